//! The gate that mixes the two branches of a block.

use ndarray::{Array2, ArrayView2};

use super::batch::for_rows;
use super::{Buffer, Linear, Rng, flat, flat_mut};
use crate::kernels::math::{self, Sigmoid};
use crate::kernels::matmul::Storage;
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::team::Team;
use crate::parameters::{Visitor, VisitorMut};

/// g = sigmoid(u·W_gᵀ + b_g), one number for each feature of each frame.
#[derive(Clone)]
pub(crate) struct Gate {
    linear: Linear,
}

impl Gate {
    pub(crate) fn zeros(h: usize, storage: Option<Storage>) -> Self {
        Gate { linear: Linear::zeros_as(h, h, true, storage) }
    }

    /// The map of the gate.
    pub(crate) fn linear_mut(&mut self) -> &mut Linear {
        &mut self.linear
    }

    /// A gradient of this gate, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Gate { linear: self.linear.zeros_like() }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.linear.init(rng);
    }

    /// Parameters of such a gate.
    pub(crate) fn count(h: usize) -> Option<usize> {
        Linear::count(h, h, true)
    }

    /// u `[rows, h]` → g `[rows, h]`
    pub(crate) fn forward(&self, team: &Team, u: ArrayView2<f32>) -> Buffer {
        let mut gate = self.linear.forward(team, u);
        let h = gate.ncols();
        for_rows(team, flat_mut(&mut gate), h, |_, gate| math::map::<Sigmoid>(gate));
        gate
    }

    /// x += g ⊙ mamba + (1 − g) ⊙ attention, all `[rows, h]`
    pub(crate) fn mix(
        team: &Team,
        gate: &Array2<f32>,
        mamba: &Array2<f32>,
        attention: &Array2<f32>,
        x: &mut Array2<f32>,
    ) {
        let h = x.ncols();
        for_rows(team, flat_mut(x), h, |first, x| {
            let here = first * h..first * h + x.len();
            let branches = flat(mamba)[here.clone()].iter().zip(&flat(attention)[here.clone()]);
            timed(Stage::Elementwise, Cost::numbers(5 * x.len()), || {
                for ((x, g), (m, a)) in x.iter_mut().zip(&flat(gate)[here]).zip(branches) {
                    *x += g * m + (1.0 - g) * a;
                }
            });
        });
    }

    /// The gradient of [`forward`](Self::forward) at u, for its result g: dg `[rows, h]` → added to du `[rows, h]`.
    pub(crate) fn backward_add(
        &self,
        team: &Team,
        u: ArrayView2<f32>,
        gate: &Array2<f32>,
        mut dgate: Buffer,
        du: &mut Array2<f32>,
        grad: &mut Gate,
    ) {
        let h = gate.ncols();
        for_rows(team, flat_mut(&mut dgate), h, |first, dgate| {
            timed(Stage::Elementwise, Cost::numbers(3 * dgate.len()), || {
                dgate.iter_mut().zip(&flat(gate)[first * h..]).for_each(|(dg, g)| *dg *= g * (1.0 - g)); // sigmoid′
            });
        });
        self.linear.backward_add(team, u, dgate.view(), du, &mut grad.linear);
    }

    /// The gradients of [`mix`](Self::mix): dx `[rows, h]`, which is also that of the x before, → those of the gate, of mamba
    /// and of attention.
    pub(crate) fn mix_backward(
        team: &Team,
        gate: &Array2<f32>,
        mamba: &Array2<f32>,
        attention: &Array2<f32>,
        dx: &Array2<f32>,
    ) -> (Buffer, Buffer, Buffer) {
        let [g, m, a, dx_all] = [flat(gate), flat(mamba), flat(attention), flat(dx)];
        let dgate = for_new_rows(team, dx, 4, |from, dgate| {
            for ((dg, dx), (m, a)) in dgate.iter_mut().zip(&dx_all[from..]).zip(m[from..].iter().zip(&a[from..])) {
                *dg = dx * (m - a);
            }
        });
        let dmamba = for_new_rows(team, dx, 3, |from, dmamba| {
            dmamba.iter_mut().zip(&dx_all[from..]).zip(&g[from..]).for_each(|((dm, dx), g)| *dm = dx * g);
        });
        let dattention = for_new_rows(team, dx, 3, |from, dattention| {
            dattention.iter_mut().zip(&dx_all[from..]).zip(&g[from..]).for_each(|((da, dx), g)| *da = dx * (1.0 - g));
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

/// An array of the shape of x, filled by `f` in rows from a number on; `passes` over them, of arrays read and written.
fn for_new_rows(team: &Team, x: &Array2<f32>, passes: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Buffer {
    let mut new = Buffer::uninit(x.dim());
    for_rows(team, flat_mut(&mut new), x.ncols(), |first, new| {
        timed(Stage::Elementwise, Cost::numbers(passes * new.len()), || f(first * x.ncols(), new));
    });
    new
}
