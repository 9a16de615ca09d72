//! The trainer: it learns each task, comes to the same end by any way, and stops with an error where it cannot go on.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::ndarray::{Array1, Array2, ArrayD, Axis, array, s};
use hymba::train::{Dataset, Decay, RegressionLoss, Stopped, Targets, Trained, Trainer, TrainerOptions, evaluate};
use hymba::{Error, HymbaOptions, Predictor, Task};

fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// With dropout.
fn encoder(embed_dim: usize) -> HymbaOptions {
    let small = HymbaOptions::recommended(embed_dim).hidden_size(8).num_heads(2).num_layers(2);
    small.state_size(2).num_meta_tokens(2).window_size(12)
}

fn parameters(predictor: &Predictor) -> Vec<(String, ArrayD<f32>)> {
    let mut all = Vec::new();
    predictor.visit(&mut |name, array| all.push((name.to_string(), array.to_owned())));
    all
}

/// Waves of two frequencies, any phase and 14 to 29 frames, in a unit of their own; the second feature is always the same.
fn waves(count: usize) -> Dataset {
    let wave = |i: usize| {
        let (phase, frequency) = (1.7 * i as f32, if i.is_multiple_of(2) { 0.3 } else { 1.7 });
        Array2::from_shape_fn((14 + i * 7 % 16, 2), |(t, feature)| match feature {
            0 => 300.0 + 40.0 * (frequency * t as f32 + phase).sin(),
            _ => 7.0,
        })
    };
    let classes = (0..count).map(|i| i % 2).collect();
    Dataset::new(&Task::classify(["slow", "fast"]), (0..count).map(wave).collect(), Targets::Classes(classes)).unwrap()
}

/// A trainer of a small model for `data`.
fn trainer(data: &Dataset, options: TrainerOptions) -> Trainer {
    let predictor = Predictor::build(encoder(data.width()), data.task().clone()).unwrap();
    Trainer::new(predictor, options).unwrap()
}

/// As [`trainer`], for a model that is large enough to learn.
fn learner(data: &Dataset, options: TrainerOptions) -> Trainer {
    let encoder = encoder(data.width()).hidden_size(16).state_size(4).num_layers(1);
    Trainer::new(Predictor::build(encoder, data.task().clone()).unwrap(), options).unwrap()
}

fn options() -> TrainerOptions {
    TrainerOptions::default().epochs(6).learning_rate(1e-2)
}

fn same(one: &Trained, other: &Trained) {
    assert_eq!((one.best_epoch, one.stopped), (other.best_epoch, other.stopped));
    assert_eq!(one.history, other.history);
    assert_eq!(parameters(&one.predictor), parameters(&other.predictor));
    assert_eq!(one.predictor.input_normalization(), other.predictor.input_normalization());
}

// ---- it learns ----

#[test]
fn learns_which_of_two_frequencies() {
    let data = waves(100);
    let trained = learner(&data, options().epochs(14).validation_fraction(0.25)).fit(&data, go_on).unwrap();
    let validation = trained.history[trained.best_epoch - 1].validation.unwrap();
    assert!(validation.accuracy.unwrap() >= 0.95, "{:?}", trained.history);
    assert_eq!(trained.stopped, Stopped::Finished);
    let best = trained.history.iter().map(|epoch| epoch.validation.unwrap().loss).fold(f32::INFINITY, f32::min);
    assert_eq!(validation.loss, best);

    // what is returned is the predictor of that epoch, for frames in the units of the data
    let (_, part) = data.split(0.25, 0).unwrap();
    let found = evaluate(&trained.predictor, &part, &options()).unwrap();
    assert!((found.loss - validation.loss).abs() < 1e-6);
    let input = trained.predictor.input_normalization().unwrap();
    assert!((input.mean() - &array![300.0, 7.0]).iter().all(|d| d.abs() < 5.0), "{input:?}");
    assert_eq!(input.scale()[1], 1.0);
}

