//! The options of a model: name, default, range and meaning in one place.

use serde::{Deserialize, Serialize};

use crate::kernels::norm::SmallVariance;
use crate::layers::TimeStep;
use crate::{Error, Result};

/// Which arithmetic the layers use. See [`HymbaOptions::edifice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Preset {
    /// The model this crate documents: meta tokens travel through every block.
    #[default]
    Hymba,
    /// The arithmetic of `Edifice.SSM.Hymba` 0.2.0 (Elixir, Axon), to the letter.
    Edifice,
}

/// What the layers do differently from preset to preset: all of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// The projections into and out of the Mamba branch have a bias.
    pub projection_bias: bool,
    /// A and the skip D are learned; otherwise A is −1 … −n and there is no skip.
    pub learned_decay: bool,
    pub time_step: TimeStep,
    /// Every block has its own meta keys and values; otherwise meta tokens travel through the blocks.
    pub own_meta_rows: bool,
    pub small_variance: SmallVariance,
}

impl Preset {
    pub(crate) fn rules(self) -> Rules {
        match self {
            Preset::Hymba => Rules {
                projection_bias: false,
                learned_decay: true,
                time_step: TimeStep::Softplus,
                own_meta_rows: false,
                small_variance: SmallVariance::AddEpsilon,
            },
            Preset::Edifice => Rules {
                projection_bias: true,
                learned_decay: false,
                time_step: TimeStep::Clipped,
                own_meta_rows: true,
                small_variance: SmallVariance::ClipBelowEpsilon,
            },
        }
    }
}

/// How to build a [`Hymba`](crate::Hymba).
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `embed_dim` | required | ≥ 1 | width of one input frame |
/// | `hidden_size` | 256 | ≥ 1, a multiple of `num_heads` | width `h` of the residual stream and of the output |
/// | `state_size` | 16 | ≥ 1 | state `n` of each Mamba channel |
/// | `num_layers` | 4 | ≥ 1 | number of blocks |
/// | `num_heads` | 4 | ≥ 1, divides `hidden_size` | attention heads `a` |
/// | `num_meta_tokens` | 4 | ≥ 0 | learned tokens `k` in front of every sequence; 0 turns them off |
/// | `dropout` | 0.0 | 0 ≤ rate < 1 | dropout between blocks, in training only |
/// | `window_size` | 60 | ≥ 1 | frames `w` a frame can attend to, itself included |
/// | `seed` | 0 | any | seed of the initial weights |
///
/// All sizes together may ask for at most [`MAX_PARAMETERS`](Self::MAX_PARAMETERS) parameters.
///
/// The fields can be read and written; nothing is checked until [`validate`](Self::validate), which
/// [`Hymba::build`](crate::Hymba::build) and deserialisation call.
///
/// ```
/// use hymba::HymbaOptions;
///
/// let options = HymbaOptions::new(12).hidden_size(64).num_layers(2).window_size(100);
/// assert_eq!(options.num_heads, HymbaOptions::DEFAULT_NUM_HEADS);
/// assert_eq!(options.output_size(), 64);
/// assert!(options.validate().is_ok());
/// assert!(options.dropout(1.5).validate().is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
#[non_exhaustive]
pub struct HymbaOptions {
    /// Width of one input frame.
    pub embed_dim: usize,
    /// Width `h` of the residual stream and of the output.
    pub hidden_size: usize,
    /// State size `n` of each Mamba channel.
    pub state_size: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Attention heads `a`; divides `hidden_size`.
    pub num_heads: usize,
    /// Meta tokens `k`; 0 turns them off.
    pub num_meta_tokens: usize,
    /// Dropout rate between blocks, in training only.
    pub dropout: f32,
    /// How many frames `w` a frame can attend to, itself included. Not used by the Edifice preset.
    pub window_size: usize,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Which arithmetic the layers use.
    pub preset: Preset,
}

