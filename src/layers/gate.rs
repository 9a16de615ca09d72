//! The gate that mixes the two branches of a block.

use ndarray::{Array2, ArrayView2, Zip};

use super::{Buffer, Linear, Rng, Visitor, VisitorMut, flat_mut};
use crate::kernels::clock::{Part, Work, timed};
use crate::kernels::math::{self, Sigmoid};

/// g = sigmoid(u·W_gᵀ + b_g), one number for each feature of each frame.
#[derive(Clone)]
pub(crate) struct Gate {
    linear: Linear,
}

impl Gate {
    pub(crate) fn zeros(h: usize) -> Self {
        Gate { linear: Linear::zeros(h, h, true) }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.linear.init(rng);
    }

    /// u `[rows, h]` → g `[rows, h]`
    pub(crate) fn forward(&self, u: ArrayView2<f32>) -> Buffer {
        let mut gate = self.linear.forward(u);
        math::map::<Sigmoid>(flat_mut(&mut gate));
        gate
    }

    /// x += g ⊙ mamba + (1 − g) ⊙ attention, all `[rows, h]`
    pub(crate) fn mix(gate: &Array2<f32>, mamba: &Array2<f32>, attention: &Array2<f32>, x: &mut Array2<f32>) {
        timed(Part::Elementwise, Work::numbers(5 * x.len()), || {
            Zip::from(x).and(gate).and(mamba).and(attention).for_each(|x, &g, &m, &a| *x += g * m + (1.0 - g) * a);
        });
    }

    /// The gradient of [`forward`](Self::forward) at u, for its result g: dg `[rows, h]` → du `[rows, h]`.
    pub(crate) fn backward(
        &self,
        u: ArrayView2<f32>,
        gate: &Array2<f32>,
        mut dgate: Buffer,
        grad: &mut Gate,
    ) -> Buffer {
        timed(Part::Elementwise, Work::numbers(3 * gate.len()), || {
            Zip::from(&mut *dgate).and(gate).for_each(|dg, &g| *dg *= g * (1.0 - g)); // sigmoid′
        });
        self.linear.backward(u, dgate.view(), &mut grad.linear)
    }

    /// The gradients of [`mix`](Self::mix): dx `[rows, h]`, which is also that of the x before, → those of the gate, of mamba
    /// and of attention.
    pub(crate) fn mix_backward(
        gate: &Array2<f32>,
        mamba: &Array2<f32>,
        attention: &Array2<f32>,
        dx: &Array2<f32>,
    ) -> (Buffer, Buffer, Buffer) {
        let (mut dgate, mut dmamba, mut dattention) =
            (Buffer::any(dx.dim()), Buffer::any(dx.dim()), Buffer::any(dx.dim()));
        timed(Part::Elementwise, Work::numbers(8 * dx.len()), || {
            Zip::from(&mut *dgate).and(dx).and(mamba).and(attention).for_each(|dg, &dx, &m, &a| *dg = dx * (m - a));
            Zip::from(&mut *dmamba).and(&mut *dattention).and(dx).and(gate).for_each(|dm, da, &dx, &g| {
                *dm = dx * g;
                *da = dx * (1.0 - g);
            });
        });
        (dgate, dmamba, dattention)
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.linear.visit(name, f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.linear.visit_mut(name, f);
    }
}
