//! Which low-rank parts a language model gets.

use crate::layers::LORA_NAMES;
use crate::{Error, Result};

/// Which maps get a low-rank part, y = W·x + scale · B·(A·x), and which.
///
/// | option | default | |
/// |---|---|---|
/// | `rank` | 8 | r, rows of A: from 1 to 4096 |
/// | `alpha` | 16 | scale is alpha/r |
/// | `rslora` | `false` | scale is alpha/√r instead |
/// | `maps` | `*_proj*` | patterns of names, in which `*` stands for any text; one without fits the end of a name, too |
///
/// Maps are called as in the checkpoint, such as `model.layers.0.mamba.in_proj`, without `.weight`: in every layer
/// `mamba.in_proj`, `mamba.x_proj.0`, `mamba.dt_proj.0` and `mamba.out_proj`, `moe.experts.0.gate_proj` (in a gated MLP), `up_proj`
/// and `down_proj`, and of an untied model `lm_head`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LoraOptions {
    /// Rows of A.
    pub rank: usize,
    /// The scale is alpha/r, or alpha/√r.
    pub alpha: f64,
    /// Whether it is alpha/√r.
    pub rslora: bool,
    /// Patterns of the names of maps.
    pub maps: Vec<String>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        LoraOptions { rank: 8, alpha: 16.0, rslora: false, maps: vec!["*_proj*".into()] }
    }
}

impl LoraOptions {
    /// Largest rank.
    const MAX_RANK: usize = 4096;

    /// Sets the rank.
    pub fn rank(mut self, rank: usize) -> Self {
        self.rank = rank;
        self
    }

    /// Sets alpha.
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets whether the scale is alpha/√r.
    pub fn rslora(mut self, rslora: bool) -> Self {
        self.rslora = rslora;
        self
    }

    /// Sets the patterns of the names of maps.
    pub fn maps<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.maps = patterns.into_iter().map(Into::into).collect();
        self
    }

    pub(super) fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    pub(super) fn validate(&self) -> Result<()> {
        let bad = |option, given: String, allowed: &str| Err(Error::Option { option, given, allowed: allowed.into() });
        if !(1..=Self::MAX_RANK).contains(&self.rank) {
            return bad("rank", self.rank.to_string(), "it must be from 1 to 4096");
        }
        if !self.scale().is_finite() {
            return bad("alpha", self.alpha.to_string(), "it must be finite; 16 is usual");
        }
        Ok(())
    }
}

/// Whether it is the name of an A or a B.
pub(crate) fn is_lora(name: &str) -> bool {
    LORA_NAMES.iter().any(|end| name.ends_with(end))
}
