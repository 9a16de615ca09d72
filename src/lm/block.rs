//! One layer: attention and Mamba side by side between two shared projections, and an MLP.

use super::config::{HymbaLmConfig, KeyQueryNorm, MlpActivation};
use super::names::{LAYER, in_files, visit_published};
use crate::kernels::matmul::Storage;
use crate::kernels::rows::{Out, Rows};
use crate::layers::{
    Activation, AttentionConfig, Batch, Buffer, Depth, HeadNorms, KvShape, KvStorage, LayerState, Linear, MambaBranch,
    MambaConfig, MetaTokenAttention, Mlp, RmsNorm, TimeStep, Weight, flat,
};
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};

/// One layer.
pub(super) struct Block {
    depth: Depth,
    norm: RmsNorm,
    in_proj: Linear,
    attention: MetaTokenAttention,
    mamba: MambaBranch,
    attention_norm: RmsNorm,
    mamba_norm: RmsNorm,
    out_proj: Linear,
    /// Absent where `intermediate_size` is 0.
    mlp: Option<(RmsNorm, Mlp)>,
    /// Heads of queries, of new keys and of new values in front of the rows of `in_proj`.
    heads: [usize; 3],
    /// Columns of all queries, and of all keys.
    widths: [usize; 2],
}

impl Block {
    pub(super) fn zeros(config: &HymbaLmConfig, layer: usize, storage: &dyn Fn(&str) -> Storage) -> Self {
        let (h, e, f) = (config.hidden_size, config.inner_size(), config.intermediate_size);
        let (n, r) = (config.mamba_d_state, config.dt_rank());
        let linear = |outputs, inputs, ours: &str, bias| {
            let (_, published) = LAYER.into_iter().find(|(name, _)| *name == ours).expect("a name of the table");
            Linear::with_weight(Weight::stored(outputs, inputs, storage(&in_files(layer, published))), bias)
        };
        let norm = |width| RmsNorm::zeros(width, config.rms_norm_eps as f32);
        let bias = config.mamba_proj_bias;
        let kv_layer = config.kv_source(layer);
        let later = layer + 1..config.num_hidden_layers;
        let depth = Depth {
            layer,
            kv_layer,
            kv_is_used_later: later.into_iter().any(|later| config.kv_source(later) == kv_layer),
        };
        let attention = AttentionConfig {
            query_heads: config.num_attention_heads,
            kv: KvShape {
                heads: config.num_key_value_heads,
                key_width: config.key_width(),
                value_width: config.value_width(),
                meta: config.num_memory_tokens,
                // itself and sliding_window others
                window: config.window(layer).map(|window| window + 1),
            },
        };
        let head_norms = match config.kq_norm {
            KeyQueryNorm::None => HeadNorms::None,
            KeyQueryNorm::PerHeadRms => HeadNorms::PerHead,
            _ => HeadNorms::Shared,
        };
        let mamba = MambaConfig {
            inner: e,
            states: n,
            taps: config.mamba_d_conv,
            conv_bias: config.mamba_conv_bias,
            learned_decay: true,
            time_step: TimeStep::Softplus,
            inner_norms: config.mamba_inner_layernorms.then_some(config.rms_norm_eps as f32),
        };
        let (x_proj, dt_proj) =
            (linear(r + 2 * n, e, "mamba.x_proj.weight", false), linear(e, r, "mamba.dt_proj.weight", true));
        let new_heads = if kv_layer == layer { config.num_key_value_heads } else { 0 };
        let gated = config.mlp_hidden_act == MlpActivation::Silu;
        let activation = if gated { Activation::GatedSilu } else { Activation::SquaredRelu };
        Block {
            depth,
            norm: norm(h),
            in_proj: linear(config.in_proj_rows(layer), h, "in_proj.weight", bias),
            attention: MetaTokenAttention::without_projections(attention, head_norms),
            mamba: MambaBranch::new(&mamba, None, x_proj, dt_proj),
            attention_norm: norm(e),
            mamba_norm: norm(e),
            out_proj: linear(h, e, "out_proj.weight", bias),
            mlp: (f > 0).then(|| {
                let gate = gated.then(|| linear(f, h, "mlp.gate.weight", false));
                let (up, down) = (linear(f, h, "mlp.up.weight", false), linear(h, f, "mlp.down.weight", false));
                (norm(h), Mlp::new(activation, gate, up, down))
            }),
            heads: [config.num_attention_heads, new_heads, new_heads],
            widths: [config.num_attention_heads * config.key_width(), new_heads * config.key_width()],
        }
    }

