//! The `compare` example: its tasks can be solved from what a model sees, and not by guessing; its models are of one size, and learn;
//! its results are kept and summed up as they should.

#[path = "../examples/support/picture.rs"]
mod picture;
#[path = "../examples/compare/results.rs"]
mod results;
#[path = "../examples/compare/table.rs"]
mod table;
#[path = "../examples/compare/tasks.rs"]
mod tasks;
#[path = "../examples/compare/trial.rs"]
mod trial;
#[allow(dead_code, reason = "the shares of trials are tested with the search")]
#[path = "../examples/support/trials.rs"]
mod trials;

use std::collections::HashSet;
use std::path::Path;

use hymba::ndarray::s;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use results::{Record, append, is_done, load};
use tasks::{Example, Generated};
use trial::{Outcome, PATTERNS, Settings, Trial, Work, pattern};

const ALL: [&str; 6] =
    ["mqar-4-64", "mqar-16-256", "mqar-64-256-8192", "copying-16-128", "copying-1-3", "induction-256"];

fn task(name: &str) -> Generated {
    Generated::parse(name).unwrap()
}

fn examples(task: Generated, count: usize, seed: u64) -> Vec<Example> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| task.example(&mut rng)).collect()
}

/// How many answers, and how many of them were right, where `answer` says the answer to the tokens so far.
fn score(examples: &[Example], mut answer: impl FnMut(&[usize]) -> usize) -> (usize, usize) {
    let (mut all, mut right) = (0, 0);
    for Example { tokens, answers } in examples {
        for (t, wanted) in answers.iter().enumerate().filter_map(|(t, wanted)| Some((t, (*wanted)?))) {
            all += 1;
            right += usize::from(answer(&tokens[..=t]) == wanted);
        }
    }
    (all, right)
}

/// The value that followed the key the first time.
fn recall(tokens: &[usize], vocabulary: usize) -> usize {
    let (query, past) = tokens.split_last().unwrap();
    let first = past.iter().step_by(2).position(|key| key == query).unwrap();
    tokens[2 * first + 1] - vocabulary / 2
}

/// The token that is not noise whose turn it is.
fn copy(tokens: &[usize]) -> usize {
    let marks = tokens.iter().filter(|&&token| token == 17).count();
    *tokens.iter().filter(|&&token| token < 16).nth(marks - 1).unwrap()
}

/// What followed the special token the first time.
fn look_up(tokens: &[usize]) -> usize {
    tokens[tokens.iter().position(|&token| token == 16).unwrap() + 1]
}

fn solve(task: Generated, tokens: &[usize]) -> usize {
    match task {
        Generated::Mqar { vocabulary, .. } => recall(tokens, vocabulary),
        Generated::Copying { .. } => copy(tokens),
        Generated::Induction { .. } => look_up(tokens),
    }
}

#[test]
fn a_solution_made_by_hand_is_always_right() {
    for name in ALL {
        let task = task(name);
        for length in task.test_lengths() {
            let (all, right) = score(&examples(task.of_length(length), 50, 1), |tokens| solve(task, tokens));
            assert!(all >= 50 && right == all, "{name} at {length}: {right} of {all}");
        }
    }
}

#[test]
fn guesses_are_right_as_often_as_chance_has_it() {
    for name in ALL {
        let task = task(name);
        let mut guess = 0;
        let examples = examples(task, 4000, 2);
        // every class in turn
        let (all, right) = score(&examples, |_| {
            guess += 1;
            guess % task.classes()
        });
        let expected = all as f64 / task.classes() as f64;
        // five standard deviations
        assert!((right as f64 - expected).abs() < 5.0 * expected.sqrt(), "{name}: {right}, not {expected}");
        // and the answers are spread: no class is right much more often than others
        let mut counts = vec![0; task.classes()];
        examples.iter().flat_map(|example| &example.answers).flatten().for_each(|&class| counts[class] += 1);
        let most = *counts.iter().max().unwrap() as f64;
        assert!(most < expected + 6.0 * expected.sqrt() + 6.0, "{name}: {most}, not {expected}");
    }
}

