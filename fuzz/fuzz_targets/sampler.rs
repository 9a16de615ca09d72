//! Any options and any logits: an error, or a token that both allow, and the same one again.

#![no_main]

use hymba::lm::{GenerateOptions, Sampler};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
enum Logits {
    Any(Vec<f32>),
    /// Many equal ones, and none that is damaged.
    Levels(Vec<i8>),
}

impl Logits {
    fn numbers(&self) -> Vec<f32> {
        match self {
            Logits::Any(numbers) => numbers.clone(),
            Logits::Levels(levels) => {
                let number = |&level: &i8| if level == i8::MIN { f32::NEG_INFINITY } else { f32::from(level) / 8.0 };
                levels.iter().map(number).collect()
            }
        }
    }
}

#[derive(Debug, Arbitrary)]
enum Number {
    Any(f32),
    /// 0 to 1.
    Share(u8),
}

impl Number {
    fn number(&self) -> f32 {
        match *self {
            Number::Any(number) => number,
            Number::Share(share) => f32::from(share) / 255.0,
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Input {
    temperature: Number,
    top_k: u8,
    top_p: Number,
    min_p: Number,
    repetition_penalty: Option<Number>,
    seed: u64,
    log_probs: bool,
    observed: Vec<u32>,
    picks: Vec<Logits>,
}

fuzz_target!(|input: Input| {
    let options = GenerateOptions::default()
        .temperature(input.temperature.number())
        .top_k(input.top_k.into())
        .top_p(input.top_p.number())
        .min_p(input.min_p.number())
        .repetition_penalty(input.repetition_penalty.as_ref().map_or(1.0, Number::number))
        .seed(input.seed)
        .log_probs(input.log_probs);
    let Ok(mut sampler) = Sampler::new(&options) else {
        assert!(options.validate().is_err());
        return;
    };
    let mut again = Sampler::new(&options).expect("they were valid");
    for &id in &input.observed {
        sampler.observe(id);
        again.observe(id);
    }
    for logits in &input.picks {
        let logits = logits.numbers();
        let damaged = logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY);
        let possible = logits.iter().any(|logit| *logit > f32::NEG_INFINITY);
        let choice = match sampler.pick(&logits) {
            Ok(choice) => choice,
            Err(error) => {
                assert!(damaged || !possible, "{error}");
                continue;
            }
        };
        assert!(possible && !damaged);
        assert_eq!(again.pick(&logits).expect("it was possible"), choice);
        let chosen = logits[choice.id as usize];
        assert!(chosen > f32::NEG_INFINITY);
        assert_eq!(choice.log_prob.is_some(), options.log_probs);
        assert!(choice.log_prob.is_none_or(|log_prob| log_prob <= 0.0));
        if input.repetition_penalty.is_none() {
            let larger = |(id, logit): (usize, &f32)| *logit > chosen || *logit == chosen && id < choice.id as usize;
            let place = logits.iter().enumerate().filter(|&pair| larger(pair)).count();
            let allowed = if options.temperature == 0.0 { 1 } else { options.top_k };
            assert!(allowed == 0 || place < allowed, "token {} is number {place}", choice.id);
            if options.temperature == 1.0 {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let share = (f64::from(chosen) - f64::from(largest)).exp();
                assert!(share >= f64::from(options.min_p) * 0.999_99, "{share} of the largest");
            }
        }
        sampler.observe(choice.id);
        again.observe(choice.id);
    }
});
