use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use hymba::lm::{FrequencyPenalty, HymbaLmConfig, LoadOptions, LogitsProcessor};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::serve::metrics::Counter;

const PIECE: usize = 16;

pub fn small() -> HymbaLm {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    config.num_hidden_layers = 2;
    HymbaLm::random(config, 3, &LoadOptions::default()).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir("../tests/data/hymba-1.5b-base").unwrap()
}

fn engine(lm: &Arc<HymbaLm>, rows: usize, cache_bytes: usize) -> (Engine, Arc<Metrics>) {
    let metrics = Arc::<Metrics>::default();
    let options = EngineOptions { rows, piece: PIECE, cache_bytes };
    (Engine::start(lm.clone(), tokenizer(), options, metrics.clone()).unwrap(), metrics)
}

type Heard = UnboundedReceiver<(usize, Event)>;

fn submit(engine: &Engine, prompt: Prompt, choices: Vec<GenerateOptions>) -> Heard {
    let (events, heard) = unbounded_channel();
    let job = Job {
        prompt,
        choices,
        first_choice: 0,
        log_probs: Some(2),
        score_prompt: false,
        events,
        deadline: Instant::now() + Duration::from_secs(600),
        permit: None,
    };
    engine.submit(job).map_err(|_| "closed").unwrap();
    heard
}

/// The tokens of each choice with their log-probabilities, which tell every bit of the logits, and the last event.
type Told = Vec<(Vec<(u32, u32)>, Option<Event>)>;

fn told(mut heard: Heard, choices: usize) -> (Told, usize) {
    let (mut told, mut cached_tokens) = (vec![(Vec::new(), None); choices], 0);
    while let Some((choice, event)) = heard.blocking_recv() {
        match event {
            Event::Token { score, .. } => told[choice].0.push((score.id, score.log_prob.unwrap().to_bits())),
            Event::Prompt { cached, .. } => cached_tokens = cached,
            last => told[choice].1 = Some(last),
        }
    }
    (told, cached_tokens)
}

fn options(seed: u64) -> GenerateOptions {
    GenerateOptions::default().max_tokens(12 + seed as usize % 9).temperature(1.0).seed(seed).stop_tokens(vec![0])
}

/// Prompts of many lengths, some with a common beginning, with and without boundaries; greedy, drawn, penalised, several of one.
fn requests() -> Vec<(Prompt, Vec<GenerateOptions>)> {
    let shared: Vec<u32> = (0..40).map(|i| 1 + i * 7 % 49).collect();
    (0..14_u32)
        .map(|i| {
            let own = (0..3 + i * 5).map(|j| 1 + (i * 31 + j * j) % 49);
            let (ids, boundaries) = match i % 3 {
                0 => (own.collect(), vec![]),
                1 => (shared.iter().copied().chain(own).collect(), vec![40]),
                _ => (shared[..25].iter().copied().chain(own).collect::<Vec<_>>(), vec![7, 25]),
            };
            let choices = match i % 4 {
                0 => vec![options(0).temperature(0.0)],
                1 => vec![options(i.into()).processor(FrequencyPenalty::new(1.0).unwrap())],
                2 => (0..3).map(|stream| options(i.into()).stream(stream)).collect(),
                _ => vec![options(i.into())],
            };
            (Prompt::new(ids, &boundaries, PIECE), choices)
        })
        .collect()
}

#[test]
fn sequences_are_bit_for_bit_what_they_are_alone() {
    let lm = Arc::new(small());
    let alone: Vec<Told> = requests()
        .into_iter()
        .map(|(prompt, choices)| {
            let (engine, _) = engine(&lm, 1, 0);
            let count = choices.len();
            told(submit(&engine, prompt, choices), count).0
        })
        .collect();
    for (rows, cache) in [(3, 0), (16, 0), (5, 100 << 20), (16, 500_000)] {
        let (engine, metrics) = engine(&lm, rows, cache);
        for round in 0..2 {
            let heard: Vec<_> = requests()
                .into_iter()
                .map(|(prompt, choices)| (choices.len(), submit(&engine, prompt, choices)))
                .collect();
            for (i, ((choices, heard), alone)) in heard.into_iter().zip(&alone).enumerate() {
                let (together, cached) = told(heard, choices);
                assert_eq!(&together, alone, "request {i}, {rows} rows, {cache} bytes, round {round}");
                // the second time its beginning is known, where there is room
                assert!(cache < 1 << 20 || round == 0 || cached > 0 || i < 5, "request {i}");
            }
        }
        engine.close();
        engine.join();
        let (ended, accepted) = (metrics.ended.iter().map(|count| count.get()).sum::<u64>(), metrics.accepted.get());
        assert_eq!((ended, accepted, metrics.writing.get(), metrics.waiting.get()), (accepted, 40, 0, 0));
        assert!(metrics.cache_bytes.get() <= cache as u64);
    }
}

