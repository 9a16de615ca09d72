//! The selective scan (Mamba, arXiv 2312.00752, equations 2a and 2b with the input-dependent Δ, B and C of its
//! algorithm 2). `docs/selective-scan.md` derives it.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

use super::{Derived, Visitor, VisitorMut, flat, join};
use crate::kernels::math::{self, Softplus};
use crate::kernels::matmul::Rows;
use crate::kernels::scan::{ScanInput, selective_scan};

/// How the time step Δ follows from its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeStep {
    /// Δ = softplus, and B is scaled by it.
    Softplus,
    /// Δ = softplus clipped to \[0.001, 0.1\], and B is scaled by its mean over the channels.
    Clipped,
}

/// The limits of [`TimeStep::Clipped`].
const CLIP: (f32, f32) = (0.001, 0.1);

/// d channels with n states each.
#[derive(Clone)]
pub(crate) struct SelectiveScan {
    n: usize,
    d: usize,
    time_step: TimeStep,
    /// ln(−A) `[d, n]` and the skip D `[d]`. Without them A is −1 … −n and there is no skip.
    learned: Option<(Array2<f32>, Array1<f32>)>,
    /// A `[n, d]`, transposed so that channels lie side by side.
    a: Derived<Array2<f32>>,
}

impl SelectiveScan {
    pub(crate) fn zeros(d: usize, n: usize, learned: bool, time_step: TimeStep) -> Self {
        let learned = learned.then(|| (Array2::zeros((d, n)), Array1::zeros(d)));
        SelectiveScan { n, d, time_step, learned, a: Derived::new() }
    }

    /// A = −1 … −n for every channel, D = 1.
    pub(crate) fn init(&mut self) {
        self.a.forget();
        if let Some((a_log, skip)) = &mut self.learned {
            a_log.indexed_iter_mut().for_each(|((_, state), a_log)| *a_log = ((state + 1) as f32).ln());
            skip.fill(1.0);
        }
    }

    /// One sequence. With Δ = softplus(δ), for each frame t
    ///
    /// S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ v_t) B_tᵀ,  y_t = S_t C_t + D ⊙ v_t,  out_t = y_t ⊙ silu(z_t).
    ///
    /// `delta` `[l, d]` holds δ and is overwritten; v `[l, d]`; `bc` `[l, 2n]` holds B | C in its last 2n columns; z are the
    /// last d columns; `state` `[n, d]` is Sᵀ and moves on; `out` `[l, d]`.
    pub(crate) fn step(
        &self,
        delta: &mut [f32],
        v: ArrayView2<f32>,
        bc: ArrayView2<f32>,
        z: ArrayView2<f32>,
        state: ArrayViewMut2<f32>,
        out: ArrayViewMut2<f32>,
    ) {
        math::map::<Softplus>(delta);
        let input_step: Option<Vec<f32>> = match self.time_step {
            TimeStep::Softplus => None,
            TimeStep::Clipped => {
                delta.iter_mut().for_each(|delta| *delta = delta.clamp(CLIP.0, CLIP.1));
                Some(delta.chunks_exact(self.d).map(|row| row.iter().sum::<f32>() / self.d as f32).collect())
            }
        };
        let a = self.a.get(|| match &self.learned {
            Some((a_log, _)) => a_log.t().mapv(|a_log| -a_log.exp()).as_standard_layout().into_owned(),
            None => Array2::from_shape_fn((self.n, self.d), |(state, _)| -((state + 1) as f32)),
        });
        let b = bc.ncols() - 2 * self.n;
        let input = ScanInput {
            delta: Rows { data: delta, stride: self.d },
            v: Rows { data: flat(&v), stride: self.d },
            b: Rows { data: &flat(&bc)[b..], stride: bc.ncols() },
            c: Rows { data: &flat(&bc)[b + self.n..], stride: bc.ncols() },
            z: Rows { data: &flat(&z)[z.ncols() - self.d..], stride: z.ncols() },
            a: flat(a),
            skip: self.learned.as_ref().map(|(_, skip)| flat(skip)),
            input_step: input_step.as_deref(),
        };
        selective_scan(input, state, out);
    }

    pub(crate) fn visit(&self, name: &str, f: &mut Visitor) {
        if let Some((a_log, skip)) = &self.learned {
            f(&join(name, "a_log"), a_log.view().into_dyn());
            f(&join(name, "d"), skip.view().into_dyn());
        }
    }

    pub(crate) fn visit_mut(&mut self, name: &str, f: &mut VisitorMut) {
        self.a.forget();
        if let Some((a_log, skip)) = &mut self.learned {
            f(&join(name, "a_log"), a_log.view_mut().into_dyn());
            f(&join(name, "d"), skip.view_mut().into_dyn());
        }
    }
}
