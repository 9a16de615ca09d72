//! Trainings of several ranks, here threads joined by channels: they equal those of one, and nothing that happens to one rank leaves
//! another waiting.

use std::ops::ControlFlow;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use hymba::ndarray::{Array1, Array2, ArrayD};
use hymba::train::{
    AdamWOptions, Collective, Dataset, Parameters, Progress, Stopped, Targets, Threads, Trained, Trainer,
    TrainerOptions, TrainingData,
};
use hymba::{Error, HymbaOptions, Normalization, Predictor, Result, Task};

#[path = "distributed/batches.rs"]
mod batches;
#[cfg(feature = "lm")]
#[path = "common/tiny_lm.rs"]
mod tiny_lm;

type Weights = Vec<(String, ArrayD<f32>)>;

fn go_on(_: &Progress, _: &Predictor) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn weights(of: &impl Parameters) -> Weights {
    let mut all = Vec::new();
    of.visit(&mut |name, array| all.push((name.to_string(), array.to_owned())));
    all
}

fn close(given: &Weights, expected: &Weights) {
    for ((name, given), (_, expected)) in given.iter().zip(expected) {
        let furthest = given.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(furthest <= 1e-6, "{name} is off by {furthest}");
    }
}

/// What `work` of each rank comes to, in their order: `None` if it panicked. All must end within a minute, or this panics.
fn ranks<T: Send + 'static>(count: usize, work: impl Fn(Threads) -> T + Clone + Send + 'static) -> Vec<Option<T>> {
    let (sender, receiver) = channel();
    for rank in Threads::new(count) {
        let (work, sender, number) = (work.clone(), sender.clone(), rank.rank());
        thread::spawn(move || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(rank))).ok();
            sender.send((number, done))
        });
    }
    let next = |_| receiver.recv_timeout(Duration::from_secs(60)).expect("a rank waits for ever");
    let mut all: Vec<_> = (0..count).map(next).collect();
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, done)| done).collect()
}

/// As [`ranks`], of which none may panic.
fn all_ranks<T: Send + 'static>(count: usize, work: impl Fn(Threads) -> T + Clone + Send + 'static) -> Vec<T> {
    ranks(count, work).into_iter().map(|done| done.expect("no panic")).collect()
}

/// Series of 1 to 23 frames.
fn series(count: usize) -> Vec<Array2<f32>> {
    let number = |i: usize, t: usize, j: usize| 30.0 + 4.0 * (0.4 * t as f32 + 1.9 * i as f32 + j as f32).sin();
    (0..count).map(|i| Array2::from_shape_fn((1 + i * 7 % 23, 2), |(t, j)| number(i, t, j))).collect()
}

/// A class of every frame, one of them rare.
fn frames(count: usize) -> Dataset {
    let series = series(count);
    let class = |i: usize, t: usize| if (i + t).is_multiple_of(7) { 2 } else { (i + t / 3) % 2 };
    let classes = series.iter().enumerate().map(|(i, x)| (0..x.nrows()).map(|t| class(i, t)).collect()).collect();
    Dataset::new(&Task::classify_frames(["a", "b", "c"]), series, Targets::FrameClasses(classes)).unwrap()
}

/// A number of every series.
fn numbers(count: usize) -> Dataset {
    let targets = Targets::Values(Array2::from_shape_fn((count, 1), |(i, _)| (i % 5) as f32));
    Dataset::new(&Task::Regress { outputs: 1 }, series(count), targets).unwrap()
}

/// Two numbers of every frame, some of which there are none of.
fn frame_numbers(count: usize) -> Dataset {
    let series = series(count);
    let number = |i: usize, t: usize, j: usize| match (i + t + 2 * j) % 5 {
        0 => f32::NAN,
        _ if i.is_multiple_of(4) => f32::NAN,
        rest => rest as f32 + j as f32,
    };
    let targets =
        series.iter().enumerate().map(|(i, x)| Array2::from_shape_fn((x.nrows(), 2), |(t, j)| number(i, t, j)));
    let targets = Targets::FrameValues(targets.collect());
    Dataset::new(&Task::RegressFrames { outputs: 2 }, series, targets).unwrap()
}

