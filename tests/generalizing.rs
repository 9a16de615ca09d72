//! Training by augmentations and moving averages: the same end by any way; and what is recommended for a data set.

use std::ops::ControlFlow;

use hymba::ndarray::{Array2, ArrayD};
use hymba::train::{AdamWOptions, Augmentation, Dataset, Targets, Trained, Trainer, TrainerOptions};
use hymba::{Error, HymbaOptions, Pooling, Predictor, PredictorOptions, Stem, Task};

fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn parameters(predictor: &Predictor) -> Vec<(String, ArrayD<f32>)> {
    let mut all = Vec::new();
    predictor.visit(&mut |name, array| all.push((name.to_string(), array.to_owned())));
    all
}

/// Waves of two frequencies.
fn waves(count: usize, length: usize) -> Dataset {
    let wave = |i: usize| {
        let (phase, frequency) = (1.7 * i as f32, if i.is_multiple_of(2) { 0.3 } else { 1.7 });
        Array2::from_shape_fn((length + i % 5, 1), |(t, _)| (frequency * t as f32 + phase).sin())
    };
    let classes = (0..count).map(|i| i % 2).collect();
    Dataset::new(&Task::classify(["slow", "fast"]), (0..count).map(wave).collect(), Targets::Classes(classes)).unwrap()
}

fn everything() -> TrainerOptions {
    TrainerOptions::default().epochs(4).learning_rate(1e-2).validation_fraction(0.2).average(0.9).augmentations([
        Augmentation::TimeWarp { strength: 0.2 },
        Augmentation::Slice { fraction: 0.8 },
        Augmentation::Scale { deviation: 0.1 },
        Augmentation::Jitter { deviation: 0.1 },
        Augmentation::Mixup { alpha: 0.5 },
    ])
}

fn trainer(data: &Dataset, options: TrainerOptions) -> Trainer {
    let encoder = HymbaOptions::recommended(1).hidden_size(8).num_heads(2).num_layers(1).state_size(2);
    let model =
        PredictorOptions::new(encoder).stem(Stem::new(2).channels(4)).pooling(Pooling::Mean).bidirectional(true);
    Trainer::new(Predictor::build(model, data.task().clone()).unwrap(), options).unwrap()
}

fn same(one: &Trained, other: &Trained) {
    assert_eq!((one.best_epoch, &one.history), (other.best_epoch, &other.history));
    assert_eq!(parameters(&one.predictor), parameters(&other.predictor));
}

#[test]
fn resumed_at_any_epoch() {
    let data = waves(30, 20);
    let want = trainer(&data, everything()).fit(&data, go_on).unwrap();
    for stop in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        let stopped = trainer(&data, everything().checkpoint(folder.path())).fit(&data, |progress| {
            if progress.finished.is_some() && progress.epoch == stop { ControlFlow::Break(()) } else { go_on(progress) }
        });
        assert_eq!(stopped.unwrap().history.len(), stop);
        same(&Trainer::resume(folder.path()).unwrap().fit(&data, go_on).unwrap(), &want);
        same(&Trainer::resume(folder.path()).unwrap().fit(&data, |_| panic!("it is done")).unwrap(), &want);
    }
}

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    let data = waves(30, 40);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| trainer(&data, everything().epochs(2)).fit(&data, go_on).unwrap())
    };
    let one = run(1);
    same(&run(3), &one);
}

#[test]
fn the_average_is_another_model_and_augmentations_change_what_is_seen() {
    let data = waves(20, 20);
    let plain = TrainerOptions::default().epochs(2).learning_rate(1e-2);
    let run = |options: TrainerOptions| trainer(&data, options).fit(&data, go_on).unwrap();
    let (last, averaged) = (run(plain.clone()), run(plain.clone().average(0.9)));
    // the same steps, and another result
    assert_eq!(last.history, averaged.history);
    assert_ne!(parameters(&last.predictor), parameters(&averaged.predictor));
    let jittered = run(plain.augmentations([Augmentation::Jitter { deviation: 0.1 }]));
    assert_ne!(last.history, jittered.history);
}

