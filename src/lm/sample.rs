//! From logits to the next token.

mod file;
mod options;
mod processor;

use std::collections::HashSet;
use std::fmt;

use rand::{RngExt, SeedableRng};

pub(super) use file::end_tokens;
pub use options::{GenerateOptions, OnPrompt};
pub use processor::{FrequencyPenalty, LogitBias, LogitsProcessor, PresencePenalty, Processor};

use crate::kernels::math::{self, Unary};
use crate::kernels::simd::Simd;
use crate::layers::Rng;
use crate::{Error, Result};

/// The token that a [`Sampler`] has chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model's own distribution, where
    /// [`log_probs`](GenerateOptions::log_probs) asks for it.
    pub log_prob: Option<f32>,
}

/// Chooses one token after the other, as [`GenerateOptions`] say.
///
/// `HymbaLm::generate` has one inside; with one of your own you write the loop yourself.
///
/// ```
/// use hymba::lm::{GenerateOptions, Sampler};
///
/// let options = GenerateOptions::default().temperature(0.8).top_k(2).repetition_penalty(1.5).log_probs(true);
/// let mut sampler = Sampler::new(&options)?;
/// sampler.observe_prompt(&[3, 1]);
/// let model = |id: u32| [0.5, 4.0, 3.0, id as f32 - 9.0]; // a stand-in: a token in, logits out
/// let mut logits = model(1);
/// for _ in 0..3 {
///     let choice = sampler.pick(&logits)?;
///     assert!(choice.id == 1 || choice.id == 2);
///     sampler.observe(choice.id);
///     logits = model(choice.id);
/// }
/// # Ok::<(), hymba::Error>(())
/// ```
///
/// The options act in this order, which is that of Hugging Face's `generate`:
///
/// 1. `repetition_penalty` divides the logits of the observed tokens where positive and multiplies them where negative,
///    once for each token however often it was observed;
/// 2. `processors` change what is left, in their order;
/// 3. `temperature` 0 takes the largest logit, and that is all; otherwise it divides them;
/// 4. `top_k` keeps the k largest;
/// 5. `top_p` takes the softmax of those, and keeps the fewest largest whose sum reaches it;
/// 6. `min_p` keeps those with that share of the largest probability;
/// 7. one of those left is drawn, in proportion to its probability.
///
/// Of equal logits the one with the lower id counts as the larger. A token with the logit −∞ is never chosen. Nor is
/// one drawn whose probability is negligible beside the largest: below 2⁻⁶³ of it times the number of tokens that
/// `top_k` keeps, rounded up to a power of two, which is 3.6e-15 for 32001 tokens. The same options, observed tokens
/// and logits give the same choices.
pub struct Sampler {
    options: GenerateOptions,
    rng: Rng,
    observed: HashSet<u32>,
    processors: Vec<Box<dyn LogitsProcessor>>,
    /// The logits after the penalty and the processors.
    scores: Vec<f32>,
    // what a pick works with, kept for the next one
    ranks: Vec<u64>,
    exps: Vec<f32>,
    kept: Vec<Token>,
    halves: Vec<Token>,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy)]
struct Token {
    rank: u64,
    /// Its probability times a large number. Sums of whole numbers are exact, and the same in whatever order: a draw
    /// cannot fall off their end, nor on a token of weight 0.
    weight: u64,
}

/// A number for each token, lower for a larger score, and of equal scores for the lower id.
#[inline]
fn rank(id: usize, score: f32) -> u64 {
    // adding 0 turns −0 into 0, which it equals
    let bits = (score + 0.0).to_bits();
    // the bits of negative numbers rise as they fall, and lie above those of positive ones
    let descending = if bits >> 31 == 1 { bits } else { !bits & (u32::MAX >> 1) };
    u64::from(descending) << 32 | id as u64
}

impl Token {
    fn id(self) -> u32 {
        self.rank as u32
    }
}

impl Sampler {
    /// A sampler that has not observed any token yet.
    ///
    /// # Errors
    ///
    /// Those of [`GenerateOptions::validate`].
    pub fn new(options: &GenerateOptions) -> Result<Self> {
        options.validate()?;
        let mut rng = Rng::seed_from_u64(options.seed);
        rng.set_stream(options.stream);
        Ok(Sampler {
            rng,
            processors: options.processors.iter().map(Processor::start).collect(),
            options: options.clone(),
            observed: HashSet::new(),
            scores: Vec::new(),
            ranks: Vec::new(),
            exps: Vec::new(),
            kept: Vec::new(),
            halves: Vec::new(),
        })
    }

    pub(super) fn options(&self) -> &GenerateOptions {
        &self.options
    }

