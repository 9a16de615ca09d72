//! The gate that mixes the two branches of a block.

use ndarray::{Array2, ArrayView2, Zip};

use super::{Linear, Rng, Visitor, VisitorMut, flat_mut};
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
    pub(crate) fn forward(&self, u: ArrayView2<f32>) -> Array2<f32> {
        let mut gate = self.linear.forward(u);
        math::map::<Sigmoid>(flat_mut(&mut gate));
        gate
    }

    /// x += g ⊙ mamba + (1 − g) ⊙ attention, all `[rows, h]`
    pub(crate) fn mix(gate: &Array2<f32>, mamba: &Array2<f32>, attention: &Array2<f32>, x: &mut Array2<f32>) {
        Zip::from(x).and(gate).and(mamba).and(attention).for_each(|x, &g, &m, &a| *x += g * m + (1.0 - g) * a);
    }

    pub(crate) fn visit(&self, name: &str, f: &mut Visitor) {
        self.linear.visit(name, f);
    }

    pub(crate) fn visit_mut(&mut self, name: &str, f: &mut VisitorMut) {
        self.linear.visit_mut(name, f);
    }
}
