//! The library as WebAssembly, where there are no threads, no files and no clock: against the expected values of independent
//! implementations (`tests/data/README.md`), and against itself. `test.sh` runs it in Node, with and without vector instructions.
#![cfg(all(target_family = "wasm", target_os = "unknown"))]

#[path = "../../../tests/common/mod.rs"]
mod common;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use common::{difference, frame, frames, patterns, tensors_of, wave};
use hymba::lm::{HymbaLmConfig, LoadOptions};
use hymba::ndarray::{Array2, ArrayD, Axis, Dimension, s};
use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
use hymba::{Hymba, HymbaLm, HymbaOptions, Pooling, Predictor, PredictorOptions, Storage, Task, argmax};
use safetensors::SafeTensors;
use wasm_bindgen_test::wasm_bindgen_test as test;

type Expected = BTreeMap<String, ArrayD<f64>>;

/// The files of a folder of `tests/data`.
struct Case {
    name: &'static str,
    config: &'static str,
    model: &'static [u8],
    expected: &'static [u8],
    gradients: &'static [u8],
}

macro_rules! file {
    ($name:literal, $file:literal) => {
        concat!("../../../tests/data/", $name, "/", $file)
    };
}

macro_rules! case {
    ($name:literal) => {
        case!($name, include_bytes!(file!($name, "grads.safetensors")))
    };
    ($name:literal, $gradients:expr) => {
        Case {
            name: $name,
            config: include_str!(file!($name, "config.json")),
            model: include_bytes!(file!($name, "model.safetensors")),
            expected: include_bytes!(file!($name, "expected.safetensors")),
            gradients: $gradients,
        }
    };
}

const ENCODERS: [Case; 9] = [
    case!("hymba/small"),
    case!("hymba/no_input_projection"),
    case!("hymba/longer_than_window"),
    case!("hymba/ragged_lengths"),
    case!("hybrids/alternating_window_ragged"),
    case!("hybrids/attention_only"),
    case!("hybrids/mamba_only"),
    case!("hybrids/shared_no_meta"),
    case!("hybrids/shared_window_ragged"),
];

const LANGUAGE_MODELS: [Case; 6] = [
    case!("hymba_lm/a_minimal", &[]),
    case!("hymba_lm/b1_swa_kvshare", &[]),
    case!("hymba_lm/b2_window_lt_meta", &[]),
    case!("hymba_lm/c_batch3", &[]),
    case!("hymba_lm/e_bf16", &[]),
    case!("hymba_lm/f_options", &[]),
];

impl Case {
    /// From bytes, with the options in the metadata, where [`Hymba::from_bytes`] looks for them.
    fn encoder(&self) -> Hymba {
        let file = SafeTensors::deserialize(self.model).unwrap();
        let saved = format!("{{\"version\": 1, \"options\": {}}}", self.config);
        let metadata = HashMap::from([("hymba".to_string(), saved)]);
        Hymba::from_bytes(&safetensors::serialize(file.tensors(), Some(metadata)).unwrap()).unwrap()
    }
}

fn close<D: Dimension>(what: &str, got: &hymba::ndarray::Array<f32, D>, want: &ArrayD<f64>, tolerance: f64) {
    let difference = difference(got, want);
    assert!(difference <= tolerance, "{what}: {difference:e}");
}

fn lengths(expected: &Expected) -> Option<Vec<usize>> {
    expected.get("lengths").map(|lengths| lengths.iter().map(|length| *length as usize).collect())
}

#[test]
fn level() {
    let level = if cfg!(target_feature = "simd128") { "simd128" } else { "scalar" };
    assert_eq!(hymba::simd_level(), level);
    assert!(cfg!(debug_assertions));
}

#[test]
fn encoders_equal_the_expected_values() {
    for case in ENCODERS {
        let (model, expected) = (case.encoder(), tensors_of(case.expected));
        let x = frames(&expected["input"]);
        let (batch, l, _) = x.dim();
        let lengths = lengths(&expected).unwrap_or(vec![l; batch]);
        close(case.name, &model.forward_ragged(&x, &lengths).unwrap(), &expected["output"], 1e-5);
        let mut state = model.new_state(batch);
        for t in 0..l {
            let y = model.step(&frame(&x, t), &mut state).unwrap();
            for row in (0..batch).filter(|&row| t < lengths[row]) {
                let want = expected["sequence_output"].slice(s![row, t, ..]).to_owned().into_dyn();
                close(case.name, &y.row(row).to_owned(), &want, 1e-5);
            }
        }
        let mut filled = model.new_state(batch);
        let last = model.prefill(&x, &mut filled).unwrap();
        for row in (0..batch).filter(|&row| lengths[row] == l) {
            let want = expected["output"].slice(s![row, ..]).to_owned().into_dyn();
            close(case.name, &last.row(row).to_owned(), &want, 1e-5);
        }
    }
}

