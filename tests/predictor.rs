//! Encoders with a head: files, streams, gradients, and what they refuse.

mod common;

use std::fs;
use std::path::Path;

use common::{frame, wave};
use hymba::ndarray::{Array1, Array2, Array3, ArrayD, Axis, array, s};
use hymba::train::{Dataset, Progress, Trained, Trainer};
use hymba::{Error, Hymba, HymbaOptions, Normalization, Predictor, PredictorCache, Task, argmax, softmax};
use serde_json::{Value, json};

const OUTPUTS: usize = 3;

fn tasks() -> [Task; 4] {
    let labels = ["one", "two", "ünïcode \"three\"\n"];
    [
        Task::classify(labels),
        Task::Regress { outputs: OUTPUTS },
        Task::classify_frames(labels),
        Task::RegressFrames { outputs: OUTPUTS },
    ]
}

fn options() -> HymbaOptions {
    HymbaOptions::new(5).hidden_size(12).num_heads(3).num_layers(2).state_size(4).window_size(6).seed(2)
}

/// Of each task one predictor, with all the normalizations it can have.
fn predictors() -> Vec<Predictor> {
    let numbers = |width: usize, from: f32| Array1::from_shape_fn(width, |i| from + 0.3 * i as f32);
    let build = |task: Task| {
        let mut predictor = Predictor::build(options(), task).unwrap();
        let input = Normalization::new(numbers(5, -0.5), numbers(5, 0.4)).unwrap();
        predictor.set_input_normalization(Some(input)).unwrap();
        if !predictor.task().is_classification() {
            let output = Normalization::new(numbers(OUTPUTS, 1.0), numbers(OUTPUTS, 0.7)).unwrap();
            predictor.set_output_normalization(Some(output)).unwrap();
        }
        predictor
    };
    tasks().map(build).into()
}

fn parameters(predictor: &Predictor) -> Vec<(String, ArrayD<f32>)> {
    let mut all = Vec::new();
    predictor.visit(&mut |name, array| all.push((name.to_string(), array.to_owned())));
    all
}

#[test]
fn types_cross_threads() {
    fn shared<T: Send + Sync + std::fmt::Debug + 'static>() {}
    shared::<Predictor>();
    shared::<PredictorCache>();
    shared::<Normalization>();
    shared::<Dataset>();
    shared::<Trainer>();
    shared::<Trained>();
    shared::<Progress>();
}

#[test]
fn parameters_are_those_of_the_encoder_and_the_head() {
    for predictor in predictors() {
        let mut names = Vec::new();
        predictor.encoder().visit(&mut |name, array| names.push((name.to_string(), array.shape().to_vec())));
        names.push(("head.weight".into(), vec![OUTPUTS, 12]));
        names.push(("head.bias".into(), vec![OUTPUTS]));
        let all = parameters(&predictor);
        assert!(all.iter().map(|(name, array)| (name.clone(), array.shape().to_vec())).eq(names));
        assert_eq!(predictor.num_parameters(), all.iter().map(|(_, array)| array.len()).sum::<usize>());
        assert!(predictor.summary().contains("head: 3 "), "{}", predictor.summary());
        assert!(format!("{predictor:?}").len() < 700);
        assert!(predictor.zeros_like().num_parameters() == predictor.num_parameters());
    }
}

#[test]
fn a_saved_predictor_comes_back_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (path, again) = (folder.path().join("predictor"), folder.path().join("again"));
    let mut all = predictors();
    all.push(Predictor::build(options(), Task::Regress { outputs: 1 }).unwrap());
    for predictor in all {
        predictor.save(&path).unwrap();
        let loaded = Predictor::load(&path).unwrap();
        assert_eq!(parameters(&loaded), parameters(&predictor));
        assert_eq!((loaded.task(), loaded.options()), (predictor.task(), predictor.options()));
        assert_eq!(loaded.input_normalization(), predictor.input_normalization());
        assert_eq!(loaded.output_normalization(), predictor.output_normalization());
        let x = wave(2, 9, 5);
        assert_eq!(loaded.predict(&x, None).unwrap(), predictor.predict(&x, None).unwrap());
        loaded.save(&again).unwrap();
        assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap());
    }
}

