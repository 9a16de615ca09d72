//! One trial: a model of one pattern learns one task at one rate from one seed, and is tested.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hymba::ndarray::{Array2, Array3, Axis, s};
use hymba::series::{ReadOptions, SeriesSet};
use hymba::train::{AdamW, AdamWOptions, CrossEntropy, Dataset, Schedule, Targets, Trainer, TrainerOptions};
use hymba::{Error as HymbaError, HymbaOptions, Pattern, Predictor, Task, argmax};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::tasks::{Example, Generated};

/// What all trials of a comparison have in common.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Parameters that every model has, about.
    pub parameters: usize,
    pub layers: usize,
    /// `attention_every` of the patterns that have one.
    pub every: usize,
    pub heads: usize,
    /// Of a generated task: steps, and frames in each. Series have the defaults of `TrainerOptions`.
    pub steps: usize,
    pub frames: usize,
    /// Tokens that a frame of a generated task shows: its own, and those before it.
    #[serde(default = "alone")]
    pub shown: usize,
}

/// As it was before there was a choice.
fn alone() -> usize {
    1
}

/// What tells one trial from another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    pub task: String,
    pub pattern: String,
    pub rate: f32,
    pub seed: u64,
}

/// What came of it. The rate is chosen by `validation`; the scores are for the table only.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    pub hidden_size: usize,
    pub parameters: usize,
    /// Steps of the optimiser that were taken.
    pub steps: usize,
    /// Whether training ended with a loss that is not finite.
    pub diverged: bool,
    /// Share of right answers on sequences that neither training nor the test has.
    pub validation: f64,
    /// Share of right answers of the test, at each length.
    pub scores: Vec<(usize, f64)>,
    /// Median of a training step.
    pub step_ms: f64,
    /// Median of a frame of one stream whose window is full, and the bytes that it then remembers.
    pub stream_us: f64,
    pub state_bytes: usize,
}

/// The names of the patterns, in the order of the table.
pub const PATTERNS: [&str; 5] = ["hymba", "jamba", "zamba", "mamba", "attention"];

pub fn pattern(name: &str, every: usize) -> Result<Pattern, String> {
    Ok(match name {
        "hymba" => Pattern::Parallel,
        "jamba" => Pattern::Alternating { attention_every: every },
        "zamba" => Pattern::SharedAttention { attention_every: every },
        "mamba" => Pattern::Mamba,
        "attention" => Pattern::Attention,
        _ => return Err(format!("unknown pattern {name}; there are {}", PATTERNS.join(", "))),
    })
}

/// What is to be learned.
pub enum Work {
    Generated(Generated),
    Series(Box<[Dataset; 2]>),
}

impl Work {
    /// A generated task by its name, or the series in `NAME_TRAIN.ts` and `NAME_TEST.ts`.
    pub fn read(name: &str, data: &Path) -> Result<Self, Box<dyn Error>> {
        let generated = Generated::parse(name);
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data");
        let folders: [PathBuf; 3] = [data.join(name), data.into(), shipped];
        let file = |part: &str| {
            folders.iter().map(|folder| folder.join(format!("{name}_{part}.ts"))).find(|file| file.exists())
        };
        match (generated, file("TRAIN"), file("TEST")) {
            (Ok(task), ..) => Ok(Work::Generated(task)),
            (Err(_), Some(train_file), Some(test_file)) => {
                let read = |path: &Path| SeriesSet::read(path, &ReadOptions::default());
                let (mut train, mut test) = (read(&train_file)?, read(&test_file)?);
                train.fill_missing();
                test.fill_missing();
                let task = train.task()?;
                Ok(Work::Series(Box::new([train.into_dataset(&task)?, test.into_dataset(&task)?])))
            }
            (Err(reason), ..) => {
                Err(format!("{reason}; nor is there a {name}_TRAIN.ts and a {name}_TEST.ts: see --data").into())
            }
        }
    }

    /// The options of a model, but for its width, and what it predicts.
    fn model(&self, settings: &Settings) -> (HymbaOptions, Task) {
        match self {
            Work::Generated(task) => {
                let longest = task.test_lengths().into_iter().max().unwrap_or(1);
                // the last class is that of frames without an answer, which do not count
                let labels = (0..=task.classes()).map(|class| class.to_string());
                (HymbaOptions::new(task.width(settings.shown)).window_size(longest), Task::classify_frames(labels))
            }
            Work::Series(data) => {
                let [train, test] = &**data;
                let longest = train.longest().max(test.longest());
                (HymbaOptions::recommended(train.width()).window_size(longest), train.task().clone())
            }
        }
    }

