//! Encoders with a head: files, streams, gradients, and what they refuse.

mod common;

use std::fs;
use std::path::Path;

use common::{frame, wave};
use hymba::ndarray::{Array1, Array2, Array3, ArrayD, Axis, array, s};
use hymba::train::{Dataset, Progress, Trained, Trainer};
use hymba::{
    Differences, Error, Hymba, HymbaOptions, Normalization, Pooling, Predictor, PredictorCache, PredictorOptions,
    PredictorState, Stem, Storage, Task, argmax, softmax,
};
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

/// Of each task one predictor and of each pooling one, with all the normalizations it can have.
fn predictors() -> Vec<Predictor> {
    let build = |(task, pooling): (Task, Pooling)| normalized(PredictorOptions::new(options()).pooling(pooling), task);
    let [classify, regress, ..] = tasks();
    let pooled = [
        (classify.clone(), Pooling::Mean),
        (regress.clone(), Pooling::Max),
        (classify, Pooling::Attention { queries: 1 }),
        (regress, Pooling::Attention { queries: 3 }),
    ];
    tasks().map(|task| (task, Pooling::Last)).into_iter().chain(pooled).map(build).collect()
}

/// A predictor with all the normalizations it can have.
fn normalized(options: PredictorOptions, task: Task) -> Predictor {
    let numbers = |width: usize, from: f32| Array1::from_shape_fn(width, |i| from + 0.3 * i as f32);
    let width = options.features();
    let mut predictor = Predictor::build(options, task).unwrap();
    let input = Normalization::new(numbers(width, -0.5), numbers(width, 0.4)).unwrap();
    predictor.set_input_normalization(Some(input)).unwrap();
    if !predictor.task().is_classification() {
        let output = Normalization::new(numbers(OUTPUTS, 1.0), numbers(OUTPUTS, 0.7)).unwrap();
        predictor.set_output_normalization(Some(output)).unwrap();
    }
    predictor
}

