//! One block: Mamba and attention side by side, mixed by a gate, then a feed-forward network.

use ndarray::{Array2, Array3, Array4, ArrayView2};

use crate::HymbaOptions;
use crate::kernels::parallel;
use crate::layers::{
    AttentionCache, AttentionState, Buffer, FeedForward, Gate, LayerNorm, MambaBranch, MambaCache, MambaState,
    MetaTokenAttention, Rng, Visitor, VisitorMut, debug_shapes, join,
};

/// A block of the model (Hymba, arXiv 2411.13676, figure 2, with the learned gate of `Edifice.SSM.Hymba` in place of the
/// mean of two norms):
///
/// ```text
/// u = LayerNorm(x)                                    [l, h]
/// g = sigmoid(u·W_gᵀ + b_g)                           [l, h]
/// x = x + g ⊙ Mamba(u) + (1 − g) ⊙ Attention(u)       [l, h]
/// x = x + FFN(LayerNorm(x))                           [l, h]
/// ```
///
/// with `FFN(x) = W_down · gelu(W_up · x + b_up) + b_down`, 4h wide inside, gelu in its exact form `x/2·(1 + erf(x/√2))`, and
/// norms with ε = 1e-5.
#[derive(Clone)]
pub struct HymbaBlock {
    norm: LayerNorm,
    mamba: MambaBranch,
    attention: MetaTokenAttention,
    gate: Gate,
    ffn_norm: LayerNorm,
    ffn: FeedForward,
}

/// What lies in front of the frames in one block, the same for every sequence: what the meta tokens left behind. It follows
/// from the weights alone.
#[derive(Clone)]
pub(crate) struct Prefix {
    /// Keys and values `[k, h]` of the meta tokens.
    pub keys: Array2<f32>,
    pub values: Array2<f32>,
    /// The state of the Mamba branch after the meta tokens, for one sequence.
    pub mamba: MambaState,
    /// Frames a frame sees, itself included; `None` is the whole past.
    pub window: Option<usize>,
}

impl Prefix {
    /// A gradient of this prefix.
    pub(crate) fn zeros_like(&self) -> Self {
        let zeros = |rows: &Array2<f32>| Array2::zeros(rows.dim());
        let (keys, values) = (zeros(&self.keys), zeros(&self.values));
        Prefix { keys, values, mamba: self.mamba.zeros_like(), window: self.window }
    }

    /// Nothing in front, and everything that follows is seen: how the meta tokens themselves are read.
    pub(crate) fn none(options: &HymbaOptions) -> Self {
        let rows = Array2::zeros((0, options.hidden_size));
        Prefix { keys: rows.clone(), values: rows, mamba: MambaState::zeros(1, options), window: None }
    }
}

/// What [`HymbaBlock::backward`] reads.
pub(crate) struct BlockCache {
    /// Input of the first norm, and its output, `[b·l, h]`.
    x: Buffer,
    u: Buffer,
    mamba_cache: MambaCache,
    attention_cache: AttentionCache,
    /// The branches and the gate `[b·l, h]`.
    mamba: Buffer,
    attention: Buffer,
    gate: Buffer,
    /// Input of the second norm, and its output, `[b·l, h]`.
    mixed: Buffer,
    ffn_u: Buffer,
    /// What goes into the activation, `[b·l, 4h]`.
    ffn_inner: Buffer,
}

/// What a block remembers of each sequence of a batch.
#[derive(Clone)]
pub(crate) struct BlockState {
    mamba: MambaState,
    attention: AttentionState,
}

impl BlockState {
    pub(crate) fn new(batch: usize, prefix: &Prefix) -> Self {
        BlockState {
            mamba: prefix.mamba.repeat(batch),
            attention: AttentionState::new(batch, prefix.keys.ncols(), prefix.window),
        }
    }

    /// Numbers that a new state of one sequence takes room for.
    pub(crate) fn num_reserved(prefix: &Prefix) -> usize {
        prefix.mamba.num_numbers() + AttentionState::num_reserved(prefix.keys.ncols(), prefix.window)
    }

    pub(crate) fn num_numbers(&self) -> usize {
        self.mamba.num_numbers() + self.attention.num_numbers()
    }
}

/// What a block did to an input: see [`Hymba::inspect`](crate::Hymba::inspect).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BlockInspection {
    /// Output of the Mamba branch `[b, l, h]`, before the gate.
    pub mamba: Array3<f32>,
    /// Output of the attention branch `[b, l, h]`, before the gate.
    pub attention: Array3<f32>,
    /// The gate `[b, l, h]`, between 0 (only attention) and 1 (only Mamba).
    pub gate: Array3<f32>,
    /// Output of the block `[b, l, h]`.
    pub output: Array3<f32>,
    /// What each frame takes from each meta token, then from each frame: `[b, a, l, k + l]`, rows sum to 1.
    pub attention_weights: Array4<f32>,
}