#[test]
fn every_way_to_predict_gives_the_same() {
    for predictor in predictors() {
        let x = wave(3, 20, 5);
        let frames = predictor.predict_frames(&x).unwrap();
        let mut state = predictor.new_state(3);
        for t in 0..20 {
            let step = predictor.step(&frame(&x, t), &mut state).unwrap();
            let difference = (&step - &frames.index_axis(Axis(1), t)).mapv(f32::abs);
            assert!(difference.iter().all(|d| *d <= 1e-5), "frame {t}: {difference}");
        }
        assert_eq!(predictor.predict(&x, None).unwrap(), frames.index_axis(Axis(1), 19));

        let mut padded = x.clone();
        let lengths = [20, 1, 13];
        for (row, &length) in lengths.iter().enumerate() {
            padded.slice_mut(s![row, length.., ..]).fill(f32::NAN);
        }
        let last = predictor.predict(&padded, Some(&lengths)).unwrap();
        for (row, &length) in lengths.iter().enumerate() {
            assert_eq!(last.row(row), frames.slice(s![row, length - 1, ..]));
        }
        assert_eq!(predictor.forward_train(&padded, Some(&lengths), 0).unwrap().0, last);
        assert_eq!(predictor.forward_frames_train(&x, None, 0).unwrap().0, frames);
    }
}

#[test]
fn normalization_is_arithmetic_on_inputs_and_outputs() {
    for predictor in predictors() {
        let mut plain = predictor.clone();
        plain.set_input_normalization(None).unwrap();
        plain.set_output_normalization(None).unwrap();
        let x = wave(2, 9, 5);
        let input = predictor.input_normalization().unwrap();
        let mut want = plain.predict(&((&x - input.mean()) / input.scale()), None).unwrap();
        if let Some(output) = predictor.output_normalization() {
            want = want * output.scale() + output.mean();
        }
        let got = predictor.predict(&x, None).unwrap();
        assert!((got - want).iter().all(|d| d.abs() < 1e-5));
    }
}

/// Σ w ⊙ outputs along a direction of all inputs and parameters, against the gradient; and what padding gets.
#[test]
fn directional_differences() {
    for predictor in predictors() {
        let (x, lengths) = (wave(2, 17, 5), [17, 8]);
        let frame_wise = predictor.task().is_frame_wise();
        // of frames past the end, too: they are not to count
        let weights = wave(2, 17, OUTPUTS);
        let value = |predictor: &Predictor, x: &Array3<f32>| -> f64 {
            let product = |y: f32, w: f32| f64::from(y) * f64::from(w);
            if !frame_wise {
                let (y, _) = predictor.forward_train(x, Some(&lengths), 0).unwrap();
                return y.indexed_iter().map(|((row, i), y)| product(*y, weights[[row, 0, i]])).sum();
            }
            let (y, _) = predictor.forward_frames_train(x, Some(&lengths), 0).unwrap();
            let counted = y.indexed_iter().filter(|((row, t, _), _)| *t < lengths[*row]);
            counted.map(|(place, y)| product(*y, weights[place])).sum()
        };
        let mut grads = predictor.zeros_like();
        let dx = if frame_wise {
            let (_, cache) = predictor.forward_frames_train(&x, Some(&lengths), 0).unwrap();
            predictor.backward_frames(&cache, &weights, &mut grads).unwrap()
        } else {
            let (_, cache) = predictor.forward_train(&x, Some(&lengths), 0).unwrap();
            predictor.backward(&cache, &weights.index_axis(Axis(1), 0), &mut grads).unwrap()
        };
        assert!(dx.slice(s![1, 8.., ..]).iter().all(|dx| *dx == 0.0), "padding");

        // each of the groups alone: the head's part is small beside the encoder's
        for group in ["x", "head.", "blocks.", ""] {
            let direction = |name: &str, i: usize| match name.starts_with(group) {
                true => ((i * 7919 % 101) as f32 / 50.0 - 1.0) * 1e-3,
                false => 0.0,
            };
            let moved = |sign: f32| {
                let (mut predictor, mut x) = (predictor.clone(), x.clone());
                predictor.visit_mut(&mut |name, mut array| {
                    array.iter_mut().enumerate().for_each(|(i, p)| *p += sign * direction(name, i));
                });
                x.iter_mut().enumerate().for_each(|(i, x)| *x += sign * direction("x", i));
                value(&predictor, &x)
            };
            let slope = moved(1.0) - moved(-1.0);
            let mut want = 0.0;
            let mut add = |name: &str, i: usize, g: f32| want += 2.0 * f64::from(g) * f64::from(direction(name, i));
            dx.iter().enumerate().for_each(|(i, &g)| add("x", i, g));
            grads.visit(&mut |name, array| array.iter().enumerate().for_each(|(i, &g)| add(name, i, g)));
            let task = predictor.task();
            assert!((slope - want).abs() <= 5e-3 * want.abs().max(1e-2), "{task:?} {group}: {slope} {want}");
        }
    }
}