/// Predictors that see whole sequences only.
fn readers_of_whole_sequences() -> Vec<Predictor> {
    let [classify, regress, ..] = tasks();
    let plain = || PredictorOptions::new(options());
    let stem = || Stem::new(3).widths([3, 4, 7]).channels(4);
    vec![
        normalized(plain().stem(stem()), classify.clone()),
        normalized(plain().stem(stem()).pooling(Pooling::Mean), regress.clone()),
        normalized(plain().bidirectional(true), regress.clone()),
        normalized(plain().bidirectional(true).pooling(Pooling::Attention { queries: 2 }), classify.clone()),
        normalized(plain().differences(Differences::Only), classify.clone()),
        normalized(plain().differences(Differences::Beside).normalize_series(true), regress.clone()),
        normalized(plain().normalize_series(true), classify.clone()),
        normalized(
            plain().differences(Differences::Beside).stem(stem()).bidirectional(true).pooling(Pooling::Max),
            classify,
        ),
    ]
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
    shared::<PredictorState>();
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
        let pooling = predictor.predictor_options().pooling;
        if let Pooling::Attention { queries } = pooling {
            names.push(("pooling.queries".into(), vec![queries, 12]));
        }
        names.push(("head.weight".into(), vec![OUTPUTS, pooling.width(12)]));
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
    all.extend(readers_of_whole_sequences());
    all.push(Predictor::build(options(), Task::Regress { outputs: 1 }).unwrap());
    for predictor in all {
        predictor.save(&path).unwrap();
        let loaded = Predictor::load(&path).unwrap();
        assert_eq!(parameters(&loaded), parameters(&predictor));
        assert_eq!((loaded.task(), loaded.options()), (predictor.task(), predictor.options()));
        assert_eq!(loaded.predictor_options(), predictor.predictor_options());
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
        match predictor.predictor_options().pooling {
            Pooling::Last => assert_eq!(predictor.forward_frames_train(&x, None, 0).unwrap().0, frames),
            _ => assert!(matches!(predictor.forward_frames_train(&x, None, 0), Err(Error::Option { .. }))),
        }
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
    for predictor in predictors().into_iter().chain(readers_of_whole_sequences()) {
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
        for group in ["x", "head.", "pooling.", "stem.", "reverse.", "blocks.", ""] {
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
            let what = (predictor.task(), predictor.predictor_options());
            assert!((slope - want).abs() <= 5e-3 * want.abs().max(1e-2), "{what:?} {group}: {slope} {want}");
        }
    }
}

/// Streams that join, leave, begin anew and come back from files are the streams they were.
#[test]
fn streams_of_every_pooling() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("streams");
    for predictor in predictors() {
        let pooling = predictor.predictor_options().pooling;
        let x = wave(3, 30, 5);
        let mut state = predictor.new_state(3);
        let y = predictor.prefill(&x.slice(s![.., ..17, ..]), &mut state).unwrap();
        let want = predictor.predict(&x.slice(s![.., ..17, ..]), None).unwrap();
        assert!((y - want).iter().all(|d| d.abs() <= 1e-5), "{pooling:?}");

        predictor.save_state(&state, &path).unwrap();
        let mut loaded = predictor.load_state(&path).unwrap();
        assert_eq!((loaded.lengths(), loaded.batch()), (vec![17; 3], 3));
        let mut picked = state.select(&[2, 0]).unwrap();
        picked.append(predictor.new_state(1)).unwrap();
        picked.reset(0).unwrap();
        let next = frame(&x, 17);
        let step = predictor.step(&next, &mut state).unwrap();
        assert_eq!(predictor.step(&next, &mut loaded).unwrap(), step, "{pooling:?}");
        let step_of_picked = predictor.step(&next.select(Axis(0), &[2, 0, 1]), &mut picked).unwrap();
        let alone = predictor.predict(&next.clone().insert_axis(Axis(1)), None).unwrap();
        for (got, want) in [(0, alone.row(2)), (1, step.row(0)), (2, alone.row(1))] {
            let difference = &step_of_picked.row(got) - &want;
            assert!(difference.iter().all(|d| d.abs() <= 1e-5), "{pooling:?} {got}");
        }
        assert!(matches!(state.reset(3), Err(Error::State(_))) && matches!(state.select(&[3]), Err(Error::State(_))));
        assert!(state.num_bytes() >= state.encoder().num_bytes());

        // another pooling of the same encoder, and other queries
        let other = match pooling {
            Pooling::Mean => Pooling::Max,
            _ => Pooling::Mean,
        };
        let task = Task::Regress { outputs: OUTPUTS };
        let mut other = Predictor::build(PredictorOptions::new(options()).pooling(other), task).unwrap();
        other.set_input_normalization(predictor.input_normalization().cloned()).unwrap();
        assert!(matches!(other.step(&next, &mut state), Err(Error::State(_))), "{pooling:?}");
        assert!(matches!(other.load_state(&path), Err(Error::State(_))), "{pooling:?}");
        assert!(matches!(state.append(other.new_state(1)), Err(Error::State(_))), "{pooling:?}");
        let mut changed = predictor.clone();
        changed.visit_mut(&mut |name, mut array| {
            if name == "pooling.queries" {
                array += 1.0;
            }
        });
        if pooling.width(1) > 1 {
            assert!(matches!(changed.load_state(&path), Err(Error::State(_))), "{pooling:?}");
        }
    }
}

