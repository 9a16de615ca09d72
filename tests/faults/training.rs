//! Training: what acts, what is averaged over what, and how a training that ended goes on.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::ndarray::{Array2, Array3, ArrayD, Axis, Ix3, s};
use hymba::train::{
    AdamW, AdamWOptions, CrossEntropy, Dataset, Decay, Loss, Parameters, RegressionLoss, Stopped, Targets, Trained,
    Trainer, TrainerOptions, evaluate,
};
use hymba::{Error, Hymba, HymbaOptions, Predictor, Task};

use crate::common::wave;

fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn small(task: &Task) -> Predictor {
    let options = HymbaOptions::new(1).hidden_size(8).num_heads(2).num_layers(1);
    Predictor::build(options, task.clone()).unwrap()
}

/// One step an epoch at a constant rate, and gradients as they come.
fn plain() -> TrainerOptions {
    TrainerOptions::default().normalize(false).warm_up(0.0).decay(Decay::Constant).clip_norm(None).epochs(1)
}

fn train(data: &Dataset, options: TrainerOptions) -> Trained {
    Trainer::new(small(data.task()), options).unwrap().fit(data, go_on).unwrap()
}

fn parameters(of: &impl Parameters) -> Vec<(String, ArrayD<f32>)> {
    let mut all = Vec::new();
    of.visit(&mut |name, array| all.push((name.to_string(), array.to_owned())));
    all
}

/// Series of these lengths.
fn series(lengths: &[usize]) -> Vec<Array2<f32>> {
    let number = |i: usize, t: usize| (0.4 * t as f32 + 1.9 * i as f32).sin();
    lengths.iter().enumerate().map(|(i, &l)| Array2::from_shape_fn((l, 1), |(t, _)| number(i, t))).collect()
}

fn close(one: f64, other: f64) {
    assert!((one - other).abs() <= 1e-5 * one.abs(), "{one} {other}");
}

// ---- dropout ----

fn dropping(layers: usize) -> HymbaOptions {
    HymbaOptions::recommended(3).hidden_size(16).num_heads(2).num_layers(layers).dropout(0.5)
}

#[test]
fn dropout_acts_in_a_single_block() {
    let x = wave(2, 12, 3);
    let model = Hymba::build(dropping(1)).unwrap();
    let outputs = |seed| model.forward_train(&x, None, seed).unwrap().0;
    assert_eq!(outputs(1), outputs(1));
    assert_ne!(outputs(1), outputs(2));
    assert_ne!(outputs(1), model.forward(&x).unwrap());

    // the original has it between blocks only
    let edifice = |layers| {
        let options = HymbaOptions::edifice(3).hidden_size(16).num_heads(2).num_layers(layers).dropout(0.5);
        let model = Hymba::build(options).unwrap();
        [1, 2].map(|seed| model.forward_train(&x, None, seed).unwrap().0)
    };
    let [one, other] = edifice(1);
    assert_eq!(one, other);
    let [one, other] = edifice(2);
    assert_ne!(one, other);
}

/// The residual stream itself is never dropped: without what joins it, the seed changes nothing.
#[test]
fn dropout_is_of_what_joins_the_residual_stream() {
    let x = wave(2, 12, 3);
    let added = ["mamba.out_proj", "attention.out_proj", "ffn.down"];
    let seeds_differ = |kept: &str| {
        let mut model = Hymba::build(dropping(2)).unwrap();
        model.visit_mut(&mut |name, mut array| {
            if added.iter().any(|part| *part != kept && name.contains(part)) {
                array.fill(0.0);
            }
        });
        let [one, other] = [1, 2].map(|seed| model.forward_train(&x, None, seed).unwrap().0);
        one != other
    };
    assert!(!seeds_differ("none"));
    for kept in added {
        assert!(seeds_differ(kept), "{kept}");
    }
}

#[test]
fn dropout_of_a_sequence_does_not_depend_on_its_padding() {
    let x = wave(2, 20, 3);
    let model = Hymba::build(dropping(2)).unwrap();
    let (short, _) = model.forward_train(&x.slice(s![.., ..12, ..]), Some(&[12, 7]), 3).unwrap();
    let (padded, _) = model.forward_train(&x, Some(&[12, 7]), 3).unwrap();
    assert_eq!(short, padded);
}

