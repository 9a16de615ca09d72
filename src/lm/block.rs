//! One layer: attention and Mamba side by side between two shared projections, and an MLP.

use std::collections::BTreeMap;

use ndarray::{Array2, Axis};

use super::config::{HymbaLmConfig, KeyQueryNorm, MlpActivation};
use super::names::{LAYER, in_files, visit_published};
use crate::kernels::attention::AttentionOutput;
use crate::kernels::matmul::Storage;
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::Team;
use crate::layers::{
    Activation, Angles, AttentionConfig, Batch, Buffer, Depth, HeadNorms, InnerCache, KvShape, KvStorage, LayerState,
    Linear, MambaBranch, MambaConfig, MetaTokenAttention, Mlp, MlpCache, RmsNorm, Rng, SequenceState, SharedKv, Spans,
    StateGradient, TimeStep, Weight, add_array, copied, flat,
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

/// What [`Block::backward`] reads, `[tokens, ·]`.
pub(super) struct BlockCache {
    /// Input of the first norm.
    x: Buffer,
    /// q | k | v | u | z, of which q, k and v are prepared.
    projected: Buffer,
    /// q | k before their norms, if there are any.
    before_norms: Option<Buffer>,
    attention: Buffer,
    /// ln Σ exp(score), `[tokens, heads]`
    log_sums: Array2<f32>,
    mamba: Buffer,
    mamba_cache: InnerCache,
    /// Input of the second norm, and what the MLP keeps.
    mlp: Option<(Buffer, MlpCache)>,
}

/// Where a backward pass is: what all layers share.
#[derive(Clone, Copy)]
pub(super) struct BackwardPass<'a> {
    pub team: &'a Team,
    pub spans: &'a Spans,
    pub angles: &'a [Angles],
    /// The state that all rows began with.
    pub initial: &'a SequenceState,
    /// Keys and values that several layers used, by the layer they came from.
    pub shared: &'a BTreeMap<usize, SharedKv>,
}

/// Gradients that layers of a backward pass hand to those before them.
pub(super) struct PassGradient {
    /// Of the state that all rows began with, for each layer.
    pub initial: Vec<StateGradient>,
    /// Of the keys and values of a layer that later ones used.
    pub shared: BTreeMap<usize, [Array2<f32>; 2]>,
}

impl PassGradient {
    pub(super) fn zeros(initial: &SequenceState) -> Self {
        PassGradient { initial: initial.layers.iter().map(StateGradient::zeros).collect(), shared: BTreeMap::new() }
    }
}

