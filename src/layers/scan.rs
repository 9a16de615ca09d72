//! The selective scan (Mamba, arXiv 2312.00752, equations 2a and 2b with the input-dependent Δ, B and C of its
//! algorithm 2). `docs/selective-scan.md` derives it.

use ndarray::{Array1, Array2, ArrayView3, ArrayViewMut, ArrayViewMut2, ArrayViewMut3, Axis, Dimension};

use super::batch::{Spans, add, for_rows};
use super::{Buffer, Lazy, flat, flat_mut};
use crate::kernels::math::{self, Softplus};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::rows::{Rows, RowsMut};
use crate::kernels::scan::{CHUNK, ScanGradient, ScanInput, selective_scan, selective_scan_backward};
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};

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

/// Channels that one thread takes at a time, if there are others.
const STRIP: usize = 128;

/// What a scan reads beside Δ, row by row.
#[derive(Clone, Copy)]
pub(crate) struct ScanRows<'a> {
    /// v `[rows, d]`
    pub v: Rows<'a>,
    /// `[rows, ·]` with B | C in the last 2n columns.
    pub bc: Rows<'a>,
    /// `[rows, ·]` with z in the last d columns.
    pub xz: Rows<'a>,
}

impl ScanRows<'_> {
    fn skip_rows(self, rows: usize) -> Self {
        ScanRows { v: self.v.skip_rows(rows), bc: self.bc.skip_rows(rows), xz: self.xz.skip_rows(rows) }
    }
}

/// The gradients of [`ScanRows`] and Δ; all overwritten.
pub(crate) struct ScanRowsGradient<'a> {
    pub delta: &'a mut Array2<f32>,
    pub v: &'a mut Array2<f32>,
    /// The last 2n columns.
    pub bc: &'a mut Array2<f32>,
    /// The last d columns.
    pub xz: &'a mut Array2<f32>,
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
    a: Lazy<Array2<f32>>,
}

impl SelectiveScan {
    pub(crate) fn zeros(d: usize, n: usize, learned: bool, time_step: TimeStep) -> Self {
        let learned = learned.then(|| (Array2::zeros((d, n)), Array1::zeros(d)));
        SelectiveScan { n, d, time_step, learned, a: Lazy::new() }
    }

