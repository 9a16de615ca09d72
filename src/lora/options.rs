//! The options of an adapter.

use serde::{Deserialize, Serialize};

use crate::layers::LORA_NAMES;
use crate::{Error, Result};

/// The maps that get a low-rank part, y = W·x + scale · B·(A·x), and the form of these parts.
///
/// | option | default | |
/// |---|---|---|
/// | `rank` | 8 | r, rows of A: from 1 to 4096 |
/// | `alpha` | 16 | scale is alpha/r: finite |
/// | `rslora` | `false` | scale is alpha/√r instead |
/// | `dropout` | 0 | dropout rate of x in front of A in training: at least 0 and below 1 |
/// | `maps` | `*_proj*` | at least one pattern, in which `*` stands for any text, for a whole name or its end after a dot |
///
/// Maps have their names in files, without `.weight`, such as `model.layers.0.mamba.in_proj`. The language model has in
/// every layer `mamba.in_proj`, `mamba.x_proj.0`, `mamba.dt_proj.0` and `mamba.out_proj`, `moe.experts.0.gate_proj` (in
/// a gated MLP), `up_proj` and `down_proj`, and if it is untied `lm_head`, which the default leaves out. The encoder
/// has `input_proj` and in every block, such as `blocks.0`, those that apply of `mamba.in_proj`, `mamba.x_proj`,
/// `mamba.dt_proj`, `mamba.out_proj`, `attention.q_proj`, `attention.k_proj`, `attention.v_proj`, `attention.out_proj`,
/// `shared_proj`, `gate`, `ffn.up` and `ffn.down`, of which the default leaves out the last three. In a bidirectional
/// [`Predictor`](crate::Predictor) those of the second encoder begin with `reverse.`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LoraOptions {
    /// Rows of A.
    pub rank: usize,
    /// The scale is alpha/r, or alpha/√r.
    pub alpha: f64,
    /// Whether it is alpha/√r.
    #[serde(default)]
    pub rslora: bool,
    /// Dropout rate of x in front of A in training.
    #[serde(default)]
    pub dropout: f64,
    /// Patterns of the names of maps; of an adapter that a model holds, the names.
    pub maps: Vec<String>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        LoraOptions { rank: 8, alpha: 16.0, rslora: false, dropout: 0.0, maps: vec!["*_proj*".into()] }
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

    /// Sets the dropout rate of x in front of A in training: the numbers that stay are divided by 1 − rate. The mask is
    /// drawn for each map and row from the seed of the pass: a map that several blocks share, as in
    /// [`HymbaOptions::zamba`](crate::HymbaOptions::zamba), has the same mask in all of them.
    ///
    /// ```
    /// use hymba::ndarray::Array3;
    /// use hymba::{Hymba, HymbaOptions, LoraOptions};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(6).hidden_size(32).num_layers(1))?;
    /// model.add_lora(&LoraOptions::default().dropout(0.1), 0)?;
    /// let (y, cache) = model.forward_train(&Array3::ones((2, 10, 6)), None, 7)?; // 7 is the seed
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets the patterns of the names of maps.
    pub fn maps<T: Into<String>>(mut self, patterns: impl IntoIterator<Item = T>) -> Self {
        self.maps = patterns.into_iter().map(Into::into).collect();
        self
    }

    pub(crate) fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let bad = |option, given: String, allowed: &str| Err(Error::Option { option, given, allowed: allowed.into() });
        if !(1..=Self::MAX_RANK).contains(&self.rank) {
            return bad("rank", self.rank.to_string(), "it must be from 1 to 4096");
        }
        if !self.scale().is_finite() {
            return bad("alpha", self.alpha.to_string(), "it must be finite; 16 is usual");
        }
        // written so that NaN fails
        if !(0.0..1.0).contains(&self.dropout) {
            return bad("dropout", self.dropout.to_string(), "it must be at least 0 and below 1; 0.05 is usual");
        }
        Ok(())
    }
}

/// Whether it is the name of an A or a B.
pub(crate) fn is_lora(name: &str) -> bool {
    LORA_NAMES.iter().any(|end| name.ends_with(end))
}
