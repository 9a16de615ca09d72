//! One block: Mamba and attention side by side, mixed by a gate, then a feed-forward network.

use ndarray::{Array2, Array3, Array4, ArrayRef3};

use super::feed_forward::{FeedForward, FeedForwardCache};
use super::options::HymbaOptions;
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{
    AttentionCache, Batch, Buffer, Depth, Dropout, Ends, Gate, KvStorage, LayerNorm, LayerState, Linear, MambaBranch,
    MambaCache, MetaTokenAttention, Rng, Spans, StateGradient, add_array, copied, needed,
};
use crate::parameters::{Visitor, VisitorMut, debug_shapes, join};

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
/// norms with ε = 1e-5. In training, dropout acts on Mamba(u), on Attention(u) and on FFN's result, each with a mask of its own; in
/// the Edifice variant it acts between blocks instead.
#[derive(Clone)]
pub struct HymbaBlock {
    norm: LayerNorm,
    mamba: MambaBranch,
    attention: MetaTokenAttention,
    gate: Gate,
    ffn: FeedForward,
}

/// Places of dropout in a block: each has a mask of its own.
const MAMBA: u64 = 0;
const ATTENTION: u64 = 1;
const FFN: u64 = 2;

/// What [`HymbaBlock::backward`] reads.
pub(crate) struct BlockCache {
    dropout: Dropout,
    only: Option<Ends>,
    /// Input of the first norm, and its output, `[rows, h]`.
    x: Buffer,
    u: Buffer,
    mamba_cache: MambaCache,
    attention_cache: AttentionCache,
    /// The branches after dropout, and the gate, `[rows, h]` or `only` some rows of that.
    mamba: Buffer,
    attention: Buffer,
    gate: Buffer,
    ffn: FeedForwardCache,
}

/// The results of one block: see [`Hymba::inspect`](crate::Hymba::inspect). Arrays of parts that the block does not have are empty.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct BlockInspection {
    /// Output of the shared attention block `[b, l, h]`, before the map that feeds it to this block.
    pub shared_output: Array3<f32>,
    /// Output of the Mamba branch `[b, l, h]`, before the gate.
    pub mamba: Array3<f32>,
    /// Output of the attention branch `[b, l, h]`, before the gate.
    pub attention: Array3<f32>,
    /// The gate `[b, l, h]`, between 0 (only attention) and 1 (only Mamba).
    pub gate: Array3<f32>,
    /// Output of the block `[b, l, h]`.
    pub output: Array3<f32>,
    /// The weight that each frame gives to each meta token, then to each frame: `[b, a, l, k + l]`, rows sum to 1. Of the branch, or
    /// of this use of the shared block.
    pub attention_weights: Array4<f32>,
}

debug_shapes!(HymbaBlock);

impl HymbaBlock {
    /// The Mamba branch.
    pub fn mamba(&self) -> &MambaBranch {
        &self.mamba
    }

    /// The attention branch.
    pub fn attention(&self) -> &MetaTokenAttention {
        &self.attention
    }

    /// All zero, with the [large maps](Self::large_maps_mut) in this type of storage.
    pub(crate) fn zeros(options: &HymbaOptions, storage: Option<Storage>) -> Self {
        let h = options.hidden_size;
        HymbaBlock {
            norm: options.new_norm(h),
            mamba: options.new_mamba(storage),
            attention: options.new_attention(storage),
            gate: Gate::zeros(h, storage),
            ffn: FeedForward::zeros(options, storage),
        }
    }