/// The options as they stand in a file, before [`HymbaOptions::validate`].
#[derive(Deserialize)]
#[serde(rename = "HymbaOptions", deny_unknown_fields)]
struct Unchecked {
    embed_dim: usize,
    #[serde(default = "defaults::hidden_size")]
    hidden_size: usize,
    #[serde(default = "defaults::state_size")]
    state_size: usize,
    #[serde(default = "defaults::num_layers")]
    num_layers: usize,
    #[serde(default = "defaults::num_heads")]
    num_heads: usize,
    #[serde(default = "defaults::num_meta_tokens")]
    num_meta_tokens: usize,
    #[serde(default = "defaults::dropout")]
    dropout: f32,
    #[serde(default = "defaults::window_size")]
    window_size: usize,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    preset: Preset,
}

mod defaults {
    use super::HymbaOptions as O;

    pub fn hidden_size() -> usize {
        O::DEFAULT_HIDDEN_SIZE
    }
    pub fn state_size() -> usize {
        O::DEFAULT_STATE_SIZE
    }
    pub fn num_layers() -> usize {
        O::DEFAULT_NUM_LAYERS
    }
    pub fn num_heads() -> usize {
        O::DEFAULT_NUM_HEADS
    }
    pub fn num_meta_tokens() -> usize {
        O::DEFAULT_NUM_META_TOKENS
    }
    pub fn dropout() -> f32 {
        O::DEFAULT_DROPOUT
    }
    pub fn window_size() -> usize {
        O::DEFAULT_WINDOW_SIZE
    }
}

impl TryFrom<Unchecked> for HymbaOptions {
    type Error = Error;

    fn try_from(raw: Unchecked) -> Result<Self> {
        let options = HymbaOptions {
            embed_dim: raw.embed_dim,
            hidden_size: raw.hidden_size,
            state_size: raw.state_size,
            num_layers: raw.num_layers,
            num_heads: raw.num_heads,
            num_meta_tokens: raw.num_meta_tokens,
            dropout: raw.dropout,
            window_size: raw.window_size,
            seed: raw.seed,
            preset: raw.preset,
        };
        options.validate()?;
        Ok(options)
    }
}

impl HymbaOptions {
    /// Default of `hidden_size`.
    pub const DEFAULT_HIDDEN_SIZE: usize = 256;
    /// Default of `state_size`.
    pub const DEFAULT_STATE_SIZE: usize = 16;
    /// Default of `num_layers`.
    pub const DEFAULT_NUM_LAYERS: usize = 4;
    /// Default of `num_heads`.
    pub const DEFAULT_NUM_HEADS: usize = 4;
    /// Default of `num_meta_tokens`.
    pub const DEFAULT_NUM_META_TOKENS: usize = 4;
    /// Default of `dropout`.
    pub const DEFAULT_DROPOUT: f32 = 0.0;
    /// The `dropout` of [`recommended`](Self::recommended).
    pub const RECOMMENDED_DROPOUT: f32 = 0.1;
    /// Default of `window_size`.
    pub const DEFAULT_WINDOW_SIZE: usize = 60;
    /// Default of `seed`.
    pub const DEFAULT_SEED: u64 = 0;
    /// The largest number of parameters a model may have: 2³¹, which is 8 GiB.
    pub const MAX_PARAMETERS: usize = 1 << 31;

    /// The documented defaults for frames of width `embed_dim`.
    pub fn new(embed_dim: usize) -> Self {
        HymbaOptions {
            embed_dim,
            hidden_size: Self::DEFAULT_HIDDEN_SIZE,
            state_size: Self::DEFAULT_STATE_SIZE,
            num_layers: Self::DEFAULT_NUM_LAYERS,
            num_heads: Self::DEFAULT_NUM_HEADS,
            num_meta_tokens: Self::DEFAULT_NUM_META_TOKENS,
            dropout: Self::DEFAULT_DROPOUT,
            window_size: Self::DEFAULT_WINDOW_SIZE,
            seed: Self::DEFAULT_SEED,
            preset: Preset::Hymba,
        }
    }

