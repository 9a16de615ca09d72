//! The selective scan (Mamba, arXiv 2312.00752, equations 2a and 2b with the input-dependent Δ, B and C of its
//! algorithm 2). `docs/selective-scan.md` derives it.

use ndarray::{Array1, Array2, ArrayView3, ArrayViewMut2};

use super::{Derived, Visitor, VisitorMut, flat, join};
use crate::kernels::clock::{Part, Work, timed};
use crate::kernels::math::{self, Softplus};
use crate::kernels::matmul::Rows;
use crate::kernels::scan::{Checkpoints, RowsMut, ScanGradient, ScanInput, selective_scan, selective_scan_backward};

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

/// What a scan reads beside Δ, for one sequence of l frames.
#[derive(Clone, Copy)]
pub(crate) struct ScanRows<'a> {
    /// v `[l, d]`
    pub v: Rows<'a>,
    /// `[l, ·]` with B | C in the last 2n columns.
    pub bc: Rows<'a>,
    /// `[l, ·]` with z in the last d columns.
    pub xz: Rows<'a>,
}

/// The gradients of [`ScanRows`] and Δ, overwritten, and of the state, which goes from that after the frames to that before.
pub(crate) struct ScanRowsGradient<'a> {
    pub delta: &'a mut [f32],
    pub v: &'a mut [f32],
    pub bc: RowsMut<'a>,
    pub xz: RowsMut<'a>,
    pub state: &'a mut [f32],
}

/// The gradients of A `[n, d]` and D `[d]` of one sequence.
pub(crate) struct ScanPartial<'a> {
    pub a: &'a mut [f32],
    pub skip: &'a mut [f32],
}

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
    /// `delta` `[l, d]` holds δ and then Δ; v `[l, d]`; `bc` `[l, ·]` holds B | C in its last 2n columns, and `xz` z in its last
    /// d; `state` `[n, d]` is Sᵀ and moves on; `out` `[l, d]`. `checkpoints` are for [`backward`](Self::backward).
    pub(crate) fn step(
        &self,
        delta: &mut [f32],
        input: ScanRows,
        state: ArrayViewMut2<f32>,
        out: ArrayViewMut2<f32>,
        checkpoints: Checkpoints,
    ) {
        math::map::<Softplus>(delta);
        if self.time_step == TimeStep::Clipped {
            delta.iter_mut().for_each(|delta| *delta = delta.clamp(CLIP.0, CLIP.1));
        }
        let step = self.input_step(delta);
        selective_scan(self.input(delta, input, step.as_deref()), state, out, checkpoints);
    }

    /// The gradient of one sequence's forward pass, which left Δ in `delta` and its `checkpoints`. `gradient.delta` becomes that
    /// of δ. Adds to the `partial` gradients of A and D.
    pub(crate) fn backward(
        &self,
        delta: &[f32],
        input: ScanRows,
        checkpoints: ArrayView3<f32>,
        dout: &[f32],
        gradient: ScanRowsGradient,
        partial: ScanPartial,
    ) {
        let step = self.input_step(delta);
        let mut dstep = step.as_ref().map(|step| vec![0.0; step.len()]);
        let ddelta = gradient.delta;
        let scan_gradient = ScanGradient {
            delta: ddelta,
            v: gradient.v,
            bc: gradient.bc,
            z: gradient.xz,
            a: partial.a,
            skip: self.learned.is_some().then_some(partial.skip),
            state: gradient.state,
            input_step: dstep.as_deref_mut(),
        };
        selective_scan_backward(self.input(delta, input, step.as_deref()), checkpoints, dout, scan_gradient);
        timed(Part::Elementwise, Work::numbers(3 * delta.len()), || {
            if let Some(dstep) = dstep {
                for (t, (ddelta, delta)) in ddelta.chunks_exact_mut(self.d).zip(delta.chunks_exact(self.d)).enumerate()
                {
                    // the mean hands its gradient to all channels alike, and what is clipped stands still
                    let shared = dstep[t] / self.d as f32;
                    for (ddelta, delta) in ddelta.iter_mut().zip(delta) {
                        let moves = *delta > CLIP.0 && *delta < CLIP.1;
                        *ddelta = if moves { *ddelta + shared } else { 0.0 };
                    }
                }
            }
            math::softplus_backward(delta, ddelta);
        });
    }

    /// Adds the gradients of A and D of one sequence to those of the parameters: A = −exp(a_log), so dA/da_log = A.
    pub(crate) fn add_partial(&self, da: &[f32], dskip: &[f32], grad: &mut SelectiveScan) {
        grad.a.forget();
        if let Some((da_log, dd)) = &mut grad.learned {
            for ((state, channel), a) in self.a().indexed_iter() {
                da_log[[channel, state]] += a * da[state * self.d + channel];
            }
            dd.iter_mut().zip(dskip).for_each(|(dd, dskip)| *dd += dskip);
        }
    }

    /// The mean of Δ over the channels, for each frame, where B goes with it.
    fn input_step(&self, delta: &[f32]) -> Option<Vec<f32>> {
        let mean = |row: &[f32]| row.iter().sum::<f32>() / self.d as f32;
        (self.time_step == TimeStep::Clipped).then(|| delta.chunks_exact(self.d).map(mean).collect())
    }

    /// A `[n, d]`
    fn a(&self) -> &Array2<f32> {
        self.a.get(|| match &self.learned {
            Some((a_log, _)) => a_log.t().mapv(|a_log| -a_log.exp()).as_standard_layout().into_owned(),
            None => Array2::from_shape_fn((self.n, self.d), |(state, _)| -((state + 1) as f32)),
        })
    }

    /// The arguments of a scan over one sequence.
    pub(crate) fn input<'a>(
        &'a self,
        delta: &'a [f32],
        rows: ScanRows<'a>,
        input_step: Option<&'a [f32]>,
    ) -> ScanInput<'a> {
        let bc = rows.bc.skip_columns(rows.bc.stride - 2 * self.n);
        ScanInput {
            delta: Rows { data: delta, stride: self.d },
            v: rows.v,
            b: bc,
            c: bc.skip_columns(self.n),
            z: rows.xz.skip_columns(rows.xz.stride - self.d),
            a: flat(self.a()),
            skip: self.learned.as_ref().map(|(_, skip)| flat(skip)),
            input_step,
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some((a_log, skip)) = &self.learned {
            f(&join(name, "a_log"), a_log.view().into_dyn());
            f(&join(name, "d"), skip.view().into_dyn());
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.a.forget();
        if let Some((a_log, skip)) = &mut self.learned {
            f(&join(name, "a_log"), a_log.view_mut().into_dyn());
            f(&join(name, "d"), skip.view_mut().into_dyn());
        }
    }
}