/// Where everything behind dropout is linear, the mean over many seeds is the output without it.
#[test]
fn dropout_keeps_the_mean() {
    let x = wave(1, 6, 16);
    let mut model =
        Hymba::build(HymbaOptions::new(16).hidden_size(16).num_heads(2).num_layers(1).dropout(0.3)).unwrap();
    // outputs small beside the input, so that the norm behind them is all but linear
    model.visit_mut(&mut |name, mut array| {
        if ["mamba.out_proj", "attention.out_proj", "ffn.down"].iter().any(|part| name.contains(part)) {
            array *= 0.02;
        }
    });
    let want = model.forward(&x).unwrap();
    let count = 2000;
    let mut mean = Array2::<f32>::zeros(want.dim());
    for seed in 0..count {
        mean += &model.forward_train(&x, None, seed).unwrap().0;
    }
    mean /= count as f32;
    let spread = (&model.forward_train(&x, None, 0).unwrap().0 - &want).mapv(f32::abs).mean().unwrap();
    let off = (&mean - &want).mapv(f32::abs).mean().unwrap();
    assert!(spread > 0.0 && off < 0.05 * spread, "{off} where single seeds are off by {spread}");
}

// ---- means over batches ----

/// Of every task, series of very different lengths and targets that are not evenly spread.
fn all_tasks() -> Vec<(Dataset, TrainerOptions)> {
    let lengths = [2, 18, 5, 40, 3, 9, 27, 1];
    let data = |task: Task, targets| Dataset::new(&task, series(&lengths), targets).unwrap();
    let frames = lengths.map(|l| (0..l).map(|t| usize::from(t > 3 || l > 20)).collect());
    let classes = data(Task::classify(["a", "b"]), Targets::Classes(vec![0, 0, 1, 0, 1, 0, 0, 0]));
    let frame_classes = data(Task::classify_frames(["a", "b"]), Targets::FrameClasses(frames.to_vec()));
    let values = Array2::from_shape_fn((8, 2), |(i, j)| (i * i) as f32 - j as f32);
    let frame_values =
        lengths.map(|l| Array2::from_shape_fn((l, 1), |(t, _)| if l < 10 { 3.0 } else { t as f32 / 9.0 }));
    let frame_values = data(Task::RegressFrames { outputs: 1 }, Targets::FrameValues(frame_values.to_vec()));
    let huber = RegressionLoss::Huber { delta: 0.5 };
    vec![
        (classes.clone(), plain()),
        (classes.clone(), plain().class_weights([3.0, 1.0])),
        (classes.clone(), plain().class_weights([0.0, 2.0])),
        (classes, plain().class_weights([1.0, 9.0]).label_smoothing(0.0)),
        (frame_classes.clone(), plain().label_smoothing(0.3)),
        (frame_classes, plain().class_weights([0.1, 5.0])),
        (data(Task::Regress { outputs: 2 }, Targets::Values(values)), plain().normalize(true)),
        (frame_values.clone(), plain()),
        (frame_values, plain().regression_loss(huber)),
    ]
}

#[test]
fn a_batch_in_pieces_is_the_batch() {
    for (data, options) in all_tasks() {
        let whole = train(&data, options.clone().batch_size(8)).history.remove(0);
        for (size, accumulation) in [(1, 8), (2, 4), (3, 3), (4, 2)] {
            let pieces = train(&data, options.clone().batch_size(size).accumulation(accumulation)).history.remove(0);
            close(whole.gradient_norm.into(), pieces.gradient_norm.into());
            close(whole.train.loss.into(), pieces.train.loss.into());
        }
        // more steps than one: the same series in each
        let options = options.epochs(3).batch_size(4);
        let one_by_one = options.clone().batch_size(1).accumulation(4);
        let (whole, pieces) = (train(&data, options).history, train(&data, one_by_one).history);
        for (whole, pieces) in whole.iter().zip(&pieces) {
            assert!((whole.gradient_norm - pieces.gradient_norm).abs() < 1e-3 * whole.gradient_norm);
            assert!((whole.train.loss - pieces.train.loss).abs() < 1e-3 * whole.train.loss);
        }
    }
}