#[test]
fn gradients_add_up() {
    for predictor in predictors() {
        let (y, cache) = predictor.forward_train(&wave(2, 9, 5), None, 0).unwrap();
        let (mut once, mut twice) = (predictor.zeros_like(), predictor.zeros_like());
        predictor.backward(&cache, &y, &mut once).unwrap();
        predictor.backward(&cache, &y, &mut twice).unwrap();
        predictor.backward(&cache, &y, &mut twice).unwrap();
        for ((name, once), (_, twice)) in parameters(&once).iter().zip(parameters(&twice)) {
            assert!(
                (once * 2.0 - &twice).iter().all(|d| d.abs() <= 1e-5 * twice.iter().fold(1.0, |a, b| b.abs().max(a))),
                "{name}"
            );
        }
    }
}

#[test]
fn what_does_not_go_together() {
    let mut predictor = predictors().remove(0);
    let x = wave(2, 9, 5);
    for error in [
        predictor.predict(&wave(2, 9, 4), None).unwrap_err(),
        predictor.predict(&wave(2, 9, 6), None).unwrap_err(),
        predictor.predict_frames(&Array3::zeros((2, 0, 5))).unwrap_err(),
        predictor.step(&Array2::zeros((1, 6)), &mut predictor.new_state(1)).unwrap_err(),
        predictor.set_input_normalization(Some(Normalization::new(array![0.0], array![1.0]).unwrap())).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Shape { .. }), "{error}");
    }
    assert!(matches!(predictor.predict(&x, Some(&[9])), Err(Error::Lengths(_))));
    assert!(matches!(predictor.forward_frames_train(&x, Some(&[9, 0]), 0), Err(Error::Lengths(_))));
    let logits = Normalization::new(array![0.0, 0.0, 0.0], array![1.0, 1.0, 1.0]).unwrap();
    let error = predictor.set_output_normalization(Some(logits)).unwrap_err();
    assert!(error.to_string().contains("logits have no unit"), "{error}");

    let (y, cache) = predictor.forward_train(&x, None, 0).unwrap();
    let (frames, _) = predictor.forward_frames_train(&x, None, 0).unwrap();
    let mut grads = predictor.zeros_like();
    assert!(matches!(
        predictor.backward(&cache, &y.slice(s![.., ..2]).to_owned(), &mut grads),
        Err(Error::Shape { .. })
    ));
    assert!(matches!(predictor.backward_frames(&cache, &frames, &mut grads), Err(Error::Shape { .. })));
    for mut other in [
        Predictor::build(options(), Task::Regress { outputs: 2 }).unwrap(),
        Predictor::build(options().num_layers(1), predictor.task().clone()).unwrap(),
        Predictor::build(options().hidden_size(24), predictor.task().clone()).unwrap(),
    ] {
        assert!(matches!(predictor.backward(&cache, &y, &mut other), Err(Error::State(_))));
    }
    let mut state = predictor.new_state(1);
    let other = Normalization::new(array![0.5, 0.5, 0.5, 0.5, 0.5], array![1.0, 1.0, 1.0, 1.0, 1.0]).unwrap();
    predictor.set_input_normalization(Some(other)).unwrap();
    assert!(matches!(predictor.step(&Array2::zeros((1, 5)), &mut state), Err(Error::State(_))));
    let error = predictor.backward(&cache, &y, &mut grads).unwrap_err();
    assert!(matches!(error, Error::State(_)), "{error}");
    assert!(parameters(&grads).iter().all(|(_, g)| g.iter().all(|g| *g == 0.0)), "nothing was added");
}

