//! Trainings on batches from anywhere, a source for each rank.

use hymba::ndarray::{Array2, Array3, Ix3};
use hymba::train::{BatchSource, CrossEntropy, DatasetBatches, Decay, Loss, RegressionLoss, SeriesBatch};

use super::*;

/// So many series of each of 3 ranks.
const SHARDS: [std::ops::Range<usize>; 3] = [0..17, 17..24, 24..25];

fn shard(data: &Dataset, range: std::ops::Range<usize>) -> Dataset {
    let Targets::FrameClasses(all) = data.targets() else { panic!("classes of frames") };
    let targets = Targets::FrameClasses(all[range.clone()].to_vec());
    Dataset::new(data.task(), data.series()[range].to_vec(), targets).unwrap()
}

fn cross_entropy(z: &Array3<f32>, batch: &SeriesBatch<Targets>) -> Result<Loss<Ix3>> {
    let Targets::FrameClasses(all) = &batch.targets else { panic!("classes of frames") };
    let label = |(i, t): (usize, usize)| all[i].get(t).copied().unwrap_or(Targets::IGNORED);
    let labels = Array2::from_shape_fn((all.len(), z.dim().1), label);
    CrossEntropy::new().class_weights([1.0, 2.0, 9.0]).evaluate_sequences(z, &labels, Some(&batch.lengths))
}

#[test]
fn any_number_of_ranks_comes_to_the_weights_of_one() {
    let data = frames(25);
    // one step an epoch, so that the order has no say
    let options = options().epochs(4).accumulation(99).average(0.9);
    let train = |count: usize, options: TrainerOptions| {
        let data = data.clone();
        all_ranks(count, move |mut rank| {
            let mine = match count {
                1 => data.clone(),
                2 => shard(&data, [0..24, 24..25][rank.rank()].clone()),
                _ => shard(&data, SHARDS[rank.rank()].clone()),
            };
            let mut source = DatasetBatches::new(&mine, 4).unwrap();
            let trainer = trainer(&data, options.clone());
            trainer.fit_batches_on(&mut source, cross_entropy, |_| Ok(None), &mut rank, go_on).unwrap()
        })
    };
    let alone = &train(1, options.clone())[0];
    for count in [2, 3] {
        let (all, again) = (train(count, options.clone()), train(count, options.clone()));
        for trained in &all {
            assert_eq!(weights(&trained.predictor), weights(&again[0].predictor));
            assert_eq!(trained.history, again[0].history);
            for (given, expected) in trained.history.iter().zip(&alone.history) {
                assert!((given.train.loss - expected.train.loss).abs() <= 2e-6, "{given:?} {expected:?}");
            }
        }
        close(&weights(&all[0].predictor), &weights(&alone.predictor));
    }
}

/// As many batches as are wanted, of what the seed and the rank say; a fault in one of them.
struct Source {
    rank: usize,
    batches: usize,
    announced: Option<usize>,
    given: usize,
    fault: Option<usize>,
    seeds: Vec<u64>,
}

impl Source {
    fn new(rank: usize, batches: usize) -> Self {
        Source { rank, batches, announced: Some(batches), given: 0, fault: None, seeds: Vec::new() }
    }
}

impl BatchSource for Source {
    type Targets = f32;