    /// Passes on the tokens of the prompt: `repetition_penalty` and the processors see them. Without either this call
    /// may be left out. A token outside the vocabulary is ignored.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        if self.options.repetition_penalty != 1.0 {
            self.observed.extend(ids);
        }
        self.processors.iter_mut().for_each(|processor| processor.observe_prompt(ids));
    }

    /// Passes on a choice that has become part of the text, as [`observe_prompt`](Self::observe_prompt) does the
    /// prompt.
    pub fn observe(&mut self, id: u32) {
        if self.options.repetition_penalty != 1.0 {
            self.observed.insert(id);
        }
        self.processors.iter_mut().for_each(|processor| processor.observe(id));
    }

    /// Chooses a token from logits, one for each token of the vocabulary.
    ///
    /// After a few calls nothing is allocated any more.
    ///
    /// # Errors
    ///
    /// [`Error::Logits`] where there are none, one is NaN or +∞, or all are −∞, before or after the processors; and theirs. The
    /// sampler is as before, but for processors that have changed.
    pub fn pick(&mut self, logits: &[f32]) -> Result<Choice> {
        check(logits)?;
        self.penalize(logits);
        if !self.processors.is_empty() {
            self.processors.iter_mut().try_for_each(|processor| processor.process(&mut self.scores))?;
            check(&self.scores).map_err(of_processors)?;
        }
        let id = if self.options.temperature == 0.0 { first_largest(&self.scores) } else { self.draw() };
        let log_prob = self.options.log_probs.then(|| log_softmax_at(logits, id));
        Ok(Choice { id, log_prob })
    }

    /// Logits → scores.
    fn penalize(&mut self, logits: &[f32]) {
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        let penalty = self.options.repetition_penalty;
        for &id in &self.observed {
            // −∞ stays what it is, and nothing else becomes infinite
            if let Some(score) = self.scores.get_mut(id as usize).filter(|score| score.is_finite()) {
                let penalized = if *score < 0.0 { *score * penalty } else { *score / penalty };
                *score = penalized.clamp(f32::MIN, f32::MAX);
            }
        }
    }

    fn draw(&mut self) -> u32 {
        self.keep_top_k();
        self.weigh();
        self.keep_top_p();
        self.keep_min_p();
        let mut point = self.rng.random_range(0..total(&self.kept));
        let mut id = 0;
        for token in &self.kept {
            id = token.id();
            if point < token.weight {
                break;
            }
            point -= token.weight;
        }
        id
    }

    /// Scores → the tokens of the k largest, in the order of their ids, as after every filter.
    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        let ranks = self.scores.iter().enumerate().map(|(id, &score)| rank(id, score));
        let last = if k == 0 || k >= self.scores.len() {
            u64::MAX
        } else {
            self.ranks.clear();
            self.ranks.extend(ranks.clone());
            *self.ranks.select_nth_unstable(k - 1).1
        };
        self.kept.clear();
        self.kept.extend(ranks.filter(|&rank| rank <= last).map(|rank| Token { rank, weight: 0 }));
    }

    /// Gives the tokens their weights, and drops those that weigh nothing. At least the largest is left.
    fn weigh(&mut self) {
        let largest = f64::from(largest(&self.scores));
        let temperature = f64::from(self.options.temperature);
        // in f64, as the difference of two numbers, and all the more the quotient, may be too large for f32
        let exponent = |token: &Token| ((f64::from(self.scores[token.id() as usize]) - largest) / temperature) as f32;
        self.exps.clear();
        self.exps.extend(self.kept.iter().map(exponent));
        math::map::<Exp>(&mut self.exps);
        // so that the sum of all weights is at most 2⁶³
        let unit = ((1u64 << 63) / (self.kept.len() as u64).next_power_of_two()) as f64;
        for (token, &exp) in self.kept.iter_mut().zip(&self.exps) {
            token.weight = (f64::from(exp) * unit) as u64;
        }
        self.kept.retain(|token| token.weight > 0);
    }

    fn keep_top_p(&mut self) {
        let top_p = f64::from(self.options.top_p);
        if top_p == 1.0 {
            return;
        }
        let total = total(&self.kept);
        let needed = ((top_p * total as f64).ceil() as u64).clamp(1, total);
        // tokens this light do not fill the rest even if all are: what is needed lies among the others, which are few
        let light = (total - needed) / self.kept.len() as u64;
        self.halves.clear();
        self.halves.extend(self.kept.iter().filter(|token| token.weight > light));
        let last = reach(&mut self.halves, needed);
        self.kept.retain(|token| token.rank <= last);
    }

    fn keep_min_p(&mut self) {
        let min_p = f64::from(self.options.min_p);
        if min_p == 0.0 {
            return;
        }
        let largest = self.kept.iter().map(|token| token.weight).max().unwrap_or(0);
        self.kept.retain(|token| token.weight as f64 >= min_p * largest as f64);
    }
}

/// The options and the number of tokens observed.
impl fmt::Debug for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampler")
            .field("options", &self.options)
            .field("observed", &self.observed.len())
            .finish_non_exhaustive()
    }
}

fn total(tokens: &[Token]) -> u64 {
    tokens.iter().map(|token| token.weight).sum()
}