debug_shapes!(HymbaBlock);

impl HymbaBlock {
    /// The branch of order and the far past.
    pub fn mamba(&self) -> &MambaBranch {
        &self.mamba
    }

    /// The branch of recall.
    pub fn attention(&self) -> &MetaTokenAttention {
        &self.attention
    }

    pub(crate) fn zeros(options: &HymbaOptions) -> Self {
        let h = options.hidden_size;
        let small_variance = options.preset.rules().small_variance;
        HymbaBlock {
            norm: LayerNorm::zeros(h, small_variance),
            mamba: MambaBranch::zeros(options),
            attention: MetaTokenAttention::zeros(options),
            gate: Gate::zeros(h),
            ffn_norm: LayerNorm::zeros(h, small_variance),
            ffn: FeedForward::zeros(h),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.norm.init();
        self.mamba.init(rng);
        self.attention.init(rng);
        self.gate.init(rng);
        self.ffn_norm.init();
        self.ffn.init(rng);
    }

    /// The prefix of the frames after the meta tokens, if any, have passed through this block; `passed` is what they left.
    pub(crate) fn prefix(&self, passed: Option<(&BlockCache, MambaState)>, options: &HymbaOptions) -> Prefix {
        let mut prefix = Prefix { window: options.window(), ..Prefix::none(options) };
        if let Some((cache, state)) = passed {
            let (keys, values) = cache.attention_cache.keys_and_values();
            (prefix.keys, prefix.values, prefix.mamba) = (keys.to_owned(), values.to_owned(), state);
        } else if let Some((keys, values)) = self.attention.own_meta() {
            (prefix.keys, prefix.values) = (keys.clone(), values.clone());
        }
        prefix
    }

    /// x `[b·l, h]` → `[b·l, h]`, with `prefix` in front of every sequence.
    pub(crate) fn forward(&self, mut x: Buffer, batch: usize, prefix: &Prefix) -> Buffer {
        let u = self.norm.forward(x.view());
        let (mamba, attention, gate) = self.branches(u.view(), batch, prefix);
        self.finish(&mamba, &attention, &gate, &mut x);
        x
    }

    /// These rows of what [`forward`](Self::forward) returns. Frames meet only in the scan and in attention: what comes after
    /// is computed for these rows alone.
    pub(crate) fn forward_rows(&self, x: &Buffer, batch: usize, prefix: &Prefix, rows: &[usize]) -> Buffer {
        let u = self.norm.forward(x.view());
        let (mamba, (attention, gate)) = parallel::join_if(
            4 * x.len() * x.ncols(),
            || self.mamba.forward_rows(u.view(), batch, &prefix.mamba, rows),
            || {
                let attention = self.attention.forward_rows(u.view(), batch, prefix, rows);
                (attention, self.gate.forward(u.rows_at(rows).view()))
            },
        );
        let mut x = x.rows_at(rows);
        self.finish(&mamba, &attention, &gate, &mut x);
        x
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads, and the states after the frames.
    pub(crate) fn forward_train(&self, x: Buffer, batch: usize, prefix: &Prefix) -> (Buffer, BlockCache, MambaState) {
        let u = self.norm.forward(x.view());
        let ((mamba, mamba_cache, state), ((attention, attention_cache), gate)) = parallel::join_if(
            4 * x.len() * x.ncols(),
            || self.mamba.forward_train(u.view(), batch, &prefix.mamba),
            || (self.attention.forward_train(u.view(), batch, prefix), self.gate.forward(u.view())),
        );
        let mut mixed = Buffer::copy_of(&x);
        Gate::mix(&gate, &mamba, &attention, &mut mixed);
        let ffn_u = self.ffn_norm.forward(mixed.view());
        let mut y = Buffer::copy_of(&mixed);
        let ffn_inner = self.ffn.add_to_train(ffn_u.view(), &mut y);
        let cache = BlockCache { x, u, mamba_cache, attention_cache, mamba, attention, gate, mixed, ffn_u, ffn_inner };
        (y, cache, state)
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b·l, h]` → dx `[b·l, h]`. `dend` is the gradient of what the
    /// frames left behind, where they are meta tokens. Adds that of what was in front of them to `dprefix`.
    pub(crate) fn backward(
        &self,
        cache: &BlockCache,
        prefix: &Prefix,
        mut dy: Buffer,
        dend: Option<&Prefix>,
        grad: &mut HymbaBlock,
        dprefix: &mut Prefix,
    ) -> Buffer {
        // y = mixed + FFN(LayerNorm(mixed))
        let dffn_u = self.ffn.backward(cache.ffn_u.view(), &cache.ffn_inner, dy.view(), &mut grad.ffn);
        *dy += &*self.ffn_norm.backward(cache.mixed.view(), dffn_u.view(), &mut grad.ffn_norm);
        // mixed = x + g ⊙ Mamba(u) + (1 − g) ⊙ Attention(u)
        let (dgate, dmamba, dattention) = Gate::mix_backward(&cache.gate, &cache.mamba, &cache.attention, &dy);
        let u = cache.u.view();
        let HymbaBlock { mamba: mamba_grad, attention: attention_grad, gate: gate_grad, .. } = grad;
        let (mut du, from_attention) = parallel::join_if(
            8 * dy.len() * dy.ncols(),
            || {
                let dend = dend.map(|dend| &dend.mamba);
                let (start, dstart) = (&prefix.mamba, &mut dprefix.mamba);
                self.mamba.backward(u, &cache.mamba_cache, start, dmamba.view(), dend, mamba_grad, dstart)
            },
            || {
                let dend = dend.map(|dend| (&dend.keys, &dend.values));
                let dprefix = (&mut dprefix.keys, &mut dprefix.values);
                let attention = &cache.attention_cache;
                let mut du =
                    self.attention.backward(u, attention, prefix, dattention.view(), dend, attention_grad, dprefix);
                *du += &*self.gate.backward(u, &cache.gate, dgate, gate_grad);
                du
            },
        );
        *du += &*from_attention;
        // u = LayerNorm(x)
        *dy += &*self.norm.backward(cache.x.view(), du.view(), &mut grad.norm);
        dy
    }

    /// Adds the gradient of a prefix that consists of this block's own parameters.
    pub(crate) fn add_own_prefix(&mut self, dprefix: &Prefix) {
        self.attention.add_own_meta(&dprefix.keys, &dprefix.values);
    }

    /// The next frame of each sequence, x `[b, h]` → `[b, h]`.
    pub(crate) fn step(&self, mut x: Buffer, prefix: &Prefix, state: &mut BlockState) -> Buffer {
        let u = self.norm.forward(x.view());
        let mamba = self.mamba.step(u.view(), &mut state.mamba);
        let attention = self.attention.step(u.view(), prefix, &mut state.attention);
        let gate = self.gate.forward(u.view());
        self.finish(&mamba, &attention, &gate, &mut x);
        x
    }

    /// As [`forward`](Self::forward), keeping what is worth looking at.
    pub(crate) fn inspect(&self, mut x: Buffer, batch: usize, prefix: &Prefix) -> BlockInspection {
        let u = self.norm.forward(x.view());
        let (mamba, attention, gate) = self.branches(u.view(), batch, prefix);
        self.finish(&mamba, &attention, &gate, &mut x);
        BlockInspection {
            mamba: sequences(mamba.into_array(), batch),
            attention: sequences(attention.into_array(), batch),
            gate: sequences(gate.into_array(), batch),
            output: sequences(x.into_array(), batch),
            attention_weights: self.attention.weights(u.view(), batch, prefix),
        }
    }

    /// Mamba(u), Attention(u) and the gate, the two branches at the same time.
    fn branches(&self, u: ArrayView2<f32>, batch: usize, prefix: &Prefix) -> (Buffer, Buffer, Buffer) {
        let (rows, h) = u.dim();
        let (mamba, (attention, gate)) = parallel::join_if(
            4 * rows * h * h,
            || self.mamba.forward(u, batch, &prefix.mamba),
            || (self.attention.forward(u, batch, prefix), self.gate.forward(u)),
        );
        (mamba, attention, gate)
    }

    /// Mixes the branches into the residual stream x and adds the feed-forward network.
    fn finish(&self, mamba: &Array2<f32>, attention: &Array2<f32>, gate: &Array2<f32>, x: &mut Array2<f32>) {
        Gate::mix(gate, mamba, attention, x);
        let u = self.ffn_norm.forward(x.view());
        self.ffn.add_to(u.view(), x);
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.norm.visit(&join(name, "norm"), f);
        self.mamba.visit(&join(name, "mamba"), f);
        self.attention.visit(&join(name, "attention"), f);
        self.gate.visit(&join(name, "gate"), f);
        self.ffn_norm.visit(&join(name, "ffn_norm"), f);
        self.ffn.visit(&join(name, "ffn"), f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.norm.visit_mut(&join(name, "norm"), f);
        self.mamba.visit_mut(&join(name, "mamba"), f);
        self.attention.visit_mut(&join(name, "attention"), f);
        self.gate.visit_mut(&join(name, "gate"), f);
        self.ffn_norm.visit_mut(&join(name, "ffn_norm"), f);
        self.ffn.visit_mut(&join(name, "ffn"), f);
    }
}

/// `[b·l, h]` → `[b, l, h]`
pub(crate) fn sequences(x: Array2<f32>, batch: usize) -> Array3<f32> {
    let (rows, h) = x.dim();
    x.into_shape_with_order((batch, rows / batch, h)).expect("the rows of whole sequences")
}