#[test]
fn tasks_that_are_not_usable() {
    let many = (0..Task::MAX_LABELS + 1).map(|i| i.to_string());
    for (task, says) in [
        (Task::classify([""; 0]), "2 classes at least"),
        (Task::classify(["one"]), "2 classes at least"),
        (Task::classify_frames(["one", "two", "one"]), "\"one\" twice"),
        (Task::classify(many), "at most 16384 labels"),
        (Task::classify(["a".repeat(1 << 18), "b".to_string()]), "at most 16384 labels of 262144 bytes"),
        (Task::Regress { outputs: 0 }, "outputs = 0"),
        (Task::RegressFrames { outputs: usize::MAX }, "more than 2147483648 parameters"),
        (Task::Regress { outputs: 1 << 31 }, "more than 2147483648 parameters"),
    ] {
        let error = Predictor::build(options(), task).unwrap_err();
        assert!(matches!(error, Error::Option { .. }) && error.to_string().contains(says), "{says}: {error}");
    }
    assert!(Predictor::build(options().num_heads(5), Task::Regress { outputs: 1 }).is_err());
}

#[test]
fn a_head_on_a_trained_encoder() {
    let encoder = Hymba::build(options()).unwrap();
    let want = encoder.forward(&wave(2, 9, 5)).unwrap();
    let predictor = Predictor::with_encoder(encoder, Task::Regress { outputs: 2 }).unwrap();
    assert_eq!(predictor.predict(&wave(2, 9, 5), None).unwrap().dim(), (2, 2));
    assert_eq!(predictor.into_encoder().forward(&wave(2, 9, 5)).unwrap(), want);
}

#[test]
fn logits_of_any_size() {
    let logits = array![[1e30, -1e30, 0.0], [f32::NEG_INFINITY, 3.0, 3.0], [f32::NAN, 1.0, 2.0]];
    assert_eq!(argmax(&logits).unwrap(), array![0, 1, 2]);
    let probabilities = softmax(&logits).unwrap();
    assert_eq!(probabilities.slice(s![..2, ..]), array![[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]);
    assert!(probabilities.row(2).iter().all(|p| p.is_nan()));
    let frames = Array3::<f32>::zeros((2, 4, 0));
    assert_eq!((argmax(&frames).unwrap().dim(), softmax(&frames).unwrap().dim()), ((2, 4), (2, 4, 0)));
    let scalar = ArrayD::<f32>::zeros(Vec::new());
    assert_eq!((argmax(&scalar).unwrap().len(), softmax(&scalar).unwrap().len()), (1, 1));
    // any memory order
    assert_eq!(argmax(&array![[1.0, 0.0], [2.0, 3.0]].reversed_axes()).unwrap(), array![1, 1]);
    assert_eq!(softmax(&array![[0.0, 5.0], [0.0, 5.0]].reversed_axes()).unwrap(), array![[0.5, 0.5], [0.5, 0.5]]);
}

/// A file with its metadata entry and its tensors changed: (name, shape, numbers).
fn changed(file: &Path, change: impl FnOnce(&mut Value, &mut Vec<(String, Vec<usize>, Vec<f32>)>)) -> Vec<u8> {
    let bytes = fs::read(file).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut entry = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["hymba"]).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |data: &[u8]| data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let mut tensors: Vec<_> =
        tensors.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec(), numbers(view.data()))).collect();
    change(&mut entry, &mut tensors);
    let tensors: Vec<_> = tensors
        .into_iter()
        .map(|(name, shape, numbers)| (name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()))
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize(views, Some([("hymba".to_string(), entry.to_string())].into())).unwrap()
}

