//! The options of a model: name, default, range and meaning in one place.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::pattern::Pattern;
use super::variant::Variant;
use crate::layers::{LayerNorm, Linear};
use crate::{Error, Result};

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
/// | `dropout` | 0.0 | 0 ≤ rate < 1 | dropout of what branches and FFN add to the residual stream, in training only |
/// | `window_size` | 60 | ≥ 1 | frames `w` a frame can attend to, itself included |
/// | `pattern` | parallel | see [`Pattern`] | which kind of block runs at which depth |
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
#[serde(remote = "Self", default = "HymbaOptions::without_width", deny_unknown_fields)]
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
    /// Dropout rate, in training only: see [`dropout`](Self::dropout).
    pub dropout: f32,
    /// How many frames `w` a frame can attend to, itself included. Not used by the Edifice variant.
    pub window_size: usize,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Which kind of block runs at which depth.
    #[serde(skip_serializing_if = "Pattern::is_parallel")]
    pub pattern: Pattern,
    /// Which arithmetic the layers use.
    #[serde(alias = "preset")]
    pub variant: Variant,
}

impl<'de> Deserialize<'de> for HymbaOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let options = HymbaOptions::deserialize(deserializer)?;
        if options.embed_dim == Self::NO_WIDTH {
            return Err(serde::de::Error::missing_field("embed_dim"));
        }
        options.validate().map_err(serde::de::Error::custom)?;
        Ok(options)
    }
}

impl Serialize for HymbaOptions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        HymbaOptions::serialize(self, serializer)
    }
}

