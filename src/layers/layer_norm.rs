//! Layer normalisation over the features of a frame.

use ndarray::{Array1, Array2, ArrayView2};

use super::batch::for_rows;
use super::{Buffer, flat, flat_mut};
use crate::kernels::norm::{SmallVariance, layer_norm, layer_norm_backward};
use crate::kernels::rows::Out;
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};

/// ε of every layer norm.
const EPSILON: f32 = 1e-5;
/// Rows whose gradients are summed together. The sums of the blocks are then added in their order, so that the result does not
/// depend on the threads.
const ROWS: usize = 128;

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

    /// A gradient of this norm, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Self::zeros(self.weight.len(), self.small_variance)
    }

    /// Weight 1, bias 0.
    pub(crate) fn init(&mut self) {
        self.weight.fill(1.0);
        self.bias.fill(0.0);
    }

    /// Parameters of such a norm.
    pub(crate) fn count(h: usize) -> Option<usize> {
        h.checked_mul(2)
    }

    /// x `[rows, h]` → `[rows, h]`
    pub(crate) fn forward(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        let (x_all, h) = (flat(&x), self.weight.len());
        let mut y = Buffer::uninit(x.dim());
        for_rows(team, flat_mut(&mut y), h, |first, y| {
            let x = &x_all[first * h..][..y.len()];
            layer_norm(x, flat(&self.weight), flat(&self.bias), EPSILON, self.small_variance, y);
        });
        y
    }

    /// The gradient of [`forward`](Self::forward) at x: dy `[rows, h]` → dx `[rows, h]`.
    pub(crate) fn backward(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        grad: &mut LayerNorm,
    ) -> Buffer {
        let mut dx = Buffer::uninit(x.dim());
        self.backward_to(team, x, dy, &mut dx, Out::Set, grad);
        dx
    }

    /// As [`backward`](Self::backward), added to dx.
    pub(crate) fn backward_add(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        dx: &mut Array2<f32>,
        grad: &mut LayerNorm,
    ) {
        self.backward_to(team, x, dy, dx, Out::Add, grad);
    }

    fn backward_to(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        dx: &mut Array2<f32>,
        mode: Out,
        grad: &mut LayerNorm,
    ) {
        let h = self.weight.len();
        let blocks = x.nrows().div_ceil(ROWS);
        let [mut dweights, mut dbiases] = [(); 2].map(|()| Array2::<f32>::zeros((blocks, h)));
        let (weights, biases) = (flat_mut(&mut dweights).chunks_mut(h), flat_mut(&mut dbiases).chunks_mut(h));
        let rows = flat(&x).chunks(ROWS * h).zip(flat(&dy).chunks(ROWS * h));
        let blocks = rows.zip(flat_mut(dx).chunks_mut(ROWS * h)).zip(weights.zip(biases));
        team.for_each(blocks, |(((x, dy), dx), (dweight, dbias))| {
            let weight = flat(&self.weight);
            layer_norm_backward(x, weight, EPSILON, self.small_variance, dy, dx, mode, dweight, dbias);
        });
        dweights.rows().into_iter().for_each(|dweight| grad.weight += &dweight);
        dbiases.rows().into_iter().for_each(|dbias| grad.bias += &dbias);
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        f(&join(name, "weight"), Parameter::Array(self.weight.view().into_dyn()));
        f(&join(name, "bias"), Parameter::Array(self.bias.view().into_dyn()));
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        f(&join(name, "weight"), ParameterMut::Array(self.weight.view_mut().into_dyn()));
        f(&join(name, "bias"), ParameterMut::Array(self.bias.view_mut().into_dyn()));
    }
}