/// Rows do not see each other nor padding; what needs frames to come is refused where there are none.
#[test]
fn whole_sequences() {
    for predictor in readers_of_whole_sequences() {
        let options = predictor.predictor_options();
        let mut x = wave(3, 20, 5);
        let lengths = [20, 1, 13];
        for (row, &length) in lengths.iter().enumerate() {
            x.slice_mut(s![row, length.., ..]).fill(f32::NAN);
        }
        let y = predictor.predict(&x, Some(&lengths)).unwrap();
        assert_eq!(predictor.forward_train(&x, Some(&lengths), 0).unwrap().0, y, "{options:?}");
        for (row, &length) in lengths.iter().enumerate() {
            let alone = predictor.predict(&x.slice(s![row..row + 1, ..length, ..]), None).unwrap();
            assert_eq!(alone.row(0), y.row(row), "{options:?}");
        }
        // every number of the last frame and of the first one counts
        for frame in [0, 12] {
            let mut other = x.clone();
            other[[2, frame, 0]] += 0.5;
            assert_ne!(predictor.predict(&other, Some(&lengths)).unwrap().row(2), y.row(2), "{options:?} {frame}");
        }
        let mut state = predictor.new_state(1);
        for error in [
            predictor.step(&Array2::zeros((1, 5)), &mut state).unwrap_err(),
            predictor.prefill(&Array3::zeros((1, 4, 5)), &mut state).unwrap_err(),
            predictor.predict_frames(&Array3::zeros((1, 4, 5))).unwrap_err(),
            predictor.forward_frames_train(&Array3::zeros((1, 4, 5)), None, 0).unwrap_err(),
            Predictor::build(options.clone(), Task::RegressFrames { outputs: 1 }).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Option { .. }), "{error}");
        }
        assert!(matches!(predictor.predict(&Array3::zeros((1, 4, 6)), None), Err(Error::Shape { .. })));
        assert!(matches!(predictor.predict(&Array3::zeros((1, 4, 5)), Some(&[5])), Err(Error::Lengths(_))));
    }
    for stem in [
        Stem::new(0),
        Stem::new(4097),
        Stem::new(3).channels(0),
        Stem::new(3).widths([]),
        Stem::new(3).widths([5000]),
        Stem::new(3).widths([1; 17]),
    ] {
        let task = Task::Regress { outputs: 1 };
        let error = Predictor::build(PredictorOptions::new(options()).stem(stem), task).unwrap_err();
        assert!(matches!(error, Error::Option { option: "stem", .. }), "{error}");
    }
}

/// Gradient × input adds up to the slope of the output when all inputs grow by the same share.
#[test]
fn saliency_adds_up() {
    for predictor in readers_of_whole_sequences().into_iter().chain(predictors()) {
        let x = wave(1, 12, 5).index_axis_move(Axis(0), 0);
        let options = predictor.predictor_options();
        let reads_frames = !options.normalize_series && options.differences != Differences::Only;
        let mean = match predictor.input_normalization() {
            Some(input) if reads_frames => input.mean().slice(s![..5]).to_owned(),
            _ => Array1::zeros(5),
        };
        let value = |x: &Array2<f32>| predictor.predict(&x.view().insert_axis(Axis(0)), None).unwrap()[[0, 1]];
        // along x − mean
        let moved = |step: f32| value(&(&x + &((&x - &mean) * step)));
        let slope = (moved(1e-3) - moved(-1e-3)) / 2e-3;
        let sum = predictor.saliency(&x, 1).unwrap().sum();
        assert!((slope - sum).abs() <= 2e-2 * slope.abs().max(0.1), "{options:?}: {slope} {sum}");
    }
    let error = predictors()[0].saliency(&Array2::zeros((3, 5)), OUTPUTS).unwrap_err();
    assert!(matches!(error, Error::Option { option: "output", .. }), "{error}");
}

/// A second encoder reads what the first would read of sequences turned round.
#[test]
fn both_directions() {
    let options = PredictorOptions::new(options()).bidirectional(true);
    let mut predictor = Predictor::build(options, Task::Regress { outputs: OUTPUTS }).unwrap();
    let mut there = std::collections::BTreeMap::new();
    predictor.visit(&mut |name, array| drop(there.insert(name.to_string(), array.to_owned())));
    predictor.visit_mut(&mut |name, mut array| match name.strip_prefix("reverse.") {
        Some(name) => array.assign(&there[name]),
        None if name == "head.weight" => array.fill(0.1),
        None => {}
    });
    let x = wave(2, 11, 5);
    let turned = x.slice(s![.., ..;-1, ..]);
    let difference = predictor.predict(&x, None).unwrap() - predictor.predict(&turned, None).unwrap();
    assert!(difference.iter().all(|d| d.abs() < 1e-5), "{difference}");
}

#[test]
fn poolings_that_are_not_usable() {
    let build = |pooling, task| Predictor::build(PredictorOptions::new(options()).pooling(pooling), task);
    for queries in [0, 65, usize::MAX] {
        let error = build(Pooling::Attention { queries }, Task::Regress { outputs: 1 }).unwrap_err();
        assert!(error.to_string().contains("1 to 64 queries"), "{error}");
    }
    for task in [Task::classify_frames(["a", "b"]), Task::RegressFrames { outputs: 1 }] {
        let error = build(Pooling::Mean, task).unwrap_err();
        assert!(error.to_string().contains("Pooling::Last"), "{error}");
    }
}