    /// A state of a sequence that has seen nothing.
    pub(super) fn new_state(&self, storage: KvStorage) -> LayerState {
        let owns_kv = self.depth.kv_layer == self.depth.layer;
        LayerState { mamba: self.mamba.new_state(), kv: owns_kv.then(|| self.attention.new_cache(storage)) }
    }

    /// x `[tokens, H]` → x `[tokens, H]`, in place:
    ///
    /// ```text
    /// [q | k | v | u | z] = norm(x)·W_inᵀ
    /// x += (norm₁(Attention(q, k, v)) + norm₂(Mamba(u, z)))/2 · W_outᵀ
    /// x += MLP(norm(x))
    /// ```
    pub(super) fn forward(&self, batch: &mut Batch, x: &mut Buffer) {
        let team = batch.team;
        let mut normal = Buffer::uninit(x.dim());
        self.norm.forward(team, x.view(), 1.0, &mut normal, Out::Set);
        let mut projected = self.in_proj.forward(team, normal.view());
        self.attention.prepare_columns(batch, self.depth, &mut projected, self.heads);

        let queries = Rows { data: flat(&projected), stride: projected.ncols() };
        let keys = queries.skip_columns(self.widths[0]);
        let values = keys.skip_columns(self.widths[1]);
        let attention = self.attention.attend(batch, self.depth, queries, keys, values, None);
        let mamba = self.mamba.run(batch, self.depth.layer, projected.view(), None);
        let mut mean = Buffer::uninit(mamba.dim());
        self.attention_norm.forward(team, attention.view(), 0.5, &mut mean, Out::Set);
        self.mamba_norm.forward(team, mamba.view(), 0.5, &mut mean, Out::Add);
        self.out_proj.add_to(team, mean.view(), x);

        if let Some((norm, mlp)) = &self.mlp {
            norm.forward(team, x.view(), 1.0, &mut normal, Out::Set);
            mlp.add_to(team, normal.view(), x);
        }
    }

    pub(super) fn visit<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        let mut all: Vec<(String, Parameter<'a>)> = Vec::new();
        let add: &mut Visitor<'_, 'a> = &mut |name, parameter| all.push((name.to_string(), parameter));
        self.norm.visit("norm", add);
        self.in_proj.visit("in_proj", add);
        self.attention.visit("attention", add);
        self.mamba.visit("mamba", add);
        self.attention_norm.visit("attention_norm", add);
        self.mamba_norm.visit("mamba_norm", add);
        self.out_proj.visit("out_proj", add);
        if let Some((norm, mlp)) = &self.mlp {
            norm.visit("mlp_norm", add);
            mlp.visit("mlp", add);
        }
        visit_published(self.depth.layer, all, f);
    }

    pub(super) fn visit_mut<'a>(&'a mut self, f: &mut VisitorMut<'_, 'a>) {
        let mut all: Vec<(String, ParameterMut<'a>)> = Vec::new();
        let add: &mut VisitorMut<'_, 'a> = &mut |name, parameter| all.push((name.to_string(), parameter));
        self.norm.visit_mut("norm", add);
        self.in_proj.visit_mut("in_proj", add);
        self.attention.visit_mut("attention", add);
        self.mamba.visit_mut("mamba", add);
        self.attention_norm.visit_mut("attention_norm", add);
        self.mamba_norm.visit_mut("mamba_norm", add);
        self.out_proj.visit_mut("out_proj", add);
        if let Some((norm, mlp)) = &mut self.mlp {
            norm.visit_mut("mlp_norm", add);
            mlp.visit_mut("mlp", add);
        }
        visit_published(self.depth.layer, all, f);
    }
}