#[test]
fn bad_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("predictor");
    let [classifier, regressor] = [0, 1].map(|i| {
        let path = folder.path().join(i.to_string());
        predictors()[i].save(&path).unwrap();
        path
    });
    let set = |name: &'static str, to: f32| {
        move |_: &mut Value, tensors: &mut Vec<(String, Vec<usize>, Vec<f32>)>| {
            tensors.iter_mut().find(|(found, ..)| found == name).unwrap().2[1] = to;
        }
    };
    let without = |name: &str| changed(&classifier, |_, tensors| tensors.retain(|(found, ..)| found != name));
    let task = |task: Value| changed(&classifier, |entry, _| entry["task"] = task);
    let many: Vec<String> = (0..100_000).map(|_| String::new()).collect();
    let table = [
        ("no head", without("head.bias"), "\"head.bias\": missing, expected shape [3]"),
        ("half a normalization", without("input_scale"), "\"input_scale\": missing, expected shape [5]"),
        ("scale of 0", changed(&classifier, set("input_scale", 0.0)), "input normalization"),
        ("scale of NaN", changed(&classifier, set("input_scale", f32::NAN)), "input normalization"),
        ("negative scale", changed(&regressor, set("output_scale", -1.0)), "output normalization"),
        ("infinite mean", changed(&regressor, set("output_mean", f32::INFINITY)), "output normalization"),
        ("another width", changed(&regressor, |_, t| t.iter_mut().for_each(halve)), "\"input_mean\": has shape [4]"),
        (
            "no task",
            changed(&classifier, |entry, _| drop(entry.as_object_mut().unwrap().remove("task"))),
            "Hymba::load",
        ),
        ("an unknown task", task(json!({"translate": {}})), "unknown variant"),
        ("an unknown field", task(json!({"regress": {"outputs": 3, "size": 1}})), "unknown field"),
        (
            "fewer classes",
            task(json!({"classify": {"labels": ["a", "b"]}})),
            "\"head.weight\": has shape [3, 12], expected [2",
        ),
        ("one class", task(json!({"classify": {"labels": ["a"]}})), "2 classes at least"),
        ("one label twice", task(json!({"classify": {"labels": ["a", "a", "b"]}})), "\"a\" twice"),
        ("many labels", task(json!({"classify": {"labels": many}})), "at most 16384 labels"),
        ("no outputs", task(json!({"regress": {"outputs": 0}})), "outputs = 0"),
        ("negative outputs", task(json!({"regress": {"outputs": -1}})), "invalid value"),
        ("outputs past the file", task(json!({"regress": {"outputs": 1_000_000}})), "do not fit in a file"),
        ("outputs without end", task(json!({"regress": {"outputs": u64::MAX}})), "do not fit in a file"),
        ("another version", changed(&classifier, |entry, _| entry["version"] = json!(9)), "version 9"),
        ("no options", changed(&classifier, |entry, _| *entry = json!({"version": 1})), "missing field `options`"),
        (
            "outputs of a classifier scaled",
            changed(&classifier, |_, t| t.push(("output_mean".into(), vec![3], vec![0.0; 3]))),
            "\"output_mean\": unexpected",
        ),
    ];
    for (name, bytes, says) in table {
        fs::write(&path, bytes).unwrap();
        match Predictor::load(&path) {
            Ok(_) => panic!("{name}: was accepted"),
            Err(error) => assert!(error.to_string().contains(says), "{name}: {error}"),
        }
    }
    assert!(Hymba::load(&classifier).unwrap_err().to_string().contains("Predictor::load"));

    let file = fs::OpenOptions::new().write(true).open(&classifier).unwrap();
    for length in (0..fs::metadata(&classifier).unwrap().len()).rev().step_by(97) {
        file.set_len(length).unwrap();
        assert!(Predictor::load(&classifier).is_err(), "cut to {length} bytes");
    }
}

/// Cuts normalizations short.
fn halve((name, shape, numbers): &mut (String, Vec<usize>, Vec<f32>)) {
    if name.starts_with("input_") {
        *shape = vec![4];
        numbers.truncate(4);
    }
}