impl Block {
    /// `storage` says how a matrix is stored; one of `None` can be trained.
    pub(super) fn zeros(config: &HymbaLmConfig, layer: usize, storage: &dyn Fn(&str) -> Option<Storage>) -> Self {
        let (h, e, f) = (config.hidden_size, config.inner_size(), config.intermediate_size);
        let (n, r) = (config.mamba_d_state, config.dt_rank());
        let linear = |outputs, inputs, ours: &str, bias| {
            let (_, published) = LAYER.into_iter().find(|(name, _)| *name == ours).expect("a name of the table");
            Linear::with_weight(Weight::new(outputs, inputs, storage(&in_files(layer, published))), bias)
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

    /// Calls `f` with the large maps and their names in files.
    pub(super) fn visit_maps<'a>(&'a mut self, f: &mut dyn FnMut(String, &'a mut Linear)) {
        let layer = self.depth.layer;
        let [x_proj, dt_proj] = self.mamba.inner_linears_mut();
        f(in_files(layer, "mamba.in_proj"), &mut self.in_proj);
        f(in_files(layer, "mamba.x_proj.0"), x_proj);
        f(in_files(layer, "mamba.dt_proj.0"), dt_proj);
        f(in_files(layer, "mamba.out_proj"), &mut self.out_proj);
        let names = ["gate_proj", "up_proj", "down_proj"];
        if let Some((_, mlp)) = &mut self.mlp {
            let maps: Vec<_> = mlp.linears_mut().collect();
            // without a gate the first name has no map
            for (name, map) in names.iter().skip(names.len() - maps.len()).zip(maps) {
                f(in_files(layer, &format!("moe.experts.0.{name}")), map);
            }
        }
    }

    /// The large maps.
    pub(super) fn maps(&self) -> impl Iterator<Item = &Linear> {
        let mlp = self.mlp.iter().flat_map(|(_, mlp)| mlp.linears());
        [&self.in_proj, &self.out_proj].into_iter().chain(self.mamba.inner_linears()).chain(mlp)
    }

    /// A gradient of this layer, zero.
    pub(super) fn zeros_like(&self) -> Self {
        Block {
            depth: self.depth,
            norm: self.norm.zeros_like(),
            in_proj: self.in_proj.zeros_like(),
            attention: self.attention.zeros_like(),
            mamba: self.mamba.zeros_like(),
            attention_norm: self.attention_norm.zeros_like(),
            mamba_norm: self.mamba_norm.zeros_like(),
            out_proj: self.out_proj.zeros_like(),
            mlp: self.mlp.as_ref().map(|(norm, mlp)| (norm.zeros_like(), mlp.zeros_like())),
            heads: self.heads,
            widths: self.widths,
        }
    }

    /// The initial values in a model of `layers` layers. The matrices that end a branch are scaled by 1/√(2·layers), so
    /// that the residual stream does not grow with depth.
    pub(super) fn init(&mut self, layers: usize, rng: &mut Rng) {
        let smaller = 1.0 / (2.0 * layers as f32).sqrt();
        [&mut self.norm, &mut self.attention_norm, &mut self.mamba_norm].into_iter().for_each(RmsNorm::init);
        self.in_proj.init(rng);
        self.attention.init(rng);
        self.mamba.init(rng);
        self.out_proj.init(rng);
        self.out_proj.scale(smaller);
        if let Some((norm, mlp)) = &mut self.mlp {
            norm.init();
            mlp.init(rng);
            mlp.linears_mut().last().into_iter().for_each(|down| down.scale(smaller));
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

        let [queries, keys, values] = self.queries_keys_values(&projected);
        let attention = self.attention.attend(batch, self.depth, queries, keys, values, None);
        let mamba = self.mamba.run(batch, self.depth.layer, projected.view(), None);
        let mean = self.mean(team, &attention, &mamba);
        self.out_proj.add_to(team, mean.view(), x);

        if let Some((norm, mlp)) = &self.mlp {
            norm.forward(team, x.view(), 1.0, &mut normal, Out::Set);
            mlp.add_to(team, normal.view(), x);
        }
    }

    /// The columns of [q | k | v | …] `[tokens, ·]`.
    fn queries_keys_values<'a>(&self, projected: &'a Array2<f32>) -> [Rows<'a>; 3] {
        let queries = Rows { data: flat(projected), stride: projected.ncols() };
        let keys = queries.skip_columns(self.widths[0]);
        [queries, keys, keys.skip_columns(self.widths[1])]
    }

    /// (norm₁(attention) + norm₂(mamba))/2
    fn mean(&self, team: &Team, attention: &Array2<f32>, mamba: &Array2<f32>) -> Buffer {
        let mut mean = Buffer::uninit(mamba.dim());
        self.attention_norm.forward(team, attention.view(), 0.5, &mut mean, Out::Set);
        self.mamba_norm.forward(team, mamba.view(), 0.5, &mut mean, Out::Add);
        mean
    }

    /// As [`forward`](Self::forward): x `[tokens, H]` → `[tokens, H]`, and what [`backward`](Self::backward) reads.
    pub(super) fn forward_train(&self, batch: &mut Batch, x: Buffer) -> (Buffer, BlockCache) {
        let team = batch.team;
        let mut projected = self.in_proj.forward(team, self.norm.apply(team, x.view()).view());
        let before_norms = self.attention.has_norms().then(|| {
            let before = projected.slice(ndarray::s![.., ..self.widths[0] + self.widths[1]]);
            Buffer::from(before.as_standard_layout().into_owned())
        });
        self.attention.prepare_columns(batch, self.depth, &mut projected, self.heads);

        let mut log_sums = Array2::zeros((x.nrows(), self.heads[0]));
        let [queries, keys, values] = self.queries_keys_values(&projected);
        let attention = self.attention.attend(batch, self.depth, queries, keys, values, Some(&mut log_sums));
        let (mamba, mamba_cache) = self.mamba.run_train(batch, self.depth.layer, projected.view());
        let mut y = copied(team, &x);
        self.out_proj.add_to(team, self.mean(team, &attention, &mamba).view(), &mut y);

        let mlp = self.mlp.as_ref().map(|(norm, mlp)| {
            let mixed = copied(team, &y);
            let cache = mlp.add_to_train(team, norm.apply(team, mixed.view()).view(), &mut y);
            (mixed, cache)
        });
        (y, BlockCache { x, projected, before_norms, attention, log_sums, mamba, mamba_cache, mlp })
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[tokens, H]` → dx `[tokens, H]`. `dfinal` is the gradient of the
    /// state that a single row left behind, where it is that of the meta tokens. Norms are computed again: that costs less than
    /// keeping them.
    pub(super) fn backward(
        &self,
        pass: BackwardPass,
        cache: &BlockCache,
        dy: Buffer,
        dfinal: Option<&StateGradient>,
        grad: &mut Block,
        gradient: &mut PassGradient,
    ) -> Buffer {
        let (team, Depth { layer, .. }) = (pass.team, self.depth);
        let mut dx = dy;
        // x = mixed + MLP(norm(mixed))
        if let (Some((norm, mlp)), Some((mixed, mlp_cache)), Some((norm_grad, mlp_grad))) =
            (&self.mlp, &cache.mlp, &mut grad.mlp)
        {
            let normal = norm.apply(team, mixed.view());
            let mut dmixed = mlp.backward(team, normal.view(), mlp_cache, dx.view(), mlp_grad);
            norm.backward(team, mixed.view(), 1.0, &mut dmixed, norm_grad);
            add_array(team, &dmixed, &mut dx);
        }
        // mixed = x + (norm₁(attention) + norm₂(mamba))/2 · W_outᵀ
        let mean = self.mean(team, &cache.attention, &cache.mamba);
        let mut dattention = self.out_proj.backward(team, mean.view(), dx.view(), &mut grad.out_proj);
        let mut dmamba = copied(team, &dattention);
        self.attention_norm.backward(team, cache.attention.view(), 0.5, &mut dattention, &mut grad.attention_norm);
        self.mamba_norm.backward(team, cache.mamba.view(), 0.5, &mut dmamba, &mut grad.mamba_norm);

        let mut dprojected = Buffer::uninit(cache.projected.dim());
        self.mamba.run_backward(
            team,
            pass.spans,
            cache.projected.view(),
            &cache.mamba_cache,
            &pass.initial.layers[layer].mamba,
            &dmamba,
            dfinal.map(|dfinal| &dfinal.mamba),
            &mut grad.mamba,
            &mut gradient.initial[layer].mamba,
            &mut dprojected,
        );
        self.attention_backward(pass, cache, &dattention, dfinal, &mut dprojected, gradient);
        let (before, angles) = (cache.before_norms.as_deref(), pass.angles);
        self.attention.prepare_columns_backward(team, angles, before, &mut dprojected, self.heads, &mut grad.attention);
        // [q | k | v | u | z] = norm(x)·W_inᵀ
        let normal = self.norm.apply(team, cache.x.view());
        let mut du = self.in_proj.backward(team, normal.view(), dprojected.view(), &mut grad.in_proj);
        self.norm.backward(team, cache.x.view(), 1.0, &mut du, &mut grad.norm);
        add_array(team, &du, &mut dx);
        dx
    }

    /// The columns q | k | v of `dprojected`, which has k and v only where they are the layer's own. Others hand the gradient to the
    /// layer they come from.
    fn attention_backward(
        &self,
        pass: BackwardPass,
        cache: &BlockCache,
        dattention: &Array2<f32>,
        dfinal: Option<&StateGradient>,
        dprojected: &mut Array2<f32>,
        gradient: &mut PassGradient,
    ) {
        let Depth { layer, kv_layer, .. } = self.depth;
        let kv = pass.initial.layers[kv_layer].kv.as_ref().expect("a layer others use has keys and values");
        let width = cache.attention.ncols();
        let output = AttentionOutput {
            out: Rows { data: flat(&cache.attention), stride: width },
            dout: Rows { data: flat(dattention), stride: width },
            log_sums: cache.log_sums.view(),
        };
        let [queries, keys, values] = self.queries_keys_values(&cache.projected);
        let (dqueries, rest) = dprojected.view_mut().split_at(Axis(1), self.widths[0]);
        let dinitial = &mut gradient.initial[kv_layer];
        let (key_width, value_width) = kv.row_widths();
        if kv_layer == layer {
            let (mut dkeys, rest) = rest.split_at(Axis(1), key_width);
            let (mut dvalues, _) = rest.split_at(Axis(1), value_width);
            let input = [queries, keys, values];
            let of_input = [dqueries, dkeys.view_mut(), dvalues.view_mut()];
            self.attention.attend_backward(pass.team, pass.spans, None, kv, input, output, of_input, dinitial);
            if let Some([of_keys, of_values]) = gradient.shared.remove(&layer) {
                dkeys += &of_keys;
                dvalues += &of_values;
            }
            if let Some(dfinal) = dfinal {
                dkeys += &dfinal.keys;
                dvalues += &dfinal.values;
            }
        } else {
            let [keys, values] = pass.shared[&kv_layer].rows();
            let rows = cache.attention.nrows();
            let [mut dkeys, mut dvalues] = [key_width, value_width].map(|width| Array2::zeros((rows, width)));
            let of_input = [dqueries, dkeys.view_mut(), dvalues.view_mut()];
            let input = [queries, keys, values];
            self.attention.attend_backward(pass.team, pass.spans, None, kv, input, output, of_input, dinitial);
            match gradient.shared.get_mut(&kv_layer) {
                Some([of_keys, of_values]) => {
                    *of_keys += &dkeys;
                    *of_values += &dvalues;
                }
                None => {
                    gradient.shared.insert(kv_layer, [dkeys, dvalues]);
                }
            }
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