/// The smallest inputs with which it was seen: 8.65 and 32.9, 1.08 and 2.30.
#[test]
fn two_series_together_and_one_by_one() {
    let lengths = [2, 18];
    let targets = [1.0, -1.0].iter().zip(lengths).map(|(&target, l)| Array2::from_elem((l, 1), target)).collect();
    let frames = Dataset::new(&Task::RegressFrames { outputs: 1 }, series(&lengths), Targets::FrameValues(targets));
    let classes = Dataset::new(&Task::classify(["a", "b"]), series(&lengths), Targets::Classes(vec![0, 1]));
    for (data, options) in [(frames.unwrap(), plain()), (classes.unwrap(), plain().class_weights([3.0, 1.0]))] {
        let together = train(&data, options.clone().batch_size(2)).history[0].gradient_norm;
        let one_by_one = train(&data, options.batch_size(1).accumulation(2)).history[0].gradient_norm;
        close(together.into(), one_by_one.into());
    }
}

/// The same by hand: sums add up, and their weights.
#[test]
fn pieces_by_hand() {
    let model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_heads(2).num_layers(1)).unwrap();
    let (x, lengths) = (wave(3, 9, 3), [9, 2, 5]);
    let labels = Array2::from_shape_fn((3, 9), |(row, t)| (row + t / 3) % 8);
    let targets = wave(3, 9, 8).mapv(|y| y * y);
    let entropy = CrossEntropy::new().class_weights([1.0, 4.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0]).label_smoothing(0.1);
    let lengths_of = |rows: &[usize]| Vec::from_iter(rows.iter().map(|&row| lengths[row]));
    type Evaluate<'a> = &'a dyn Fn(&Array3<f32>, &[usize]) -> Loss<Ix3>;
    let regression: Evaluate = &|y, rows| {
        let targets = targets.select(Axis(0), rows);
        RegressionLoss::MeanSquaredError.evaluate_sequences(y, &targets, Some(&lengths_of(rows))).unwrap()
    };
    let classification: Evaluate =
        &|y, rows| entropy.evaluate_sequences(y, &labels.select(Axis(0), rows), Some(&lengths_of(rows))).unwrap();
    let weights = 3.0 + 3.0 * 4.0 + 3.0 * 0.5 + 2.0 * 4.0 + 3.0 * 0.5 + 2.0 * 2.0;
    for (weight, loss) in [(16.0, regression), (weights, classification)] {
        let run = |pieces: &[&[usize]]| {
            let (mut model, mut gradient, mut total) = (model.clone(), model.zeros_like(), 0.0);
            for rows in pieces {
                let x = x.select(Axis(0), rows);
                let (y, cache) = model.forward_sequence_train(&x, Some(&lengths_of(rows)), 0).unwrap();
                let loss = loss(&y, rows);
                model.backward_sequence(&cache, &loss.sum_gradient(), &mut gradient).unwrap();
                total += loss.weight;
            }
            assert_eq!(total, weight);
            let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
            optimizer.step_accumulated(&mut model, &mut gradient, total).unwrap().gradient_norm
        };
        let whole = run(&[&[0, 1, 2]]);
        close(whole, run(&[&[0], &[1], &[2]]));
        close(whole, run(&[&[2, 0], &[1]]));
    }
}

// ---- class weights ----

/// 18 series of one class and 2 of another.
fn rare() -> Dataset {
    let classes = (0..20).map(|i| usize::from(i % 10 == 4)).collect();
    Dataset::new(&Task::classify(["a", "b"]), series(&[12; 20]), Targets::Classes(classes)).unwrap()
}

#[test]
fn measured_losses_do_not_depend_on_the_batch_size() {
    for (data, options) in all_tasks().into_iter().chain([(rare(), plain().class_weights([1.0, 9.0]))]) {
        let predictor = small(data.task());
        let of = |size| evaluate(&predictor, &data, &options.clone().batch_size(size)).unwrap();
        for size in [1, 3, 7, 64] {
            let (one, other) = (of(20), of(size));
            close(one.loss.into(), other.loss.into());
            assert_eq!(one.accuracy, other.accuracy);
            assert_eq!(one.plain_loss.is_some(), data.task().is_classification());
        }
    }
}

