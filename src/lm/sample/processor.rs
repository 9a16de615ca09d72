//! Processors, which change logits before a token is chosen.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use crate::{Error, Result};

/// Changes the logits of a row before its next token is chosen, to favour tokens or rule them out.
///
/// A generation takes processors by [`GenerateOptions::processor`](super::GenerateOptions::processor), and each of its
/// rows has clones of its own, which receive the row's tokens.
///
/// ```
/// use std::ops::ControlFlow;
/// use hymba::lm::{GenerateOptions, HymbaLm, HymbaLmConfig, LoadOptions, LogitsProcessor};
///
/// /// Only tokens of even ids.
/// #[derive(Clone)]
/// struct Even;
///
/// impl LogitsProcessor for Even {
///     fn process(&mut self, logits: &mut [f32]) -> hymba::Result<()> {
///         logits.iter_mut().skip(1).step_by(2).for_each(|odd| *odd = f32::NEG_INFINITY);
///         Ok(())
///     }
/// }
///
/// # let mut config = HymbaLmConfig::hymba_1_5b();
/// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
/// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
/// let options = GenerateOptions::default().max_tokens(5).temperature(1.0).processor(Even);
/// let generated = lm.generate(&[1, 2, 3], &options, |_| ControlFlow::Continue(()))?;
/// assert!(generated.ids.iter().all(|id| id % 2 == 0));
/// # Ok::<(), hymba::Error>(())
/// ```
pub trait LogitsProcessor: Send + Sync {
    /// Receives the tokens of the prompt, before anything is generated.
    fn observe_prompt(&mut self, _ids: &[u32]) {}

    /// Receives a token that has become part of the generated text, which stop tokens do not.
    fn observe(&mut self, _id: u32) {}

    /// Changes the logits, one for each token of the vocabulary; −∞ rules a token out.
    ///
    /// # Errors
    ///
    /// Any error, such as [`Error::Logits`]. It ends the generation.
    fn process(&mut self, logits: &mut [f32]) -> Result<()>;
}

/// A processor that can be cloned, in [`GenerateOptions`](super::GenerateOptions). Clones are equal, others are not.
#[derive(Clone)]
pub struct Processor(Arc<dyn Prototype>);

trait Prototype: Send + Sync {
    fn start(&self) -> Box<dyn LogitsProcessor>;
}

impl<P: LogitsProcessor + Clone + 'static> Prototype for P {
    fn start(&self) -> Box<dyn LogitsProcessor> {
        Box::new(self.clone())
    }
}

impl Processor {
    pub(super) fn new(processor: impl LogitsProcessor + Clone + 'static) -> Self {
        Processor(Arc::new(processor))
    }

    /// One for a row that begins.
    pub(super) fn start(&self) -> Box<dyn LogitsProcessor> {
        self.0.start()
    }
}

impl fmt::Debug for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Processor")
    }
}

impl PartialEq for Processor {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Adds a number to the logits of some tokens.
///
/// ```
/// use hymba::lm::{LogitBias, LogitsProcessor};
///
/// let mut logits = [0.5, 1.0, 2.0];
/// LogitBias::new([(0, 10.0), (2, f32::NEG_INFINITY)])?.process(&mut logits)?;
/// assert_eq!(logits, [10.5, 1.0, f32::NEG_INFINITY]);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LogitBias(BTreeMap<u32, f32>);

impl LogitBias {
    /// A bias for each token, by its id; −∞ rules the token out. Tokens outside the vocabulary are ignored.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] for NaN and +∞.
    pub fn new(bias: impl IntoIterator<Item = (u32, f32)>) -> Result<Self> {
        let bias: BTreeMap<u32, f32> = bias.into_iter().collect();
        match bias.iter().find(|(_, bias)| bias.is_nan() || **bias == f32::INFINITY) {
            Some((id, bias)) => Err(Error::Option {
                option: "logit_bias",
                given: format!("{bias} for token {id}"),
                allowed: "it must be a finite number, or -inf, which rules a token out".into(),
            }),
            None => Ok(LogitBias(bias)),
        }
    }
}

impl LogitsProcessor for LogitBias {
    fn process(&mut self, logits: &mut [f32]) -> Result<()> {
        for (&id, bias) in &self.0 {
            add(logits, id, *bias);
        }
        Ok(())
    }
}

/// Lowers the logit of a token by a number for each time that it was generated. Tokens of the prompt do not count.
#[derive(Debug, Clone, PartialEq)]
pub struct FrequencyPenalty {
    penalty: f32,
    counts: BTreeMap<u32, u32>,
}

impl FrequencyPenalty {
    /// `penalty` is subtracted, usually 0 to 2; below 0, tokens become more probable.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] where it is not finite.
    pub fn new(penalty: f32) -> Result<Self> {
        Ok(FrequencyPenalty { penalty: finite("frequency_penalty", penalty)?, counts: BTreeMap::new() })
    }
}

impl LogitsProcessor for FrequencyPenalty {
    fn observe(&mut self, id: u32) {
        let count = self.counts.entry(id).or_default();
        *count = count.saturating_add(1);
    }

    fn process(&mut self, logits: &mut [f32]) -> Result<()> {
        for (&id, &count) in &self.counts {
            add(logits, id, -self.penalty * count as f32);
        }
        Ok(())
    }
}

/// Lowers the logits of tokens that were generated, however often, by a number. Tokens of the prompt do not count.
#[derive(Debug, Clone, PartialEq)]
pub struct PresencePenalty {
    penalty: f32,
    seen: BTreeSet<u32>,
}

impl PresencePenalty {
    /// `penalty` is subtracted, usually 0 to 2; below 0, tokens become more probable.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] where it is not finite.
    pub fn new(penalty: f32) -> Result<Self> {
        Ok(PresencePenalty { penalty: finite("presence_penalty", penalty)?, seen: BTreeSet::new() })
    }
}

impl LogitsProcessor for PresencePenalty {
    fn observe(&mut self, id: u32) {
        self.seen.insert(id);
    }

    fn process(&mut self, logits: &mut [f32]) -> Result<()> {
        for &id in &self.seen {
            add(logits, id, -self.penalty);
        }
        Ok(())
    }
}

/// Nothing finite becomes infinite.
fn add(logits: &mut [f32], id: u32, bias: f32) {
    if let Some(logit) = logits.get_mut(id as usize) {
        let sum = *logit + bias;
        *logit = if bias.is_finite() && logit.is_finite() { sum.clamp(f32::MIN, f32::MAX) } else { sum };
    }
}

fn finite(option: &'static str, number: f32) -> Result<f32> {
    if number.is_finite() {
        return Ok(number);
    }
    Err(Error::Option {
        option,
        given: number.to_string(),
        allowed: "it must be a finite number; 0 to 2 is usual".into(),
    })
}
