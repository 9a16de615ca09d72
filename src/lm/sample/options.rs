//! The options of a generation: name, default, range and meaning in one place.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::processor::{LogitsProcessor, Processor};
use crate::{Error, Result};

/// How a language model continues: which tokens are chosen, and where it ends.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `max_tokens` | 256 | any | tokens at most; 0 generates none |
/// | `temperature` | 0 | finite, ≥ 0 | 0 takes the most probable token; otherwise logits are divided by it and the token is drawn |
/// | `top_k` | 0 | any | draw from this many of the most probable tokens; 0 turns it off |
/// | `top_p` | 1.0 | 0 < p ≤ 1 | draw from the fewest most probable tokens that have this probability together; 1 turns it off |
/// | `min_p` | 0.0 | 0 to 1 | draw from the tokens with at least this share of the largest probability; 0 turns it off |
/// | `repetition_penalty` | 1.0 | finite, > 0 | above 1, tokens of the prompt and of the text so far become less probable; 1 turns it off |
/// | `seed` | 0 | any | of the draws |
/// | `stream` | 0 | any | which of the seed's sequences of random numbers the draws take |
/// | `stop_tokens` | none given | any ids | tokens that end the text; where none are given, those of the model's configuration |
/// | `stop_strings` | none | not empty | texts that end the text |
/// | `stop_at_max_positions` | no | | end at the model's `max_position_embeddings` |
/// | `log_probs` | no | | report the log-probability of every chosen token |
/// | `lookahead` | 0 | 0 to 64 | tokens that are guessed and checked in one pass; the text is the same |
/// | `processors` | none | | change the logits before a token is chosen |
/// | `on_prompt` | none | | called with the progress of the prompt; may end it |
///
/// The names and the arithmetic are those of Hugging Face's `generate`, with two differences: the default is the most
/// probable token, without a draw (there `do_sample=False`), and the filters decide between equal logits by the lower id, so
/// that `top_k` keeps k tokens, never more. [`Sampler`](super::Sampler) says in which order the options act.
///
/// Log-probabilities are the model's own: the log-softmax of its logits before penalty, temperature and filters. So
/// they do not depend on how a token was chosen.
///
/// [`from_dir`](Self::from_dir) reads what a model's folder recommends.
///
/// The fields can be read and written; nothing is checked until [`validate`](Self::validate), which
/// [`Sampler::new`](super::Sampler::new) calls.
///
/// ```
/// use hymba::lm::GenerateOptions;
///
/// let options = GenerateOptions::default().max_tokens(100).temperature(0.7).top_p(0.9).seed(5);
/// assert!(options.validate().is_ok());
/// assert!(options.top_p(90.0).validate().is_err());
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// The divisor of the logits; 0 takes the most probable token.
    pub temperature: f32,
    /// How many of the most probable tokens are drawn from; 0 is all.
    pub top_k: usize,
    /// The probability that the tokens drawn from have together; 1 is all.
    pub top_p: f32,
    /// The share of the largest probability that the tokens drawn from have at least; 0 is all.
    pub min_p: f32,
    /// The logits of tokens seen before are divided by it where positive, and multiplied with it where negative.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
    /// Which of the seed's sequences of random numbers the draws take. They are independent of each other.
    pub stream: u64,
    /// Tokens that end the text. `None` is those of the model's configuration; an empty list is no token.
    pub stop_tokens: Option<Vec<u32>>,
    /// Texts that end the text. They are looked for where tokens become text, which takes a tokenizer.
    pub stop_strings: Vec<String>,
    /// Whether a row ends where the model's `max_position_embeddings` do.
    pub stop_at_max_positions: bool,
    /// Whether the log-probabilities of the chosen tokens are reported.
    pub log_probs: bool,
    /// Processors that change the logits before a token is chosen, in this order.
    pub processors: Vec<Processor>,
    /// How many tokens are guessed at most, to be checked in one pass; 0 for none.
    pub lookahead: usize,
    /// Called with the progress of the prompt.
    pub on_prompt: Option<OnPrompt>,
}

/// Called with how many tokens of a prompt are done, and how many there are: see [`GenerateOptions::on_prompt`]. Clones are equal, others
/// are not.
#[derive(Clone)]
pub struct OnPrompt(Arc<dyn Fn(usize, usize) -> ControlFlow<()> + Send + Sync>);

impl OnPrompt {
    pub(in crate::lm) fn call(&self, done: usize, of: usize) -> ControlFlow<()> {
        (self.0)(done, of)
    }
}

impl fmt::Debug for OnPrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnPrompt")
    }
}