#[test]
fn weighted_smoothed_and_plain_losses_by_definition() {
    let data = rare();
    let predictor = small(data.task());
    let Targets::Classes(classes) = data.targets() else { panic!("a classification") };
    let (x, lengths) = data.pad(&Vec::from_iter(0..20)).unwrap();
    let probabilities = hymba::softmax(&predictor.predict(&x, Some(&lengths)).unwrap()).unwrap();
    let of = |row: usize| -> f64 { -f64::from(probabilities[[row, classes[row]]]).ln() };
    let weight = |row: usize| [1.0, 9.0][classes[row]];
    let weighted = (0..20).map(|row| weight(row) * of(row)).sum::<f64>() / 36.0;
    let plain_loss = (0..20).map(of).sum::<f64>() / 20.0;

    let options = plain().class_weights([1.0, 9.0]);
    let sharp = evaluate(&predictor, &data, &options.clone().label_smoothing(0.0).batch_size(3)).unwrap();
    close(weighted, sharp.loss.into());
    close(plain_loss, sharp.plain_loss.unwrap().into());
    let smoothed = evaluate(&predictor, &data, &options).unwrap();
    assert!((smoothed.loss - sharp.loss).abs() > 1e-4);
    assert_eq!(smoothed.plain_loss, sharp.plain_loss);
}

#[test]
fn class_weights_matter_in_a_batch_of_one() {
    let data = rare();
    let options = TrainerOptions::default().epochs(3).batch_size(1);
    let without = train(&data, options.clone());
    let with = train(&data, options.clone().class_weights([1.0, 9.0]));
    assert_ne!(parameters(&with.predictor), parameters(&without.predictor));
    // only their ratio matters, and equal ones are none
    let scaled = train(&data, options.clone().class_weights([16.0, 144.0]));
    close(with.history[2].train.loss.into(), scaled.history[2].train.loss.into());
    close(with.history[0].gradient_norm.into(), scaled.history[0].gradient_norm.into());
    let equal = train(&data, options.class_weights([2.0, 2.0]));
    assert_eq!(parameters(&equal.predictor), parameters(&without.predictor));
}

/// A heavy target pulls harder than a light one, by the ratio of their weights.
#[test]
fn a_target_pulls_by_its_weight() {
    let norm = |weights: [f32; 2]| {
        let mut norms = Vec::new();
        let classes = Targets::Classes(vec![0, 1]);
        let data = Dataset::new(&Task::classify(["a", "b"]), vec![Array2::ones((5, 1)); 2], classes).unwrap();
        let options = plain().class_weights(weights).learning_rate(1e-12).weight_decay(0.0).batch_size(1);
        Trainer::new(small(data.task()), options.label_smoothing(0.0))
            .unwrap()
            .fit(&data, |progress| {
                norms.push(progress.gradient_norm);
                ControlFlow::Continue(())
            })
            .unwrap();
        (norms[0], norms[1])
    };
    let ((a, b), (of_three, of_one)) = (norm([1.0, 1.0]), norm([3.0, 1.0]));
    // in the order of the seed; which of them is the heavy one is for the ratios to say
    let mut ratios = [of_three / a, of_one / b];
    ratios.sort_by(f32::total_cmp);
    close(0.5, ratios[0].into());
    close(1.5, ratios[1].into());
}

#[test]
fn classes_without_weight_or_without_series() {
    let task = Task::classify(["a", "b", "never"]);
    let data = Dataset::new(&task, series(&[5; 6]), Targets::Classes(vec![0, 1, 0, 0, 1, 0])).unwrap();
    let trained = train(&data, plain().class_weights([0.0, 1.0, 7.0]).batch_size(1));
    assert!(trained.history[0].train.loss > 0.0);
    let useless = plain().class_weights([0.0, 0.0, 1.0]);
    let error = evaluate(&trained.predictor, &data, &useless).unwrap_err();
    assert!(matches!(&error, Error::Option { option: "class_weights", .. }), "{error}");
    let error = Trainer::new(trained.predictor, useless).unwrap().fit(&data, go_on).unwrap_err();
    assert!(error.to_string().contains("[0.0, 0.0, 1.0]"), "{error}");
}

// ---- numbers that are not finite ----

#[test]
fn a_gradient_that_went_wrong_can_be_cleared() {
    let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_heads(2).num_layers(1)).unwrap();
    let mut optimizer = AdamW::new(&model, AdamWOptions::default()).unwrap();
    let mut gradient = model.zeros_like();
    let mut learn = |x: &Array3<f32>, gradient: &mut Hymba| {
        let (y, cache) = model.forward_train(x, None, 0).unwrap();
        model.backward(&cache, &y, gradient).unwrap();
        optimizer.step(&mut model, gradient)
    };
    let (good, bad) = (wave(2, 5, 3), Array3::from_elem((2, 5, 3), f32::NAN));
    learn(&good, &mut gradient).unwrap();
    let error = learn(&bad, &mut gradient).unwrap_err();
    assert!(error.to_string().contains("Parameters::fill_zero"), "{error}");
    assert!(learn(&good, &mut gradient).is_err(), "what is added to NaN is NaN");
    gradient.fill_zero();
    assert_eq!(learn(&good, &mut gradient).unwrap().step, 2);
}

