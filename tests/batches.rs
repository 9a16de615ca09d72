//! Batches from anywhere, losses and metrics of one's own, several labels at once, and frames without a class.

use std::ops::ControlFlow;

use hymba::ndarray::{Array2, Array3, ArrayD, Axis, Ix3, array, s};
use hymba::train::{
    BatchSource, BinaryCrossEntropy, CrossEntropy, Dataset, DatasetBatches, Decay, Loss, RegressionLoss, SeriesBatch,
    Targets, Trained, Trainer, TrainerOptions, evaluate,
};
use hymba::{Error, HymbaOptions, KernelPredictor, Predictor, Result, Task};

fn go_on<T>(_: &T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn predictor(task: Task) -> Predictor {
    let options = HymbaOptions::new(1).hidden_size(16).num_layers(1).num_heads(2).state_size(4).window_size(12);
    Predictor::build(options, task).unwrap()
}

fn parameters(predictor: &Predictor) -> Vec<ArrayD<f32>> {
    let mut all = Vec::new();
    predictor.visit(&mut |_, array| all.push(array.to_owned()));
    all
}

/// Waves of 10 to 17 frames that are slow or fast.
fn waves(count: usize) -> Dataset {
    let wave = |i: usize| {
        let frequency = if i.is_multiple_of(2) { 0.3 } else { 1.3 };
        Array2::from_shape_fn((10 + i % 8, 1), |(t, _)| (frequency * t as f32 + 1.7 * i as f32).sin())
    };
    let classes = (0..count).map(|i| i % 2).collect();
    Dataset::new(&Task::classify(["slow", "fast"]), (0..count).map(wave).collect(), Targets::Classes(classes)).unwrap()
}

fn cross_entropy(z: &Array3<f32>, batch: &SeriesBatch<Targets>) -> Result<Loss<Ix3>> {
    let Targets::Classes(classes) = &batch.targets else { panic!("classes") };
    let labels = Array2::from_shape_fn((classes.len(), 1), |(i, _)| classes[i]);
    CrossEntropy::new().evaluate_sequences(z, &labels, None)
}

fn options() -> TrainerOptions {
    TrainerOptions::default().epochs(6).learning_rate(1e-2).average(0.9)
}

fn fit(data: &Dataset, trainer: Trainer, stop_after: usize) -> Result<Trained> {
    let mut source = DatasetBatches::new(data, 8)?;
    trainer.fit_batches(
        &mut source,
        cross_entropy,
        |_| Ok(None),
        |progress| match progress.finished.is_some() && progress.epoch == stop_after {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        },
    )
}

#[test]
fn a_loss_of_ones_own_is_learned_and_a_stopped_training_goes_on() {
    let (data, folder) = (waves(40), tempfile::tempdir().unwrap());
    let new = |options| Trainer::new(predictor(data.task().clone()), options).unwrap();
    let whole = fit(&data, new(options()), 99).unwrap();
    assert!(whole.history[5].train.loss < 0.5 * whole.history[0].train.loss, "{:?}", whole.history);
    assert!(whole.history[5].learning_rate < 1e-4, "the cosine is near its end");
    assert_eq!(
        (whole.history[0].train.accuracy, whole.history[0].train.plain_loss),
        (None, None),
        "nobody measured them"
    );

    let folder = folder.path().join("run");
    fit(&data, new(options().checkpoint(&folder)), 2).unwrap();
    let resumed = fit(&data, Trainer::resume(&folder).unwrap(), 99).unwrap();
    assert_eq!((&resumed.history, resumed.best_epoch), (&whole.history, whole.best_epoch));
    assert_eq!(parameters(&resumed.predictor), parameters(&whole.predictor));

    // it has ended; with more epochs it goes on
    let trainer = Trainer::resume(&folder).unwrap();
    let longer = trainer.options().clone().epochs(8);
    let longer = fit(&data, trainer.prolong(longer).unwrap(), 99).unwrap();
    assert_eq!((longer.history.len(), &longer.history[..6]), (8, &whole.history[..]));
    // not a training of fit
    let error = Trainer::resume(&folder).unwrap().fit(&data, go_on).unwrap_err();
    assert!(matches!(error, Error::Data(_)), "{error}");
}

#[test]
fn accumulated_batches_are_one_batch() {
    let data = waves(24);
    let after = |size, accumulation| {
        let options = options().epochs(1).accumulation(accumulation).decay(Decay::Constant).warm_up(0.0);
        let trainer = Trainer::new(predictor(data.task().clone()), options).unwrap();
        let mut source = DatasetBatches::new(&data, size).unwrap();
        trainer.fit_batches(&mut source, cross_entropy, |_| Ok(None), go_on).unwrap()
    };
    let (one, pieces) = (after(24, 1), after(6, 4));
    assert!((one.history[0].train.loss - pieces.history[0].train.loss).abs() < 1e-6);
    assert!((one.history[0].gradient_norm - pieces.history[0].gradient_norm).abs() < 1e-5);
}

#[test]
fn the_metric_picks_the_epoch() {
    let data = waves(16);
    let mut epoch = 0.0;
    let metric = |_: &Predictor| {
        epoch += 1.0f32;
        Ok(Some((epoch - 3.0).abs()))
    };
    let trainer = Trainer::new(predictor(data.task().clone()), options().patience(2)).unwrap();
    let mut source = DatasetBatches::new(&data, 8).unwrap();
    let trained = trainer.fit_batches(&mut source, cross_entropy, metric, go_on).unwrap();
    assert_eq!((trained.best_epoch, trained.history.len()), (3, 5));
    assert_eq!(trained.history[3].validation.map(|metrics| metrics.loss), Some(1.0));
}

/// So many batches, as announced or not.
struct Source {
    announced: Option<usize>,
    left: usize,
    given: usize,
}

impl BatchSource for Source {
    type Targets = ();

    fn begin(&mut self, _: u64) -> Result<()> {
        self.left = self.given;
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<SeriesBatch<()>>> {
        let left = self.left.checked_sub(1);
        self.left = left.unwrap_or(0);
        Ok(left.map(|_| SeriesBatch { x: Array3::ones((2, 5, 1)), lengths: vec![5, 3], targets: () }))
    }

    fn batches(&self) -> Option<usize> {
        self.announced
    }
}

#[test]
fn sources_that_cannot_be_trained_on() {
    let run = |announced, given, options: TrainerOptions, weight: f64| {
        let trainer = Trainer::new(predictor(Task::Regress { outputs: 1 }), options).unwrap();
        let loss = |z: &Array3<f32>, _: &SeriesBatch<()>| Ok(Loss { value: 1.0, gradient: z.clone(), weight });
        trainer.fit_batches(&mut Source { announced, left: 0, given }, loss, |_| Ok(None), go_on)
    };
    let constant = || options().epochs(2).decay(Decay::Constant).warm_up(0.0);
    assert_eq!(run(None, 3, constant(), 2.0).unwrap().history.len(), 2);
    for (result, expected) in [
        (run(None, 3, options(), 2.0), "the source does not say how many batches it has"),
        (run(Some(3), 2, options(), 2.0), "announced 3 batches, but epoch 1 has another number"),
        (run(Some(2), 3, options(), 2.0), "announced 2 batches"),
        (run(Some(0), 0, constant(), 2.0), "has no batches"),
        (run(Some(3), 3, options(), 0.0), "none in which anything counts"),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let trainer = Trainer::new(predictor(Task::Regress { outputs: 1 }), options()).unwrap();
    let bad =
        |_: &Array3<f32>, _: &SeriesBatch<()>| Ok(Loss { value: 1.0, gradient: Array3::zeros((1, 1, 1)), weight: 1.0 });
    let error = trainer.fit_batches(&mut Source { announced: Some(1), left: 0, given: 1 }, bad, |_| Ok(None), go_on);
    assert!(error.unwrap_err().to_string().contains("gradient has shape [1, 1, 1]"));
}

#[test]
fn several_labels_at_once_are_learned() {
    let task = Task::multi_label(["fast", "high"]);
    let labels = Array2::from_shape_fn((48, 2), |(i, label)| (i >> label) % 2 == 1);
    let wave = |i: usize| {
        let (frequency, height) = (if labels[[i, 0]] { 1.3 } else { 0.3 }, if labels[[i, 1]] { 2.0 } else { 0.5 });
        Array2::from_shape_fn((12 + i % 5, 1), |(t, _)| height * (frequency * t as f32 + 1.7 * i as f32).sin())
    };
    let data = Dataset::new(&task, (0..48).map(wave).collect(), Targets::Labels(labels.clone())).unwrap();
    let options = TrainerOptions::default().epochs(40).learning_rate(1e-2).class_weights([1.0, 2.0]);
    let trained = Trainer::new(predictor(task.clone()), options.clone()).unwrap().fit(&data, go_on).unwrap();
    let last = trained.history.last().unwrap();
    assert!(last.train.accuracy.unwrap() > 0.9, "{last:?}");
    // what is measured, by definition; saved and read again
    let read = Predictor::from_bytes(&trained.predictor.to_bytes().unwrap()).unwrap();
    assert_eq!(read.task(), &task);
    let logits = read.predict_series(data.series()).unwrap();
    let metrics = evaluate(&read, &data, &options).unwrap();
    let right = logits.iter().zip(&labels).filter(|(z, label)| (**z > 0.0) == **label).count();
    let of = |z: f32| 1.0 / (1.0 + (-f64::from(z)).exp());
    let plain = logits.iter().zip(&labels).map(|(&z, &label)| -(if label { of(z) } else { 1.0 - of(z) }).ln());
    assert_eq!(metrics.accuracy, Some(right as f32 / 96.0));
    let plain = plain.sum::<f64>() / 96.0;
    assert!((f64::from(metrics.plain_loss.unwrap()) - plain).abs() < 1e-5, "{metrics:?} {plain}");

    assert!(matches!(KernelPredictor::fit(&data, 0), Err(Error::Data(_))));
    let wrong = Dataset::new(&task, vec![Array2::ones((2, 1)); 3], Targets::Labels(Array2::default((3, 1))));
    assert!(wrong.unwrap_err().to_string().contains("the labels have shape [3, 1], expected [3, 2]"));
    let wrong = Dataset::new(&task, vec![Array2::ones((2, 1)); 2], Targets::Classes(vec![0, 1]));
    assert!(wrong.unwrap_err().to_string().contains("give Targets::Labels"));
}

#[test]
fn frames_without_a_class_do_not_count() {
    const NONE: usize = Targets::IGNORED;
    let z = array![[[1.0, -1.0], [0.5, 2.0], [3.0, 0.0]], [[0.0, 1.0], [9.0, 9.0], [7.0, 7.0]]];
    let labels = array![[0, NONE, 1], [NONE, 1, 0]];
    let loss = CrossEntropy::new().class_weights([2.0, 1.0]);
    let ignoring = loss.evaluate_sequences(&z, &labels, Some(&[3, 1])).unwrap();
    let left = loss.evaluate(&array![[1.0, -1.0], [3.0, 0.0]], &[0, 1]).unwrap();
    assert_eq!((ignoring.value, ignoring.weight), (left.value, 3.0));
    assert_eq!(ignoring.gradient.slice(s![0, 0, ..]), left.gradient.row(0));
    assert_eq!(ignoring.gradient.slice(s![0, 2, ..]), left.gradient.row(1));
    assert!(
        ignoring
            .gradient
            .slice(s![0, 1, ..])
            .iter()
            .chain(&ignoring.gradient.index_axis(Axis(0), 1))
            .all(|&g| g == 0.0)
    );

    // in training: the metrics are those of the frames that have one
    let task = Task::classify_frames(["low", "high"]);
    let series: Vec<_> = (0..12).map(|i| Array2::from_shape_fn((8, 1), |(t, _)| ((t + i) as f32).sin())).collect();
    let class = |i: usize, t: usize| {
        if (t + i).is_multiple_of(3) || i == 5 { NONE } else { usize::from(series[i][[t, 0]] > 0.0) }
    };
    let classes: Vec<Vec<usize>> = (0..12).map(|i| (0..8).map(|t| class(i, t)).collect()).collect();
    let data = Dataset::new(&task, series.clone(), Targets::FrameClasses(classes.clone())).unwrap();
    let options = TrainerOptions::default().epochs(25).learning_rate(1e-2).batch_size(1).class_weights([1.0, 3.0]);
    let trained = Trainer::new(predictor(task.clone()), options.clone()).unwrap().fit(&data, go_on).unwrap();
    let metrics = evaluate(&trained.predictor, &data, &options).unwrap();
    let (mut right, mut count) = (0, 0);
    for (series, classes) in series.iter().zip(&classes) {
        let z = trained.predictor.predict_frames(&series.view().insert_axis(Axis(0))).unwrap();
        for (t, &class) in classes.iter().enumerate().filter(|(_, class)| **class != NONE) {
            right += usize::from((z[[0, t, 1]] > z[[0, t, 0]]) == (class == 1));
            count += 1;
        }
    }
    assert_eq!(metrics.accuracy, Some(right as f32 / count as f32));
    assert!(right * 10 > count * 9, "{right} of {count}");
    let nothing = Dataset::new(&task, series, Targets::FrameClasses(vec![vec![NONE; 8]; 12]));
    assert!(nothing.unwrap_err().to_string().contains("no frame has a class"));
}

#[test]
fn numbers_of_frames_that_there_are_none_of_do_not_count() {
    const NONE: f32 = f32::NAN;
    let y = array![[[1.0f32, -1.0], [0.5, 2.0], [3.0, 0.0]], [[0.0, 1.0], [9.0, 9.0], [7.0, 7.0]]];
    let targets = array![[[0.0, NONE], [NONE, NONE], [1.0, 5.0]], [[NONE, 3.0], [0.0, 0.0], [f32::INFINITY, 0.0]]];
    let ignoring = RegressionLoss::MeanSquaredError.evaluate_sequences(&y, &targets, Some(&[3, 1])).unwrap();
    // errors of 1, 2, −5 and −2
    assert_eq!((ignoring.value, ignoring.weight), (34.0 / 4.0, 2.0));
    let mut expected = Array3::zeros((2, 3, 2));
    for (place, error) in [((0, 0, 0), 1.0), ((0, 2, 0), 2.0), ((0, 2, 1), -5.0), ((1, 0, 1), -2.0)] {
        expected[place] = error / 2.0;
    }
    assert_eq!(ignoring.gradient, expected);
    let nothing = RegressionLoss::MeanSquaredError.evaluate_sequences(&y, &Array3::from_elem((2, 3, 2), NONE), None);
    let nothing = nothing.unwrap();
    assert_eq!((nothing.value, nothing.weight, nothing.gradient), (0.0, 0.0, Array3::zeros((2, 3, 2))));

    // in training: the running mean of what was seen, of which every third frame is known, and of one series nothing
    let task = Task::RegressFrames { outputs: 1 };
    let series: Vec<_> = (0..24).map(|i| Array2::from_shape_fn((8, 1), |(t, _)| ((t * t + i) as f32).sin())).collect();
    let mean = |i: usize, t: usize| 1000.0 + 50.0 * series[i].slice(s![..=t, 0]).mean().unwrap();
    let known = |i: usize, t: usize| (t + i).is_multiple_of(3) && i != 5;
    let numbers = |gap: f32| {
        let number = |i, t| if known(i, t) { mean(i, t) } else { gap };
        let all = (0..24).map(|i| Array2::from_shape_fn((8, 1), |(t, _)| number(i, t))).collect();
        Dataset::new(&task, series.clone(), Targets::FrameValues(all)).unwrap()
    };
    let options = TrainerOptions::default().epochs(30).learning_rate(1e-2).batch_size(1);
    let fit =
        |data: &Dataset| Trainer::new(predictor(task.clone()), options.clone()).unwrap().fit(data, go_on).unwrap();
    let data = numbers(NONE);
    let trained = fit(&data);
    // they have no say in the normalization, the steps and the metrics
    let normalization = trained.predictor.output_normalization().unwrap();
    let all: Vec<_> = (0..24).flat_map(|i| (0..8).map(move |t| (i, t))).filter(|&(i, t)| known(i, t)).collect();
    let expected = all.iter().map(|&(i, t)| f64::from(mean(i, t))).sum::<f64>() / all.len() as f64;
    assert!((f64::from(normalization.mean()[0]) - expected).abs() < 0.01, "{normalization:?} {expected}");
    let metrics = evaluate(&trained.predictor, &data, &options).unwrap();
    let predicted = |i: usize| trained.predictor.predict_frames(&series[i].view().insert_axis(Axis(0))).unwrap();
    let predicted: Vec<_> = (0..24).map(predicted).collect();
    let error = |&(i, t): &(usize, usize)| f64::from((predicted[i][[0, t, 0]] - mean(i, t)) / normalization.scale()[0]);
    let squares = all.iter().map(error).map(|e| e * e).sum::<f64>() / all.len() as f64;
    assert!((f64::from(metrics.loss) - squares).abs() < 1e-4, "{metrics:?} {squares}");
    assert!(metrics.loss < 0.3, "{metrics:?}");

    // such a series is no step: what is left out and what has no numbers are the same
    let only =
        |i: usize| Dataset::new(&task, vec![series[i].clone()], Targets::FrameValues(vec![Array2::ones((8, 1))]));
    let with_others = |i: usize| {
        let all = (0..24).map(|j| Array2::from_elem((8, 1), if i == j { 1.0 } else { NONE })).collect();
        Dataset::new(&task, series.clone(), Targets::FrameValues(all))
    };
    let constant = options.epochs(2).normalize(false).decay(Decay::Constant).warm_up(0.0);
    let [given, expected] = [with_others(4), only(4)].map(|data| {
        Trainer::new(predictor(task.clone()), constant.clone()).unwrap().fit(&data.unwrap(), go_on).unwrap()
    });
    assert_eq!(parameters(&given.predictor), parameters(&expected.predictor));
    assert_eq!(given.history, expected.history);
}

#[test]
fn binary_cross_entropy_by_definition() {
    let (z, t) = (array![[0.3f32, -2.0, 1.5], [40.0, -0.7, 0.0]], array![[1.0f32, 0.0, 0.25], [0.0, 1.0, 1.0]]);
    let (w, p, smoothing) = ([1.0f32, 0.5, 2.0], [3.0f32, 1.0, 0.5], 0.2);
    let loss = BinaryCrossEntropy::new().weights(w).positive_weights(p).label_smoothing(smoothing);
    let value = |z: &Array2<f32>| {
        let mut sum = 0.0;
        for ((i, label), &z) in z.indexed_iter() {
            let (z, t) = (f64::from(z), f64::from(t[[i, label]]) * 0.8 + 0.1);
            let (w, p) = (f64::from(w[label]), f64::from(p[label]));
            // 1 − sigmoid(z) = sigmoid(−z)
            let log = |z: f64| -(1.0 + (-z).exp()).ln();
            sum -= w * (p * t * log(z) + (1.0 - t) * log(-z));
        }
        sum / 6.0
    };
    let found = loss.evaluate(&z, &t).unwrap();
    assert!((f64::from(found.value) - value(&z)).abs() < 1e-6, "{} {}", found.value, value(&z));
    assert_eq!(found.weight, 2.0);
    for (place, &slope) in found.gradient.indexed_iter() {
        let at = |by: f32| {
            let mut z = z.clone();
            z[place] += by;
            value(&z)
        };
        let expected = (at(1.0 / 64.0) - at(-1.0 / 64.0)) * 32.0;
        assert!((f64::from(slope) - expected).abs() < 2e-5, "{place:?}: {slope} {expected}");
    }
    let far = BinaryCrossEntropy::new().evaluate(&array![[1e30, -1e30]], &array![[0.0, 0.0]]).unwrap();
    assert_eq!((far.value, far.gradient), (5e29, array![[0.5, 0.0]]));
    for (loss, targets) in [
        (BinaryCrossEntropy::new().weights([1.0]), &t),
        (BinaryCrossEntropy::new().positive_weights([1.0, -1.0, 1.0]), &t),
        (BinaryCrossEntropy::new().label_smoothing(2.0), &t),
        (BinaryCrossEntropy::new(), &array![[1.0, 0.0, 1.5], [0.0, 0.0, 0.0]]),
    ] {
        assert!(matches!(loss.evaluate(&z, targets), Err(Error::Option { .. } | Error::Targets(_))));
    }
}

#[test]
fn parts_and_steps_in_which_no_frame_has_a_class() {
    let task = Task::classify_frames(["low", "high"]);
    let series: Vec<_> = (0..10).map(|i| Array2::from_shape_fn((8, 1), |(t, _)| ((t + i) as f32).sin())).collect();
    let only =
        |i: usize| Targets::FrameClasses((0..10).map(|j| vec![if i == j { 1 } else { Targets::IGNORED }; 8]).collect());
    let data = Dataset::new(&task, series.clone(), only(4)).unwrap();
    let options =
        TrainerOptions::default().epochs(2).batch_size(1).normalize(false).decay(Decay::Constant).warm_up(0.0);
    let fit = |data, options: &TrainerOptions| {
        Trainer::new(predictor(task.clone()), options.clone()).unwrap().fit(data, go_on)
    };

    // such a step is none: the optimiser does not go on by its momentum
    let alone = Dataset::new(&task, vec![series[4].clone()], Targets::FrameClasses(vec![vec![1; 8]])).unwrap();
    let [given, expected] = [&data, &alone].map(|data| fit(data, &options).unwrap());
    assert_eq!(parameters(&given.predictor), parameters(&expected.predictor));
    assert_eq!(given.history, expected.history);

    // and nothing can be validated on, or learned from, such a part
    for seed in 0..3 {
        let error = fit(&data, &options.clone().validation_fraction(0.5).seed(seed)).unwrap_err().to_string();
        assert!(error.contains("part has a target"), "{error}");
    }
}
