//! Normalisation by the root of the mean square.

use ndarray::{Array1, ArrayView2};

use super::batch::{add, for_rows, for_rows_summed};
use super::{Buffer, flat, flat_mut};
use crate::kernels::norm::{rms_norm, rms_norm_backward, rms_norm_in_place};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};

/// weight ⊙ x / √(mean(x²) + ε), weight `[h]`.
#[derive(Clone)]
pub(crate) struct RmsNorm {
    weight: Array1<f32>,
    epsilon: f32,
}

impl RmsNorm {
    pub(crate) fn zeros(h: usize, epsilon: f32) -> Self {
        RmsNorm { weight: Array1::zeros(h), epsilon }
    }

    /// A gradient of this norm, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Self::zeros(self.weight.len(), self.epsilon)
    }

    /// Weight 1.
    pub(crate) fn init(&mut self) {
        self.weight.fill(1.0);
    }

    /// out (+)= scale · norm(x), for x `[rows, h]`
    pub(crate) fn forward(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        scale: f32,
        out: &mut ndarray::Array2<f32>,
        mode: Out,
    ) {
        let h = self.weight.len();
        let x = Rows { data: flat(&x), stride: h };
        for_rows(team, flat_mut(out), h, |first, out| {
            rms_norm(x.skip_rows(first), flat(&self.weight), self.epsilon, scale, out, mode);
        });
    }

    /// x `[rows, h]` → `[rows, h]`
    pub(crate) fn apply(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        let mut out = Buffer::uninit(x.dim());
        self.forward(team, x, 1.0, &mut out, Out::Set);
        out
    }

    /// The gradient of [`forward`](Self::forward) at x: d `[rows, h]`, that of the output, becomes that of x.
    pub(crate) fn backward(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        scale: f32,
        d: &mut ndarray::Array2<f32>,
        grad: &mut RmsNorm,
    ) {
        let (x, h) = (flat(&x), self.weight.len());
        let sums = for_rows_summed(team, flat_mut(d), h, h, |first, d, dweight| {
            let x = &x[first * h..][..d.len()];
            rms_norm_backward(x, flat(&self.weight), self.epsilon, scale, d, dweight);
        });
        grad.add(&sums);
    }

    /// Normalises one row `[h]`.
    pub(crate) fn in_place(&self, row: &mut [f32]) {
        rms_norm_in_place(row, flat(&self.weight), self.epsilon);
    }

    /// The gradient of [`in_place`](Self::in_place) at x `[h]`: d becomes that of x. Adds that of the weight to `dweight` `[h]`.
    pub(crate) fn in_place_backward(&self, x: &[f32], d: &mut [f32], dweight: &mut [f32]) {
        rms_norm_backward(x, flat(&self.weight), self.epsilon, 1.0, d, dweight);
    }

    /// Adds to the weight, where this is a gradient.
    pub(crate) fn add(&mut self, dweight: &[f32]) {
        add(dweight, flat_mut(&mut self.weight));
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        f(&join(name, "weight"), Parameter::Array(self.weight.view().into_dyn()));
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        f(&join(name, "weight"), ParameterMut::Array(self.weight.view_mut().into_dyn()));
    }
}