/// The rank at which the weights, added up from the first rank on, reach `needed`, which is at most their sum. Halving what
/// is left takes time in proportion to the number of tokens, where sorting takes several times as long.
fn reach(tokens: &mut [Token], mut needed: u64) -> u64 {
    let mut left = tokens;
    while left.len() > 1 {
        let middle = left.len() / 2;
        left.select_nth_unstable_by_key(middle, |token| token.rank);
        let (first, second) = left.split_at_mut(middle);
        let sum = total(first);
        if needed <= sum {
            left = first;
        } else {
            needed -= sum;
            left = second;
        }
    }
    left.first().map_or(u64::MAX, |token| token.rank)
}

fn check(logits: &[f32]) -> Result<()> {
    let bad = |reason: String| Err(Error::Logits(reason));
    if logits.is_empty() {
        return bad("there are none; give one number for each token of the vocabulary".into());
    }
    if u32::try_from(logits.len()).is_err() {
        return bad(format!("there are {}, and a token's id is at most {}", logits.len(), u32::MAX));
    }
    // false for NaN, too
    let usable = |&logit: &f32| logit < f32::INFINITY;
    // without an early exit, the compiler checks several per instruction
    if !logits.iter().fold(true, |all, logit| all & usable(logit)) {
        let (id, logit) = logits.iter().enumerate().find(|(_, logit)| !usable(logit)).unwrap_or((0, &f32::NAN));
        return bad(format!(
            "token {id} has {logit}, where only finite numbers and -inf can be used: the weights or the state are \
             damaged; load the model again, and start from a new state"
        ));
    }
    if largest(logits) == f32::NEG_INFINITY {
        return bad(format!(
            "all {} are -inf, so that no token is possible: leave one where you rule out tokens yourself; otherwise the \
             weights or the state are damaged: load the model again, and start from a new state",
            logits.len()
        ));
    }
    Ok(())
}

fn of_processors(error: Error) -> Error {
    match error {
        Error::Logits(reason) => Error::Logits(format!("after the processors, {reason}")),
        error => error,
    }
}

/// The largest number, where none is NaN; of none, −∞.
fn largest(numbers: &[f32]) -> f32 {
    // side by side, as a single maximum makes every comparison wait for the one before
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = numbers.as_chunks::<16>();
    for chunk in chunks {
        for (lane, &number) in lanes.iter_mut().zip(chunk) {
            *lane = if number > *lane { number } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

fn first_largest(scores: &[f32]) -> u32 {
    let largest = largest(scores);
    scores.iter().position(|&score| score == largest).unwrap_or(0) as u32
}

/// The logarithm of the probability that these logits give to token `id`: z_id − ln Σ eᶻ. `None` where `id` is beyond
/// the logits; NaN where a logit is NaN or +∞, or all are −∞. It is what [`LogLikelihood`](super::LogLikelihood) and
/// [`Choice`] report.
///
/// ```
/// use hymba::lm::log_prob;
///
/// assert_eq!(log_prob(&[0.0, f32::NEG_INFINITY], 0), Some(0.0));
/// assert_eq!(log_prob(&[0.0, 1.0], 2), None);
/// ```
pub fn log_prob(logits: &[f32], id: u32) -> Option<f32> {
    log_probs(logits)(id)
}

/// As [`log_prob`], of several tokens: the sum over the vocabulary is taken once.
///
/// ```
/// use hymba::lm::{log_prob, log_probs};
///
/// let logits = [0.5, 1.0, -2.0];
/// let of = log_probs(&logits);
/// assert_eq!((of(0), of(2), of(3)), (log_prob(&logits, 0), log_prob(&logits, 2), None));
/// ```
pub fn log_probs(logits: &[f32]) -> impl Fn(u32) -> Option<f32> {
    let (largest, ln) = log_sum(logits);
    move |id| logits.get(id as usize).map(|&logit| (f64::from(logit) - largest - ln) as f32)
}

/// As [`log_prob`], of a token that is there.
pub(crate) fn log_softmax_at(logits: &[f32], id: u32) -> f32 {
    let (largest, ln) = log_sum(logits);
    (f64::from(logits[id as usize]) - largest - ln) as f32
}

/// The largest logit, and ln Σ e^(logit − largest).
fn log_sum(logits: &[f32]) -> (f64, f64) {
    let largest = largest(logits);
    let mut sum = 0.0;
    let mut exps = [0.0; 256];
    for chunk in logits.chunks(exps.len()) {
        let exps = &mut exps[..chunk.len()];
        for (exp, &logit) in exps.iter_mut().zip(chunk) {
            *exp = logit - largest;
        }
        math::map::<Exp>(exps);
        sum += exps.iter().map(|&exp| f64::from(exp)).sum::<f64>();
    }
    (f64::from(largest), sum.ln())
}

struct Exp;

impl Unary for Exp {
    #[inline(always)]
    fn apply<S: Simd>(s: S, x: S::V) -> S::V {
        math::exp(s, x)
    }
}

#[cfg(test)]
mod tests;
