//! The configuration of a checkpoint: `config.json`.

use std::path::Path;

use serde::Deserialize;

use self::raw::Raw;
use super::python_json::python_json_of_strings;
use crate::files::header::printable;
use crate::files::tensors::Source;
use crate::{Error, Result};

mod bytes;
mod check;
mod raw;
mod rope_parameters;
#[cfg(test)]
mod tests;
mod value;
mod words;
mod write;

/// Longest `config.json` that is read. The published one has 3 kB.
pub(super) const MAX_CONFIG: u64 = 1 << 20;

/// The shape and the switches of a Hymba language model: the keys of its `config.json` that influence what it computes.
///
/// Fields are named as the keys are, and read as the published code reads them: see the two tables.
///
/// | key | if absent | range |
/// |---|---|---|
/// | `model_type` | null | null, `"hymba"` |
/// | `hidden_size`, `num_hidden_layers`, `vocab_size`, `num_attention_heads` | refused | ≥ 1 |
/// | `intermediate_size` | refused | ≥ 0; 0 leaves out the MLP |
/// | `num_key_value_heads` | 8 | ≥ 1, divides `num_attention_heads`; null for as many |
/// | `mlp_hidden_act` | refused | `"silu"`, `"relu2"` |
/// | `kq_norm` | refused | `"none"`, `"rms"`, `"perhead-rms"` |
/// | `hidden_act` | `"silu"` | `"silu"` |
/// | `mamba_expand`, `mamba_d_state`, `mamba_d_conv` | 2, 16, 4 | > 0, ≥ 1, 1 to 4 |
/// | `mamba_dt_rank` | `"auto"` | ≥ 1, or `"auto"`, which is ⌈hidden_size / 16⌉ |
/// | `mamba_conv_bias`, `mamba_proj_bias`, `mamba_inner_layernorms` | true, false, true | |
/// | `num_memory_tokens` | 0 | 0 to [`MAX_META_TOKENS`](Self::MAX_META_TOKENS) |
/// | `sliding_window` | null | ≥ 1; null for none, and then all layers are global |
/// | `global_attn_idx` | null | layer numbers, of which those of no layer are ignored; needed with a `sliding_window` |
/// | `kv_reuse_group` | null | lists of layer numbers, of which those of no layer are ignored; the first comes before the others |
/// | `kv_reuse_every_i_layer` | −1 | ≥ 1; 0 or less for never |
/// | `rope` | false | |
/// | `rope_type` | null | null or `"default"`, `"ntk"` |
/// | `rope_theta` | 10000 | > 0 |
/// | `rope_parameters`, `rope_scaling` | null | objects with `rope_theta` and `rope_type` (or `type`): null, `"default"`, `"ntk"` |
/// | `partial_rotary_factor` | 1 | 1, also in those objects |
/// | `max_position_embeddings` | 262144 | ≥ 1 |
/// | `orig_max_position_embeddings` | null | ≥ 1; needed with `"ntk"` |
/// | `rms_norm_eps` | 1e-6 | > 0, ≤ 1 |
/// | `tie_word_embeddings` | false | |
/// | `bos_token_id`, `eos_token_id`, `pad_token_id` | 1, 2, 0 | null or below 0 for none; `eos_token_id` may be a list |
/// | `torch_dtype`, or `dtype` | null | null, `"float32"`, `"float16"`, `"bfloat16"` |
/// | `memory_tokens_interspersed_every` | 0 | 0 or less |
/// | `attn_hidden_size`, `kq_head_dim` | −1 | 0 or less, or what they are anyway: `hidden_size`, and that over the number of heads |
/// | `quantization_config` | null | null, or what [`save_dir`](crate::HymbaLm::save_dir) writes of a quantised model |
///
/// | ignored, as they change nothing in the published code either | |
/// |---|---|
/// | `num_experts`, `num_experts_per_tok`, `output_router_logits`, `router_aux_loss_coef` | there is always one expert, and no router |
/// | `v_head_dim`, `conv_dim` | follow from the other sizes |
/// | `layer_type`, `num_mamba`, `kv_weight_reuse` | all layers are hybrid |
/// | `attn_implementation`, `attn_implementation_new`, `use_mamba_kernels`, `use_cache`, `calc_logits_for_entire_prompt` | how it is computed |
/// | `attention_dropout`, `initializer_range` | for training |
/// | `architectures`, `auto_map`, `transformers_version`, `seq_length`, and any other key | |
///
/// What is ignored may be anything that Python's `json` writes, `Infinity` and `NaN` included; a byte order mark is skipped. As in
/// transformers, `rope_scaling` comes before `rope_parameters`, and a `rope_theta` in there before the one outside;
/// parameters for each kind of layers must be the same for all. A `rope_type` of `"default"` in there leaves Hymba's
/// own key as it is. Without `rope`, these objects are ignored. In `kv_reuse_group`, a layer that uses the keys and
/// values of another and begins a list of its own hands those on.
///
/// Besides, `hidden_size` and the inner width ⌊mamba_expand · hidden_size⌋ must be multiples of `num_attention_heads`,
/// and layers that share keys and values must be all global or all windowed. All sizes together may ask for at most
/// [`MAX_PARAMETERS`](Self::MAX_PARAMETERS) parameters, in at most [`MAX_LAYERS`](Self::MAX_LAYERS) layers.
///
/// The fields can be read and written; nothing is checked until [`validate`](Self::validate), which
/// [`from_file`](Self::from_file) and deserialisation call.
///
/// ```
/// use hymba::lm::HymbaLmConfig;
///
/// let config = HymbaLmConfig::hymba_1_5b();
/// assert_eq!(config.num_parameters(), Some(1_522_797_824));
///
/// let mut config = config;
/// config.num_attention_heads = 7;
/// let error = config.validate().unwrap_err();
/// assert!(error.to_string().contains("hidden_size = 1600"), "{error}");
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Raw")]
#[non_exhaustive]
pub struct HymbaLmConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of tokens, and width of the logits.
    pub vocab_size: usize,
    /// Query heads; each is `hidden_size / num_attention_heads` wide.
    pub num_attention_heads: usize,
    /// Heads of keys and values; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Inner width of the MLP; 0 leaves it out.
    pub intermediate_size: usize,
    /// Activation of the MLP.
    pub mlp_hidden_act: MlpActivation,
    /// Activation after the convolution: `"silu"`.
    pub hidden_act: String,
    /// Inner width of both branches, as a multiple of `hidden_size`.
    pub mamba_expand: f64,
    /// State of each Mamba channel.
    pub mamba_d_state: usize,
    /// Taps of the convolution.
    pub mamba_d_conv: usize,
    /// Rank of the time step; `None` is `"auto"`, ⌈hidden_size / 16⌉.
    pub mamba_dt_rank: Option<usize>,
    /// Whether the convolution has a bias.
    pub mamba_conv_bias: bool,
    /// Whether the projections into and out of the layer have a bias.
    pub mamba_proj_bias: bool,
    /// Whether the time step, B and C are normalised.
    pub mamba_inner_layernorms: bool,
    /// Meta tokens in front of every sequence.
    pub num_memory_tokens: usize,
    /// How far back a token sees in a windowed layer, besides the meta tokens: it sees itself and this many before it.
    pub sliding_window: Option<usize>,
    /// The layers that see everything; `None` only without a window, and then all do. Numbers of no layer are ignored.
    pub global_attn_idx: Option<Vec<usize>>,
    /// Layers that share keys and values: the first of a list makes them, the others use them. No layer is in two lists; numbers
    /// that no layer has are ignored.
    pub kv_reuse_group: Option<Vec<Vec<usize>>>,
    /// Without `kv_reuse_group`: each layer whose number is a multiple of it makes keys and values, the others use the last
    /// ones made. `None` where every layer makes its own.
    pub kv_reuse_every_i_layer: Option<usize>,
    /// Normalisation of queries and keys.
    pub kq_norm: KeyQueryNorm,
    /// Whether queries and keys are rotated by their position.
    pub rope: bool,
    /// How the rotation's base is formed.
    pub rope_type: RopeType,
    /// Base of the rotation, before `rope_type`.
    pub rope_theta: f64,
    /// Positions the model was trained for, meta tokens included. It enters the base of the rotation with [`RopeType::Ntk`].
    ///
    /// Longer sequences are computed all the same, as in the published code: positions go on, windowed layers see what they
    /// always see, and global layers keep the keys and values of all tokens. Answers usually get worse from there on.
    pub max_position_embeddings: usize,
    /// Positions of the training before it was extended, for [`RopeType::Ntk`].
    pub orig_max_position_embeddings: Option<usize>,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Whether the embedding is also the matrix of the logits. Of a checkpoint that says so and yet has an `lm_head.weight` of
    /// its own, [`HymbaLm::config`](crate::HymbaLm::config) says false.
    pub tie_word_embeddings: bool,
    /// The token in front of a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text; may be empty.
    pub eos_token_id: Vec<u32>,
    /// The token that fills short rows.
    pub pad_token_id: Option<u32>,
    /// The type the checkpoint was saved in, by its own account.
    pub torch_dtype: Option<TorchDtype>,
    /// How many tokens apart the meta tokens are repeated; 0 for never.
    pub memory_tokens_interspersed_every: usize,
    /// The bits of the matrices in the checkpoint, and in a model that was quantised while it was read.
    pub quantization: Quantization,
}