/// Good series, and `bad` ones with a target whose loss or gradient is past what f32 can hold.
fn wild(bad: usize, target: f32) -> Dataset {
    let target = |i: usize| if i < bad { target } else { (i % 3) as f32 };
    let targets = Targets::Values(Array2::from_shape_fn((12, 1), |(i, _)| target(i)));
    Dataset::new(&Task::Regress { outputs: 1 }, series(&[7; 12]), targets).unwrap()
}

#[test]
fn batches_that_went_wrong_can_be_left_out() {
    // only the gradient, the loss, too
    for target in [1.5e19, 1e25] {
        let (two, options) = (wild(2, target), plain().epochs(3).batch_size(1));
        let error = Trainer::new(small(two.task()), options.clone()).unwrap().fit(&two, go_on).unwrap_err();
        assert!(matches!(&error, Error::NotFinite { .. }), "{error}");
        assert!(error.to_string().contains("skip_not_finite"), "{error}");

        let (mut told, mut batches) = (Vec::new(), 0);
        let options = options.skip_not_finite(6);
        let trained = Trainer::new(small(two.task()), options.clone()).unwrap().fit(&two, |progress| {
            batches += usize::from(progress.finished.is_none());
            told.extend(progress.finished.as_ref().map(|_| progress.skipped));
            ControlFlow::Continue(())
        });
        let trained = trained.unwrap();
        assert_eq!((told, batches), (vec![2, 2, 2], 36));
        for epoch in &trained.history {
            assert!(epoch.skipped == 2 && epoch.train.loss < 10.0 && epoch.gradient_norm < 1e3, "{epoch:?}");
        }
        // they have changed nothing
        let others = Targets::Values(Array2::from_shape_fn((10, 1), |(i, _)| ((i + 2) % 3) as f32));
        let others = Dataset::new(two.task(), two.series()[2..].to_vec(), others).unwrap();
        let found = evaluate(&trained.predictor, &others, &options).unwrap();
        assert!(found.loss < evaluate(&small(two.task()), &others, &options).unwrap().loss);

        // in all epochs together, and over a resumption
        let folder = tempfile::tempdir().unwrap();
        let run = |options: TrainerOptions, name: &str, stop: usize| {
            let path = folder.path().join(name);
            let trainer = Trainer::new(small(two.task()), options.checkpoint(&path)).unwrap();
            trainer.fit(&two, |p| if p.epoch > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })?;
            Trainer::resume(&path)?.fit(&two, go_on)
        };
        assert_eq!(parameters(&run(options.clone(), "enough", 1).unwrap().predictor), parameters(&trained.predictor));
        assert!(matches!(run(options.clone().skip_not_finite(5), "too few", 2), Err(Error::NotFinite { .. })));

        // a step is left out as a whole, and an epoch without any step is an error
        let pieces = train(&wild(1, target), options.clone().accumulation(4));
        assert!(pieces.history.iter().all(|epoch| epoch.skipped == 1));
        let all = wild(12, target);
        let trainer = Trainer::new(small(all.task()), options.skip_not_finite(usize::MAX)).unwrap();
        let error = trainer.fit(&all, go_on).unwrap_err();
        assert!(error.to_string().contains("no step of an epoch"), "{error}");
    }
}

// ---- trainings that have ended ----

fn rates(trained: &Trained) -> Vec<f32> {
    trained.history.iter().map(|epoch| epoch.learning_rate).collect()
}

/// A finished training of 3 epochs.
fn finished(folder: &Path) -> (Dataset, Trained) {
    let data = rare();
    let options = TrainerOptions::default().epochs(3).batch_size(4).checkpoint(folder);
    let trained = train(&data, options);
    (data, trained)
}

fn prolonged(folder: &Path, change: impl FnOnce(TrainerOptions) -> TrainerOptions) -> hymba::Result<Trainer> {
    let trainer = Trainer::resume(folder)?;
    let options = change(trainer.options().clone());
    trainer.prolong(options)
}