    /// The options of a model of so many parameters, the head among them, and how many it really has.
    pub fn fitted(&self, pattern: Pattern, settings: &Settings) -> Result<(HymbaOptions, usize), String> {
        let (options, task) = self.model(settings);
        let options = options.num_layers(settings.layers).num_heads(settings.heads).pattern(pattern);
        options.clone().hidden_size(settings.heads).validate().map_err(|error| error.to_string())?;
        let sized = |width: usize| {
            let options = options.clone().hidden_size(width);
            let count = options.num_parameters()?.checked_add((width + 1).checked_mul(task.outputs())?)?;
            Some((options, count))
        };
        let mut best: Option<(usize, HymbaOptions, usize)> = None;
        for width in (1..).map(|heads| heads * settings.heads) {
            let Some((options, count)) = sized(width) else { break };
            let off = count.abs_diff(settings.parameters);
            if best.as_ref().is_none_or(|(least, ..)| off < *least) {
                best = Some((off, options, count));
            }
            if count > settings.parameters {
                break;
            }
        }
        best.map(|(_, options, count)| (options, count)).ok_or_else(|| "no model can be counted".into())
    }

    pub fn run(&self, trial: &Trial, settings: &Settings) -> Result<Outcome, Box<dyn Error>> {
        let (options, parameters) = self.fitted(pattern(&trial.pattern, settings.every)?, settings)?;
        let predictor = Predictor::build(options.clone().seed(trial.seed), self.model(settings).1)?;
        let learned = match self {
            Work::Generated(task) => learn(*task, predictor, trial, settings)?,
            Work::Series(data) => learn_series(data, predictor, trial)?,
        };
        let (stream_us, state_bytes) = stream(&learned.predictor)?;
        Ok(Outcome {
            hidden_size: options.hidden_size,
            parameters,
            steps: learned.steps,
            diverged: learned.diverged,
            validation: learned.validation,
            scores: learned.scores,
            step_ms: learned.step_ms,
            stream_us,
            state_bytes,
        })
    }
}

struct Learned {
    predictor: Predictor,
    steps: usize,
    diverged: bool,
    validation: f64,
    scores: Vec<(usize, f64)>,
    step_ms: f64,
}

/// Seeds of sequences that are no training data: these begin at the seed of the trial.
const VALIDATION: u64 = 1 << 40;
const TEST: u64 = 2 << 40;
/// Answers that a score is the share of, about.
const ANSWERS: usize = 2000;
/// Steps in a row without a wrong answer after which there is nothing left to learn.
const SOLVED: usize = 20;

/// Fresh sequences at every step; of their frames, those with an answer count.
fn learn(
    task: Generated,
    mut predictor: Predictor,
    trial: &Trial,
    settings: &Settings,
) -> Result<Learned, Box<dyn Error>> {
    let steps = settings.steps as u64;
    let schedule = Schedule::cosine(trial.rate, steps).warm_up(steps / 10);
    let mut optimizer = AdamW::new(&predictor, AdamWOptions::default().schedule(schedule).clip_norm(1.0))?;
    let mut weights = vec![1.0; task.classes() + 1];
    weights[task.classes()] = 0.0;
    let loss = CrossEntropy::new().class_weights(weights);
    let mut gradient = predictor.zeros_like();
    let mut rng = ChaCha8Rng::seed_from_u64(trial.seed);
    let batch = (settings.frames / task.length()).max(1);
    let (mut times, mut in_a_row, mut diverged) = (Vec::new(), 0, false);
    for step in 0..steps {
        let examples: Vec<Example> = (0..batch).map(|_| task.example(&mut rng)).collect();
        let (x, labels) = (task.frames(&examples, settings.shown), labels(task, &examples));
        let start = Instant::now();
        let (logits, cache) = predictor.forward_frames_train(&x, None, step)?;
        let loss = loss.evaluate_sequences(&logits, &labels, None)?;
        predictor.backward_frames(&cache, &loss.gradient, &mut gradient)?;
        match optimizer.step(&mut predictor, &mut gradient) {
            Err(HymbaError::NotFinite { .. }) => {
                diverged = true;
                break;
            }
            other => other?,
        };
        times.push(start.elapsed().as_secs_f64());
        in_a_row = if right(task, &examples, &logits) == answers(&examples) { in_a_row + 1 } else { 0 };
        if in_a_row == SOLVED {
            break;
        }
    }
    let measure = |task, seed| measure(task, settings.shown, &predictor, seed);
    let lengths = task.test_lengths().into_iter();
    let scores =
        lengths.map(|length| Ok((length, measure(task.of_length(length), TEST)?))).collect::<hymba::Result<_>>()?;
    let validation = measure(task, VALIDATION)?;
    Ok(Learned { steps: times.len(), diverged, validation, scores, step_ms: 1e3 * median(times), predictor })
}

