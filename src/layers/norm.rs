//! Layer normalisation over the features of a frame.

use ndarray::{Array1, ArrayView2};

use super::{Buffer, Visitor, VisitorMut, flat, flat_mut, join};
use crate::kernels::norm::{SmallVariance, layer_norm, layer_norm_backward};

/// ε of every norm.
const EPSILON: f32 = 1e-5;

/// weight ⊙ (x − mean) / √(variance + ε) + bias, weight and bias `[h]`.
#[derive(Clone)]
pub(crate) struct LayerNorm {
    weight: Array1<f32>,
    bias: Array1<f32>,
    small_variance: SmallVariance,
}

impl LayerNorm {
    pub(crate) fn zeros(h: usize, small_variance: SmallVariance) -> Self {
        LayerNorm { weight: Array1::zeros(h), bias: Array1::zeros(h), small_variance }
    }

    /// Weight 1, bias 0.
    pub(crate) fn init(&mut self) {
        self.weight.fill(1.0);
        self.bias.fill(0.0);
    }

    /// x `[rows, h]` → `[rows, h]`
    pub(crate) fn forward(&self, x: ArrayView2<f32>) -> Buffer {
        let mut y = Buffer::any(x.dim());
        layer_norm(flat(&x), flat(&self.weight), flat(&self.bias), EPSILON, self.small_variance, flat_mut(&mut y));
        y
    }

    /// The gradient of [`forward`](Self::forward) at x: dy `[rows, h]` → dx `[rows, h]`.
    pub(crate) fn backward(&self, x: ArrayView2<f32>, dy: ArrayView2<f32>, grad: &mut LayerNorm) -> Buffer {
        let mut dx = Buffer::any(x.dim());
        layer_norm_backward(
            flat(&x),
            flat(&self.weight),
            EPSILON,
            self.small_variance,
            flat(&dy),
            flat_mut(&mut dx),
            flat_mut(&mut grad.weight),
            flat_mut(&mut grad.bias),
        );
        dx
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        f(&join(name, "weight"), self.weight.view().into_dyn());
        f(&join(name, "bias"), self.bias.view().into_dyn());
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        f(&join(name, "weight"), self.weight.view_mut().into_dyn());
        f(&join(name, "bias"), self.bias.view_mut().into_dyn());
    }
}