/// The key `kq_norm`: how queries and keys are normalised, before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyQueryNorm {
    /// `"none"`: not at all.
    None,
    /// `"rms"`: RMSNorm over the width of a head, one weight for all heads.
    Rms,
    /// `"perhead-rms"`: the same, a weight for each head.
    PerHeadRms,
}

/// The key `mlp_hidden_act`: the activation of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MlpActivation {
    /// `"silu"`: `silu(gate(x)) ⊙ up(x)`.
    Silu,
    /// `"relu2"`: `relu(up(x))²`, without a gate.
    Relu2,
}

/// The key `rope_type`: the base of the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RopeType {
    /// `"default"` or null: `rope_theta`.
    Default,
    /// `"ntk"`: stretched for longer sequences,
    /// `rope_theta · (2·max_position_embeddings / orig_max_position_embeddings − 1)^(p/(p−2))` with `p` the width of a
    /// query head.
    Ntk,
}

/// The key `torch_dtype`: a type of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TorchDtype {
    /// `"float32"`.
    F32,
    /// `"float16"`.
    F16,
    /// `"bfloat16"`.
    BF16,
}

/// How many bits each weight of the big matrices takes, in the files of a checkpoint (key `quantization_config`) and in
/// memory ([`LoadOptions::quantize`](super::LoadOptions::quantize)).
///
/// | matrix | `None` | `Bits8` | `Bits4` |
/// |---|---|---|---|
/// | embedding, head, `in_proj`, `out_proj`, `gate_proj`, `up_proj`, `down_proj` | as in the file | 8 bits | 4 bits |
/// | `x_proj`, `dt_proj`, which make the time step, B and C of the scan | as in the file | 8 bits | 8 bits |
/// | norms, biases, convolution, A, D, meta tokens | f32 | f32 | f32 |
///
/// 32 consecutive weights of a row share a scale, a bfloat16: 8.5 or 4.5 bits per weight in all. A weight is its scale
/// times an integer, of −127 to 127 in 8 bits and of −8 to 7 in 4. In 8 bits the scale is the largest magnitude over
/// 127; in 4 bits it is the one, of eight tried, with the least squared error. Products quantise the activations to 8
/// bits, too, 32 at a time, and multiply integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Quantization {
    /// Not at all.
    #[default]
    None,
    /// 8 bits.
    Bits8,
    /// 4 bits.
    Bits4,
}