#[test]
fn learns_a_number_of_each_series() {
    // the mean of the second half, in a unit far from that of the input
    let series: Vec<_> = (0..120)
        .map(|i| {
            Array2::from_shape_fn((8 + i % 5, 1), |(t, _)| {
                (0.7 * i as f32).sin() + 0.3 * (t as f32 * 1.1 + i as f32).cos()
            })
        })
        .collect();
    let mean = |x: &Array2<f32>| 5e4 + 1e3 * x.slice(s![x.nrows() / 2.., 0]).mean().unwrap();
    let targets = Array1::from_iter(series.iter().map(mean)).insert_axis(Axis(1));
    let data = Dataset::new(&Task::Regress { outputs: 1 }, series, Targets::Values(targets.clone())).unwrap();
    let trained = learner(&data, options().epochs(16)).fit(&data, go_on).unwrap();
    let (x, lengths) = data.pad(&Vec::from_iter(0..120)).unwrap();
    let error = trained.predictor.predict(&x, Some(&lengths)).unwrap() - &targets;
    let error = error.mapv(|e| e * e).mean().unwrap().sqrt();
    assert!(error < 0.25 * targets.std(0.0), "{error} where the deviation is {}", targets.std(0.0));
}

/// Noise of −1 and 1, and of each frame whether the three last ones have the sum 1 or more.
fn runs() -> (Vec<Array2<f32>>, Vec<Vec<usize>>) {
    let noise = |i: usize, t: usize| if ((i * 31 + t * 17 + i * t * 13) % 7).is_multiple_of(2) { 1.0 } else { -1.0 };
    let series: Vec<_> = (0..60).map(|i| Array2::from_shape_fn((9 + i % 8, 1), |(t, _)| noise(i, t))).collect();
    let sum = |x: &Array2<f32>, t: usize| x.slice(s![t.saturating_sub(2)..=t, 0]).sum();
    let classes = series.iter().map(|x| (0..x.nrows()).map(|t| usize::from(sum(x, t) >= 1.0)).collect()).collect();
    (series, classes)
}

#[test]
fn learns_a_class_of_each_frame() {
    let (series, classes) = runs();
    let data = Dataset::new(&Task::classify_frames(["low", "high"]), series, Targets::FrameClasses(classes)).unwrap();
    let trained = learner(&data, options().epochs(14).validation_fraction(0.2)).fit(&data, go_on).unwrap();
    let validation = trained.history[trained.best_epoch - 1].validation.unwrap();
    assert!(validation.accuracy.unwrap() >= 0.95, "{:?}", trained.history);
}

#[test]
fn learns_numbers_of_each_frame() {
    let (series, classes) = runs();
    let numbers =
        |classes: &Vec<usize>| Array2::from_shape_fn((classes.len(), 2), |(t, i)| [100.0, -3.0][i] * classes[t] as f32);
    let targets = Targets::FrameValues(classes.iter().map(numbers).collect());
    let data = Dataset::new(&Task::RegressFrames { outputs: 2 }, series, targets).unwrap();
    let options = options().epochs(14).regression_loss(RegressionLoss::Huber { delta: 1.0 });
    let trained = learner(&data, options.clone()).fit(&data, go_on).unwrap();
    // half the variance, 0.5, is what a constant reaches
    let loss = evaluate(&trained.predictor, &data, &options).unwrap().loss;
    assert!(loss < 0.05, "{loss}");
    let y = trained.predictor.predict_frames(&data.pad(&[0]).unwrap().0).unwrap();
    for (t, &class) in classes[0].iter().enumerate() {
        assert!((y[[0, t, 0]] - 100.0 * class as f32).abs() < 40.0, "{y}");
    }
}