#[test]
fn a_training_that_has_ended_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (data, before) = finished(folder.path());
    assert!(rates(&before)[2] < 1e-4);
    let moments = fs::read(folder.path().join("optimizer-3.safetensors")).unwrap();

    // the first step: from the same weights, with the same moments, at the rate asked for
    let last = Predictor::load(folder.path().join("model-3.safetensors")).unwrap();
    let constant = |options: TrainerOptions| options.epochs(5).learning_rate(3e-4).decay(Decay::Constant).warm_up(0.0);
    let mut first = None;
    let trained = prolonged(folder.path(), constant).unwrap().fit(&data, |progress| {
        first.get_or_insert((progress.epoch, progress.batch, progress.learning_rate));
        ControlFlow::Break(())
    });
    assert_eq!(first, Some((4, 1, 3e-4)));
    assert_eq!(trained.unwrap().history, before.history);
    // nothing is written before the end of an epoch
    assert_eq!(fs::read(folder.path().join("optimizer-3.safetensors")).unwrap(), moments);
    let optimizer = AdamW::load(folder.path().join("optimizer-3.safetensors"), &last).unwrap();
    assert_eq!(optimizer.steps(), 15);

    let trained = prolonged(folder.path(), |options| options.epochs(6)).unwrap().fit(&data, go_on).unwrap();
    assert_eq!((trained.history.len(), trained.stopped), (6, Stopped::Finished));
    assert_eq!(trained.history[..3], before.history);
    let rates = rates(&trained);
    assert!(rates[3] > 5e-4 && rates[4] > 1e-4 && rates[5] > 0.0 && rates[5] < 1e-4, "{rates:?}");
    let optimizer = AdamW::load(folder.path().join("optimizer-6.safetensors"), &last).unwrap();
    assert_eq!(optimizer.steps(), 30, "the moments' own count goes on");
}

