//! The options of the optimiser.

use serde::{Deserialize, Serialize};

use crate::parameters::fits;
use crate::train::Schedule;
use crate::{Error, Result};

/// How [`AdamW`](super::AdamW) steps.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `schedule` | constant 0.001 | see [`Schedule`] | learning rate of every step |
/// | `betas` | (0.9, 0.999) | 0 ≤ β < 1 | how much of the running means of g and g² each step keeps |
/// | `epsilon` | 1e-8 | > 0 | keeps small gradients from large steps |
/// | `weight_decay` | 0.01 | ≥ 0 | decay of the matrices: a step multiplies by 1 − rate·decay |
/// | `weight_decay_for` | none | ≥ 0; at most 256 patterns, each of at most 256 bytes | decay of parameters by name |
/// | `rate_for` | none | 0 to 1000; at most 256 patterns, each of at most 256 bytes | factor of the learning rate of parameters by name; 0 freezes them |
/// | `clip_norm` | none | > 0 | the largest norm a gradient keeps |
///
/// Nothing is checked until [`validate`](Self::validate), which [`AdamW::new`](super::AdamW::new) calls.
///
/// ```
/// use hymba::train::{AdamWOptions, Schedule};
///
/// let schedule = Schedule::cosine(1e-3, 10_000).warm_up(500);
/// let options = AdamWOptions::default().schedule(schedule).weight_decay(0.05).clip_norm(1.0);
/// assert!(options.validate().is_ok());
/// assert!(options.betas(0.9, 1.0).validate().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AdamWOptions {
    /// Learning rate of every step.
    pub schedule: Schedule,
    /// How much of the running means of g and g² each step keeps.
    pub betas: (f32, f32),
    /// Keeps small gradients from large steps.
    pub epsilon: f32,
    /// Decay of the matrices.
    pub weight_decay: f32,
    /// Pattern and decay, the last that fits wins.
    pub weight_decay_for: Vec<(String, f32)>,
    /// Pattern and factor of the learning rate, the last that fits wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rate_for: Vec<(String, f32)>,
    /// The largest norm a gradient keeps.
    pub clip_norm: Option<f32>,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        AdamWOptions {
            schedule: Schedule::constant(1e-3),
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.01,
            weight_decay_for: Vec::new(),
            rate_for: Vec::new(),
            clip_norm: None,
        }
    }
}

impl AdamWOptions {
    /// Most patterns of [`weight_decay_for`](Self::weight_decay_for) and [`rate_for`](Self::rate_for), and most bytes of one. They may
    /// come from a file.
    const MAX_PATTERNS: usize = 256;

    /// Sets a constant learning rate.
    pub fn learning_rate(self, rate: f32) -> Self {
        self.schedule(Schedule::constant(rate))
    }

    /// Sets the learning rate of every step.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets how much of the running means of g and g² each step keeps.
    pub fn betas(mut self, beta1: f32, beta2: f32) -> Self {
        self.betas = (beta1, beta2);
        self
    }

