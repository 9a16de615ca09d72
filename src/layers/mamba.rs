//! The Mamba branch (Mamba-1, arXiv 2312.00752, figure 3 and algorithm 2).

use ndarray::{Array2, Array3, ArrayView2, Axis, s};
use rand::RngExt;

use super::conv::HISTORY;
use super::{CausalConv, Linear, Rng, SelectiveScan, Visitor, VisitorMut, debug_shapes, flat_mut, join};
use crate::HymbaOptions;

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
    pub(crate) fn forward(&self, u: ArrayView2<f32>, batch: usize, start: &MambaState) -> Array2<f32> {
        self.step(u, &mut start.repeat(batch))
    }

    /// The next frames of each sequence, u `[b·l, h]` → `[b·l, h]`; `state` moves on by l frames, usually one.
    pub(crate) fn step(&self, u: ArrayView2<f32>, state: &mut MambaState) -> Array2<f32> {
        let (batch, _, d) = state.conv.dim();
        let l = u.nrows() / batch;
        let xz = self.in_proj.forward(u); // [b·l, 2d]
        let mut v = Array2::zeros((batch * l, d));
        for (i, history) in state.conv.outer_iter_mut().enumerate() {
            let xi = xz.slice(s![i * l..(i + 1) * l, ..]); // columns d.. are z, which the convolution leaves alone
            self.conv.step(xi, history, &mut flat_mut(&mut v)[i * l * d..(i + 1) * l * d]);
        }
        let dbc = self.x_proj.forward(v.view()); // [b·l, r | n | n]
        let mut delta = self.dt_proj.forward(dbc.view()); // [b·l, d]
        let mut y: Array2<f32> = Array2::zeros((batch * l, d));
        for (i, scan) in state.scan.outer_iter_mut().enumerate() {
            let rows = s![i * l..(i + 1) * l, ..];
            let delta = &mut flat_mut(&mut delta)[i * l * d..(i + 1) * l * d];
            self.scan.step(delta, v.slice(rows), dbc.slice(rows), xz.slice(rows), scan, y.slice_mut(rows));
        }
        self.out_proj.forward(y.view())
    }

    pub(crate) fn visit(&self, name: &str, f: &mut Visitor) {
        self.in_proj.visit(&join(name, "in_proj"), f);
        self.conv.visit(&join(name, "conv"), f);
        self.x_proj.visit(&join(name, "x_proj"), f);
        self.dt_proj.visit(&join(name, "dt_proj"), f);
        self.scan.visit(name, f);
        self.out_proj.visit(&join(name, "out_proj"), f);
    }

    pub(crate) fn visit_mut(&mut self, name: &str, f: &mut VisitorMut) {
        self.in_proj.visit_mut(&join(name, "in_proj"), f);
        self.conv.visit_mut(&join(name, "conv"), f);
        self.x_proj.visit_mut(&join(name, "x_proj"), f);
        self.dt_proj.visit_mut(&join(name, "dt_proj"), f);
        self.scan.visit_mut(name, f);
        self.out_proj.visit_mut(&join(name, "out_proj"), f);
    }
}