fn options() -> TrainerOptions {
    // the gradient by the bias of keys is 0 but for rounding, of which Adam makes whole steps
    let adamw = AdamWOptions::default().rate_for("*.k_proj.bias", 0.0);
    TrainerOptions::default().adamw(adamw).epochs(1).batch_size(10)
}

fn trainer(data: &Dataset, options: TrainerOptions) -> Trainer {
    let encoder = HymbaOptions::new(2).hidden_size(16).num_heads(2).num_layers(2).window_size(9);
    Trainer::new(Predictor::build(encoder, data.task().clone()).unwrap(), options).unwrap()
}

fn train_on(count: usize, data: &Dataset, options: &TrainerOptions) -> Vec<Trained> {
    let (data, options) = (data.clone(), options.clone());
    all_ranks(count, move |mut rank| trainer(&data, options.clone()).fit_on(&data, &mut rank, go_on).expect("no error"))
}

// ---- several ranks equal one ----

#[test]
fn any_number_of_ranks_comes_to_the_weights_of_one() {
    let weighted = options().class_weights([1.0, 2.0, 9.0]);
    for (data, options) in [
        (frames(37), weighted.clone()),
        (frames(37), weighted.batch_size(5).accumulation(2).average(0.9).validation_fraction(0.3)),
        (numbers(41), options().validation_fraction(0.2)),
        (frame_numbers(37), options().validation_fraction(0.2).batch_size(3)),
        // some ranks have nothing in a step
        (numbers(5), options().batch_size(2)),
    ] {
        let alone = trainer(&data, options.clone()).fit(&data, |_| ControlFlow::Continue(())).unwrap();
        for count in [2, 3] {
            let all = train_on(count, &data, &options);
            for trained in &all {
                assert_eq!(weights(&trained.predictor), weights(&all[0].predictor));
                assert_eq!(trained.history, all[0].history);
            }
            close(&weights(&all[0].predictor), &weights(&alone.predictor));
            for (given, expected) in all[0].history.iter().zip(&alone.history) {
                assert!((given.train.loss - expected.train.loss).abs() <= 1e-6, "{given:?} {expected:?}");
                assert_eq!(given.train.accuracy, expected.train.accuracy);
                let [given, expected] = [given, expected].map(|epoch| epoch.validation.map(|metrics| metrics.loss));
                assert!(given.zip(expected).is_none_or(|(x, y)| (x - y).abs() <= 1e-6), "{given:?} {expected:?}");
            }
            let again = train_on(count, &data, &options);
            assert_eq!(weights(&again[1].predictor), weights(&all[0].predictor), "a repeat");
        }
    }
}

#[test]
fn ranks_that_have_parts_of_the_data_come_to_the_weights_of_one_that_has_all() {
    // one step an epoch, so that the order has no say
    for data in [frames(25), numbers(25)] {
        let mut options = options().epochs(4).batch_size(25);
        if matches!(data.targets(), Targets::FrameClasses(_)) {
            options = options.class_weights([1.0, 2.0, 9.0]);
        }
        let alone = trainer(&data, options.clone()).fit(&data, |_| ControlFlow::Continue(())).unwrap();
        let all = all_ranks(3, move |mut rank| {
            // 17, 7 and 1
            let range = [0..17, 17..24, 24..25][rank.rank()].clone();
            let series = data.series()[range.clone()].to_vec();
            let targets = match data.targets() {
                Targets::FrameClasses(all) => Targets::FrameClasses(all[range].to_vec()),
                Targets::Values(all) => Targets::Values(all.select(hymba::ndarray::Axis(0), &Vec::from_iter(range))),
                _ => unreachable!(),
            };
            let mine = Dataset::new(data.task(), series, targets).unwrap();
            trainer(&data, options.clone()).fit_on(TrainingData::new(&mine).sharded(), &mut rank, go_on).unwrap()
        });
        for trained in &all {
            assert_eq!(weights(&trained.predictor), weights(&all[0].predictor));
            assert_eq!(trained.history, all[0].history);
            for (given, expected) in trained.history.iter().zip(&alone.history) {
                assert!((given.train.loss - expected.train.loss).abs() <= 2e-6, "{given:?} {expected:?}");
            }
            let [given, expected] = [trained, &alone].map(|of| of.predictor.input_normalization().unwrap());
            let relative = |x: &f32, y: &f32| (x - y).abs() <= 1e-6 * y.abs();
            assert!(given.mean().iter().zip(expected.mean()).all(|(x, y)| relative(x, y)));
            assert!(given.scale().iter().zip(expected.scale()).all(|(x, y)| relative(x, y)));
        }
        close(&weights(&all[0].predictor), &weights(&alone.predictor));
    }
}

