//! The Mamba branch (Mamba-1, arXiv 2312.00752, figure 3 and algorithm 2).

use ndarray::{Array2, Array3, Array4, ArrayView2, Axis, s};
use rand::RngExt;

use super::conv::HISTORY;
use super::scan::{ScanPartial, ScanRows, ScanRowsGradient};
use super::{Buffer, CausalConv, Linear, Rng, SelectiveScan, Visitor, VisitorMut, debug_shapes, flat, flat_mut, join};
use crate::HymbaOptions;
use crate::kernels::matmul::Rows;
use crate::kernels::parallel;
use crate::kernels::scan::{CHUNK, RowsMut};

/// The branch that carries order and the far past: a gated selective state space model.
///
/// | step | shape |
/// |---|---|
/// | `[xi \| z] = u·W_inᵀ` | `[l, 2d]` |
/// | `v = silu(conv(xi))`, causal and depthwise, width 4 | `[l, d]` |
/// | `[δ \| B \| C] = v·W_xᵀ` | `[l, r \| n \| n]` |
/// | `Δ = softplus(δ·W_dtᵀ + b_dt)` | `[l, d]` |
/// | `S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ v_t) B_tᵀ`, `A = −exp(a_log)` | `[d, n]` |
/// | `y_t = S_t C_t + D ⊙ v_t` | `[d]` |
/// | `(y ⊙ silu(z))·W_outᵀ` | `[l, h]` |
///
/// with `d = 2h` and `r = ⌈h/16⌉`. The Edifice preset differs as [`HymbaOptions::edifice`] says.
#[derive(Clone)]
pub struct MambaBranch {
    in_proj: Linear,
    conv: CausalConv,
    x_proj: Linear,
    dt_proj: Linear,
    scan: SelectiveScan,
    out_proj: Linear,
}

/// What [`MambaBranch::backward`] reads.
pub(crate) struct MambaCache {
    /// `[b·l, d | d]`
    xz: Buffer,
    /// `[b·l, d]`
    v: Buffer,
    /// `[b·l, r | n | n]`
    dbc: Buffer,
    /// Δ `[b·l, d]`
    delta: Buffer,
    /// `[b·l, d]`, after the gate.
    y: Buffer,
    /// The states `[b, ⌈l/16⌉, n, d]` at the start of every 16 frames.
    checkpoints: Array4<f32>,
}

impl MambaCache {
    /// Sequence `i` of length l.
    fn scan_rows(&self, i: usize, l: usize) -> ScanRows<'_> {
        fn rows(array: &Array2<f32>, first: usize) -> Rows<'_> {
            Rows { data: &flat(array)[first * array.ncols()..], stride: array.ncols() }
        }
        ScanRows { v: rows(&self.v, i * l), bc: rows(&self.dbc, i * l), xz: rows(&self.xz, i * l) }
    }
}

/// Multiplications that take as long as one number of the convolution, and as one state of the scan.
const CONV_WORK: usize = 30;
const SCAN_WORK: usize = 50;

/// What the branch remembers of each sequence of a batch.
#[derive(Clone)]
pub(crate) struct MambaState {
    /// The last rows of xi `[b, 3, d]`, oldest first.
    conv: Array3<f32>,
    /// Sᵀ `[b, n, d]`.
    scan: Array3<f32>,
}

impl MambaState {
    /// Nothing seen yet.
    pub(crate) fn zeros(batch: usize, options: &HymbaOptions) -> Self {
        let d = options.inner_size();
        MambaState { conv: Array3::zeros((batch, HISTORY, d)), scan: Array3::zeros((batch, options.state_size, d)) }
    }

    /// A gradient of this state.
    pub(crate) fn zeros_like(&self) -> Self {
        MambaState { conv: Array3::zeros(self.conv.dim()), scan: Array3::zeros(self.scan.dim()) }
    }

    /// This state of one sequence, for each of `batch`.
    pub(crate) fn repeat(&self, batch: usize) -> Self {
        let repeat = |state: &Array3<f32>| {
            let one = state.index_axis(Axis(0), 0);
            ndarray::stack(Axis(0), &vec![one; batch]).unwrap_or_default()
        };
        MambaState { conv: repeat(&self.conv), scan: repeat(&self.scan) }
    }

    pub(crate) fn num_numbers(&self) -> usize {
        self.conv.len() + self.scan.len()
    }
}

debug_shapes!(MambaBranch);

impl MambaBranch {
    pub(crate) fn zeros(options: &HymbaOptions) -> Self {
        let (h, d, n, r) = (options.hidden_size, options.inner_size(), options.state_size, options.dt_rank());
        let rules = options.preset.rules();
        MambaBranch {
            in_proj: Linear::zeros(h, 2 * d, rules.projection_bias),
            conv: CausalConv::zeros(d),
            x_proj: Linear::zeros(d, r + 2 * n, rules.projection_bias),
            dt_proj: Linear::zeros(r, d, true),
            scan: SelectiveScan::zeros(d, n, rules.learned_decay, rules.time_step),
            out_proj: Linear::zeros(d, h, rules.projection_bias),
        }
    }