impl PartialEq for OnPrompt {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_tokens: Self::DEFAULT_MAX_TOKENS,
            temperature: Self::DEFAULT_TEMPERATURE,
            top_k: Self::DEFAULT_TOP_K,
            top_p: Self::DEFAULT_TOP_P,
            min_p: Self::DEFAULT_MIN_P,
            repetition_penalty: Self::DEFAULT_REPETITION_PENALTY,
            seed: Self::DEFAULT_SEED,
            stream: 0,
            stop_tokens: None,
            stop_strings: Vec::new(),
            stop_at_max_positions: false,
            log_probs: false,
            processors: Vec::new(),
            lookahead: 0,
            on_prompt: None,
        }
    }
}

impl GenerateOptions {
    /// Default of `max_tokens`.
    pub const DEFAULT_MAX_TOKENS: usize = 256;
    /// Default of `temperature`.
    pub const DEFAULT_TEMPERATURE: f32 = 0.0;
    /// Default of `top_k`.
    pub const DEFAULT_TOP_K: usize = 0;
    /// Default of `top_p`.
    pub const DEFAULT_TOP_P: f32 = 1.0;
    /// Default of `min_p`.
    pub const DEFAULT_MIN_P: f32 = 0.0;
    /// Default of `repetition_penalty`.
    pub const DEFAULT_REPETITION_PENALTY: f32 = 1.0;
    /// The largest `lookahead`.
    pub const MAX_LOOKAHEAD: usize = 64;
    /// Default of `seed`.
    pub const DEFAULT_SEED: u64 = 0;

