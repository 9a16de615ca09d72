//! The feed-forward network of a block.

use ndarray::{Array2, ArrayView2};

use super::{Buffer, Linear, Rng, Visitor, VisitorMut, flat, flat_mut, join};
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

    /// As [`add_to`](Self::add_to); returns what goes into the activation, `[rows, 4h]`.
    pub(crate) fn add_to_train(&self, x: ArrayView2<f32>, y: &mut Array2<f32>) -> Buffer {
        let inner = self.up.forward(x);
        self.down.add_to(activated(&inner).view(), y);
        inner
    }

    /// The gradient of the network at x, for dy `[rows, h]` → dx `[rows, h]`. The activation is computed again: it costs less
    /// than keeping it.
    pub(crate) fn backward(
        &self,
        x: ArrayView2<f32>,
        inner: &Array2<f32>,
        dy: ArrayView2<f32>,
        grad: &mut FeedForward,
    ) -> Buffer {
        let mut dinner = self.down.backward(activated(inner).view(), dy, &mut grad.down);
        math::map_backward::<Activation>(flat(inner), flat_mut(&mut dinner));
        self.up.backward(x, dinner.view(), &mut grad.up)
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.up.visit(&join(name, "up"), f);
        self.down.visit(&join(name, "down"), f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.up.visit_mut(&join(name, "up"), f);
        self.down.visit_mut(&join(name, "down"), f);
    }
}

fn activated(inner: &Array2<f32>) -> Buffer {
    let mut activated = Buffer::copy_of(inner);
    math::map::<Activation>(flat_mut(&mut activated));
    activated
}