    fn begin(&mut self, seed: u64) -> Result<()> {
        self.given = 0;
        self.seeds.push(seed);
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<SeriesBatch<f32>>> {
        if self.given == self.batches {
            return Ok(None);
        }
        self.given += 1;
        if self.fault == Some(self.given) {
            return Err(Error::Data("as was asked for".into()));
        }
        let number = |(i, t, j)| ((self.rank * 7 + self.given * 5 + i * 3 + t * 2 + j) as f32).sin();
        let targets = self.given as f32 / 4.0;
        Ok(Some(SeriesBatch { x: Array3::from_shape_fn((2, 6, 2), number), lengths: vec![6, 3], targets }))
    }

    fn batches(&self) -> Option<usize> {
        self.announced
    }
}

/// A loss that may differ from rank to rank.
type RankLoss = fn(usize, &Array3<f32>, &SeriesBatch<f32>) -> Result<Loss<Ix3>>;

fn squares(z: &Array3<f32>, batch: &SeriesBatch<f32>) -> Result<Loss<Ix3>> {
    RegressionLoss::MeanSquaredError.evaluate_sequences(z, &Array3::from_elem(z.dim(), batch.targets), None)
}

/// A training of 2 epochs on each rank, of the batches of `source`.
fn train(
    count: usize,
    options: TrainerOptions,
    source: impl Fn(usize) -> Source + Clone + Send + 'static,
    loss: RankLoss,
) -> Vec<(Result<Trained>, Vec<u64>, usize)> {
    all_ranks(count, move |mut rank| {
        let number = rank.rank();
        let (mut source, mut calls) = (source(number), 0);
        let trained = trainer(&numbers(2), options.clone().epochs(2)).fit_batches_on(
            &mut source,
            |z, batch| loss(number, z, batch),
            // one rank does not measure
            |_| Ok((number < 2).then_some(number as f32)),
            &mut rank,
            |progress, _| {
                calls += usize::from(progress.finished.is_none());
                ControlFlow::Continue(())
            },
        );
        (trained, source.seeds, calls)
    })
}

#[test]
fn ranks_that_have_other_numbers_of_batches() {
    let run = |announced: bool, options: TrainerOptions| {
        let source = move |rank: usize| {
            let source = Source::new(rank, [3, 7, 0][rank]);
            Source { announced: source.announced.filter(|_| announced || rank != 1), ..source }
        };
        train(3, options, source, |_, z, batch| squares(z, batch))
    };
    let known = run(true, options().accumulation(2).decay(Decay::Linear));
    for (trained, seeds, _) in &known {
        let trained = trained.as_ref().unwrap();
        assert_eq!(weights(&trained.predictor), weights(&known[0].0.as_ref().unwrap().predictor));
        assert_eq!(trained.history, known[0].0.as_ref().unwrap().history);
        assert_eq!(seeds, &known[0].1, "one order for all");
        assert!(seeds.len() == 2 && seeds[0] != seeds[1]);
        // the mean of 0 and 1
        assert_eq!(trained.history[1].validation.map(|metrics| metrics.loss), Some(0.5));
        // 7 batches of the second rank, 2 at a time: 8 steps in all, the last of which has the rate of an eighth
        let rate = TrainerOptions::default().learning_rate / 8.0;
        assert!((trained.history[1].learning_rate - rate).abs() < 1e-9, "{:?}", trained.history);
    }
    // of 3 batches the first rank tells the one that ends no step, and each of 4 steps
    assert_eq!(known.iter().map(|(_, _, calls)| *calls).collect::<Vec<_>>(), [2 * (1 + 4), 0, 0]);

    // that one rank does not know its number is an error only where the schedule asks for it
    for (trained, ..) in run(false, options().decay(Decay::Linear)) {
        let error = trained.unwrap_err().to_string();
        assert!(error.contains("does not say how many batches"), "{error}");
    }
    let unknown = run(false, options().decay(Decay::Constant).warm_up(0.0));
    assert!(unknown.iter().all(|(trained, ..)| trained.as_ref().is_ok_and(|trained| trained.history.len() == 2)));

    for (trained, ..) in train(2, options(), |rank| Source::new(rank, 0), |_, z, batch| squares(z, batch)) {
        assert!(trained.unwrap_err().to_string().contains("has no batches"));
    }
}

#[test]
fn what_happens_to_one_source_happens_to_all() {
    let failed = |source: fn(usize) -> Source, loss: RankLoss| {
        train(3, options(), source, loss).into_iter().map(|(trained, ..)| trained).collect::<Vec<_>>()
    };
    fn good(_: usize, z: &Array3<f32>, batch: &SeriesBatch<f32>) -> Result<Loss<Ix3>> {
        squares(z, batch)
    }
    // the first batch, or a later one, which is fetched while the one before is learned from
    for fault in [1, 3] {
        let source = match fault {
            1 => |rank| Source { fault: Some(1).filter(|_| rank == 1), ..Source::new(rank, 4) },
            _ => |rank| Source { fault: Some(3).filter(|_| rank == 1), ..Source::new(rank, 4) },
        };
        let said = errors(failed(source, good), 1);
        assert!(said[1].contains("as was asked for") && said[0].contains("rank 1"), "{said:?}");
    }
    let said = errors(
        failed(|rank| Source { announced: Some(4), ..Source::new(rank, if rank == 2 { 2 } else { 4 }) }, good),
        2,
    );
    assert!(said[2].contains("announced 4 batches"), "{said:?}");
    let said = errors(
        failed(
            |rank| Source::new(rank, 4),
            |rank, z, batch| if rank == 2 { Err(Error::Data("no loss".into())) } else { squares(z, batch) },
        ),
        2,
    );
    assert!(said[2].contains("no loss"), "{said:?}");

    // a loss that is not finite on one
    fn wild(rank: usize, z: &Array3<f32>, batch: &SeriesBatch<f32>) -> Result<Loss<Ix3>> {
        let loss = squares(z, batch)?;
        Ok(Loss { value: if rank == 1 && batch.targets == 0.5 { f32::NAN } else { loss.value }, ..loss })
    }
    for done in failed(|rank| Source::new(rank, 4), wild) {
        assert!(matches!(done, Err(Error::NotFinite { .. })));
    }
    // the step is left out on all, the last of an epoch, too
    let skipping = options().skip_not_finite(2);
    let all = train(3, skipping, |rank| Source::new(rank, [1, 2, 2][rank]), wild);
    for (trained, ..) in &all {
        let trained = trained.as_ref().unwrap();
        assert_eq!(trained.history.iter().map(|epoch| epoch.skipped).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(weights(&trained.predictor), weights(&all[0].0.as_ref().unwrap().predictor));
    }

    // the callback of the first rank
    let all = all_ranks(3, |mut rank| {
        let mut source = Source::new(rank.rank(), 4);
        trainer(&numbers(2), options()).fit_batches_on(
            &mut source,
            squares,
            |_| Ok(None),
            &mut rank,
            |progress, _| {
                if progress.batch == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
        )
    });
    let all: Vec<_> = all.into_iter().map(Result::unwrap).collect();
    for trained in &all {
        assert_eq!((trained.stopped, trained.history.len()), (Stopped::Callback, 0));
        assert_eq!(weights(&trained.predictor), weights(&all[0].predictor));
    }
    // a metric
    let all = all_ranks(2, |mut rank| {
        let (mut source, fails) = (Source::new(rank.rank(), 2), rank.rank() == 0);
        let metric = |_: &Predictor| if fails { Err(Error::Data("no metric".into())) } else { Ok(Some(1.0)) };
        trainer(&numbers(2), options()).fit_batches_on(&mut source, squares, metric, &mut rank, go_on)
    });
    assert!(errors(all, 0)[0].contains("no metric"));
}

#[test]
fn a_training_goes_on_with_other_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let run = |count: usize, epochs: usize, path: std::path::PathBuf| {
        all_ranks(count, move |mut rank| {
            // the same batches on all, so that there are as many for any number of ranks
            let mut source = Source::new(0, 3);
            let trainer = match path.exists() {
                true => Trainer::resume(&path).unwrap(),
                false => trainer(&numbers(2), options().epochs(4).checkpoint(&path)),
            };
            // nobody asks whether the folder exists after another has made it
            rank.sum(&mut [0.0]).unwrap();
            trainer
                .fit_batches_on(
                    &mut source,
                    squares,
                    |_| Ok(None),
                    &mut rank,
                    |progress, _| {
                        let done = progress.finished.is_some() && progress.epoch == epochs;
                        if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                    },
                )
                .unwrap()
        })
    };
    let whole = run(2, 9, folder.path().join("whole"));
    run(3, 1, path.clone());
    // a schedule counts steps: with other numbers of them only one that is constant goes on
    let of_five = |path: &std::path::Path| {
        let source = &mut Source::new(0, 5);
        Trainer::resume(path).unwrap().fit_batches(source, squares, |_| Ok(None), |_| ControlFlow::Continue(()))
    };
    let error = of_five(&path).unwrap_err().to_string();
    assert!(error.contains("5 in an epoch"), "{error}");
    let constant = folder.path().join("constant");
    let rate = options().decay(Decay::Constant).warm_up(0.0).epochs(2).checkpoint(&constant);
    trainer(&numbers(2), rate)
        .fit_batches(
            &mut Source::new(0, 3),
            squares,
            |_| Ok(None),
            |progress| match progress.finished {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            },
        )
        .unwrap();
    assert_eq!(of_five(&constant).unwrap().history.len(), 2);

    run(2, 2, path.clone());
    let end = run(1, 9, path);
    assert_eq!((end[0].history.len(), whole[0].history.len()), (4, 4));
    close(&weights(&end[0].predictor), &weights(&whole[0].predictor));
}