#[test]
fn what_cannot_be_used() {
    let all = |augmentation: Augmentation| TrainerOptions::default().augmentations([augmentation]);
    for options in [
        all(Augmentation::Jitter { deviation: 0.0 }),
        all(Augmentation::Scale { deviation: f32::NAN }),
        all(Augmentation::TimeWarp { strength: 1.1 }),
        all(Augmentation::Slice { fraction: 1.0 }),
        all(Augmentation::Mixup { alpha: -1.0 }),
        TrainerOptions::default().augmentations([Augmentation::Jitter { deviation: 0.1 }; 17]),
        TrainerOptions::default().average(1.0),
        TrainerOptions::default().average(0.0),
        TrainerOptions::default().average(f32::NAN),
    ] {
        assert!(matches!(options.validate(), Err(Error::Option { .. })), "{options:?}");
    }
    let frames = Targets::FrameClasses(vec![vec![0, 1, 1]]);
    let data = Dataset::new(&Task::classify_frames(["a", "b"]), vec![Array2::ones((3, 1))], frames).unwrap();
    let model = HymbaOptions::new(1).hidden_size(8).num_layers(1);
    let fit = |augmentation| {
        let predictor = Predictor::build(model.clone(), data.task().clone()).unwrap();
        Trainer::new(predictor, all(augmentation).epochs(1)).unwrap().fit(&data, go_on)
    };
    assert!(matches!(fit(Augmentation::Slice { fraction: 0.5 }), Err(Error::Option { .. })));
    assert!(fit(Augmentation::Jitter { deviation: 0.1 }).is_ok());
}

/// An old `training.json` has neither augmentations nor an average, and two options of the optimiser outside.
#[test]
fn options_of_old_files() {
    let mut json = serde_json::to_value(TrainerOptions::default()).unwrap();
    for new in ["augmentations", "average", "adamw"] {
        json.as_object_mut().unwrap().remove(new).unwrap();
    }
    json["weight_decay"] = 0.03.into();
    json["clip_norm"] = serde_json::Value::Null;
    let want = TrainerOptions::default().weight_decay(0.03).clip_norm(None);
    assert_eq!(serde_json::from_value::<TrainerOptions>(json.clone()).unwrap(), want);
    assert_eq!(serde_json::from_value::<TrainerOptions>(serde_json::to_value(&want).unwrap()).unwrap(), want);
    json["colour"] = 1.into();
    assert!(serde_json::from_value::<TrainerOptions>(json).is_err());
}

/// What is frozen stays, to the bit, decay or not; the rest learns.
#[test]
fn frozen_parameters() {
    let data = waves(20, 20);
    let adamw = AdamWOptions::default().weight_decay(0.1).rate_for("*", 0.0).rate_for("head.*", 0.5);
    let trainer = trainer(&data, TrainerOptions::default().epochs(2).adamw(adamw));
    let mut before = Vec::new();
    let trained = trainer
        .fit_with(&data, None, |progress, predictor| {
            if before.is_empty() {
                before = parameters(predictor);
            }
            go_on(progress)
        })
        .unwrap();
    for ((name, before), (_, after)) in before.iter().zip(parameters(&trained.predictor)) {
        assert_eq!(name.starts_with("head."), *before != after, "{name}");
    }
    for factor in [-1.0, f32::NAN, 1001.0] {
        assert!(AdamWOptions::default().rate_for("*", factor).validate().is_err());
    }
}

#[test]
fn recommended() {
    for (count, length) in [(2, 1), (10, 7), (300, 60), (40, 427), (4, 18_000), (2, 600_000)] {
        let data = waves(count, length);
        let model = PredictorOptions::recommended_for(&data);
        let tokens = model.stem.as_ref().unwrap().tokens(data.longest());
        assert!(tokens <= 64.max(data.longest().div_ceil(Stem::MAX_SIZE)), "{tokens}");
        assert!(model.encoder.window_size <= 256 && model.encoder.window_size >= tokens.min(256));
        let training = TrainerOptions::recommended_for(&data);
        training.validate().unwrap();
        Predictor::build(model, data.task().clone()).unwrap();
    }
    // of every frame: nothing around the encoder
    let frames = Targets::FrameValues(vec![Array2::zeros((900, 1))]);
    let data = Dataset::new(&Task::RegressFrames { outputs: 1 }, vec![Array2::ones((900, 1))], frames).unwrap();
    let model = PredictorOptions::recommended_for(&data);
    assert_eq!((model.stem.clone(), model.encoder.window_size), (None, 256));
    Predictor::build(model, data.task().clone()).unwrap();
}