#[test]
fn a_training_goes_on_with_another_number_of_ranks() {
    let (data, folder) = (numbers(41), tempfile::tempdir().unwrap());
    let options = options().epochs(4);
    let whole = trainer(&data, options.clone()).fit(&data, |_| ControlFlow::Continue(())).unwrap();
    let path = folder.path().join("run");
    let (of_ranks, to) = (data.clone(), path.clone());
    let stopped = all_ranks(3, move |mut rank| {
        // rank 0 alone writes, so the others may have any folder
        let to = if rank.rank() == 0 { to.clone() } else { to.join("nowhere") };
        let trainer = trainer(&of_ranks, options.clone().checkpoint(to));
        trainer.fit_on(&of_ranks, &mut rank, |progress, _| match progress.epoch {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
    });
    assert!(stopped.iter().all(|trained| trained.as_ref().unwrap().stopped == Stopped::Callback));
    assert!(!path.join("nowhere").exists());
    let (of_ranks, from) = (data.clone(), path.clone());
    let all = all_ranks(2, move |mut rank| {
        let stop_after_3 = |progress: &Progress, _: &Predictor| match &progress.finished {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        };
        Trainer::resume(&from).unwrap().fit_on(&of_ranks, &mut rank, stop_after_3).unwrap()
    });
    assert_eq!(all[1].history.len(), 3);
    let end = Trainer::resume(&path).unwrap().fit(&data, |_| ControlFlow::Continue(())).unwrap();
    close(&weights(&end.predictor), &weights(&whole.predictor));
}

#[test]
fn a_sharded_training_goes_on_whichever_rank_has_which_series() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    // one step an epoch, so that the order has no say
    let options = options().epochs(3).batch_size(30).validation_fraction(0.25);
    let begin = options.clone();
    // series in two orders, some of which a rank may have none of to train on
    let run = move |parts: &[&[usize]], stop: usize, path: Option<std::path::PathBuf>| {
        let (parts, options) = (parts.iter().map(|part| part.to_vec()).collect::<Vec<_>>(), begin.clone());
        all_ranks(parts.len(), move |mut rank| {
            let (data, mine) = (numbers(24), &parts[rank.rank()]);
            let series = mine.iter().map(|&i| data.series()[i].clone()).collect();
            let targets = Targets::Values(Array2::from_shape_fn((mine.len(), 1), |(i, _)| (mine[i] % 5) as f32));
            let mine = Dataset::new(data.task(), series, targets).unwrap();
            let options = path.iter().fold(options.clone(), |options, path| options.checkpoint(path));
            let trainer = match &path {
                Some(path) if path.join("training.json").exists() => Trainer::resume(path).unwrap(),
                _ => trainer(&data, options),
            };
            // nobody asks whether there is a training after another has begun it
            rank.sum(&mut [0.0]).unwrap();
            trainer.fit_on(TrainingData::new(&mine).sharded(), &mut rank, |progress, _| {
                let done = progress.finished.is_some() && progress.epoch == stop;
                if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        })
    };
    let all: Vec<usize> = (0..24).collect();
    let odd_and_even: Vec<usize> = all.iter().map(|i| (2 * i) % 24 + i / 12).collect();
    let whole: Vec<_> = run(&[&all], 9, None).into_iter().map(Result::unwrap).collect();
    run(&[&all[..9], &all[9..]], 1, Some(path.clone())).into_iter().for_each(|done| drop(done.unwrap()));
    let thirds = [&odd_and_even[..1], &odd_and_even[1..12], &odd_and_even[12..]];
    run(&thirds, 2, Some(path.clone())).into_iter().for_each(|done| drop(done.unwrap()));
    // other data are not taken for the same
    for refused in run(&[&all[..9], &all[10..]], 9, Some(path.clone())) {
        assert!(matches!(refused, Err(Error::Data(_))));
    }
    for trained in run(&[&all[..12], &all[12..]], 9, Some(path)) {
        let trained = trained.unwrap();
        close(&weights(&trained.predictor), &weights(&whole[0].predictor));
        for (given, expected) in trained.history.iter().zip(&whole[0].history) {
            let [given, expected] = [given, expected].map(|epoch| epoch.validation.unwrap().loss);
            assert!((given - expected).abs() <= 2e-6, "{given} {expected}");
        }
    }
}

/// A part is validated on even where all series are equal.
#[test]
fn equal_series_of_ranks_are_divided() {
    let trained = all_ranks(2, |mut rank| {
        let task = Task::Regress { outputs: 1 };
        let data = Dataset::new(&task, vec![Array2::ones((9, 2)); 6], Targets::Values(Array2::ones((6, 1)))).unwrap();
        let trainer = trainer(&data, options().validation_fraction(0.25));
        trainer.fit_on(TrainingData::new(&data).sharded(), &mut rank, go_on).unwrap()
    });
    assert!(trained[0].history[0].validation.is_some());
    assert_eq!(trained[0].history, trained[1].history);
}

// ---- what happens to one happens to all ----

/// Every rank's error, of which the one at `fault` is its own.
fn errors<T>(all: Vec<Result<T>>, fault: usize) -> Vec<String> {
    let errors = all.into_iter().map(|done| done.err().expect("an error"));
    errors
        .enumerate()
        .map(|(rank, error)| {
            assert_eq!(matches!(error, Error::Collective(_)), rank != fault, "rank {rank}: {error}");
            error.to_string()
        })
        .collect()
}

/// Rank 1 has a target whose loss is past what f32 holds.
fn wild(rank: usize) -> Dataset {
    let target = |i: usize| if rank == 1 && i == 3 { 1e25 } else { (i % 3) as f32 };
    let targets = Targets::Values(Array2::from_shape_fn((12, 1), |(i, _)| target(i)));
    Dataset::new(&Task::Regress { outputs: 1 }, series(12), targets).unwrap()
}

#[test]
fn a_loss_that_is_not_finite_on_one_rank() {
    let run = |skip| {
        all_ranks(3, move |mut rank| {
            let mine = wild(rank.rank());
            let options = options().normalize(false).batch_size(6).epochs(2).skip_not_finite(skip);
            trainer(&mine, options).fit_on(TrainingData::new(&mine).sharded(), &mut rank, go_on)
        })
    };
    for done in run(0) {
        let error = done.unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
    }
    // the step is left out on all
    let all: Vec<_> = run(2).into_iter().map(Result::unwrap).collect();
    for trained in &all {
        assert_eq!(trained.history.iter().map(|epoch| epoch.skipped).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(weights(&trained.predictor), weights(&all[0].predictor));
    }
}

#[test]
fn an_error_on_one_rank() {
    // before the first step: data of another task
    let all = all_ranks(3, |mut rank| {
        let data = if rank.rank() == 2 { frames(9) } else { numbers(9) };
        trainer(&numbers(9), options()).fit_on(TrainingData::new(&data).sharded(), &mut rank, go_on)
    });
    let said = errors(all, 2);
    assert!(said[0].contains("rank 2"), "{}", said[0]);

    // between epochs: rank 0 cannot write
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let all = all_ranks(2, move |mut rank| {
        let data = numbers(9);
        let trainer = trainer(&data, options().epochs(3).checkpoint(&path));
        trainer.fit_on(&data, &mut rank, |progress, _| {
            if progress.epoch == 2 {
                let _ = std::fs::remove_dir_all(&path);
            }
            ControlFlow::Continue(())
        })
    });
    let said = errors(all, 0);
    assert!(said[1].contains("rank 0"), "{}", said[1]);
}

#[test]
fn a_callback_that_stops() {
    for (epoch, batch, finished) in [(1, 1, false), (1, 5, false), (2, 5, true)] {
        let all = all_ranks(3, move |mut rank| {
            let data = numbers(41);
            let mut calls = 0;
            let trained = trainer(&data, options().epochs(2)).fit_on(&data, &mut rank, |progress, _| {
                calls += 1;
                let here = (progress.epoch, progress.batch, progress.finished.is_some());
                if here == (epoch, batch, finished) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            (trained.unwrap(), calls)
        });
        let calls = if finished { 12 } else { batch };
        for (i, (trained, called)) in all.iter().enumerate() {
            assert_eq!((trained.stopped, *called), (Stopped::Callback, if i == 0 { calls } else { 0 }));
            assert_eq!(weights(&trained.predictor), weights(&all[0].0.predictor));
        }
    }
}

/// A rank that fails in its own way after so many sums of gradients.
struct Failing {
    rank: Threads,
    sums: usize,
    fail: fn(&mut [f32]),
}

impl Collective for Failing {
    fn rank(&self) -> usize {
        self.rank.rank()
    }
    fn size(&self) -> usize {
        self.rank.size()
    }
    fn sum(&mut self, numbers: &mut [f32]) -> Result<()> {
        self.rank.sum(numbers)?;
        if self.sums == 0 && self.rank() == 1 {
            (self.fail)(numbers);
        }
        self.sums = self.sums.saturating_sub(1);
        Ok(())
    }
    fn sum_f64(&mut self, numbers: &mut [f64]) -> Result<()> {
        self.rank.sum_f64(numbers)
    }
    fn broadcast(&mut self, numbers: &mut [f32]) -> Result<()> {
        self.rank.broadcast(numbers)
    }
}

#[test]
fn a_rank_that_dies() {
    let all = ranks(3, |rank| {
        let data = numbers(41);
        let mut rank = Failing { rank, sums: 2, fail: |_| panic!("a rank dies, as this test wants") };
        trainer(&data, options()).fit_on(&data, &mut rank, go_on)
    });
    assert!(all[1].is_none());
    for rank in [0, 2] {
        let error = all[rank].as_ref().unwrap().as_ref().unwrap_err();
        assert!(matches!(error, Error::Collective(_)) && error.to_string().contains("is gone"), "{error}");
    }
}

#[test]
fn weights_that_differ_are_found() {
    let all = all_ranks(3, |rank| {
        let data = numbers(41);
        let mut rank = Failing { rank, sums: 2, fail: |numbers| numbers[5] = numbers[5].next_up() };
        trainer(&data, options()).fit_on(&data, &mut rank, go_on)
    });
    for done in all {
        let error = done.unwrap_err().to_string();
        assert!(error.contains("the weights after an epoch on rank 1 differ"), "{error}");
    }
}

#[test]
fn what_must_be_the_same_is_compared_at_the_start() {
    let error = |change: fn(usize) -> (Dataset, TrainerOptions)| {
        let all = all_ranks(2, move |mut rank| {
            let (data, options) = change(rank.rank());
            trainer(&data, options).fit_on(&data, &mut rank, go_on)
        });
        let [one, other] = all.try_into().unwrap();
        let [one, other] = [one, other].map(|done: Result<_>| done.unwrap_err().to_string());
        assert_eq!(one, other);
        one
    };
    let found = error(|rank| (numbers(9), options().learning_rate([1e-3, 2e-3][rank])));
    assert!(found.contains("the options"), "{found}");
    let found = error(|rank| (numbers([9, 10][rank]), options()));
    assert!(found.contains("the data"), "{found}");
    // one of them has a part of the data only, or brings a normalization
    for sharded in [true, false] {
        let all = all_ranks(2, move |mut rank| {
            let data = numbers(9);
            let mut predictor = Predictor::build(HymbaOptions::new(2).hidden_size(8), data.task().clone()).unwrap();
            if rank.rank() == 1 && !sharded {
                let normalization = Normalization::new(Array1::zeros(2), Array1::ones(2)).unwrap();
                predictor.set_input_normalization(Some(normalization)).unwrap();
            }
            let mut given = TrainingData::new(&data);
            if rank.rank() == 1 && sharded {
                given = given.sharded();
            }
            Trainer::new(predictor, options()).unwrap().fit_on(given, &mut rank, go_on)
        });
        for done in all {
            let error = done.unwrap_err().to_string();
            assert!(error.contains("the options"), "{error}");
        }
    }

    // and weights need not be: rank 0 has them
    let all = all_ranks(2, |mut rank| {
        let data = numbers(9);
        let mut predictor = Predictor::build(HymbaOptions::new(2).hidden_size(8), data.task().clone()).unwrap();
        if rank.rank() == 1 {
            predictor.visit_mut(&mut |_, mut array| array.fill(0.5));
        }
        Trainer::new(predictor, options()).unwrap().fit_on(&data, &mut rank, go_on).unwrap()
    });
    assert_eq!(weights(&all[0].predictor), weights(&all[1].predictor));
}

// ---- the language model ----

#[cfg(feature = "lm")]
mod lm {
    use hymba::HymbaLm;
    use hymba::lm::LoraOptions;
    use hymba::train::{LmProgress, LmTrained, LmTrainer, LmTrainerOptions, TokenRows};

    use super::*;

    fn rows(from: usize, to: usize) -> TokenRows {
        let row = |i: usize| (0..2 + i * 5 % 17).map(|t| ((i * t + t * t / 3) % 11) as u32).collect();
        let mask = |i: usize| (0..2 + i * 5 % 17).map(|t| !(i + t).is_multiple_of(4)).collect();
        TokenRows::new((from..to).map(row).collect(), Some((from..to).map(mask).collect())).unwrap().bytes(100)
    }

    fn trainer(options: &LmTrainerOptions) -> LmTrainer {
        let model = HymbaLm::build(tiny_lm::config(11), 3).unwrap();
        LmTrainer::new(model, options.clone()).unwrap()
    }

    fn options() -> LmTrainerOptions {
        // of a gradient that is nearly 0, so of rounding, Adam makes steps of the learning rate
        LmTrainerOptions::default().learning_rate(1e-4).batch_size(7).pass_size(2).epochs(1)
    }

    fn go_on(_: &LmProgress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn any_number_of_ranks_comes_to_the_weights_of_one() {
        let (train, validation) = (rows(0, 30), rows(30, 39));
        let alone = trainer(&options()).fit(&train, Some(&validation), go_on).unwrap();
        for count in [2, 3] {
            let run = || -> Vec<LmTrained> {
                let (train, validation) = (train.clone(), validation.clone());
                all_ranks(count, move |mut rank| {
                    let data = TrainingData::new(&train).validation(&validation);
                    trainer(&options()).fit_on(data, &mut rank, go_on).unwrap()
                })
            };
            let (all, again) = (run(), run());
            for trained in &all {
                assert_eq!(weights(&trained.lm), weights(&again[0].lm));
                assert_eq!(trained.history, again[0].history);
            }
            close(&weights(&all[0].lm), &weights(&alone.lm));
            let [given, expected] = [&all[0], &alone].map(|of| of.history[0].validation.unwrap());
            assert_eq!(given.tokens, expected.tokens);
            assert!((given.mean() - expected.mean()).abs() < 1e-6);
        }
    }

    #[test]
    fn weights_that_are_not_trained_must_be_the_same() {
        let error = |seeds: [u64; 2], parts: [bool; 2]| {
            let all = all_ranks(2, move |mut rank| {
                let mut model = HymbaLm::build(tiny_lm::config(11), seeds[rank.rank()]).unwrap();
                if parts[rank.rank()] {
                    model.add_lora(&LoraOptions::default().rank(2).maps(["out_proj"]), 0).unwrap();
                }
                LmTrainer::new(model, options()).unwrap().fit_on(&rows(0, 9), &mut rank, go_on).map(drop)
            });
            let said: Vec<_> = all.into_iter().map(|done| done.err().map(|error| error.to_string())).collect();
            assert_eq!(said[0], said[1]);
            said[0].clone()
        };
        assert_eq!(error([3, 3], [true, true]), None);
        assert!(error([3, 4], [true, true]).is_some_and(|error| error.contains("the weights to begin with")));
        assert!(error([3, 3], [true, false]).is_some_and(|error| error.contains("the options")));
    }

    /// Rows count from 0 on every rank, and lose other numbers there.
    #[test]
    fn ranks_with_parts_drop_for_themselves() {
        let row = TokenRows::new(vec![(0..15).map(|t| t * t % 11).collect()], None).unwrap();
        let loss = |count: usize, dropout: f64| {
            let row = row.clone();
            let all = all_ranks(count, move |mut rank| {
                let mut model = HymbaLm::build(tiny_lm::config(11), 3).unwrap();
                model.add_lora(&LoraOptions::default().rank(2).dropout(dropout), 0).unwrap();
                model.visit_mut(&mut |_, mut array| array.fill(0.1));
                let trainer = LmTrainer::new(model, options().batch_size(count)).unwrap();
                trainer.fit_on(TrainingData::new(&row).sharded(), &mut rank, go_on).unwrap().history[0].train.mean()
            });
            all[0]
        };
        // the same row on each
        assert_eq!(loss(2, 0.0), loss(1, 0.0));
        let [one, two, again] = [1, 2, 2].map(|count| loss(count, 0.3));
        assert!(two != one && two == again, "{one} {two}");
    }

    #[test]
    fn ranks_with_parts_errors_and_callbacks() {
        let whole = options().batch_size(30).epochs(3);
        let alone = trainer(&whole).fit(&rows(0, 30), None, go_on).unwrap();
        let all = all_ranks(2, move |mut rank| {
            let mine = if rank.rank() == 0 { rows(0, 22) } else { rows(22, 30) };
            trainer(&whole).fit_on(TrainingData::new(&mine).sharded(), &mut rank, go_on).unwrap()
        });
        close(&weights(&all[1].lm), &weights(&alone.lm));

        let all = all_ranks(2, |mut rank| {
            // a token that is not in the vocabulary
            let mine = if rank.rank() == 0 { rows(0, 9) } else { TokenRows::new(vec![vec![1, 99]], None).unwrap() };
            trainer(&options()).fit_on(TrainingData::new(&mine).sharded(), &mut rank, go_on)
        });
        errors(all, 1);

        let all = all_ranks(3, |mut rank| {
            let stop = |progress: &LmProgress| match progress.step {
                2 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            };
            trainer(&options()).fit_on(&rows(0, 30), &mut rank, stop).unwrap()
        });
        assert!(all.iter().all(|trained| trained.stopped == Stopped::Callback));
        assert_eq!(weights(&all[0].lm), weights(&all[2].lm));
    }
}