#[test]
fn gradients_add_up() {
    for predictor in predictors().into_iter().chain(readers_of_whole_sequences()) {
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
        (Task::classify([""; 0]), "at least 2 classes"),
        (Task::classify(["one"]), "at least 2 classes"),
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
    assert_eq!(argmax(&logits), array![0, 1, 2]);
    let probabilities = softmax(&logits);
    assert_eq!(probabilities.slice(s![..2, ..]), array![[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]);
    assert!(probabilities.row(2).iter().all(|p| p.is_nan()));
    let frames = Array3::<f32>::zeros((2, 4, 0));
    assert_eq!((argmax(&frames).dim(), softmax(&frames).dim()), ((2, 4), (2, 4, 0)));
    let scalar = ArrayD::<f32>::zeros(Vec::new());
    assert_eq!((argmax(&scalar).len(), softmax(&scalar).len()), (1, 1));
    // any memory order
    assert_eq!(argmax(&array![[1.0, 0.0], [2.0, 3.0]].reversed_axes()), array![1, 1]);
    assert_eq!(softmax(&array![[0.0, 5.0], [0.0, 5.0]].reversed_axes()), array![[0.5, 0.5], [0.5, 0.5]]);
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
        ("one class", task(json!({"classify": {"labels": ["a"]}})), "at least 2 classes"),
        ("one label twice", task(json!({"classify": {"labels": ["a", "a", "b"]}})), "\"a\" twice"),
        ("many labels", task(json!({"classify": {"labels": many}})), "at most 16384 labels"),
        ("no outputs", task(json!({"regress": {"outputs": 0}})), "outputs = 0"),
        ("negative outputs", task(json!({"regress": {"outputs": -1}})), "invalid value"),
        ("outputs past the file", task(json!({"regress": {"outputs": 1_000_000}})), "do not fit in a file"),
        ("outputs without end", task(json!({"regress": {"outputs": u64::MAX}})), "do not fit in a file"),
        ("an unknown pooling", changed(&classifier, |entry, _| entry["pooling"] = json!("median")), "unknown variant"),
        (
            "many queries",
            changed(&classifier, |entry, _| entry["pooling"] = json!({"attention": {"queries": u64::MAX}})),
            "do not fit in a file",
        ),
        (
            "queries that are not there",
            changed(&classifier, |entry, _| entry["pooling"] = json!({"attention": {"queries": 2}})),
            "\"pooling.queries\": missing, expected shape [2, 12]",
        ),
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

/// What another predictor's forward pass left is refused, whatever its pooling.
#[test]
fn caches_of_other_predictors_are_refused() {
    let build = |pooling| {
        let encoder = HymbaOptions::new(3).hidden_size(16).num_heads(2).num_layers(1);
        Predictor::build(PredictorOptions::new(encoder).pooling(pooling), Task::classify(["a", "b"])).unwrap()
    };
    let (mean, attention) = (build(Pooling::Mean), build(Pooling::Attention { queries: 1 }));
    let x = Array3::ones((2, 5, 3));
    let (y, cache) = attention.forward_train(&x, None, 0).unwrap();
    let error = mean.backward(&cache, &Array2::ones(y.dim()), &mut mean.zeros_like()).unwrap_err();
    assert!(matches!(error, Error::State(_)), "{error}");
}

/// Both encoders of a bidirectional predictor are stored narrow, and come back from a file.
#[test]
fn narrow_encoders_of_both_directions_come_back() {
    let encoder = HymbaOptions::new(6).hidden_size(128).num_layers(2);
    let options = PredictorOptions::new(encoder).bidirectional(true);
    let mut predictor = Predictor::build(options, Task::classify(["a", "b"])).unwrap();
    let x = Array3::from_shape_fn((2, 9, 6), |(b, t, i)| ((b + 2 * t + 3 * i) as f32 * 0.3).sin());
    for storage in [Storage::Bf16, Storage::Q8, Storage::Q4] {
        predictor.store_as(storage).unwrap();
        let back = Predictor::from_bytes(&predictor.to_bytes().unwrap()).unwrap();
        assert_eq!(back.predict(&x, None).unwrap(), predictor.predict(&x, None).unwrap(), "{storage:?}");
    }
}