#[test]
fn sequences_are_what_they_are_said_to_be() {
    for name in ALL {
        let task = task(name);
        assert_ne!(examples(task, 20, 3), examples(task, 20, 4));
        assert_eq!(examples(task, 20, 3), examples(task, 20, 3));
        let examples = examples(task, 20, 3);
        for example in &examples {
            assert_eq!((example.tokens.len(), example.answers.len()), (task.length(), task.length()));
            assert!(example.tokens.iter().all(|&token| token < task.tokens()));
            let answers = example.answers.iter().flatten().count();
            let expected = match task {
                Generated::Mqar { pairs, .. } => pairs,
                Generated::Copying { copies, .. } => copies,
                Generated::Induction { .. } => 1,
            };
            assert_eq!(answers, expected, "{name}");
        }
        let x = task.frames(&examples, 2);
        assert_eq!(x.dim(), (20, task.length(), task.width(2)));
        let all = task.tokens();
        for (i, token) in examples[7].tokens.iter().enumerate() {
            let shown = |place: usize| x.slice(s![7, i, place * all..(place + 1) * all]);
            assert_eq!((shown(0)[*token], shown(0).sum()), (1.0, 1.0));
            match i.checked_sub(1) {
                Some(before) => assert_eq!((shown(1)[examples[7].tokens[before]], shown(1).sum()), (1.0, 1.0)),
                None => assert_eq!(shown(1).sum(), 0.0),
            }
            let position = x.slice(s![7, i, 2 * all..]);
            assert!(
                (position.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5,
                "a position weighs as much as a token"
            );
        }
    }
    // keys, and values, are different ones
    for example in examples(task("mqar-16-256"), 50, 5) {
        let distinct = |from: usize| example.tokens[from..32].iter().step_by(2).collect::<HashSet<_>>().len();
        assert_eq!((distinct(0), distinct(1)), (16, 16));
    }
}

/// Small gaps are drawn more often, as (gap + 1)^−0.99.
#[test]
fn gaps_follow_the_power_law() {
    let mut counts = [0usize; 28];
    for example in examples(task("mqar-1-58"), 40_000, 6) {
        let t = example.answers.iter().position(Option::is_some).unwrap();
        counts[(t - 2) / 2] += 1;
    }
    let weights: Vec<f64> = (1..=28).map(|gap| (gap as f64).powf(-0.99)).collect();
    let sum: f64 = weights.iter().sum();
    for (gap, (count, weight)) in counts.iter().zip(&weights).enumerate() {
        let expected = 40_000.0 * weight / sum;
        assert!((*count as f64 - expected).abs() < 5.0 * expected.sqrt(), "gap {gap}: {count}, not {expected}");
    }
}

/// Which pair is meant follows from the key only: the first query asks for each pair equally often.
#[test]
fn places_do_not_tell_the_pair() {
    let mut counts = [0usize; 4];
    for example in examples(task("mqar-4-64"), 40_000, 7) {
        let t = example.answers.iter().position(Option::is_some).unwrap();
        let pair = (0..4).find(|pair| example.tokens[2 * pair] == example.tokens[t]).unwrap();
        counts[pair] += 1;
    }
    for (pair, count) in counts.into_iter().enumerate() {
        assert!((count as f64 - 10_000.0).abs() < 5.0 * 7500f64.sqrt(), "pair {pair}: {count} of 40,000");
    }
}

/// What has been answered is not told: who only knows the values, and leaves out those that came again, is right once in four times.
#[test]
fn values_do_not_come_again_after_their_queries() {
    let (all, right) = score(&examples(task("mqar-4-64"), 10_000, 8), |tokens| {
        let values = tokens[1..8].iter().step_by(2);
        let unseen = values.clone().find(|value| !tokens[8..].contains(value));
        unseen.unwrap_or(&tokens[1]) - 64
    });
    let expected = all as f64 / 4.0;
    assert!((right as f64 - expected).abs() < 5.0 * (expected * 0.75).sqrt(), "{right} of {all}");
}

#[test]
fn keys_come_again_once() {
    for example in examples(task("mqar-8-128"), 1000, 9) {
        for key in example.tokens[..16].iter().step_by(2) {
            assert_eq!(example.tokens.iter().filter(|token| *token == key).count(), 2);
        }
    }
}

#[test]
fn tasks_that_cannot_be() {
    for name in [
        "",
        "mqar",
        "mqar-0-64",
        "mqar-20-64",
        "mqar-80-640-128",
        "copying-16-40",
        "induction-2",
        "other-3",
        "mqar-1-x",
    ] {
        assert!(Generated::parse(name).is_err(), "{name}");
    }
}

// ---- trials ----

const SETTINGS: Settings =
    Settings { parameters: 100_000, layers: 2, every: 2, heads: 2, steps: 1000, frames: 4096, shown: 2 };

#[test]
fn models_are_of_one_size() {
    for name in ["mqar-4-64", "copying-16-128", "JapaneseVowels"] {
        let work = Work::read(name, Path::new(".")).unwrap();
        for name in PATTERNS {
            let (options, count) = work.fitted(pattern(name, 2).unwrap(), &SETTINGS).unwrap();
            assert!(count.abs_diff(100_000) < 5_000, "{name}: {count}");
            assert_eq!((options.num_layers, options.hidden_size % 2), (2, 0));
        }
    }
    let work = Work::read("mqar-4-64", Path::new(".")).unwrap();
    let impossible = Settings { every: 5, ..SETTINGS };
    let error = work.fitted(pattern("jamba", 5).unwrap(), &impossible).unwrap_err();
    assert!(error.contains("attention_every"), "{error}");
    assert!(Work::read("absent", Path::new(".")).is_err() && pattern("lstm", 2).is_err());
}

/// To say again the one token that was no noise, of two.
#[test]
fn every_pattern_learns_what_is_easy() {
    let settings = Settings { parameters: 8000, steps: 250, frames: 192, ..SETTINGS };
    let work = Work::read("copying-1-3", Path::new(".")).unwrap();
    for pattern in PATTERNS {
        let trial = Trial { task: "copying-1-3".into(), pattern: pattern.into(), rate: 0.01, seed: 1 };
        let outcome = work.run(&trial, &settings).unwrap();
        assert!(
            outcome.scores == [(3, 1.0)] && outcome.validation == 1.0 && !outcome.diverged,
            "{pattern}: {outcome:?}"
        );
        assert!(outcome.steps > 20 && outcome.state_bytes > 0);
        if pattern == "zamba" {
            let again = work.run(&trial, &settings).unwrap();
            assert_eq!((again.steps, again.scores), (outcome.steps, outcome.scores));
        }
    }
}

// ---- results ----

fn record(pattern: &str, rate: f32, seed: u64, validation: f64, score: f64) -> Record {
    let trial = Trial { task: "mqar-4-64".into(), pattern: pattern.into(), rate, seed };
    let outcome = Outcome {
        hidden_size: 32,
        parameters: 99_000,
        steps: 10,
        diverged: false,
        validation,
        scores: vec![(64, score)],
        step_ms: 1.0,
        stream_us: 2.0,
        state_bytes: 3,
    };
    Record { trial, settings: SETTINGS, outcome, seconds: 1.0, simd: "scalar".into(), note: "here".into() }
}

#[test]
fn a_killed_comparison_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.jsonl");
    assert_eq!(load::<Record>(&path).unwrap().0.len(), 0);
    let (first, second) = (record("hymba", 1e-3, 0, 0.5, 0.5), record("hymba", 1e-3, 1, 0.5, 0.5));
    append(&path, &first).unwrap();
    let whole = std::fs::read(&path).unwrap();
    // the second line was cut short
    append(&path, &second).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..whole.len() + 40]).unwrap();
    let (records, none) = load(&path).unwrap();
    assert_eq!((records.len(), none), (1, 1));
    assert!(is_done(&records, &first.trial, &SETTINGS) && !is_done(&records, &second.trial, &SETTINGS));
    assert!(!is_done(&records, &first.trial, &Settings { steps: 7, ..SETTINGS }));
    append(&path, &second).unwrap();
    let (records, none) = load(&path).unwrap();
    assert_eq!((records.len(), none), (2, 1));
    assert!(is_done(&records, &second.trial, &SETTINGS));
}

