//! One block: Mamba and attention side by side, mixed by a gate, then a feed-forward network.

use ndarray::{Array2, Array3, Array4, ArrayView2};

use crate::HymbaOptions;
use crate::kernels::parallel;
use crate::layers::{
    AttentionState, FeedForward, Gate, LayerNorm, MambaBranch, MambaState, MetaTokenAttention, Rng, Visitor,
    VisitorMut, debug_shapes, join,
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
    /// Nothing in front, and everything that follows is seen: how the meta tokens themselves are read.
    pub(crate) fn none(options: &HymbaOptions) -> Self {
        let rows = Array2::zeros((0, options.hidden_size));
        Prefix { keys: rows.clone(), values: rows, mamba: MambaState::zeros(1, options), window: None }
    }
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

    /// The prefix of the frames after the meta tokens have passed through this block and left `state` behind.
    pub(crate) fn prefix(&self, state: BlockState, window: Option<usize>) -> Prefix {
        let travelled = state.attention.into_first();
        let (keys, values) = self.attention.own_meta().cloned().or(travelled).unwrap_or_default();
        Prefix { keys, values, mamba: state.mamba, window }
    }

    /// x `[b·l, h]` → `[b·l, h]`, with `prefix` in front of every sequence.
    pub(crate) fn forward(&self, mut x: Array2<f32>, batch: usize, prefix: &Prefix) -> Array2<f32> {
        let u = self.norm.forward(x.view());
        let (mamba, attention, gate) = self.branches(u.view(), batch, prefix);
        self.finish(&mamba, &attention, &gate, &mut x);
        x
    }

    /// The next frame of each sequence, x `[b, h]` → `[b, h]`.
    pub(crate) fn step(&self, mut x: Array2<f32>, prefix: &Prefix, state: &mut BlockState) -> Array2<f32> {
        let u = self.norm.forward(x.view());
        let mamba = self.mamba.step(u.view(), &mut state.mamba);
        let attention = self.attention.step(u.view(), prefix, &mut state.attention);
        let gate = self.gate.forward(u.view());
        self.finish(&mamba, &attention, &gate, &mut x);
        x
    }

    /// As [`forward`](Self::forward), keeping what is worth looking at.
    pub(crate) fn inspect(&self, mut x: Array2<f32>, batch: usize, prefix: &Prefix) -> BlockInspection {
        let u = self.norm.forward(x.view());
        let (mamba, attention, gate) = self.branches(u.view(), batch, prefix);
        self.finish(&mamba, &attention, &gate, &mut x);
        BlockInspection {
            mamba: sequences(mamba, batch),
            attention: sequences(attention, batch),
            gate: sequences(gate, batch),
            output: sequences(x, batch),
            attention_weights: self.attention.weights(u.view(), batch, prefix),
        }
    }

    /// Mamba(u), Attention(u) and the gate, the two branches at the same time.
    fn branches(&self, u: ArrayView2<f32>, batch: usize, prefix: &Prefix) -> (Array2<f32>, Array2<f32>, Array2<f32>) {
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

    pub(crate) fn visit(&self, name: &str, f: &mut Visitor) {
        self.norm.visit(&join(name, "norm"), f);
        self.mamba.visit(&join(name, "mamba"), f);
        self.attention.visit(&join(name, "attention"), f);
        self.gate.visit(&join(name, "gate"), f);
        self.ffn_norm.visit(&join(name, "ffn_norm"), f);
        self.ffn.visit(&join(name, "ffn"), f);
    }

    pub(crate) fn visit_mut(&mut self, name: &str, f: &mut VisitorMut) {
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