    /// A gradient of this scan, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Self::zeros(self.d, self.n, self.learned.is_some(), self.time_step)
    }

    /// A = −1 … −n for every channel, D = 1.
    pub(crate) fn init(&mut self) {
        self.a.forget();
        if let Some((a_log, skip)) = &mut self.learned {
            a_log.indexed_iter_mut().for_each(|((_, state), a_log)| *a_log = ((state + 1) as f32).ln());
            skip.fill(1.0);
        }
    }

    /// Parameters of such a scan.
    pub(crate) fn count(d: usize, n: usize, learned: bool) -> Option<usize> {
        if learned { n.checked_add(1)?.checked_mul(d) } else { Some(0) }
    }

    /// d, and n.
    pub(crate) fn dim(&self) -> (usize, usize) {
        (self.d, self.n)
    }

    /// With Δ = softplus(δ), for each frame t of each sequence
    ///
    /// S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ v_t) B_tᵀ,  y_t = S_t C_t + D ⊙ v_t,  out_t = y_t ⊙ silu(z_t).
    ///
    /// `delta` `[rows, d]` holds δ and then Δ; `states` `[n, d]` are Sᵀ and move on → `[rows, d]`. `checkpoints`, of
    /// [`num_checkpoints`](Self::num_checkpoints) states, are for [`backward`](Self::backward).
    pub(crate) fn forward<'a>(
        &self,
        team: &Team,
        spans: &Spans,
        delta: &mut Array2<f32>,
        input: ScanRows,
        states: impl Iterator<Item = &'a mut Array2<f32>>,
        mut checkpoints: Option<ArrayViewMut3<f32>>,
    ) -> Buffer {
        for_rows(team, flat_mut(delta), self.d, |_, delta| {
            math::map::<Softplus>(delta);
            if self.time_step == TimeStep::Clipped {
                delta.iter_mut().for_each(|delta| *delta = delta.clamp(CLIP.0, CLIP.1));
            }
        });
        let mean_delta = self.mean_delta(delta);
        let mut out = Buffer::uninit(delta.dim());
        let strip = if team.threads() > 1 { STRIP } else { self.d };
        let mut items = Vec::new();
        for ((span, state), out) in spans.iter().zip(states).zip(spans.split(flat_mut(&mut out), self.d)) {
            let rows = Rows { data: flat(delta), stride: self.d }.skip_rows(span.start);
            let mean = mean_delta.as_ref().map(|mean| &mean[span.clone()]);
            let input = self.input(rows, input.skip_rows(span.start), mean);
            let out = ArrayViewMut2::from_shape((span.len(), self.d), out).expect("whole rows");
            let mut chunks = Vec::new();
            if let Some(all) = checkpoints.take() {
                let (here, rest) = all.split_at(Axis(0), span.len().div_ceil(CHUNK));
                (chunks, checkpoints) = (strips(here, strip), Some(rest));
            }
            let mut chunks = chunks.into_iter();
            for (i, (state, out)) in strips(state.view_mut(), strip).into_iter().zip(strips(out, strip)).enumerate() {
                items.push((input, i * strip, state, out, chunks.next()));
            }
        }
        team.for_each(items, |(input, first, state, out, kept)| selective_scan(input, first, state, out, kept));
        out
    }

    /// States that the forward pass keeps for [`backward`](Self::backward): one at the start of every [`CHUNK`] frames.
    pub(crate) fn num_checkpoints(spans: &Spans) -> usize {
        spans.iter().map(|span| span.len().div_ceil(CHUNK)).sum()
    }

    /// The gradient of the forward pass, which left Δ in `delta` and its `checkpoints`, at dout `[rows, d]`. `gradient.delta`
    /// becomes that of δ. `dfinal` `[n, d]` is that of the states after the frames; adds that of the one state before them to
    /// `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        delta: &Array2<f32>,
        input: ScanRows,
        checkpoints: ArrayView3<f32>,
        dout: &Array2<f32>,
        gradient: ScanRowsGradient,
        dfinal: Option<&Array2<f32>>,
        dinitial: &mut Array2<f32>,
        grad: &mut SelectiveScan,
    ) {
        let (n, d) = (self.n, self.d);
        let mean_delta = self.mean_delta(delta);
        let [bc_width, xz_width] = [gradient.bc.ncols(), gradient.xz.ncols()];
        let mut rest = checkpoints;
        let mut items = Vec::new();
        let parts = spans.split(flat_mut(gradient.v), d).zip(spans.split(flat_mut(gradient.bc), bc_width));
        let parts = parts.zip(spans.split(flat_mut(gradient.xz), xz_width));
        for ((span, ddelta), ((dv, dbc), dxz)) in spans.iter().zip(spans.split(flat_mut(gradient.delta), d)).zip(parts)
        {
            let (kept, later) = rest.split_at(Axis(0), span.len().div_ceil(CHUNK));
            rest = later;
            let (dbc, dxz) = (RowsMut { data: dbc, stride: bc_width }, RowsMut { data: dxz, stride: xz_width });
            items.push((span, kept, ddelta, dv, dbc, dxz));
        }
        // what the sequences share is summed afterwards, in their order
        let shared = team.map(items, |(span, kept, ddelta, dv, dbc, dxz)| {
            let delta = Rows { data: flat(delta), stride: d }.skip_rows(span.start);
            let mean = mean_delta.as_ref().map(|mean| &mean[span.clone()]);
            let mut dmean = mean.map(|mean| vec![0.0; mean.len()]);
            let (mut da, mut dskip) = (vec![0.0; n * d], vec![0.0; d]);
            let mut dstate = dfinal.map_or_else(|| vec![0.0; n * d], |dfinal| flat(dfinal).to_vec());
            let scan_gradient = ScanGradient {
                delta: ddelta,
                v: dv,
                bc: dbc,
                z: dxz,
                a: &mut da,
                skip: self.learned.is_some().then_some(&mut dskip),
                state: &mut dstate,
                mean_delta: dmean.as_deref_mut(),
            };
            let dout = &flat(dout)[span.start * d..span.end * d];
            selective_scan_backward(self.input(delta, input.skip_rows(span.start), mean), kept, dout, scan_gradient);
            self.delta_backward(&delta.data[..span.len() * d], dmean.as_deref(), ddelta);
            (da, dskip, dstate)
        });
        let (mut da, mut dskip) = (vec![0.0; n * d], vec![0.0; d]);
        for (da_here, dskip_here, dstate) in &shared {
            add(da_here, &mut da);
            add(dskip_here, &mut dskip);
            add(dstate, flat_mut(dinitial));
        }
        self.add_gradient(&da, &dskip, grad);
    }

    /// From the gradient of Δ to that of δ.
    fn delta_backward(&self, delta: &[f32], dmean: Option<&[f32]>, ddelta: &mut [f32]) {
        timed(Stage::Elementwise, Cost::numbers(3 * delta.len()), || {
            for (t, dmean) in dmean.into_iter().flatten().enumerate() {
                // the mean hands its gradient to all channels alike, and what is clipped stands still
                let shared = dmean / self.d as f32;
                let row = t * self.d..(t + 1) * self.d;
                for (ddelta, delta) in ddelta[row.clone()].iter_mut().zip(&delta[row]) {
                    let moves = *delta > CLIP.0 && *delta < CLIP.1;
                    *ddelta = if moves { *ddelta + shared } else { 0.0 };
                }
            }
            math::softplus_backward(delta, ddelta);
        });
    }

    /// Adds the gradients of A and D to those of the parameters: A = −exp(a_log), so dA/da_log = A.
    fn add_gradient(&self, da: &[f32], dskip: &[f32], grad: &mut SelectiveScan) {
        grad.a.forget();
        if let Some((da_log, dd)) = &mut grad.learned {
            for ((state, channel), a) in self.a().indexed_iter() {
                da_log[[channel, state]] += a * da[state * self.d + channel];
            }
            dd.iter_mut().zip(dskip).for_each(|(dd, dskip)| *dd += dskip);
        }
    }

    /// The mean of Δ over the channels, for each row, where B goes with it.
    fn mean_delta(&self, delta: &Array2<f32>) -> Option<Vec<f32>> {
        let mean = |row: &[f32]| row.iter().sum::<f32>() / self.d as f32;
        (self.time_step == TimeStep::Clipped).then(|| flat(delta).chunks_exact(self.d).map(mean).collect())
    }

    /// A `[n, d]`
    fn a(&self) -> &Array2<f32> {
        self.a.get(|| match &self.learned {
            Some((a_log, _)) => a_log.t().mapv(|a_log| -a_log.exp()).as_standard_layout().into_owned(),
            None => Array2::from_shape_fn((self.n, self.d), |(state, _)| -((state + 1) as f32)),
        })
    }

    /// The arguments of a scan over one sequence.
    fn input<'a>(&'a self, delta: Rows<'a>, rows: ScanRows<'a>, mean_delta: Option<&'a [f32]>) -> ScanInput<'a> {
        let bc = rows.bc.skip_columns(rows.bc.stride - 2 * self.n);
        ScanInput {
            delta,
            v: rows.v,
            b: bc,
            c: bc.skip_columns(self.n),
            z: rows.xz.skip_columns(rows.xz.stride - self.d),
            a: flat(self.a()),
            skip: self.learned.as_ref().map(|(_, skip)| flat(skip)),
            mean_delta,
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some((a_log, skip)) = &self.learned {
            f(&join(name, "a_log"), Parameter::Array(a_log.view().into_dyn()));
            f(&join(name, "d"), Parameter::Array(skip.view().into_dyn()));
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.a.forget();
        if let Some((a_log, skip)) = &mut self.learned {
            f(&join(name, "a_log"), ParameterMut::Array(a_log.view_mut().into_dyn()));
            f(&join(name, "d"), ParameterMut::Array(skip.view_mut().into_dyn()));
        }
    }
}

/// The last axis in strips of so many.
fn strips<D: Dimension>(mut rest: ArrayViewMut<'_, f32, D>, width: usize) -> Vec<ArrayViewMut<'_, f32, D>> {
    let axis = Axis(rest.ndim() - 1);
    let mut strips = Vec::new();
    while rest.len_of(axis) > width {
        let (left, right) = rest.split_at(axis, width);
        strips.push(left);
        rest = right;
    }
    strips.push(rest);
    strips
}