#[test]
fn the_table_chooses_rates_by_validation_and_shows_the_spread() {
    let mut records = Vec::new();
    // the test would choose 0.01, validation chooses 0.001
    for seed in 0..3 {
        let score = 0.6 + 0.1 * seed as f64;
        records.push(record("hymba", 1e-3, seed, 0.8, score));
        records.push(record("hymba", 1e-2, seed, 0.7, 0.95));
        records.push(record("jamba", 1e-3, seed, 0.9, 0.65));
        records.push(record("mamba", 1e-3, seed, 0.9, 0.1));
    }
    records.push(records[0].clone());
    let text = table::table(&records);
    let line = text.lines().find(|line| line.starts_with("| mqar-4-64 | 64 |")).unwrap();
    for cell in
        ["**0.700** (0.600 to 0.800; 3 × 1e-3)", "= 0.650 (0.650 to 0.650; 3 × 1e-3)", "| 0.100 (0.100 to 0.100"]
    {
        assert!(line.contains(cell), "{cell}: {line}");
    }
    assert!(text.contains("| mqar-4-64 | hymba | 32 | 99000 | 100000 | 1.0 | 2 | 3 |"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.svg");
    table::draw(&records, &path).unwrap();
    let svg = std::fs::read_to_string(path).unwrap();
    assert!(svg.contains("mqar-4-64") && svg.contains("jamba"));
}
