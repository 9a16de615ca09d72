//! The feed-forward network of a block.

use ndarray::{Array2, ArrayView2};

use super::{Linear, Rng, Visitor, VisitorMut, flat_mut, join};
use crate::kernels::math;

/// The activation between the two maps.
type Activation = math::Gelu;

/// W_down · gelu(W_up · x + b_up) + b_down, four times as wide inside.
#[derive(Clone)]
pub(crate) struct FeedForward {
    up: Linear,
    down: Linear,
}

impl FeedForward {
    pub(crate) fn zeros(h: usize) -> Self {
        FeedForward { up: Linear::zeros(h, 4 * h, true), down: Linear::zeros(4 * h, h, true) }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.up.init(rng);
        self.down.init(rng);
    }

    /// y `[rows, h]` += ffn(x `[rows, h]`)
    pub(crate) fn add_to(&self, x: ArrayView2<f32>, y: &mut Array2<f32>) {
        let mut inner = self.up.forward(x); // [rows, 4h]
        math::map::<Activation>(flat_mut(&mut inner));
        self.down.add_to(inner.view(), y);
    }

    pub(crate) fn visit(&self, name: &str, f: &mut Visitor) {
        self.up.visit(&join(name, "up"), f);
        self.down.visit(&join(name, "down"), f);
    }

    pub(crate) fn visit_mut(&mut self, name: &str, f: &mut VisitorMut) {
        self.up.visit_mut(&join(name, "up"), f);
        self.down.visit_mut(&join(name, "down"), f);
    }
}