    /// As [`new`](Self::new), with dropout 0.1: a good start for training.
    pub fn recommended(embed_dim: usize) -> Self {
        Self::new(embed_dim).dropout(Self::RECOMMENDED_DROPOUT)
    }

    /// As [`new`](Self::new), with the arithmetic of `Edifice.SSM.Hymba` 0.2.0.
    ///
    /// It differs from the default model in this:
    ///
    /// * every block has its own learned meta keys and values; nothing travels between blocks;
    /// * A is fixed at −1 … −n, there is no D skip, and all projections have a bias;
    /// * Δ is clipped to \[0.001, 0.1\], and B is scaled by its mean over the channels;
    /// * the time step's rank is `hidden_size / 8`;
    /// * the norm takes variances below 1e-5 for 1e-5;
    /// * attention is causal over the whole past. `window_size` is not used, and the streaming state
    ///   grows by two rows of `hidden_size` numbers a block with every frame.
    ///
    /// Initial values are those of this crate, not Axon's, whose norm weights start at random.
    pub fn edifice(embed_dim: usize) -> Self {
        HymbaOptions { preset: Preset::Edifice, ..Self::new(embed_dim) }
    }

    /// Sets the width `h` of the residual stream and of the output.
    pub fn hidden_size(mut self, hidden_size: usize) -> Self {
        self.hidden_size = hidden_size;
        self
    }

    /// Sets the state size `n` of each Mamba channel.
    pub fn state_size(mut self, state_size: usize) -> Self {
        self.state_size = state_size;
        self
    }

    /// Sets the number of blocks.
    pub fn num_layers(mut self, num_layers: usize) -> Self {
        self.num_layers = num_layers;
        self
    }

    /// Sets the number of attention heads, which must divide `hidden_size`.
    pub fn num_heads(mut self, num_heads: usize) -> Self {
        self.num_heads = num_heads;
        self
    }

    /// Sets the number of meta tokens; 0 turns them off.
    pub fn num_meta_tokens(mut self, num_meta_tokens: usize) -> Self {
        self.num_meta_tokens = num_meta_tokens;
        self
    }

    /// Sets the dropout rate between blocks, used in training only.
    pub fn dropout(mut self, dropout: f32) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets how many frames a frame can attend to, itself included.
    pub fn window_size(mut self, window_size: usize) -> Self {
        self.window_size = window_size;
        self
    }

