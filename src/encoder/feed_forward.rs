//! The second half of most blocks: a norm, then a feed-forward network.

use ndarray::{Array2, ArrayView2};

use super::options::HymbaOptions;
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{Buffer, Dropout, LayerNorm, Linear, Mlp, MlpCache, Rng, Spans};
use crate::parameters::{Visitor, VisitorMut, join};

/// FFN(LayerNorm(x)), with `FFN(u) = W_down · gelu(W_up · u + b_up) + b_down`, 4h wide inside.
#[derive(Clone)]
pub(super) struct FeedForward {
    norm: LayerNorm,
    ffn: Mlp,
}

/// What [`FeedForward::backward`] reads.
pub(super) struct FeedForwardCache {
    /// Input of the norm, and its output, `[rows, h]`.
    x: Buffer,
    u: Buffer,
    ffn: MlpCache,
}

impl FeedForward {
    pub fn zeros(options: &HymbaOptions, storage: Option<Storage>) -> Self {
        FeedForward { norm: options.new_norm(options.hidden_size), ffn: options.new_ffn(storage) }
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.ffn.linears_mut()
    }

    /// Calls `f` with every map and its name in files.
    pub fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.ffn.visit_maps(name, f);
    }

    pub fn zeros_like(&self) -> Self {
        FeedForward { norm: self.norm.zeros_like(), ffn: self.ffn.zeros_like() }
    }

    pub fn init(&mut self, rng: &mut Rng) {
        self.norm.init();
        self.ffn.init(rng);
    }

    /// x `[rows, h]` → `[rows, h]`
    pub fn forward(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        self.ffn.forward(team, self.norm.forward(team, x).view())
    }

    /// x `[rows, h]` += FFN(LayerNorm(x))
    pub fn add_to(&self, team: &Team, x: &mut Array2<f32>) {
        let u = self.norm.forward(team, x.view());
        self.ffn.add_to(team, u.view(), x);
    }

    /// x + dropout(FFN(LayerNorm(x))), where nothing is dropped to the bit what [`add_to`](Self::add_to) gives; and what
    /// [`backward`](Self::backward) reads.
    pub fn residual_train(
        &self,
        team: &Team,
        spans: &Spans,
        x: Buffer,
        dropout: Dropout,
    ) -> (Buffer, FeedForwardCache) {
        let u = self.norm.forward(team, x.view());
        let (y, ffn) = self.ffn.residual_train(team, spans, u.view(), &x, dropout);
        (y, FeedForwardCache { x, u, ffn })
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub fn forward_train(&self, team: &Team, x: Buffer) -> (Buffer, FeedForwardCache) {
        let u = self.norm.forward(team, x.view());
        let (y, ffn) = self.ffn.forward_train(team, u.view());
        (y, FeedForwardCache { x, u, ffn })
    }

    /// The gradient of [`residual_train`](Self::residual_train): d `[rows, h]`, that of the output, becomes that of x.
    pub fn residual_backward(
        &self,
        team: &Team,
        spans: &Spans,
        cache: &FeedForwardCache,
        dropout: Dropout,
        d: &mut Array2<f32>,
        grad: &mut FeedForward,
    ) {
        // y = x + dropout(FFN(LayerNorm(x)))
        let dropped = dropout.applied(team, spans, d);
        let dffn = dropped.as_deref().unwrap_or(d).view();
        let du = self.ffn.backward(team, cache.u.view(), &cache.ffn, dffn, &mut grad.ffn);
        self.norm.backward_add(team, cache.x.view(), du.view(), d, &mut grad.norm);
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[rows, h]` → dx `[rows, h]`.
    pub fn backward(
        &self,
        team: &Team,
        cache: &FeedForwardCache,
        dy: ArrayView2<f32>,
        grad: &mut FeedForward,
    ) -> Buffer {
        let du = self.ffn.backward(team, cache.u.view(), &cache.ffn, dy, &mut grad.ffn);
        self.norm.backward(team, cache.x.view(), du.view(), &mut grad.norm)
    }

    /// The parameters of a block: `NAME.ffn_norm` and `NAME.ffn`.
    pub fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.norm.visit(&join(name, "ffn_norm"), f);
        self.ffn.visit(&join(name, "ffn"), f);
    }

    pub fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.norm.visit_mut(&join(name, "ffn_norm"), f);
        self.ffn.visit_mut(&join(name, "ffn"), f);
    }
}
