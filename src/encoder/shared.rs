//! The attention block that several depths share.

use ndarray::{Array2, Array4, s};

use super::feed_forward::{FeedForward, FeedForwardCache};
use super::options::HymbaOptions;
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{
    AttentionCache, Batch, Buffer, Depth, KvStorage, LayerNorm, LayerState, Linear, MetaTokenAttention, Rng, Spans,
    StateGradient,
};
use crate::parameters::{Visitor, VisitorMut, debug_shapes, join};

/// The block T of [`Pattern::SharedAttention`](crate::Pattern::SharedAttention), as in Zamba (arXiv 2405.16712). It reads the
/// residual stream x beside x₀, which is x in front of the first block:
///
/// ```text
/// c = [x | x₀]                                       [l, 2h]
/// t = Attention(LayerNorm(c))                        [l, h]      a heads of width P = 2h/a, scores times 1/√(P/2)
/// T = W_down · gelu(W_up · LayerNorm(t) + b_up) + b_down
/// ```
///
/// Queries, keys and values are `[2h, 2h]` maps with bias, the output is one of `[h, 2h]`; otherwise attention, with its meta tokens
/// and its window, is that of [`HymbaBlock`](crate::HymbaBlock). There is no residual inside. One set of weights serves every use;
/// the keys and values that a stream remembers are each use's own. Zamba's has RMS norms, no biases and a gated network.
#[derive(Clone)]
pub struct SharedBlock {
    norm: LayerNorm,
    attention: MetaTokenAttention,
    ffn: FeedForward,
}

/// What [`SharedBlock::backward`] reads of one use.
pub(crate) struct SharedCache {
    /// Input of the first norm, and its output, `[rows, 2h]`.
    c: Buffer,
    u: Buffer,
    attention_cache: AttentionCache,
    ffn: FeedForwardCache,
}

debug_shapes!(SharedBlock);

impl SharedBlock {
    pub(crate) fn zeros(options: &HymbaOptions, storage: Option<Storage>) -> Self {
        let h = options.hidden_size;
        SharedBlock {
            norm: options.new_norm(2 * h),
            attention: options.new_shared_attention(storage),
            ffn: FeedForward::zeros(options, storage),
        }
    }

    /// The maps that may be stored narrow.
    pub(crate) fn large_maps_mut(&mut self) -> Vec<&mut Linear> {
        self.attention.linears_mut().chain(self.ffn.linears_mut()).collect()
    }

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.attention.visit_maps(&join(name, "attention"), f);
        self.ffn.visit_maps(&join(name, "ffn"), f);
    }

    /// A gradient of this block, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        SharedBlock { norm: self.norm.zeros_like(), attention: self.attention.zeros_like(), ffn: self.ffn.zeros_like() }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.norm.init();
        self.attention.init(rng);
        self.ffn.init(rng);
    }

    /// A state of one use, of a sequence that has seen nothing.
    pub(crate) fn new_state(&self) -> LayerState {
        LayerState::of_attention(self.attention.new_cache(KvStorage::F32))
    }

    /// x and x₀ `[rows, h]` → T `[rows, h]`. The keys and values of `layer` move on.
    pub(crate) fn forward(&self, batch: &mut Batch, layer: usize, x: &Array2<f32>, x0: &Array2<f32>) -> Buffer {
        let team = batch.team;
        let u = self.norm.forward(team, beside(x, x0).view());
        let t = self.attention.forward(batch, Depth::of(layer), u.view(), None);
        self.ffn.forward(team, t.view())
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        layer: usize,
        x: &Array2<f32>,
        x0: &Array2<f32>,
    ) -> (Buffer, SharedCache) {
        let team = batch.team;
        let c = beside(x, x0);
        let u = self.norm.forward(team, c.view());
        let (t, attention_cache) = self.attention.forward_train(batch, Depth::of(layer), u.view(), None);
        let (y, ffn) = self.ffn.forward_train(team, t);
        (y, SharedCache { c, u, attention_cache, ffn })
    }

    /// The gradient of [`forward_train`](Self::forward_train) for sequences that all began with the state `initial`: dy `[rows, h]`
    /// is added to dx and dx₀ `[rows, h]`. `dfinal` and `dinitial` as in [`HymbaBlock`](crate::HymbaBlock).
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        cache: &SharedCache,
        initial: &LayerState,
        dy: Buffer,
        dfinal: Option<&StateGradient>,
        grad: &mut SharedBlock,
        dinitial: &mut StateGradient,
        [dx, dx0]: [&mut Array2<f32>; 2],
    ) {
        let dt = self.ffn.backward(team, &cache.ffn, dy.view(), &mut grad.ffn);
        let (u, attention) = (cache.u.view(), &cache.attention_cache);
        let (dt, grad_attention) = (dt.view(), &mut grad.attention);
        let du =
            self.attention.backward(team, spans, None, u, attention, initial, dt, dfinal, grad_attention, dinitial);
        let dc = self.norm.backward(team, cache.c.view(), du.view(), &mut grad.norm);
        let h = dx.ncols();
        *dx += &dc.slice(s![.., ..h]);
        *dx0 += &dc.slice(s![.., h..]);
    }

    /// The attention weights of sequences of one length, as [`MetaTokenAttention::weights`] has them.
    pub(crate) fn weights(&self, batch: &Batch, layer: usize, x: &Array2<f32>, x0: &Array2<f32>) -> Array4<f32> {
        let u = self.norm.forward(batch.team, beside(x, x0).view());
        self.attention.weights(batch, Depth::of(layer), u.view())
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.norm.visit(&join(name, "norm"), f);
        self.attention.visit(&join(name, "attention"), f);
        self.ffn.visit(name, f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.norm.visit_mut(&join(name, "norm"), f);
        self.attention.visit_mut(&join(name, "attention"), f);
        self.ffn.visit_mut(name, f);
    }
}

/// `[x | x₀]`: `[rows, h]` twice → `[rows, 2h]`
fn beside(x: &Array2<f32>, x0: &Array2<f32>) -> Buffer {
    let (rows, h) = x.dim();
    let mut c = Buffer::uninit((rows, 2 * h));
    c.slice_mut(s![.., ..h]).assign(x);
    c.slice_mut(s![.., h..]).assign(x0);
    c
}