    /// Sets the seed of the initial weights.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Width of the model's output: `hidden_size`.
    pub fn output_size(&self) -> usize {
        self.hidden_size
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first option outside its range (see the table above), the value given, and what is
    /// allowed.
    pub fn validate(&self) -> Result<()> {
        let at_least_one = [
            ("embed_dim", self.embed_dim, "the width of one input frame"),
            ("hidden_size", self.hidden_size, "the width of the output; 256 is the default"),
            ("state_size", self.state_size, "the state of a Mamba channel; 16 is the default"),
            ("num_layers", self.num_layers, "the number of blocks; 4 is the default"),
            ("num_heads", self.num_heads, "the number of attention heads; 4 is the default"),
            ("window_size", self.window_size, "the frames a frame can attend to; 60 is the default"),
        ];
        for (option, given, meaning) in at_least_one {
            if given == 0 {
                return Err(Error::Option {
                    option,
                    given: "0".into(),
                    allowed: format!("it must be at least 1 ({meaning})"),
                });
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_heads) {
            let example = self.hidden_size.div_ceil(self.num_heads).checked_mul(self.num_heads);
            let example = example.map_or(String::new(), |example| format!(", for example {example}"));
            return Err(Error::Option {
                option: "hidden_size",
                given: self.hidden_size.to_string(),
                allowed: format!("it must be a multiple of num_heads = {}{example}; change either", self.num_heads),
            });
        }
        // written so that NaN fails
        if !(self.dropout >= 0.0 && self.dropout < 1.0) {
            return Err(Error::Option {
                option: "dropout",
                given: self.dropout.to_string(),
                allowed: "it must be at least 0 and below 1; 0.1 is usual".into(),
            });
        }
        match self.parameters() {
            Some(count) if count <= Self::MAX_PARAMETERS => Ok(()),
            count => {
                let (option, given) = self.largest();
                let count = count.map_or("more parameters than can be counted".into(), |n| format!("{n} parameters"));
                Err(Error::Option {
                    option,
                    given: given.to_string(),
                    allowed: format!("with it the model has {count}, and at most {} are allowed", Self::MAX_PARAMETERS),
                })
            }
        }
    }

    /// The option that is to blame for too many parameters: the first that, at its default, makes them few enough.
    fn largest(&self) -> (&'static str, usize) {
        let small = Self { preset: self.preset, ..Self::new(1) };
        let sizes = [
            ("embed_dim", self.embed_dim, Self { embed_dim: small.embed_dim, ..self.clone() }),
            ("state_size", self.state_size, Self { state_size: small.state_size, ..self.clone() }),
            ("num_meta_tokens", self.num_meta_tokens, Self { num_meta_tokens: small.num_meta_tokens, ..self.clone() }),
            ("num_layers", self.num_layers, Self { num_layers: small.num_layers, ..self.clone() }),
        ];
        let fits = |options: &Self| options.parameters().is_some_and(|count| count <= Self::MAX_PARAMETERS);
        let culprit = sizes.into_iter().find(|(_, _, without)| fits(without));
        culprit.map_or(("hidden_size", self.hidden_size), |(option, given, _)| (option, given))
    }

    /// Inner width `d` of the Mamba branch: 2·h.
    pub(crate) fn inner_size(&self) -> usize {
        2 * self.hidden_size
    }

    /// Rank `r` of the time-step projection.
    pub(crate) fn dt_rank(&self) -> usize {
        match self.preset {
            Preset::Hymba => self.hidden_size.div_ceil(16),
            Preset::Edifice => (self.hidden_size / 8).max(1),
        }
    }

    /// The attention window; `None` is the whole past.
    pub(crate) fn window(&self) -> Option<usize> {
        match self.preset {
            Preset::Hymba => Some(self.window_size),
            Preset::Edifice => None,
        }
    }

    /// The number of parameters, or `None` where it cannot be counted. Equal to
    /// [`Hymba::num_parameters`](crate::Hymba::num_parameters), without building the model.
    pub(crate) fn parameters(&self) -> Option<usize> {
        let mul = |a: usize, b: usize| a.checked_mul(b);
        let sum = |terms: &[Option<usize>]| terms.iter().try_fold(0usize, |total, term| total.checked_add((*term)?));
        let (e, h, n, k) = (self.embed_dim, self.hidden_size, self.state_size, self.num_meta_tokens);
        let d = mul(2, h)?;
        let r = self.dt_rank();
        let rules = self.preset.rules();
        let dense = |inputs: usize, outputs: usize, bias: bool| {
            mul(inputs, outputs)?.checked_add(if bias { outputs } else { 0 })
        };
        let mamba = sum(&[
            dense(h, mul(2, d)?, rules.projection_bias),
            mul(5, d),
            dense(d, mul(2, n)?.checked_add(r)?, rules.projection_bias),
            dense(r, d, true),
            if rules.learned_decay { mul(d, n.checked_add(1)?) } else { Some(0) },
            dense(d, h, rules.projection_bias),
        ]);
        let meta_rows = mul(k, h);
        let attention =
            sum(&[mul(4, dense(h, h, true)?), if rules.own_meta_rows { mul(2, meta_rows?) } else { Some(0) }]);
        let ffn = sum(&[dense(h, mul(4, h)?, true), dense(mul(4, h)?, h, true)]);
        let block = sum(&[mul(4, h), mamba, attention, dense(h, h, true), ffn])?;
        sum(&[
            if e == h { Some(0) } else { dense(e, h, true) },
            if rules.own_meta_rows { Some(0) } else { meta_rows },
            mul(self.num_layers, block),
            mul(2, h),
        ])
    }
}