    /// Sets what is added to √v.
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }

    /// Sets the decay of the matrices; see [`decay_of`](Self::decay_of) for which these are.
    pub fn weight_decay(mut self, weight_decay: f32) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets the decay of the parameters whose names fit `pattern`, in which `*` stands for any text. Of several patterns that
    /// fit, the last one counts.
    ///
    /// ```
    /// use hymba::train::AdamWOptions;
    ///
    /// let options = AdamWOptions::default().weight_decay_for("*.gate.*", 0.0).weight_decay_for("meta_tokens", 0.1);
    /// assert_eq!(options.decay_of("blocks.2.gate.weight", &[8, 8]), 0.0);
    /// assert_eq!(options.decay_of("meta_tokens", &[4, 8]), 0.1);
    /// ```
    pub fn weight_decay_for(mut self, pattern: impl Into<String>, weight_decay: f32) -> Self {
        self.weight_decay_for.push((pattern.into(), weight_decay));
        self
    }

    /// Sets a factor of the learning rate of the parameters whose names fit `pattern`, in which `*` stands for any text. A factor of 0
    /// freezes them: they stay as they are, to the bit, and their gradients are left out of the norm that is clipped. Of several
    /// patterns that fit, the last one counts.
    ///
    /// ```
    /// use hymba::train::AdamWOptions;
    ///
    /// // a new head on a trained encoder: the encoder is left alone, but for its last norm
    /// let options = AdamWOptions::default().rate_for("*", 0.0).rate_for("head.*", 1.0).rate_for("final_norm.*", 0.1);
    /// assert_eq!(options.factor_of("blocks.0.gate.weight"), 0.0);
    /// assert_eq!((options.factor_of("head.weight"), options.factor_of("final_norm.bias")), (1.0, 0.1));
    /// ```
    pub fn rate_for(mut self, pattern: impl Into<String>, factor: f32) -> Self {
        self.rate_for.push((pattern.into(), factor));
        self
    }

    /// The factor of a parameter's learning rate: 1 without a pattern that fits its name.
    pub fn factor_of(&self, name: &str) -> f32 {
        self.rate_for.iter().rfind(|(pattern, _)| fits(pattern, name)).map_or(1.0, |(_, factor)| *factor)
    }

    /// Sets the largest norm a gradient keeps: a longer one, all parameters that are not frozen taken together, is scaled down to it.
    pub fn clip_norm(mut self, norm: f32) -> Self {
        self.clip_norm = Some(norm);
        self
    }

    /// The decay of a parameter. Without a pattern that fits its name, it is `weight_decay` for matrices and 0 for biases,
    /// norms and all else of a single axis, for norms of each head, for meta tokens, meta keys, meta values and queries of
    /// pooling, and for `a_log`, whose 0 is no neutral value.
    ///
    /// ```
    /// use hymba::train::AdamWOptions;
    ///
    /// let options = AdamWOptions::default().weight_decay(0.1);
    /// assert_eq!(options.decay_of("blocks.0.ffn.up.weight", &[32, 8]), 0.1);
    /// assert_eq!(options.decay_of("blocks.0.ffn.up.bias", &[32]), 0.0);
    /// assert_eq!(options.decay_of("blocks.0.mamba.a_log", &[16, 4]), 0.0);
    /// ```
    pub fn decay_of(&self, name: &str, shape: &[usize]) -> f32 {
        if let Some((_, decay)) = self.weight_decay_for.iter().rfind(|(pattern, _)| fits(pattern, name)) {
            return *decay;
        }
        /// Arrays of several axes that are no matrices. (The last two are of language models.)
        const NO_MATRICES: [&str; 7] =
            ["meta_tokens", "meta_k", "meta_v", "queries", "a_log", "A_log", "memory_tokens"];
        // the number of an array in a list says nothing
        let mut parts = name.rsplit('.').filter(|part| part.parse::<usize>().is_err());
        let (last, owner) = (parts.next().unwrap_or(name), parts.next().unwrap_or_default());
        let decays = shape.len() >= 2 && !NO_MATRICES.contains(&last) && !owner.ends_with("norm");
        if decays { self.weight_decay } else { 0.0 }
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first option outside its range (see the table above), the value given, and what is
    /// allowed.
    pub fn validate(&self) -> Result<()> {
        self.schedule.validate()?;
        let bad =
            |option, given: String, allowed: &str| Err(Error::Option { option, given, allowed: allowed.to_string() });
        // comparisons are written so that NaN fails
        for beta in [self.betas.0, self.betas.1] {
            if !(0.0..1.0).contains(&beta) {
                return bad("betas", beta.to_string(), "each must be at least 0 and below 1; 0.9 and 0.999 are usual");
            }
        }
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return bad("epsilon", self.epsilon.to_string(), "it must be a finite number above 0; 1e-8 is usual");
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return bad(
                "weight_decay",
                self.weight_decay.to_string(),
                "it must be finite and 0 or more; 0.01 is usual",
            );
        }
        if self.weight_decay_for.len() > Self::MAX_PATTERNS {
            let allowed = "at most 256 are allowed; let one pattern fit more names with *";
            return bad("weight_decay_for", format!("{} patterns", self.weight_decay_for.len()), allowed);
        }
        for (pattern, decay) in &self.weight_decay_for {
            if pattern.len() > Self::MAX_PATTERNS {
                return bad("weight_decay_for", "a long pattern".into(), "a pattern has at most 256 bytes");
            }
            if !(*decay >= 0.0 && decay.is_finite()) {
                let given = format!("({pattern:?}, {decay})");
                return bad("weight_decay_for", given, "each decay must be finite and 0 or more");
            }
        }
        if self.rate_for.len() > Self::MAX_PATTERNS {
            return bad("rate_for", format!("{} patterns", self.rate_for.len()), "at most 256 are allowed");
        }
        for (pattern, factor) in &self.rate_for {
            if pattern.len() > Self::MAX_PATTERNS {
                return bad("rate_for", "a long pattern".into(), "a pattern has at most 256 bytes");
            }
            if !(0.0..=1000.0).contains(factor) {
                let given = format!("({pattern:?}, {factor})");
                return bad("rate_for", given, "each factor must be from 0 to 1000; 0 freezes");
            }
        }
        match self.clip_norm {
            Some(norm) if !(norm > 0.0 && norm.is_finite()) => {
                bad("clip_norm", norm.to_string(), "it must be a finite number above 0; 1 is usual")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("", "", true),
            ("*", "", true),
            ("**", "anything", true),
            ("*.weight", "blocks.0.gate.weight", true),
            ("*.weight", "weight", false),
            ("blocks.*", "blocks.0.gate.weight", true),
            ("blocks.*.bias", "blocks.0.gate.weight", false),
            ("*.gate.*", "blocks.0.gate.bias", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("*ab*ab*", "abab", true),
            ("*ab*ab*", "abb", false),
            ("*ß*", "straße", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }
}