impl HymbaLmConfig {
    /// The largest number of parameters a model may have: 2³⁶.
    pub const MAX_PARAMETERS: u64 = 1 << 36;
    /// The largest number of layers a model may have.
    pub const MAX_LAYERS: usize = 512;
    /// The largest number of meta tokens: 2¹⁴. They see each other, so their cost grows with the square of their
    /// number.
    pub const MAX_META_TOKENS: usize = 1 << 14;

    /// Hymba-1.5B, as NVIDIA published it (base and instruct).
    pub fn hymba_1_5b() -> Self {
        // layers 0, 15 and 31 are global; between them two by two share, and three once
        let mut groups: Vec<Vec<usize>> = (1..15).step_by(2).map(|layer| vec![layer, layer + 1]).collect();
        groups.push(vec![16, 17, 18]);
        groups.extend((19..31).step_by(2).map(|layer| vec![layer, layer + 1]));
        HymbaLmConfig {
            hidden_size: 1600,
            num_hidden_layers: 32,
            vocab_size: 32001,
            num_attention_heads: 25,
            num_key_value_heads: 5,
            intermediate_size: 5504,
            mlp_hidden_act: MlpActivation::Silu,
            hidden_act: "silu".into(),
            mamba_expand: 2.0,
            mamba_d_state: 16,
            mamba_d_conv: 4,
            mamba_dt_rank: Some(100),
            mamba_conv_bias: true,
            mamba_proj_bias: false,
            mamba_inner_layernorms: true,
            num_memory_tokens: 128,
            sliding_window: Some(1024),
            global_attn_idx: Some(vec![0, 15, 31]),
            kv_reuse_group: Some(groups),
            kv_reuse_every_i_layer: None,
            kq_norm: KeyQueryNorm::None,
            rope: true,
            rope_type: RopeType::Ntk,
            rope_theta: 10000.0,
            max_position_embeddings: 8192,
            orig_max_position_embeddings: Some(2048),
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            bos_token_id: Some(1),
            eos_token_id: vec![2],
            pad_token_id: Some(0),
            torch_dtype: Some(TorchDtype::BF16),
            memory_tokens_interspersed_every: 0,
            quantization: Quantization::None,
        }
    }