#[test]
fn gradients_equal_the_expected_values() {
    for case in ENCODERS {
        let (model, expected, want) = (case.encoder(), tensors_of(case.expected), tensors_of(case.gradients));
        let x = frames(&expected["input"]);
        let (_, cache) = model.forward_train(&x, lengths(&expected).as_deref(), 0).unwrap();
        let dy: Array2<f32> = expected["cotangent"].mapv(|x| x as f32).into_dimensionality().unwrap();
        let mut gradient = model.zeros_like();
        let dx = model.backward(&cache, &dy, &mut gradient).unwrap();
        let mut got = BTreeMap::from([("input".to_string(), dx.into_dyn())]);
        gradient.visit(&mut |name, array| {
            got.insert(name.into(), array.to_owned());
        });
        // as in tests/gradients.rs
        let largest = |array: &ArrayD<f64>| array.iter().fold(0f64, |m, x| m.max(x.abs()));
        let of_all = want.values().map(largest).fold(0.0, f64::max);
        assert_eq!(got.len(), want.len(), "{}", case.name);
        for (name, want) in want {
            let bound = 3e-4 * largest(&want).max(1e-3 * of_all);
            close(&format!("{} {name}", case.name), &got[&name], &want, bound);
        }
    }
}

#[test]
fn streams_of_every_pattern_equal_whole_sequences() {
    for options in patterns().into_iter().chain([HymbaOptions::new(7).hidden_size(40).num_layers(2).window_size(9)]) {
        let model = Hymba::build(options).unwrap();
        let x = wave(2, 40, model.options().embed_dim);
        let mut state = model.new_state(2);
        let mut last = Array2::zeros((0, 0));
        for t in 0..40 {
            last = model.step(&frame(&x, t), &mut state).unwrap();
        }
        close("steps", &last, &model.forward(&x).unwrap().mapv(f64::from).into_dyn(), 1e-5);
    }
}

#[test]
fn files_are_bytes() {
    let model =
        Predictor::build(HymbaOptions::new(5).hidden_size(24).num_layers(2), Task::classify(["a", "b"])).unwrap();
    let (bytes, x) = (model.to_bytes().unwrap(), wave(3, 20, 5));
    let same = Predictor::from_bytes(&bytes).unwrap();
    assert_eq!(same.predict(&x, None).unwrap(), model.predict(&x, None).unwrap());
    for cut in [0, 7, 100, bytes.len() - 1] {
        assert!(Predictor::from_bytes(&bytes[..cut]).is_err());
    }
    // what has no file system says so
    assert!(model.save("model.safetensors").is_err());
    for storage in [Storage::Bf16, Storage::F16, Storage::Q8, Storage::Q4] {
        let mut small = same.clone();
        small.store_as(storage).unwrap();
        let again = Predictor::from_bytes(&small.to_bytes().unwrap()).unwrap();
        assert_eq!(again.predict(&x, None).unwrap(), small.predict(&x, None).unwrap(), "{storage:?}");
    }
}

/// Series of which the class is a frequency.
fn tones(count: usize, first: usize) -> Dataset {
    let tone =
        |i: usize| Array2::from_shape_fn((30, 1), |(t, _)| ((0.3 + 0.5 * (i % 3) as f32) * t as f32 + i as f32).sin());
    let task = Task::classify(["slow", "middle", "fast"]);
    let all = first..first + count;
    Dataset::new(&task, all.clone().map(tone).collect(), Targets::Classes(all.map(|i| i % 3).collect())).unwrap()
}

#[test]
fn a_trainer_trains_without_a_clock() {
    let (train, test) = (tones(60, 0), tones(30, 60));
    let encoder = HymbaOptions::new(1).hidden_size(16).num_layers(1);
    let options = PredictorOptions::new(encoder).pooling(Pooling::Attention { queries: 2 });
    let predictor = Predictor::build(options, train.task().clone()).unwrap();
    let options = TrainerOptions::default().epochs(8).learning_rate(5e-3).validation_fraction(0.0);
    let trained = Trainer::new(predictor, options).unwrap().fit(&train, |_| ControlFlow::Continue(())).unwrap();
    let (x, lengths) = test.pad(&Vec::from_iter(0..30)).unwrap();
    let given = argmax(&trained.predictor.predict(&x, Some(&lengths)).unwrap());
    let right = given.iter().enumerate().filter(|(i, class)| **class == i % 3).count();
    assert!(right >= 27, "{right} of 30");
}

#[test]
fn language_models_equal_the_published_code() {
    const LOGITS: f64 = 3e-4; // of the folders' README
    for case in LANGUAGE_MODELS {
        let lm = HymbaLm::from_parts(case.config, case.model, &LoadOptions::default(), |_| {}).unwrap();
        let expected = tensors_of(case.expected);
        let ids = |name: &str| -> Array2<u32> { expected[name].mapv(|id| id as u32).into_dimensionality().unwrap() };
        let prompt = ids("input_ids");
        close(case.name, &lm.forward(&prompt).unwrap(), &expected["logits"], LOGITS);
        let mut state = lm.new_state(prompt.nrows());
        let mut logits = lm.prefill(&prompt, &mut state).unwrap();
        for (step, chosen) in ids("greedy_ids").columns().into_iter().enumerate() {
            let want = expected["uncached_step_logits"].index_axis(Axis(1), step).to_owned();
            close(&format!("{} step {step}", case.name), &logits, &want, LOGITS);
            logits = lm.step(&chosen.to_owned(), &mut state).unwrap();
        }
    }
}

#[test]
fn a_language_model_of_bytes_is_the_same() {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    let lm = HymbaLm::random(config, 0, &LoadOptions::default()).unwrap();
    let ids = Array2::from_shape_fn((1, 7), |(_, i)| 3 * i as u32);
    let again = HymbaLm::from_bytes(&lm.to_bytes().unwrap()).unwrap();
    assert_eq!(again.forward(&ids).unwrap(), lm.forward(&ids).unwrap());
}