/// The class of each frame `[b, l]`.
fn labels(task: Generated, examples: &[Example]) -> Array2<usize> {
    Array2::from_shape_fn((examples.len(), examples[0].tokens.len()), |(row, t)| {
        examples[row].answers[t].unwrap_or(task.classes())
    })
}

fn answers(examples: &[Example]) -> usize {
    examples.iter().map(|example| example.answers.iter().flatten().count()).sum()
}

/// Answers that are right in predictions `[b, l, classes + 1]`, of which the last is never one.
fn right(task: Generated, examples: &[Example], predictions: &Array3<f32>) -> usize {
    let mut right = 0;
    for (row, example) in examples.iter().enumerate() {
        for (t, wanted) in example.answers.iter().enumerate() {
            let is = |wanted| argmax(&predictions.slice(s![row..row + 1, t, ..task.classes()]))[0] == wanted;
            right += usize::from(wanted.is_some_and(is));
        }
    }
    right
}

/// The share of right answers on new sequences.
fn measure(task: Generated, shown: usize, predictor: &Predictor, seed: u64) -> hymba::Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let batch = (8192 / task.length()).max(1);
    let (mut all, mut good) = (0, 0);
    // of a task with one answer, 500 sequences
    let mut sequences = 0;
    while all < ANSWERS && sequences < ANSWERS / 4 {
        let examples: Vec<Example> = (0..batch).map(|_| task.example(&mut rng)).collect();
        let prediction = predictor.predict_frames(&task.frames(&examples, shown))?;
        all += answers(&examples);
        good += right(task, &examples, &prediction);
        sequences += batch;
    }
    Ok(good as f64 / all as f64)
}

/// As `TrainerOptions` has it, but for the rate, and a fifth of the series to choose the rate by.
fn learn_series([train, test]: &[Dataset; 2], predictor: Predictor, trial: &Trial) -> Result<Learned, Box<dyn Error>> {
    let start = predictor.clone();
    let options = TrainerOptions::default().learning_rate(trial.rate).seed(trial.seed).validation_fraction(0.2);
    let (mut steps, mut first) = (0, None);
    let trained = Trainer::new(predictor, options)?.fit(train, |progress| {
        if progress.finished.is_none() {
            first.get_or_insert_with(Instant::now);
            steps += 1;
        }
        ControlFlow::Continue(())
    });
    let step_ms = first.map_or(0.0, |first| 1e3 * first.elapsed().as_secs_f64() / steps.max(1) as f64);
    let (predictor, validation, diverged) = match trained {
        Err(HymbaError::NotFinite { .. }) => (start, 0.0, true),
        other => {
            let trained = other?;
            let best = trained.history.get(trained.best_epoch.saturating_sub(1)).and_then(|epoch| epoch.validation);
            (trained.predictor, best.and_then(|metrics| metrics.accuracy).unwrap_or(0.0).into(), false)
        }
    };
    let Targets::Classes(wanted) = test.targets() else { return Err("the series have no classes".into()) };
    let mut good = 0;
    for first in (0..test.num_series()).step_by(32) {
        let some: Vec<usize> = (first..test.num_series().min(first + 32)).collect();
        let (x, lengths) = test.pad(&some)?;
        let prediction = predictor.predict(&x, Some(&lengths))?;
        good += some.iter().zip(argmax(&prediction)).filter(|(i, class)| wanted[**i] == *class).count();
    }
    let scores = vec![(test.longest(), good as f64 / test.num_series() as f64)];
    Ok(Learned { predictor, steps, diverged, validation, scores, step_ms })
}

/// Microseconds of a frame of one stream, and bytes of its state, when the window is full.
fn stream(predictor: &Predictor) -> hymba::Result<(f64, usize)> {
    const FRAMES: usize = 300;
    let model = predictor.encoder();
    let options = model.options();
    let frame = Array2::from_shape_fn((1, options.embed_dim), |(_, i)| if i == 0 { 1.0 } else { 0.0 });
    let mut state = model.new_state(1);
    let filling = frame.view().insert_axis(Axis(1));
    let filling =
        filling.broadcast((1, options.window_size, options.embed_dim)).expect("frames that repeat themselves");
    model.prefill(&filling, &mut state)?;
    let mut times = Vec::with_capacity(FRAMES);
    for _ in 0..FRAMES {
        let start = Instant::now();
        model.step(&frame, &mut state)?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok((1e6 * median(times), state.num_bytes()))
}

pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}