// ---- the same end by any way ----

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    // large enough that work is shared among threads
    let data = waves(24);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let encoder = HymbaOptions::recommended(2).hidden_size(64).num_layers(2);
            let predictor = Predictor::build(encoder, data.task().clone()).unwrap();
            let options = TrainerOptions::default().epochs(1).validation_fraction(0.2);
            Trainer::new(predictor, options).unwrap().fit(&data, go_on).unwrap()
        })
    };
    let one = run(1);
    for threads in [2, 4] {
        same(&run(threads), &one);
    }
}

#[test]
fn the_seed_decides() {
    let data = waves(40);
    let run = |seed| trainer(&data, options().epochs(2).seed(seed)).fit(&data, go_on).unwrap();
    same(&run(1), &run(1));
    assert_ne!(parameters(&run(1).predictor), parameters(&run(2).predictor));
}

#[test]
fn stopped_at_any_batch_and_resumed() {
    let data = waves(50);
    let folder = tempfile::tempdir().unwrap();
    let options = options().validation_fraction(0.2).accumulation(2).batch_size(8);
    let want = trainer(&data, options.clone()).fit(&data, go_on).unwrap();
    // 3 steps of two batches and the end of the epoch make 7 calls an epoch
    for stop in [1, 5, 7, 9, 24, 41] {
        let path = folder.path().join(stop.to_string());
        let mut calls = 0;
        let stopped = trainer(&data, options.clone().checkpoint(&path))
            .fit(&data, |_| {
                calls += 1;
                if calls == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .unwrap();
        assert_eq!((stopped.stopped, stopped.history.len()), (Stopped::Callback, stop / 7));
        assert_eq!(stopped.history, want.history[..stop / 7]);

        // in two goes more
        let next = stop / 7 + 1;
        let again = Trainer::resume(&path).unwrap();
        assert_eq!(again.options(), &options.clone().checkpoint(&path));
        again.fit(&data, |p| if p.epoch > next { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }).unwrap();
        same(&Trainer::resume(&path).unwrap().fit(&data, go_on).unwrap(), &want);
        // and once more, when there is nothing left to do
        same(&Trainer::resume(&path).unwrap().fit(&data, |_| panic!("it is done")).unwrap(), &want);

        let mut files: Vec<_> = fs::read_dir(&path).unwrap().map(|file| file.unwrap().file_name()).collect();
        files.sort();
        let best = format!("model-{}.safetensors", want.best_epoch);
        let mut expected = vec![best.as_str(), "model-6.safetensors", "optimizer-6.safetensors", "training.json"];
        expected.dedup();
        assert_eq!(files, expected);
    }
}

/// The folder for [`a_process_to_be_killed`].
const FOLDER: &str = "HYMBA_TEST_CHECKPOINT";

#[test]
#[ignore = "to be run by `killed_and_resumed` only"]
fn a_process_to_be_killed() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let data = waves(50);
    let trainer = if Path::new(&folder).join("training.json").exists() {
        Trainer::resume(&folder).unwrap()
    } else {
        trainer(&data, options().checkpoint(&folder))
    };
    let never = |_: &_| {
        std::thread::sleep(std::time::Duration::from_millis(2));
        ControlFlow::Continue(())
    };
    trainer.fit(&data, never).unwrap();
}

#[test]
fn killed_and_resumed() {
    let data = waves(50);
    let want = trainer(&data, options()).fit(&data, go_on).unwrap();
    let folder = tempfile::tempdir().unwrap();
    // at other moments of writing each time
    for milliseconds in [0, 7, 13, 40] {
        let mut process = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "a_process_to_be_killed", "--test-threads", "1"])
            .env(FOLDER, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let epochs = || {
            let text = fs::read_to_string(folder.path().join("training.json")).unwrap_or_default();
            text.matches("learning_rate\":").count()
        };
        // the first is among the options
        let before = epochs().max(1);
        for _ in 0..10_000 {
            if epochs() > before || process.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(epochs() > before || epochs() == 7, "no epoch was done");
    }
    same(&Trainer::resume(folder.path()).unwrap().fit(&data, go_on).unwrap(), &want);
}

#[test]
fn progress_is_told() {
    let data = waves(50);
    let mut calls = Vec::new();
    let options = options().epochs(3).batch_size(16).validation_fraction(0.2);
    let trained = trainer(&data, options).fit(&data, |progress| {
        calls.push(progress.clone());
        ControlFlow::Continue(())
    });
    let trained = trained.unwrap();
    let places: Vec<_> = calls.iter().map(|call| (call.epoch, call.batch, call.finished.is_some())).collect();
    let epoch = |epoch| [(epoch, 1, false), (epoch, 2, false), (epoch, 3, false), (epoch, 3, true)];
    assert_eq!(places, [1, 2, 3].map(epoch).concat());
    for call in &calls {
        assert_eq!((call.epochs, call.batches), (3, 3));
        assert!(call.learning_rate > 0.0 && call.gradient_norm > 0.0 && call.train.loss > 0.0, "{call:?}");
        assert!(call.train.accuracy.is_some());
    }
    assert!(calls.windows(2).all(|pair| pair[0].elapsed <= pair[1].elapsed));
    assert!(calls.last().unwrap().remaining.is_zero() && !calls[0].remaining.is_zero());
    let finished: Vec<_> = calls.into_iter().filter_map(|call| call.finished).collect();
    assert_eq!(finished, trained.history);
}

#[test]
fn stops_early_and_returns_the_best() {
    let data = waves(40);
    // labels of validation that contradict: what is learned makes it worse
    let Targets::Classes(classes) = data.targets() else { panic!("a classification") };
    let wrong = Targets::Classes(classes.iter().map(|class| 1 - class).collect());
    let wrong = Dataset::new(data.task(), data.series().to_vec(), wrong).unwrap();
    let options = options().epochs(40).patience(3);
    let trained = trainer(&data, options.clone()).fit_with_validation(&data, &wrong, go_on).unwrap();
    assert_eq!(trained.stopped, Stopped::NoImprovement);
    assert_eq!(trained.history.len(), trained.best_epoch + 3);
    let best = trained.history[trained.best_epoch - 1].validation.unwrap();
    assert!(trained.history.iter().all(|epoch| epoch.validation.unwrap().loss >= best.loss));
    assert!((evaluate(&trained.predictor, &wrong, &options).unwrap().loss - best.loss).abs() < 1e-6);
}

#[test]
fn stopped_before_the_end_of_the_first_epoch() {
    let data = waves(40);
    let untrained = Predictor::build(encoder(2), data.task().clone()).unwrap();
    let stopped = trainer(&data, options()).fit(&data, |_| ControlFlow::Break(())).unwrap();
    assert_eq!((stopped.best_epoch, stopped.history.len(), stopped.stopped), (0, 0, Stopped::Callback));
    assert_ne!(parameters(&stopped.predictor), parameters(&untrained), "what was learned is not lost");
}

// ---- what it refuses ----

#[test]
fn numbers_that_are_not_finite() {
    let data = waves(40);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let wild = options().learning_rate(1e30).warm_up(0.0).checkpoint(&path);
    let error = trainer(&data, wild).fit(&data, go_on).unwrap_err();
    assert!(matches!(error, Error::NotFinite { step: 2, .. }), "{error}");
    let message = error.to_string();
    assert!(
        message.contains("the loss is") && message.contains("parameter") && message.contains(".weight"),
        "{message}"
    );
    let start = Predictor::load(path.join("model-0.safetensors")).unwrap();
    assert!(parameters(&start).iter().all(|(_, array)| array.iter().all(|x| x.is_finite())));
    assert!(Trainer::resume(&path).is_ok());

    // the loss is a number, and its gradient is not
    let (series, targets) = (data.series().to_vec(), Array2::from_elem((40, 1), 1.5e19));
    let data = Dataset::new(&Task::Regress { outputs: 1 }, series, Targets::Values(targets)).unwrap();
    let plain = options().normalize(false).clip_norm(None);
    let error = trainer(&data, plain).fit(&data, go_on).unwrap_err();
    assert!(matches!(error, Error::NotFinite { step: 1, .. }), "{error}");
    assert!(error.to_string().contains("the gradient of \""), "{error}");

    // after the last step of an epoch
    let data = waves(16);
    let path = folder.path().join("another");
    let wild = options().learning_rate(3e38).warm_up(0.0).decay(Decay::Constant).checkpoint(&path);
    let error = trainer(&data, wild).fit(&data, go_on).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    assert!(Trainer::resume(&path).is_ok());
}

#[test]
fn bad_data() {
    let [classify, regress] = [Task::classify(["a", "b"]), Task::Regress { outputs: 2 }];
    let [frames, numbers] = [Task::classify_frames(["a", "b"]), Task::RegressFrames { outputs: 2 }];
    let series = || vec![Array2::<f32>::zeros((3, 2)), Array2::ones((5, 2))];
    let with = |row: usize, place: [usize; 2], x: f32| {
        let mut all = series();
        all[row][place] = x;
        all
    };
    let classes = || Targets::Classes(vec![0, 1]);
    let values = |x| Targets::Values(Array2::from_elem((2, 2), x));
    let table = [
        (&classify, vec![], Targets::Classes(vec![]), "no series"),
        (&classify, vec![Array2::zeros((3, 2)), Array2::zeros((0, 2))], classes(), "series 1 has no frames"),
        (&classify, vec![Array2::zeros((3, 0)); 2], classes(), "width 0"),
        (&classify, vec![Array2::zeros((3, 2)), Array2::zeros((3, 4))], classes(), "series 1 has frames of width 4"),
        (&classify, with(1, [4, 0], f32::NAN), classes(), "series 1: feature 0 of frame 4 is NaN"),
        (&classify, with(0, [2, 1], f32::INFINITY), classes(), "series 0: feature 1 of frame 2 is inf"),
        (&classify, series(), Targets::Classes(vec![0]), "1 targets for 2 series"),
        (&classify, series(), Targets::Classes(vec![0, 1, 1]), "3 targets for 2 series"),
        (&classify, series(), Targets::Classes(vec![0, 2]), "series 1 has class 2, but there are 2: 0 to 1"),
        (&classify, series(), values(0.0), "give Targets::Classes"),
        (&regress, series(), classes(), "give Targets::Values"),
        (&regress, series(), Targets::Values(Array2::zeros((3, 2))), "shape [3, 2], expected [2, 2]"),
        (&regress, series(), Targets::Values(Array2::zeros((2, 1))), "shape [2, 1], expected [2, 2]"),
        (&regress, series(), values(f32::NEG_INFINITY), "have -inf at [0, 0]"),
        (&regress, series(), values(f32::NAN), "have NaN at [0, 0]"),
        (&frames, series(), classes(), "give Targets::FrameClasses"),
        (&frames, series(), Targets::FrameClasses(vec![vec![0; 3]]), "1 targets for 2 series"),
        (&frames, series(), Targets::FrameClasses(vec![vec![0; 3]; 2]), "3 classes for the 5 frames of series 1"),
        (&frames, series(), Targets::FrameClasses(vec![vec![0, 1, 7], vec![0; 5]]), "frame 2 of series 0 has class 7"),
        (&numbers, series(), values(0.0), "give Targets::FrameValues"),
        (&numbers, series(), Targets::FrameValues(vec![Array2::zeros((3, 2)); 2]), "series 1 have shape [3, 2]"),
        (
            &numbers,
            series(),
            Targets::FrameValues(vec![Array2::from_elem((3, 2), f32::NAN), Array2::from_elem((5, 2), f32::INFINITY)]),
            "series 1 have inf at [0, 0]",
        ),
        (
            &numbers,
            series(),
            Targets::FrameValues([3, 5].map(|length| Array2::from_elem((length, 2), f32::NAN)).into()),
            "no frame has a target",
        ),
    ];
    for (task, series, targets, says) in table {
        let error = Dataset::new(task, series, targets).expect_err(says);
        assert!(matches!(error, Error::Data(_)) && error.to_string().contains(says), "{says}: {error}");
    }
    assert!(matches!(Dataset::new(&Task::classify(["a"]), series(), classes()), Err(Error::Option { .. })));
    let data = Dataset::new(&classify, series(), classes()).unwrap();
    assert!(matches!(data.pad(&[0, 2]), Err(Error::Data(_))));
}

#[test]
fn data_and_options_that_do_not_fit() {
    let never = |_: &_| -> ControlFlow<()> { panic!("nothing is trained") };
    let data = waves(8);
    let other = |task: Task, width: usize| Predictor::build(encoder(width), task).unwrap();
    for (predictor, says) in [
        (other(Task::classify(["fast", "slow"]), 2), "for the task"),
        (other(Task::Regress { outputs: 2 }, 2), "for the task"),
        (other(data.task().clone(), 3), "width 2, and the predictor has embed_dim 3"),
    ] {
        let found = evaluate(&predictor, &data, &options()).unwrap_err();
        let error = Trainer::new(predictor, options()).unwrap().fit(&data, never).unwrap_err();
        for error in [found, error] {
            assert!(matches!(error, Error::Data(_)) && error.to_string().contains(says), "{error}");
        }
    }
    let error = trainer(&data, options().class_weights([1.0; 3])).fit(&data, never).unwrap_err();
    assert!(error.to_string().contains("class_weights"), "{error}");
    let error = trainer(&data, options().validation_fraction(0.01)).fit(&data, never).unwrap_err();
    assert!(matches!(error, Error::Data(_)), "{error}");

    let base = TrainerOptions::default;
    for (options, option) in [
        (base().epochs(0), "epochs"),
        (base().epochs(usize::MAX), "epochs"),
        (base().batch_size(0), "batch_size"),
        (base().accumulation(0), "accumulation"),
        (base().learning_rate(0.0), "learning_rate"),
        (base().learning_rate(f32::NAN), "learning_rate"),
        (base().warm_up(1.0), "warm_up"),
        (base().warm_up(-0.1), "warm_up"),
        (base().weight_decay(-1.0), "weight_decay"),
        (base().clip_norm(0.0), "clip_norm"),
        (base().label_smoothing(1.5), "label_smoothing"),
        (base().class_weights([-1.0, 1.0]), "class_weights"),
        (base().regression_loss(RegressionLoss::Huber { delta: 0.0 }), "delta"),
        (base().validation_fraction(1.0), "validation_fraction"),
        (base().validation_fraction(f32::NAN), "validation_fraction"),
        (base().patience(0), "patience"),
    ] {
        let predictor = Predictor::build(encoder(2), data.task().clone()).unwrap();
        let error = Trainer::new(predictor, options).expect_err(option);
        assert!(matches!(&error, Error::Option { option: named, .. } if *named == option), "{option}: {error}");
    }
    // sizes far past the data are fine
    let large = options().epochs(1).batch_size(usize::MAX).accumulation(usize::MAX).patience(usize::MAX);
    assert_eq!(trainer(&data, large).fit(&data, go_on).unwrap().history.len(), 1);
}

#[test]
fn options_in_files() {
    let text = r#"{"epochs": 5, "decay": "linear", "regression_loss": {"huber": {"delta": 2.0}}, "clip_norm": null}"#;
    let read: TrainerOptions = serde_json::from_str(text).unwrap();
    let huber = RegressionLoss::Huber { delta: 2.0 };
    let want = TrainerOptions::default().epochs(5).decay(Decay::Linear).regression_loss(huber).clip_norm(None);
    assert_eq!(read, want);
    assert_eq!(serde_json::from_str::<TrainerOptions>(&serde_json::to_string(&want).unwrap()).unwrap(), want);
    assert!(serde_json::from_str::<TrainerOptions>(r#"{"epoch": 5}"#).is_err());
}

#[test]
fn checkpoints_that_cannot_be_used() {
    let data = waves(16);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let options = options().epochs(2).checkpoint(&path);
    trainer(&data, options.clone()).fit(&data, go_on).unwrap();

    let error = trainer(&data, options.clone()).fit(&data, go_on).unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }) && error.to_string().contains("Trainer::resume"), "{error}");
    // without its list, too, but not for what is left of one that has not begun
    let lost = folder.path().join("lost");
    fs::create_dir(&lost).unwrap();
    for (name, usable) in
        [("model-0.safetensors", true), ("model-final.safetensors", true), ("model-3.safetensors", false)]
    {
        fs::write(lost.join(name), "").unwrap();
        let found = trainer(&data, options.clone().epochs(1).checkpoint(&lost)).fit(&data, go_on);
        assert_eq!(found.is_ok(), usable, "{name}");
        if usable {
            fs::remove_file(lost.join("training.json")).unwrap();
            fs::remove_file(lost.join("model-1.safetensors")).unwrap();
            fs::remove_file(lost.join("optimizer-1.safetensors")).unwrap();
        }
    }
    assert!(lost.join("model-final.safetensors").exists(), "not one of ours");

    let error = Trainer::resume(&path).unwrap().fit(&waves(17), go_on).unwrap_err();
    assert!(error.to_string().contains("not the data"), "{error}");
    let error = Trainer::resume(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = trainer(&data, options.checkpoint(&file)).fit(&data, go_on).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");

    let json = path.join("training.json");
    let valid = fs::read_to_string(&json).unwrap();
    let table = [
        (String::new(), "EOF"),
        ("\u{1b}[31m".into(), "expected value"),
        (valid.replace("\"version\":1", "\"version\":7"), "version 7"),
        (valid.replace("\"epochs\":2", "\"epochs\":1"), "2 of 1 epochs"),
        (valid.replace("\"epochs\":2", "\"epochs\":0"), "epochs = 0"),
        (valid.replace("\"data\":", "\"colour\":1,\"data\":"), "unknown field"),
        (valid.replace("\"data\":", "\"data\":1,\"data\":"), "duplicate field"),
        (valid.replacen("\"loss\":", "\"loss\":null,\"was\":", 1), "training.json"),
        (valid.replace("\"accuracy\":", "\"accuracy\":\"\u{1b}\",\"was\":"), "training.json"),
        ("[".repeat(100_000), "training.json"),
        (format!("{{{}}}", valid), "training.json"),
    ];
    for (text, says) in table {
        fs::write(&json, &text).unwrap();
        let error = Trainer::resume(&path).expect_err(says);
        let message = error.to_string();
        assert!(matches!(error, Error::Format { .. }) && message.contains(says), "{says}: {message}");
        assert!(!message.contains('\u{1b}'), "{message}");
    }
    for length in (0..valid.trim_end().len()).rev() {
        fs::write(&json, &valid.as_bytes()[..length]).unwrap();
        assert!(Trainer::resume(&path).is_err(), "cut to {length} bytes");
    }
    fs::write(&json, &valid).unwrap();
    assert!(Trainer::resume(&path).is_ok());
    fs::rename(path.join("optimizer-2.safetensors"), path.join("other")).unwrap();
    assert!(matches!(Trainer::resume(&path), Err(Error::Io { .. })));
    fs::copy(path.join("model-2.safetensors"), path.join("optimizer-2.safetensors")).unwrap();
    assert!(matches!(Trainer::resume(&path), Err(Error::Format { .. })));
    fs::rename(path.join("other"), path.join("optimizer-2.safetensors")).unwrap();
    Predictor::build(encoder(2).num_layers(1), data.task().clone())
        .unwrap()
        .save(path.join("model-2.safetensors"))
        .unwrap();
    assert!(matches!(Trainer::resume(&path), Err(Error::Tensors { .. })));
}