    /// As Mamba starts: the bias of the time step such that Δ is log-uniform in \[0.001, 0.1\].
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.in_proj.init(rng);
        self.conv.init(rng);
        self.x_proj.init(rng);
        self.dt_proj.init(rng);
        self.dt_proj.init_bias(|| {
            let delta = rng.random_range(0.001f32.ln()..=0.1f32.ln()).exp();
            delta.exp_m1().ln() // softplus⁻¹
        });
        self.scan.init();
        self.out_proj.init(rng);
    }

    /// u `[b·l, h]`, every sequence starting from the one state `start` → `[b·l, h]`
    pub(crate) fn forward(&self, u: ArrayView2<f32>, batch: usize, start: &MambaState) -> Buffer {
        self.step(u, &mut start.repeat(batch))
    }

    /// These rows of what [`forward`](Self::forward) returns: the last projection is left out for the others.
    pub(crate) fn forward_rows(&self, u: ArrayView2<f32>, batch: usize, start: &MambaState, rows: &[usize]) -> Buffer {
        let y = self.run(u, &mut start.repeat(batch), None).y;
        self.out_proj.forward(y.rows_at(rows).view())
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads, and the states after the frames.
    pub(crate) fn forward_train(
        &self,
        u: ArrayView2<f32>,
        batch: usize,
        start: &MambaState,
    ) -> (Buffer, MambaCache, MambaState) {
        let mut state = start.repeat(batch);
        let chunks = (u.nrows() / batch).div_ceil(CHUNK);
        let (_, n, d) = start.scan.dim();
        let mut checkpoints = Array4::zeros((batch, chunks, n, d));
        let cache = self.run(u, &mut state, Some(&mut checkpoints));
        (self.out_proj.forward(cache.y.view()), MambaCache { checkpoints, ..cache }, state)
    }

    /// The gradient of [`forward_train`](Self::forward_train) at u: dy `[b·l, h]` → du `[b·l, h]`. `dend` is the gradient of the
    /// one state after the frames of a batch of one, if it was used. Adds that of the state before to `dstart`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        u: ArrayView2<f32>,
        cache: &MambaCache,
        start: &MambaState,
        dy: ArrayView2<f32>,
        dend: Option<&MambaState>,
        grad: &mut MambaBranch,
        dstart: &mut MambaState,
    ) -> Buffer {
        let (batch, _, n, d) = cache.checkpoints.dim();
        let (rows, l) = (u.nrows(), u.nrows() / batch);
        let width = cache.dbc.ncols();
        let dout = self.out_proj.backward(cache.y.view(), dy, &mut grad.out_proj); // [b·l, d]

        // the scan, each sequence on its own; what they share is summed afterwards, in their order
        let mut ddelta = Buffer::any((rows, d));
        let mut dv = Buffer::any((rows, d));
        let mut ddbc = Buffer::any((rows, width));
        let mut dxz = Buffer::any((rows, 2 * d));
        let mut dstates = dend.map_or_else(|| Array3::zeros((batch, n, d)), |dend| dend.scan.clone());
        let mut da = Array3::zeros((batch, n, d));
        let mut dskip = Array2::zeros((batch, d));
        let mut sequences = Vec::with_capacity(batch);
        for (((((((i, delta), v), bc), xz), state), a), skip) in (0..)
            .zip(flat_mut(&mut ddelta).chunks_exact_mut(l * d))
            .zip(flat_mut(&mut dv).chunks_exact_mut(l * d))
            .zip(flat_mut(&mut ddbc).chunks_exact_mut(l * width))
            .zip(flat_mut(&mut dxz).chunks_exact_mut(l * 2 * d))
            .zip(flat_mut(&mut dstates).chunks_exact_mut(n * d))
            .zip(flat_mut(&mut da).chunks_exact_mut(n * d))
            .zip(flat_mut(&mut dskip).chunks_exact_mut(d))
        {
            let (bc, xz) = (RowsMut { data: bc, stride: width }, RowsMut { data: xz, stride: 2 * d });
            sequences.push((i, ScanRowsGradient { delta, v, bc, xz, state }, ScanPartial { a, skip }));
        }
        parallel::for_each(sequences, |(i, gradient, partial)| {
            let here = i * l * d..(i + 1) * l * d;
            let checkpoints = cache.checkpoints.index_axis(Axis(0), i);
            let (delta, dout) = (&flat(&cache.delta)[here.clone()], &flat(&dout)[here]);
            self.scan.backward(delta, cache.scan_rows(i, l), checkpoints, dout, gradient, partial);
        });
        for i in 0..batch {
            let (da, dskip) = (da.index_axis(Axis(0), i), dskip.row(i));
            self.scan.add_partial(flat(&da), flat(&dskip), &mut grad.scan);
            dstart.scan += &dstates.index_axis(Axis(0), i);
        }

        let dlow = self.dt_proj.backward(cache.dbc.view(), ddelta.view(), &mut grad.dt_proj); // [b·l, r]
        ddbc.slice_mut(s![.., ..dlow.ncols()]).assign(&dlow);
        *dv += &*self.x_proj.backward(cache.v.view(), ddbc.view(), &mut grad.x_proj);
        let history = start.conv.index_axis(Axis(0), 0);
        for i in 0..batch {
            let rows = s![i * l..(i + 1) * l, ..];
            let dv = &mut flat_mut(&mut dv)[i * l * d..(i + 1) * l * d];
            let dhistory = dstart.conv.index_axis_mut(Axis(0), 0);
            self.conv.backward(cache.xz.slice(rows), history, dv, dxz.slice_mut(rows), dhistory, &mut grad.conv);
        }
        if let Some(dend) = dend {
            // the rows left behind are the last of the history and the frames together
            for (j, dend) in dend.conv.index_axis(Axis(0), 0).rows().into_iter().enumerate() {
                match (l + j).checked_sub(HISTORY) {
                    Some(t) => dxz.slice_mut(s![t, ..d]).scaled_add(1.0, &dend),
                    None => dstart.conv.slice_mut(s![0, l + j, ..]).scaled_add(1.0, &dend),
                }
            }
        }
        self.in_proj.backward(u, dxz.view(), &mut grad.in_proj)
    }

    /// The next frames of each sequence, u `[b·l, h]` → `[b·l, h]`; `state` moves on by l frames, usually one.
    pub(crate) fn step(&self, u: ArrayView2<f32>, state: &mut MambaState) -> Buffer {
        self.out_proj.forward(self.run(u, state, None).y.view())
    }

    /// Everything up to the last projection.
    fn run(&self, u: ArrayView2<f32>, state: &mut MambaState, checkpoints: Option<&mut Array4<f32>>) -> MambaCache {
        let (batch, _, d) = state.conv.dim();
        let l = u.nrows() / batch;
        let xz = self.in_proj.forward(u); // [b·l, 2d]
        let mut v = Buffer::any((batch * l, d));
        let histories = state.conv.outer_iter_mut();
        let sequences = histories.zip(flat_mut(&mut v).chunks_exact_mut(l * d)).enumerate().collect();
        parallel::for_each_if(batch * l * d * CONV_WORK, sequences, |(i, (history, v))| {
            // columns d.. are z, which the convolution leaves alone
            self.conv.step(Rows { data: &flat(&xz)[i * l * 2 * d..], stride: 2 * d }, history, v);
        });
        let dbc = self.x_proj.forward(v.view()); // [b·l, r | n | n]
        let mut delta = self.dt_proj.forward(dbc.view()); // [b·l, d]
        let mut y = Buffer::any((batch * l, d));
        let none = Array4::zeros((0, 0, 0, 0));
        let mut cache =
            MambaCache { xz, v, dbc, delta: Buffer::any((0, 0)), y: Buffer::any((0, 0)), checkpoints: none };
        let work = l * state.scan.len() * SCAN_WORK;
        let mut checkpoints = checkpoints.map(|checkpoints| checkpoints.outer_iter_mut());
        let sequences: Vec<_> = (0..batch)
            .zip(state.scan.outer_iter_mut())
            .zip(flat_mut(&mut delta).chunks_exact_mut(l * d))
            .zip(y.axis_chunks_iter_mut(Axis(0), l))
            .map(|sequence| (sequence, checkpoints.as_mut().and_then(|checkpoints| checkpoints.next())))
            .collect();
        parallel::for_each_if(work, sequences, |((((i, state), delta), y), checkpoints)| {
            self.scan.step(delta, cache.scan_rows(i, l), state, y, checkpoints);
        });
        (cache.delta, cache.y) = (delta, y);
        cache
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.in_proj.visit(&join(name, "in_proj"), f);
        self.conv.visit(&join(name, "conv"), f);
        self.x_proj.visit(&join(name, "x_proj"), f);
        self.dt_proj.visit(&join(name, "dt_proj"), f);
        self.scan.visit(name, f);
        self.out_proj.visit(&join(name, "out_proj"), f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.in_proj.visit_mut(&join(name, "in_proj"), f);
        self.conv.visit_mut(&join(name, "conv"), f);
        self.x_proj.visit_mut(&join(name, "x_proj"), f);
        self.dt_proj.visit_mut(&join(name, "dt_proj"), f);
        self.scan.visit_mut(name, f);
        self.out_proj.visit_mut(&join(name, "out_proj"), f);
    }
}