/// A setter for each of these fields.
macro_rules! setters {
    ($($(#[$doc:meta])* $option:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        pub fn $option(mut self, $option: $type) -> Self {
            self.$option = $option;
            self
        }
    )*};
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
    /// Default of `pattern`.
    pub const DEFAULT_PATTERN: Pattern = Pattern::Parallel;
    /// The `attention_every` of [`jamba`](Self::jamba) and [`zamba`](Self::zamba).
    pub const DEFAULT_ATTENTION_EVERY: usize = 3;
    /// The `num_layers` of [`jamba`](Self::jamba) and [`zamba`](Self::zamba).
    pub const HYBRID_NUM_LAYERS: usize = 6;
    /// Default of `seed`.
    pub const DEFAULT_SEED: u64 = 0;
    /// The largest number of parameters a model may have: 2³¹, which is 8 GiB, and about twice that from the first call on,
    /// when weights are kept in the order of the products, too. Training takes four times as much besides.
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
            pattern: Self::DEFAULT_PATTERN,
            variant: Variant::Hymba,
        }
    }

    /// As [`new`](Self::new), with dropout 0.1: a good start for training.
    pub fn recommended(embed_dim: usize) -> Self {
        Self::new(embed_dim).dropout(Self::RECOMMENDED_DROPOUT)
    }

    /// Mamba blocks of which every third has attention instead, as in Jamba: as [`new`](Self::new), with 6 blocks and
    /// [`Pattern::Alternating`].
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::jamba(12).hidden_size(64))?; // M M A M M A
    /// assert!(model.blocks()[2].attention().is_some() && model.blocks()[2].mamba().is_none());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn jamba(embed_dim: usize) -> Self {
        let pattern = Pattern::Alternating { attention_every: Self::DEFAULT_ATTENTION_EVERY };
        Self::new(embed_dim).num_layers(Self::HYBRID_NUM_LAYERS).pattern(pattern)
    }

    /// Mamba blocks of which every third is fed by one attention block that they share, as in Zamba: as [`new`](Self::new), with 6
    /// blocks and [`Pattern::SharedAttention`].
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::zamba(12).hidden_size(64))?;
    /// assert!(model.shared_block().is_some());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn zamba(embed_dim: usize) -> Self {
        let pattern = Pattern::SharedAttention { attention_every: Self::DEFAULT_ATTENTION_EVERY };
        Self::new(embed_dim).num_layers(Self::HYBRID_NUM_LAYERS).pattern(pattern)
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
    ///   grows by two rows of `hidden_size` numbers per block and frame.
    ///
    /// Its blocks are [`Pattern::Parallel`]. Initial values are those of this crate, not Axon's, whose norm weights start at random.
    pub fn edifice(embed_dim: usize) -> Self {
        HymbaOptions { variant: Variant::Edifice, ..Self::new(embed_dim) }
    }

    /// The defaults for options in a file, with a width that the file must set.
    fn without_width() -> Self {
        Self::new(Self::NO_WIDTH)
    }

    /// More than any frame has.
    const NO_WIDTH: usize = usize::MAX;

    setters! {
        /// Sets the width `h` of the residual stream and of the output.
        hidden_size: usize;
        /// Sets the state size `n` of each Mamba channel.
        state_size: usize;
        /// Sets the number of blocks.
        num_layers: usize;
        /// Sets the number of attention heads, which must divide `hidden_size`.
        num_heads: usize;
        /// Sets the number of meta tokens; 0 turns them off.
        num_meta_tokens: usize;
        /// Sets the dropout rate, used in training only: of the outputs of both branches and of the feed-forward network of every
        /// block, before they join the residual stream. In the Edifice variant, as in the original, of what passes from block to
        /// block, so that it does nothing in a model of one block. Rates are rounded to multiples of 2⁻¹⁶.
        dropout: f32;
        /// Sets how many frames a frame can attend to, itself included.
        window_size: usize;
        /// Sets the seed of the initial weights.
        seed: u64;
        /// Sets which kind of block runs at which depth.
        pattern: Pattern;
    }

    /// Width of the model's output: `hidden_size`.
    pub fn output_size(&self) -> usize {
        self.hidden_size
    }

    /// The number of parameters of a model with these options, without building it: to compare sizes, or to choose one. `None` where
    /// they cannot be counted, or an option is not usable.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// // the widest Zamba of at most a million parameters
    /// let of = |width| HymbaOptions::zamba(12).hidden_size(width);
    /// let width = (1..=64).rev().map(|part| 4 * part).find(|&width| of(width).num_parameters().is_some_and(|count| count <= 1_000_000));
    /// let model = Hymba::build(of(width.unwrap()))?;
    /// assert_eq!(Some(model.num_parameters()), model.options().num_parameters());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn num_parameters(&self) -> Option<usize> {
        self.validate().ok()?;
        self.parameters()
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
        self.pattern.validate(self.num_layers)?;
        if self.variant == Variant::Edifice && self.pattern != Pattern::Parallel {
            return Err(Error::Option {
                option: "pattern",
                given: self.pattern.kind().into(),
                allowed: "the blocks of the Edifice variant are parallel; set one of the two back".into(),
            });
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
            _ => Err(self.too_large(&format!("at most {} are allowed", Self::MAX_PARAMETERS), |options| {
                options.parameters().is_some_and(|count| count <= Self::MAX_PARAMETERS)
            })),
        }
    }

    /// The error that there are too many parameters; others `fit`.
    pub(crate) fn too_large(&self, why: &str, fit: impl Fn(&Self) -> bool) -> Error {
        let (option, given) = self.largest(fit);
        let count = self
            .parameters()
            .map_or("more parameters than can be counted".into(), |count| format!("{count} parameters"));
        Error::Option { option, given: given.to_string(), allowed: format!("with it the model has {count}, and {why}") }
    }

    /// The option that is to blame for too many parameters: the first that, at its default, makes them few enough.
    fn largest(&self, fit: impl Fn(&Self) -> bool) -> (&'static str, usize) {
        let small = Self { variant: self.variant, ..Self::new(1) };
        let sizes = [
            ("embed_dim", self.embed_dim, Self { embed_dim: small.embed_dim, ..self.clone() }),
            ("state_size", self.state_size, Self { state_size: small.state_size, ..self.clone() }),
            ("num_meta_tokens", self.num_meta_tokens, Self { num_meta_tokens: small.num_meta_tokens, ..self.clone() }),
            ("num_layers", self.num_layers, Self { num_layers: small.num_layers, ..self.clone() }),
        ];
        let culprit = sizes.into_iter().find(|(_, _, without)| fit(without));
        culprit.map_or(("hidden_size", self.hidden_size), |(option, given, _)| (option, given))
    }

    /// Inner width `d` of the Mamba branch: 2·h.
    pub(crate) fn inner_size(&self) -> usize {
        2 * self.hidden_size
    }

    /// Rank `r` of the time-step projection.
    pub(crate) fn dt_rank(&self) -> usize {
        match self.variant {
            Variant::Hymba => self.hidden_size.div_ceil(16),
            Variant::Edifice => (self.hidden_size / 8).max(1),
        }
    }

    /// The attention window; `None` is the whole past.
    pub(crate) fn window(&self) -> Option<usize> {
        match self.variant {
            Variant::Hymba => Some(self.window_size),
            Variant::Edifice => None,
        }
    }

    /// The number of parameters, or `None` where it cannot be counted. Equal to
    /// [`Hymba::num_parameters`](crate::Hymba::num_parameters), without building the model.
    pub(crate) fn parameters(&self) -> Option<usize> {
        let (e, h, k) = (self.embed_dim, self.hidden_size, self.num_meta_tokens);
        // what is derived from it must not overflow either
        h.checked_mul(8)?;
        let own_meta = self.variant.differences().own_meta;
        let kinds = self.pattern.kinds(self.num_layers);
        let blocks: Vec<_> = kinds.map(|(kind, count)| self.block_parameters(kind)?.checked_mul(count)).collect();
        sum(&[
            if e == h { Some(0) } else { Linear::count(e, h, true) },
            if own_meta { Some(0) } else { k.checked_mul(h) },
            if self.pattern.shares() { self.shared_parameters() } else { Some(0) },
            sum(&blocks),
            LayerNorm::count(h),
        ])
    }
}

/// Adds counts, of which one may be too large to be counted.
pub(super) fn sum(counts: &[Option<usize>]) -> Option<usize> {
    counts.iter().try_fold(0usize, |sum, count| sum.checked_add((*count)?))
}