    /// The maps that may be stored narrow: all but W_x and W_dt, which make the time step, B and C of the scan.
    pub(crate) fn large_maps_mut(&mut self) -> Vec<&mut Linear> {
        let (branches, gate) = (self.mamba.linears_mut().chain(self.attention.linears_mut()), self.gate.linear_mut());
        branches.chain([gate]).chain(self.ffn.linears_mut()).collect()
    }

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.mamba.visit_maps(&join(name, "mamba"), f);
        self.attention.visit_maps(&join(name, "attention"), f);
        f(join(name, "gate"), self.gate.linear_mut());
        self.ffn.visit_maps(&join(name, "ffn"), f);
    }

    /// A gradient of this block, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        HymbaBlock {
            norm: self.norm.zeros_like(),
            mamba: self.mamba.zeros_like(),
            attention: self.attention.zeros_like(),
            gate: self.gate.zeros_like(),
            ffn: self.ffn.zeros_like(),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.norm.init();
        self.mamba.init(rng);
        self.attention.init(rng);
        self.gate.init(rng);
        self.ffn.init(rng);
    }

    /// A state of a sequence in front of which stands nothing but what the block has itself.
    pub(crate) fn new_state(&self) -> LayerState {
        let mut kv = self.attention.new_cache(KvStorage::F32);
        self.attention.push_own_meta(&mut kv);
        LayerState { mamba: self.mamba.new_state(), kv: Some(kv) }
    }

    /// x `[rows, h]` → `[rows, h]`, or `only` some rows of it. Frames meet only in the scan and in attention: what comes after is
    /// computed for these rows alone. The states of `layer` move on.
    pub(crate) fn forward(&self, batch: &mut Batch, layer: usize, mut x: Buffer, only: Option<&[usize]>) -> Buffer {
        let mut u = self.norm.forward(batch.team, x.view());
        let mamba = self.mamba.forward(batch, layer, u.view(), only);
        let attention = self.attention.forward(batch, Depth::of(layer), u.view(), only);
        if let Some(rows) = only {
            (x, u) = (x.rows_at(rows), u.rows_at(rows));
        }
        let gate = self.gate.forward(batch.team, u.view());
        Gate::mix(batch.team, &gate, &mamba, &attention, &mut x);
        self.ffn.add_to(batch.team, &mut x);
        x
    }

    /// As [`forward`](Self::forward), with dropout of what the branches and the feed-forward network add to the residual stream.
    /// Returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        layer: usize,
        x: Buffer,
        dropout: Dropout,
        only: Option<Ends>,
    ) -> (Buffer, BlockCache) {
        let team = batch.team;
        let rows = only.as_ref().map(|only| &*only.rows);
        let u = self.norm.forward(team, x.view());
        let (mut mamba, mamba_cache) = self.mamba.forward_train(batch, layer, u.view(), rows);
        let (mut attention, attention_cache) = self.attention.forward_train(batch, Depth::of(layer), u.view(), rows);
        // from here on frames do not meet
        let _seeded = team.seeded_at(rows);
        let ends = only.as_ref().map_or(&batch.spans, |only| &only.spans);
        dropout.at(MAMBA).apply(team, ends, &mut mamba);
        dropout.at(ATTENTION).apply(team, ends, &mut attention);
        let gate = self.gate.forward(team, needed(&u, rows).view());
        let mut mixed = rows.map_or_else(|| copied(team, &x), |rows| x.rows_at(rows));
        Gate::mix(team, &gate, &mamba, &attention, &mut mixed);
        let (y, ffn) = self.ffn.residual_train(team, ends, mixed, dropout.at(FFN));
        let cache = BlockCache { dropout, only, x, u, mamba_cache, attention_cache, mamba, attention, gate, ffn };
        (y, cache)
    }

    /// The gradient of [`forward_train`](Self::forward_train) for sequences that all began with the state `initial`: dy
    /// of the shape of the output → dx `[rows, h]`. `dfinal` is the gradient of what a single sequence left behind, where it is that of the
    /// meta tokens. Adds that of what was in front to `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        cache: &BlockCache,
        initial: &LayerState,
        mut dy: Buffer,
        dfinal: Option<&StateGradient>,
        grad: &mut HymbaBlock,
        dinitial: &mut StateGradient,
    ) -> Buffer {
        let (dropout, (rows, ends)) = (cache.dropout, Ends::of(&cache.only, spans));
        let seeded = team.seeded_at(rows);
        // y = mixed + FFN(LayerNorm(mixed))
        self.ffn.residual_backward(team, ends, &cache.ffn, dropout.at(FFN), &mut dy, &mut grad.ffn);
        // mixed = x + g ⊙ Mamba(u) + (1 − g) ⊙ Attention(u)
        let (dgate, mut dmamba, mut dattention) =
            Gate::mix_backward(team, &cache.gate, &cache.mamba, &cache.attention, &dy);
        dropout.at(MAMBA).apply(team, ends, &mut dmamba);
        dropout.at(ATTENTION).apply(team, ends, &mut dattention);
        drop(seeded);
        let u = cache.u.view();
        let (dfinal_mamba, mamba) = (dfinal.map(|dfinal| &dfinal.mamba), &cache.mamba_cache);
        let (dmamba, dstate) = (dmamba.view(), &mut dinitial.mamba);
        let (initial_mamba, grad_mamba) = (&initial.mamba, &mut grad.mamba);
        let mut du =
            self.mamba.backward(team, spans, rows, u, mamba, initial_mamba, dmamba, dfinal_mamba, grad_mamba, dstate);
        let (attention, dattention) = (&cache.attention_cache, dattention.view());
        let of_attention = self.attention.backward(
            team,
            spans,
            rows,
            u,
            attention,
            initial,
            dattention,
            dfinal,
            &mut grad.attention,
            dinitial,
        );
        add_array(team, &of_attention, &mut du);
        match rows {
            Some(rows) => {
                let _seeded = team.seeded_at(Some(rows));
                let (u, mut more) = (cache.u.rows_at(rows), Buffer::zeros(dy.dim()));
                self.gate.backward_add(team, u.view(), &cache.gate, dgate, &mut more, &mut grad.gate);
                du.add_at(rows, &more);
            }
            None => self.gate.backward_add(team, u, &cache.gate, dgate, &mut du, &mut grad.gate),
        }
        let mut dy = dy.spread(rows, du.nrows());
        // u = LayerNorm(x)
        self.norm.backward_add(team, cache.x.view(), du.view(), &mut dy, &mut grad.norm);
        dy
    }

    /// Adds the gradient of a state in front that consists of this block's own parameters.
    pub(crate) fn add_own_meta(&mut self, dinitial: &StateGradient) {
        self.attention.add_own_meta(dinitial);
    }

    /// As [`forward`](Self::forward) of sequences of one length, keeping what is worth looking at.
    pub(crate) fn inspect(&self, batch: &mut Batch, layer: usize, mut x: Buffer) -> BlockInspection {
        let (team, count) = (batch.team, batch.spans.len());
        let sequences = |x: Buffer| sequences(x.into_array(), count);
        let u = self.norm.forward(team, x.view());
        let attention_weights = self.attention.weights(batch, Depth::of(layer), u.view());
        let mamba = self.mamba.forward(batch, layer, u.view(), None);
        let attention = self.attention.forward(batch, Depth::of(layer), u.view(), None);
        let gate = self.gate.forward(team, u.view());
        Gate::mix(team, &gate, &mamba, &attention, &mut x);
        self.ffn.add_to(team, &mut x);
        BlockInspection {
            mamba: sequences(mamba),
            attention: sequences(attention),
            gate: sequences(gate),
            output: sequences(x),
            attention_weights,
            ..BlockInspection::default()
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.norm.visit(&join(name, "norm"), f);
        self.mamba.visit(&join(name, "mamba"), f);
        self.attention.visit(&join(name, "attention"), f);
        self.gate.visit(&join(name, "gate"), f);
        self.ffn.visit(name, f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.norm.visit_mut(&join(name, "norm"), f);
        self.mamba.visit_mut(&join(name, "mamba"), f);
        self.attention.visit_mut(&join(name, "attention"), f);
        self.gate.visit_mut(&join(name, "gate"), f);
        self.ffn.visit_mut(name, f);
    }
}

/// `[b, l, width]` → `[b·l, width]`
pub(super) fn rows(x: &ArrayRef3<f32>) -> Buffer {
    let (batch, l, width) = x.dim();
    x.to_shape((batch * l, width)).expect("the same numbers").into_owned().into()
}

/// `[b·l, h]` → `[b, l, h]`
pub(crate) fn sequences(x: Array2<f32>, batch: usize) -> Array3<f32> {
    let (rows, h) = x.dim();
    x.into_shape_with_order((batch, rows / batch, h)).expect("the rows of whole sequences")
}