#[test]
fn a_prolonged_training_that_was_killed_comes_to_the_same_end() {
    let folders = [0; 3].map(|_| tempfile::tempdir().unwrap());
    let longer = |options: TrainerOptions| options.epochs(6).learning_rate(5e-4);
    let run = |folder: &Path, stop: usize| {
        let (data, _) = finished(folder);
        let stopping = |progress: &hymba::train::Progress| match progress.epoch > stop {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        prolonged(folder, longer).unwrap().fit(&data, stopping).unwrap();
        // the program runs again, and asks for the same; once it only resumes
        let again = if stop == 4 { Trainer::resume(folder) } else { prolonged(folder, longer) };
        again.unwrap().fit(&data, go_on).unwrap()
    };
    let want = run(folders[0].path(), 6);
    for (folder, stop) in folders[1..].iter().zip([3, 4]) {
        let got = run(folder.path(), stop);
        assert_eq!(got.history, want.history);
        assert_eq!(parameters(&got.predictor), parameters(&want.predictor));
        let last = |folder: &Path| fs::read(folder.join("optimizer-6.safetensors")).unwrap();
        assert!(last(folder.path()) == last(folders[0].path()));
    }
}

#[test]
fn what_cannot_be_prolonged() {
    let folder = tempfile::tempdir().unwrap();
    let (data, before) = finished(folder.path());
    // the options it has already: it has ended
    let same = prolonged(folder.path(), |options| options).unwrap().fit(&data, |_| panic!("it is done")).unwrap();
    assert_eq!(same.history, before.history);
    for (options, option) in [
        (TrainerOptions::default().epochs(2), "epochs"),
        (TrainerOptions::default().epochs(3).batch_size(4).learning_rate(1e-4), "epochs"),
        (TrainerOptions::default().epochs(0), "epochs"),
        (TrainerOptions::default().epochs(9).seed(1), "seed"),
        (TrainerOptions::default().epochs(9).validation_fraction(0.2), "validation_fraction"),
        (TrainerOptions::default().epochs(9).label_smoothing(0.0), "label_smoothing"),
        (TrainerOptions::default().epochs(9).class_weights([1.0, 2.0]), "class_weights"),
        (TrainerOptions::default().epochs(9).regression_loss(RegressionLoss::Huber { delta: 1.0 }), "regression_loss"),
    ] {
        let error = Trainer::resume(folder.path()).unwrap().prolong(options).unwrap_err();
        assert!(matches!(&error, Error::Option { option: named, .. } if *named == option), "{option}: {error}");
    }
    // one that has not begun just takes them
    let new = Trainer::new(small(data.task()), TrainerOptions::default()).unwrap();
    assert_eq!(new.prolong(plain().seed(5)).unwrap().options(), &plain().seed(5));
}

#[test]
fn patience_counts_from_where_a_training_was_prolonged() {
    let folder = tempfile::tempdir().unwrap();
    let data = rare();
    // contradicting labels: what is learned makes it worse
    let Targets::Classes(classes) = data.targets() else { panic!("a classification") };
    let wrong = Targets::Classes(classes.iter().map(|class| 1 - class).collect());
    let wrong = Dataset::new(data.task(), data.series().to_vec(), wrong).unwrap();
    let options = TrainerOptions::default().epochs(30).learning_rate(1e-2).patience(2).checkpoint(folder.path());
    let stopped = Trainer::new(small(data.task()), options).unwrap().fit_with_validation(&data, &wrong, go_on).unwrap();
    assert_eq!(stopped.stopped, Stopped::NoImprovement);
    let done = stopped.history.len();
    let trainer = prolonged(folder.path(), |options| options.learning_rate(1e-6)).unwrap();
    let further = trainer.fit_with_validation(&data, &wrong, go_on).unwrap();
    assert_eq!((further.stopped, further.history.len()), (Stopped::NoImprovement, done + 2));
}

/// Seen as epochs at a learning rate of 0.
#[test]
fn an_edited_training_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let (data, before) = finished(folder.path());
    let json = folder.path().join("training.json");
    let valid = fs::read_to_string(&json).unwrap();
    for (from, to) in [
        ("\"epochs\":3", "\"epochs\":10"),
        ("\"learning_rate\":0.001", "\"learning_rate\":0.01"),
        ("\"batch_size\":4", "\"batch_size\":2"),
        ("\"decay\":\"cosine\"", "\"decay\":\"linear\""),
        ("\"before_schedule\":0", "\"before_schedule\":3"),
    ] {
        let edited = valid.replacen(from, to, 1);
        assert_ne!(edited, valid, "{from}");
        fs::write(&json, edited).unwrap();
        let error = Trainer::resume(folder.path()).unwrap().fit(&data, go_on).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }) && error.to_string().contains("prolong"), "{to}: {error}");
    }
    fs::write(&json, valid.replace("\"before_schedule\":0", "\"before_schedule\":4")).unwrap();
    assert!(matches!(Trainer::resume(folder.path()), Err(Error::Format { .. })));
    // written before there was such a field
    fs::write(&json, valid.replace(",\"before_schedule\":0", "")).unwrap();
    let trained = Trainer::resume(folder.path()).unwrap().fit(&data, go_on).unwrap();
    assert_eq!(trained.history, before.history);
}

#[test]
fn a_schedule_that_begins_anew_is_kept_in_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer");
    let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_heads(2).num_layers(1)).unwrap();
    let schedule = |peak| AdamWOptions::default().schedule(hymba::train::Schedule::linear(peak, 4));
    let mut optimizer = AdamW::new(&model, schedule(1.0)).unwrap();
    let mut gradient = model.zeros_like();
    for _ in 0..6 {
        optimizer.step(&mut model, &mut gradient).unwrap();
    }
    assert!(optimizer.restart(schedule(-1.0)).is_err());
    assert_eq!(optimizer.step(&mut model, &mut gradient).unwrap().learning_rate, 0.0, "nothing was changed");
    optimizer.restart(schedule(2.0)).unwrap();
    assert_eq!(optimizer.step(&mut model, &mut gradient).unwrap().learning_rate, 2.0);
    optimizer.save(&path).unwrap();
    let mut loaded = AdamW::load(&path, &model).unwrap();
    for rate in [1.5, 1.0, 0.5, 0.0, 0.0] {
        assert_eq!(loaded.step(&mut model, &mut gradient).unwrap().learning_rate, rate);
    }
    assert_eq!((loaded.steps(), optimizer.steps()), (13, 8));
    // more steps before the schedule than in all
    let text = fs::read(&path).unwrap();
    let at = text.windows(20).position(|bytes| bytes.starts_with(b"before_schedule\\\":7")).unwrap();
    let mut bad = text.clone();
    bad[at + 18] = b'9';
    fs::write(&path, bad).unwrap();
    assert!(matches!(AdamW::load(&path, &model), Err(Error::Format { .. })));
}