#[test]
fn short_prompts_give_what_the_library_gives() {
    let lm = Arc::new(small());
    let (engine, _) = engine(&lm, 8, 1 << 20);
    let heard: Vec<_> = (1..=PIECE as u64)
        .map(|length| {
            let ids: Vec<u32> = (0..length).map(|i| (1 + i * 11 % 49) as u32).collect();
            (ids.clone(), length, submit(&engine, Prompt::new(ids, &[], PIECE), vec![options(length)]))
        })
        .collect();
    for (ids, seed, heard) in heard {
        let expected = lm.generate(&ids, &options(seed).log_probs(true), |_| ControlFlow::Continue(())).unwrap();
        let expected: Vec<_> =
            expected.ids.iter().copied().zip(expected.log_probs.iter().map(|p| p.to_bits())).collect();
        assert_eq!(told(heard, 1).0[0].0, expected);
    }
}

#[test]
fn prompts_get_their_log_probabilities() {
    let lm = Arc::new(small());
    let (engine, _) = engine(&lm, 4, 1 << 20);
    let ids: Vec<u32> = (0..50).map(|i| 1 + i * 13 % 49).collect();
    let (events, mut heard) = unbounded_channel();
    let job = Job {
        prompt: Prompt::new(ids.clone(), &[], PIECE),
        choices: vec![options(1).max_tokens(0)],
        first_choice: 0,
        log_probs: Some(1),
        score_prompt: true,
        events,
        deadline: Instant::now() + Duration::from_secs(600),
        permit: None,
    };
    engine.submit(job).map_err(|_| "closed").unwrap();
    let Some((0, Event::Prompt { scores, .. })) = heard.blocking_recv() else { panic!("the prompt is not read") };
    let expected = lm.log_likelihood(&ids[..1], &ids[1..]).unwrap();
    assert_eq!(scores.len(), expected.tokens.len());
    for ((score, expected), id) in scores.iter().zip(&expected.tokens).zip(&ids[1..]) {
        assert_eq!(score.id, *id);
        assert!((score.log_prob.unwrap() - expected).abs() < 1e-4);
        assert!(score.top[0].1 >= score.log_prob.unwrap());
    }
    let last = heard.blocking_recv();
    assert!(matches!(last, Some((0, Event::End { finish: FinishReason::MaxTokens, .. }))), "{last:?}");
}

/// Breaks after some tokens.
#[derive(Clone)]
struct Breaks(usize);

impl LogitsProcessor for Breaks {
    fn process(&mut self, _: &mut [f32]) -> hymba::Result<()> {
        self.0 = self.0.checked_sub(1).expect("this one is meant to break");
        Ok(())
    }
}

#[test]
fn what_breaks_takes_nobody_along() {
    let lm = Arc::new(small());
    let (engine, metrics) = engine(&lm, 8, 0);
    let prompt = || Prompt::new(vec![3; 20], &[], PIECE);
    let expected = told(submit(&engine, prompt(), vec![options(5)]), 1).0;
    let broken: Vec<_> = (0..4).map(|n| submit(&engine, prompt(), vec![options(1).processor(Breaks(n))])).collect();
    let whole = submit(&engine, prompt(), vec![options(5)]);
    assert_eq!(told(whole, 1).0, expected);
    for (n, heard) in broken.into_iter().enumerate() {
        let (told, _) = told(heard, 1);
        assert_eq!(told[0].0.len(), n);
        assert!(matches!(told[0].1, Some(Event::Failed(Failure::Internal(_)))), "{:?}", told[0].1);
    }
    // ids that do not exist are an error of that step
    let lost = told(submit(&engine, Prompt::new(vec![999], &[], PIECE), vec![options(1)]), 1).0;
    assert!(matches!(lost[0].1, Some(Event::Failed(Failure::Internal(_)))));
    assert_eq!(told(submit(&engine, prompt(), vec![options(5)]), 1).0, expected);
    engine.close();
    engine.join();
    assert_eq!(metrics.ended[4].get(), 5);
}

#[test]
fn who_leaves_or_takes_too_long_makes_room() {
    let lm = Arc::new(small());
    let (engine, metrics) = engine(&lm, 2, 0);
    let long = || options(1).max_tokens(1_000_000_000).stop_tokens(vec![]);
    let prompt = || Prompt::new(vec![3; 40], &[], PIECE);
    let mut gone = submit(&engine, prompt(), vec![long(), long()]);
    gone.blocking_recv();
    let never = submit(&engine, prompt(), vec![long()]);
    let (events, late) = unbounded_channel();
    let (choices, deadline) = (vec![long()], Instant::now() + Duration::from_millis(50));
    let job = Job {
        prompt: prompt(),
        choices,
        first_choice: 0,
        log_probs: None,
        score_prompt: false,
        events,
        deadline,
        permit: None,
    };
    engine.submit(job).map_err(|_| "closed").unwrap();
    let mut late = late;
    assert_eq!(late.blocking_recv(), Some((0, Event::Failed(Failure::Timeout))));
    drop(never);
    let next = submit(&engine, prompt(), vec![options(5)]);
    drop(gone);
    assert!(matches!(told(next, 1).0[0].1, Some(Event::End { .. })));
    let mut left = submit(&engine, prompt(), vec![long()]);
    left.blocking_recv();
    engine.abort();
    engine.join();
    assert!(matches!(told(left, 1).0[0].1, Some(Event::Failed(Failure::Stopped))));
    assert_eq!(metrics.ended.each_ref().map(Counter::get)[2..], [3, 1, 1]);
}