    /// Sets how many tokens are generated at most.
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Sets the temperature; 0 takes the most probable token.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets how many of the most probable tokens are drawn from; 0 is all.
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.top_k = top_k;
        self
    }

    /// Sets the probability that the tokens drawn from have together; 1 is all.
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.top_p = top_p;
        self
    }

    /// Sets the share of the largest probability that the tokens drawn from have at least; 0 is all.
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.min_p = min_p;
        self
    }

    /// Sets the penalty on tokens seen before; 1 is none.
    pub fn repetition_penalty(mut self, repetition_penalty: f32) -> Self {
        self.repetition_penalty = repetition_penalty;
        self
    }

    /// Sets the seed of the draws.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets which of the seed's sequences of random numbers the draws take.
    ///
    /// Row i of a batch takes i streams further on than its options say, so this is how to have row i again alone: see
    /// [`HymbaLm::generate_batch`](crate::HymbaLm::generate_batch).
    pub fn stream(mut self, stream: u64) -> Self {
        self.stream = stream;
        self
    }

    /// Sets the tokens that end the text; `None` is those of the model's configuration, an empty list is no token.
    pub fn stop_tokens(mut self, stop_tokens: impl Into<Option<Vec<u32>>>) -> Self {
        self.stop_tokens = stop_tokens.into();
        self
    }

    /// Sets the texts that end the text. They are looked for where tokens become text, which takes a tokenizer.
    ///
    /// ```
    /// use hymba::lm::GenerateOptions;
    ///
    /// let options = GenerateOptions::default().stop_strings(["\n\n", "###"]);
    /// assert_eq!(options.stop_strings.len(), 2);
    /// ```
    pub fn stop_strings(mut self, stop_strings: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.stop_strings = stop_strings.into_iter().map(Into::into).collect();
        self
    }

    /// Sets whether a row ends, with [`FinishReason::MaxPositions`](crate::lm::FinishReason::MaxPositions), where the model's
    /// `max_position_embeddings` do: no token is generated that would stand at that position or a later one. The meta tokens
    /// and all that the state has seen take positions, too: a row of a state has used up
    /// `config.num_memory_tokens + state.lengths()[row]` of them. A prompt that is longer is fed all the same, and not continued.
    ///
    /// It is off, as in Hugging Face's `generate`: positions only rotate queries and keys, so nothing breaks beyond those of the
    /// training. The text may get worse there, and the keys and values of global layers go on growing.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use hymba::lm::{FinishReason, GenerateOptions, HymbaLm, HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # config.orig_max_position_embeddings = Some(10);
    /// (config.num_memory_tokens, config.max_position_embeddings) = (4, 10);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let options = GenerateOptions::default().stop_tokens(vec![]).stop_at_max_positions(true);
    /// let generated = lm.generate(&[1, 2, 3], &options, |_| ControlFlow::Continue(()))?;
    /// assert_eq!((generated.ids.len(), generated.finish), (10 - 4 - 3, FinishReason::MaxPositions));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn stop_at_max_positions(mut self, stop_at_max_positions: bool) -> Self {
        self.stop_at_max_positions = stop_at_max_positions;
        self
    }

    /// Sets whether the log-probabilities of the chosen tokens are reported.
    pub fn log_probs(mut self, log_probs: bool) -> Self {
        self.log_probs = log_probs;
        self
    }

    /// Adds a processor that changes the logits before a token is chosen, after those already there. Each row gets a
    /// clone.
    ///
    /// ```
    /// use hymba::lm::{FrequencyPenalty, GenerateOptions, LogitBias};
    ///
    /// let options = GenerateOptions::default()
    ///     .processor(LogitBias::new([(7, f32::NEG_INFINITY)])?)
    ///     .processor(FrequencyPenalty::new(0.5)?);
    /// assert_eq!(options.processors.len(), 2);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn processor(mut self, processor: impl LogitsProcessor + Clone + 'static) -> Self {
        self.processors.push(Processor::new(processor));
        self
    }

    /// Sets a callback for the progress of a long prompt, called after each piece of at most 512 tokens: how many
    /// tokens of all rows are done, and how many there are. [`ControlFlow::Break`] ends the generation with
    /// [`FinishReason::Cancelled`](crate::lm::FinishReason::Cancelled) before its first token; the state has then seen
    /// a part of the prompt, as [`LmState::lengths`](crate::LmState::lengths) says. In a batch with options of each
    /// row, all that are set are called, and the first to break ends all rows.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicBool, Ordering};
    /// use hymba::lm::{FinishReason, GenerateOptions, HymbaLm, HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # config.num_hidden_layers = 2;
    /// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let cancelled = Arc::new(AtomicBool::new(false)); // set by another thread
    /// let flag = cancelled.clone();
    /// let options = GenerateOptions::default().on_prompt(move |_done, _of| {
    ///     if flag.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    /// });
    /// cancelled.store(true, Ordering::Relaxed);
    /// let generated = lm.generate(&[7; 700], &options, |_| ControlFlow::Continue(()))?;
    /// assert_eq!((generated.ids.len(), generated.finish), (0, FinishReason::Cancelled));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn on_prompt(mut self, hear: impl Fn(usize, usize) -> ControlFlow<()> + Send + Sync + 'static) -> Self {
        self.on_prompt = Some(OnPrompt(Arc::new(hear)));
        self
    }

    /// Sets how many tokens are guessed at most where the last ones have occurred before, in the prompt or in the text so far:
    /// those that followed there. They are checked together, in one pass that reads the weights once, and what the model does not
    /// choose itself is taken back. So the text, its log-probabilities and the state are the same, bit for bit, with every other option,
    /// and come faster where the text repeats some of the prompt: code, summaries, answers about a document.
    ///
    /// It is for one row alone: batches are decoded without it. A guess takes the time of a few more tokens in a pass, and memory for
    /// a second state.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use hymba::{GenerateOptions, HymbaLm};
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let prompt = [1, 2, 3, 4, 5, 1, 2, 3];
    /// let options = GenerateOptions::default().max_tokens(20);
    /// let plain = lm.generate(&prompt, &options, |_| ControlFlow::Continue(()))?;
    /// let ahead = lm.generate(&prompt, &options.lookahead(8), |_| ControlFlow::Continue(()))?;
    /// assert_eq!(ahead.ids, plain.ids);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn lookahead(mut self, lookahead: usize) -> Self {
        self.lookahead = lookahead;
        self
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first option outside its range (see the table above), the value given, and what is
    /// allowed.
    pub fn validate(&self) -> Result<()> {
        let bad =
            |option, given: String, allowed: &str| Err(Error::Option { option, given, allowed: allowed.to_string() });
        // every range is written so that NaN fails
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let allowed = "it must be a finite number of at least 0; 0 takes the most probable token, 0.7 is usual";
            return bad("temperature", self.temperature.to_string(), allowed);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let allowed = "it must be above 0 and at most 1; 1 turns it off, 0.9 is usual";
            return bad("top_p", self.top_p.to_string(), allowed);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            let allowed = "it must be at least 0 and at most 1; 0 turns it off, 0.05 is usual";
            return bad("min_p", self.min_p.to_string(), allowed);
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let allowed = "it must be a finite number above 0; 1 turns it off, 1.1 is usual";
            return bad("repetition_penalty", self.repetition_penalty.to_string(), allowed);
        }
        if self.lookahead > Self::MAX_LOOKAHEAD {
            let allowed = "it must be at most 64; 0 turns it off, 10 is usual";
            return bad("lookahead", self.lookahead.to_string(), allowed);
        }
        if self.stop_strings.iter().any(String::is_empty) {
            let allowed = "an empty one would end every text at once; leave it out";
            return bad("stop_strings", format!("{:?}", self.stop_strings), allowed);
        }
        Ok(())
    }
}