    /// Reads and checks a `config.json`. The file need not be trusted.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be read, and [`Error::Format`] when it is not a config or describes a model that
    /// cannot be run here; the message says which key, what it holds and what is allowed.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_text(path, &Self::text(path)?)
    }

    /// The text of a `config.json`.
    pub(super) fn text(path: &Path) -> Result<String> {
        Source::open(path)?.text(MAX_CONFIG)
    }

    /// Reads and checks the text of the file at `path`.
    pub(super) fn from_text(path: &Path, text: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_slice(&python_json_of_strings(text.as_bytes()))
            .map_err(|error| Error::format(path, format!("not a usable config: {}", printable(&error.to_string()))))?;
        Self::try_from(raw).map_err(|error| Error::format(path, error.to_string()))
    }

    /// The number of parameters, tied ones counted once; `None` where a value is outside its range, as
    /// [`validate`](Self::validate) finds, or the number does not fit a `usize`.
    pub fn num_parameters(&self) -> Option<usize> {
        self.check_values().ok()?;
        usize::try_from(self.count()?).ok()
    }

    /// Inner width of both branches: ⌊mamba_expand · hidden_size⌋.
    pub(crate) fn inner_size(&self) -> usize {
        (self.mamba_expand * self.hidden_size as f64) as usize
    }

    /// Width of a query or key head.
    pub(crate) fn key_width(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// Width of a value head.
    pub(crate) fn value_width(&self) -> usize {
        self.inner_size() / self.num_attention_heads
    }

    /// Rank of the time step.
    pub(crate) fn dt_rank(&self) -> usize {
        self.mamba_dt_rank.unwrap_or(self.hidden_size.div_ceil(16))
    }

    /// Whether the layer sees everything.
    pub(crate) fn is_global(&self, layer: usize) -> bool {
        self.window(layer).is_none()
    }

    /// How many rows before itself, besides the meta tokens, a row sees in this layer; `None` in a global layer.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        let global = self.global_attn_idx.as_ref().is_some_and(|layers| layers.contains(&layer));
        self.sliding_window.filter(|_| !global)
    }

    /// The layer whose keys and values this layer uses: often its own.
    pub(crate) fn kv_source(&self, layer: usize) -> usize {
        match (&self.kv_reuse_group, self.kv_reuse_every_i_layer) {
            (Some(groups), _) => groups.iter().find(|group| group.contains(&layer)).map_or(layer, |group| group[0]),
            (None, Some(every)) => layer - layer % every,
            (None, None) => layer,
        }
    }

    /// Whether the layers compute the same as those of `other` if they have the same weights: all that a state depends on. What
    /// tokens mean and how weights are stored may differ.
    pub(crate) fn has_layers_of(&self, other: &Self) -> bool {
        let sizes = |config: &Self| {
            let layers = 0..config.num_hidden_layers;
            let attention: Vec<_> = layers.map(|layer| (config.kv_source(layer), config.window(layer))).collect();
            let heads = (config.num_attention_heads, config.num_key_value_heads, config.kq_norm);
            let mlp = (config.intermediate_size, config.mlp_hidden_act, config.hidden_act.clone());
            let mamba = (config.inner_size(), config.mamba_d_state, config.mamba_d_conv, config.dt_rank());
            let biases = (config.mamba_conv_bias, config.mamba_proj_bias, config.mamba_inner_layernorms);
            let norms = (config.rms_norm_eps.to_bits(), config.rope_base().map(f64::to_bits));
            (config.hidden_size, config.num_memory_tokens, attention, heads, mlp, mamba, biases, norms)
        };
        sizes(self) == sizes(other)
    }

    /// Whether the layer makes its own keys and values.
    pub(crate) fn owns_kv(&self, layer: usize) -> bool {
        self.kv_source(layer) == layer
    }

    /// Base of the rotation; `None` where nothing is rotated.
    pub(crate) fn rope_base(&self) -> Option<f64> {
        let stretch = match self.rope_type {
            RopeType::Default => 1.0,
            RopeType::Ntk => {
                let width = self.key_width() as f64;
                let longer =
                    self.max_position_embeddings as f64 / self.orig_max_position_embeddings.unwrap_or(0) as f64;
                (2.0 * longer - 1.0).powf(width / (width - 2.0))
            }
        };
        self.rope.then_some(self.rope_theta * stretch)
    }

    /// Rows of the layer's `in_proj`: q, then k and v where they are the layer's own, then the two inputs of the Mamba branch.
    pub(crate) fn in_proj_rows(&self, layer: usize) -> usize {
        self.projected(self.owns_kv(layer))
    }

    fn projected(&self, owns_kv: bool) -> usize {
        let own = if owns_kv { self.num_key_value_heads * (self.key_width() + self.value_width()) } else { 0 };
        self.hidden_size + own + 2 * self.inner_size()
    }

    /// Name and shape of every tensor of the state dict, in the order in which the model uses them. A tied model has no
    /// `lm_head.weight`.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let outer = |(name, shape): (&str, _)| (name.to_string(), shape);
        let mut tensors: Vec<_> = self.first_tensors().into_iter().map(outer).collect();
        for layer in 0..self.num_hidden_layers {
            let inner = |(name, shape)| (format!("model.layers.{layer}.{name}"), shape);
            tensors.extend(self.layer_tensors(self.owns_kv(layer)).into_iter().map(inner));
        }
        tensors.extend(self.last_tensors().into_iter().map(outer));
        tensors
    }

    fn first_tensors(&self) -> Vec<(&'static str, Vec<usize>)> {
        let mut tensors = vec![("model.embed_tokens.weight", vec![self.vocab_size, self.hidden_size])];
        if self.num_memory_tokens > 0 {
            tensors.push(("model.memory_tokens", vec![self.num_memory_tokens, self.hidden_size]));
        }
        tensors
    }

    fn last_tensors(&self) -> Vec<(&'static str, Vec<usize>)> {
        let mut tensors = vec![("model.final_layernorm.weight", vec![self.hidden_size])];
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight", vec![self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    /// The tensors of one layer, by their names within it.
    fn layer_tensors(&self, owns_kv: bool) -> Vec<(&'static str, Vec<usize>)> {
        let (h, e, f, n, r) =
            (self.hidden_size, self.inner_size(), self.intermediate_size, self.mamba_d_state, self.dt_rank());
        let rows = self.projected(owns_kv);
        let (gated, mlp) = (self.mlp_hidden_act == MlpActivation::Silu, f > 0);
        let normed = self.kq_norm != KeyQueryNorm::None;
        let per_head = |heads: usize| match self.kq_norm {
            KeyQueryNorm::PerHeadRms => vec![1, heads, 1, self.key_width()],
            KeyQueryNorm::None | KeyQueryNorm::Rms => vec![self.key_width()],
        };
        [
            (true, "input_layernorm.weight", vec![h]),
            (true, "mamba.in_proj.weight", vec![rows, h]),
            (self.mamba_proj_bias, "mamba.in_proj.bias", vec![rows]),
            (normed, "mamba.self_attn.q_norm.weight", per_head(self.num_attention_heads)),
            // there, though without use, where keys come from another layer
            (normed, "mamba.self_attn.k_norm.weight", per_head(self.num_key_value_heads)),
            (true, "mamba.conv1d.weight", vec![e, 1, self.mamba_d_conv]),
            (self.mamba_conv_bias, "mamba.conv1d.bias", vec![e]),
            (true, "mamba.x_proj.0.weight", vec![r + 2 * n, e]),
            (self.mamba_inner_layernorms, "mamba.dt_layernorm.weight", vec![r]),
            (self.mamba_inner_layernorms, "mamba.B_layernorm.weight", vec![n]),
            (self.mamba_inner_layernorms, "mamba.C_layernorm.weight", vec![n]),
            (true, "mamba.dt_proj.0.weight", vec![e, r]),
            (true, "mamba.dt_proj.0.bias", vec![e]),
            (true, "mamba.A_log.0", vec![e, n]),
            (true, "mamba.D.0", vec![e]),
            (true, "mamba.pre_avg_layernorm1.weight", vec![e]),
            (true, "mamba.pre_avg_layernorm2.weight", vec![e]),
            (true, "mamba.out_proj.weight", vec![h, e]),
            (self.mamba_proj_bias, "mamba.out_proj.bias", vec![h]),
            (mlp, "pre_moe_layernorm.weight", vec![h]),
            (mlp && gated, "moe.experts.0.gate_proj.weight", vec![f, h]),
            (mlp, "moe.experts.0.up_proj.weight", vec![f, h]),
            (mlp, "moe.experts.0.down_proj.weight", vec![h, f]),
        ]
        .into_iter()
        .filter_map(|(there, name, shape)| there.then_some((name, shape)))
        .collect()
    }

    /// Parameters of a model whose values have been checked.
    fn count(&self) -> Option<u64> {
        let sum = |tensors: Vec<(&str, Vec<usize>)>| {
            tensors.iter().try_fold(0u64, |sum, (_, shape)| {
                sum.checked_add(shape.iter().try_fold(1u64, |size, &axis| size.checked_mul(axis as u64))?)
            })
        };
        let owners = (0..self.num_hidden_layers).filter(|&layer| self.owns_kv(layer)).count() as u64;
        let users = self.num_hidden_layers as u64 - owners;
        sum(self.first_tensors())?
            .checked_add(sum(self.layer_tensors(true))?.checked_mul(owners)?)?
            .checked_add(sum(self.layer_tensors(false))?.checked_mul(users)?)?
            .checked_add(sum(self.last_tensors())?)
    }
}
