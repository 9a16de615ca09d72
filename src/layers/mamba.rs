//! The Mamba branch (Mamba-1, arXiv 2312.00752, figure 3 and algorithm 2).

use ndarray::{Array2, Array3, ArrayView2, s};
use rand::RngExt;

use super::batch::{Batch, Spans, for_rows};
use super::conv::{CausalConv, HISTORY};
use super::rms_norm::RmsNorm;
use super::scan::{ScanRows, ScanRowsGradient, SelectiveScan, TimeStep};
use super::state::MambaState;
use super::{Buffer, Linear, Rng, flat, flat_mut};
use crate::kernels::rows::Rows;
use crate::kernels::team::Team;
use crate::parameters::{Visitor, VisitorMut, debug_shapes, join};

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
/// with `d = 2h` and `r = ⌈h/16⌉`. The Edifice variant differs as
/// [`HymbaOptions::edifice`](crate::HymbaOptions::edifice) says. In the language model the first and the last map are one with those
/// of attention and so belong to the block, and δ, B and C may have norms of their own.
#[derive(Clone)]
pub struct MambaBranch {
    /// W_in, and W_out.
    projections: Option<[Linear; 2]>,
    conv: CausalConv,
    x_proj: Linear,
    /// Norms of δ `[r]`, B `[n]` and C `[n]`.
    inner_norms: Option<[RmsNorm; 3]>,
    dt_proj: Linear,
    scan: SelectiveScan,
}

/// The sizes and the parts of a branch.
pub(crate) struct MambaConfig {
    /// d
    pub inner: usize,
    /// n
    pub states: usize,
    /// Taps of the convolution, at most 4, and whether it has a bias.
    pub taps: usize,
    pub conv_bias: bool,
    pub learned_decay: bool,
    pub time_step: TimeStep,
    /// ε of the norms of δ, B and C, if there are any.
    pub inner_norms: Option<f32>,
}

/// What [`MambaBranch::backward`] reads.
pub(crate) struct MambaCache {
    /// `[rows, d | d]`
    xz: Buffer,
    /// `[rows, d]`
    v: Buffer,
    /// `[rows, r | n | n]`
    dbc: Buffer,
    /// Δ `[rows, d]`
    delta: Buffer,
    /// `[rows, d]`, after the gate.
    y: Buffer,
    /// The states `[·, n, d]` at the start of every 16 frames of each sequence.
    checkpoints: Array3<f32>,
}

debug_shapes!(MambaBranch);

impl MambaBranch {
    /// With these maps: W_in `[2d, h]` and W_out `[h, d]`, unless the block has them, W_x `[r + 2n, d]` and W_dt `[d, r]`.
    pub(crate) fn new(config: &MambaConfig, projections: Option<[Linear; 2]>, x_proj: Linear, dt_proj: Linear) -> Self {
        let (d, n, (_, r)) = (config.inner, config.states, dt_proj.dim());
        MambaBranch {
            projections,
            conv: CausalConv::zeros(d, config.taps, config.conv_bias),
            x_proj,
            inner_norms: config.inner_norms.map(|epsilon| [r, n, n].map(|width| RmsNorm::zeros(width, epsilon))),
            dt_proj,
            scan: SelectiveScan::zeros(d, n, config.learned_decay, config.time_step),
        }
    }

    /// A gradient of this branch, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        MambaBranch {
            projections: self.projections.as_ref().map(|both| both.each_ref().map(Linear::zeros_like)),
            conv: self.conv.zeros_like(),
            x_proj: self.x_proj.zeros_like(),
            inner_norms: self.inner_norms.as_ref().map(|norms| norms.each_ref().map(RmsNorm::zeros_like)),
            dt_proj: self.dt_proj.zeros_like(),
            scan: self.scan.zeros_like(),
        }
    }

    /// As Mamba starts: the bias of the time step such that Δ is log-uniform in \[0.001, 0.1\].
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        if let Some([in_proj, _]) = &mut self.projections {
            in_proj.init(rng);
        }
        self.conv.init(rng);
        self.x_proj.init(rng);
        self.dt_proj.init(rng);
        self.dt_proj.init_bias(|| {
            let delta = rng.random_range(0.001f32.ln()..=0.1f32.ln()).exp();
            delta.exp_m1().ln() // softplus⁻¹
        });
        self.scan.init();
        if let Some([_, out_proj]) = &mut self.projections {
            out_proj.init(rng);
        }
        self.inner_norms.iter_mut().flatten().for_each(RmsNorm::init);
    }

    /// The large maps.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.projections.iter_mut().flatten()
    }

    /// Parameters of a branch with maps `[2d, h]` and `[h, d]` of its own, without inner norms.
    pub(crate) fn count(config: &MambaConfig, h: usize, r: usize, bias: bool) -> Option<usize> {
        let (d, n) = (config.inner, config.states);
        let counts = [
            Linear::count(h, d.checked_mul(2)?, bias)?,
            CausalConv::count(d)?,
            Linear::count(d, n.checked_mul(2)?.checked_add(r)?, bias)?,
            Linear::count(r, d, true)?,
            SelectiveScan::count(d, n, config.learned_decay)?,
            Linear::count(d, h, bias)?,
        ];
        counts.into_iter().try_fold(0, usize::checked_add)
    }

    /// A state of a sequence that has seen nothing.
    pub(crate) fn new_state(&self) -> MambaState {
        let (d, n) = self.scan.dim();
        MambaState::zeros(d, n)
    }

    /// u `[rows, h]` → `[rows, h]`, or `only` some rows of it. The states of `layer` move on.
    pub(crate) fn forward(
        &self,
        batch: &mut Batch,
        layer: usize,
        u: ArrayView2<f32>,
        only: Option<&[usize]>,
    ) -> Buffer {
        let [in_proj, out_proj] = self.projections();
        let xz = in_proj.forward(batch.team, u);
        let y = self.run(batch, layer, xz.view(), None);
        match only {
            Some(rows) => out_proj.forward(batch.team, y.rows_at(rows).view()),
            None => out_proj.forward(batch.team, y.view()),
        }
    }

    /// Everything between the outer maps: xz `[rows, ·]`, of which the last 2d columns are xi and z → y ⊙ silu(z) `[rows, d]`.
    pub(crate) fn run(
        &self,
        batch: &mut Batch,
        layer: usize,
        xz: ArrayView2<f32>,
        cache: Option<&mut MambaCache>,
    ) -> Buffer {
        let (team, spans) = (batch.team, &batch.spans);
        let (d, _) = self.scan.dim();
        let width = xz.ncols();
        let all = Rows { data: flat(&xz), stride: width };

        // v = silu(conv(xi))                                 [rows, d]
        let mut v = Buffer::uninit((xz.nrows(), d));
        let histories = batch.states.iter_mut().map(|state| &mut state.layers[layer].mamba.conv);
        self.conv.forward(team, spans, all.skip_columns(width - 2 * d), histories, flat_mut(&mut v));
        // [δ | B | C] = v·W_xᵀ                               [rows, r | n | n]
        let mut dbc = self.x_proj.forward(team, v.view());
        self.normalise(team, &mut dbc);
        // Δ = softplus(δ·W_dtᵀ + b_dt)                       [rows, d]
        let mut delta = self.dt_proj.forward(team, dbc.view());
        // S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ v_t) B_tᵀ,  y_t = S_t C_t + D ⊙ v_t,  out_t = y_t ⊙ silu(z_t)
        let bc = Rows { data: flat(&dbc), stride: dbc.ncols() };
        let input = ScanRows { v: Rows { data: flat(&v), stride: d }, bc, xz: all };
        let states = batch.states.iter_mut().map(|state| &mut state.layers[layer].mamba.scan);
        match cache {
            None => self.scan.forward(team, spans, &mut delta, input, states, None),
            Some(cache) => {
                let y = self.scan.forward(team, spans, &mut delta, input, states, Some(&mut cache.checkpoints));
                (cache.v, cache.dbc, cache.delta) = (v, dbc, delta);
                y
            }
        }
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(&self, batch: &mut Batch, layer: usize, u: ArrayView2<f32>) -> (Buffer, MambaCache) {
        let [in_proj, out_proj] = self.projections();
        let (d, n) = self.scan.dim();
        let mut cache = MambaCache {
            xz: in_proj.forward(batch.team, u),
            v: Buffer::empty(),
            dbc: Buffer::empty(),
            delta: Buffer::empty(),
            y: Buffer::empty(),
            checkpoints: Array3::zeros((SelectiveScan::num_checkpoints(&batch.spans), n, d)),
        };
        let xz = std::mem::replace(&mut cache.xz, Buffer::empty());
        let y = self.run(batch, layer, xz.view(), Some(&mut cache));
        (cache.xz, cache.y) = (xz, y);
        (out_proj.forward(batch.team, cache.y.view()), cache)
    }

    /// The gradient of [`forward_train`](Self::forward_train) at u, for sequences that all began with the state `initial`: dy
    /// `[rows, h]` → du `[rows, h]`. `dfinal` is the gradient of the state after the rows of a single sequence, if it was used. Adds
    /// that of the state before to `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        u: ArrayView2<f32>,
        cache: &MambaCache,
        initial: &MambaState,
        dy: ArrayView2<f32>,
        dfinal: Option<&MambaState>,
        grad: &mut MambaBranch,
        dinitial: &mut MambaState,
    ) -> Buffer {
        let ([in_proj, out_proj], Some([grad_in, grad_out])) = (self.projections(), &mut grad.projections) else {
            unreachable!("a gradient has the maps of its branch");
        };
        let (d, _) = self.scan.dim();
        let rows = u.nrows();
        let width = cache.dbc.ncols();
        let dout = out_proj.backward(team, cache.y.view(), dy, grad_out); // [rows, d]

        let (mut ddelta, mut dv) = (Buffer::uninit((rows, d)), Buffer::uninit((rows, d)));
        let (mut ddbc, mut dxz) = (Buffer::uninit((rows, width)), Buffer::uninit((rows, 2 * d)));
        let gradient = ScanRowsGradient { delta: &mut ddelta, v: &mut dv, bc: &mut ddbc, xz: &mut dxz };
        let input = ScanRows {
            v: Rows { data: flat(&cache.v), stride: d },
            bc: Rows { data: flat(&cache.dbc), stride: width },
            xz: Rows { data: flat(&cache.xz), stride: 2 * d },
        };
        self.scan.backward(
            team,
            spans,
            &cache.delta,
            input,
            cache.checkpoints.view(),
            &dout,
            gradient,
            dfinal.map(|dfinal| &dfinal.scan),
            &mut dinitial.scan,
            &mut grad.scan,
        );
        let dlow = self.dt_proj.backward(team, cache.dbc.view(), ddelta.view(), &mut grad.dt_proj); // [rows, r]
        ddbc.slice_mut(s![.., ..dlow.ncols()]).assign(&*dlow);
        *dv += &*self.x_proj.backward(team, cache.v.view(), ddbc.view(), &mut grad.x_proj);
        let history = initial.conv.view();
        let xz = cache.xz.view();
        self.conv.backward(team, spans, xz, history, flat_mut(&mut dv), &mut dxz, &mut dinitial.conv, &mut grad.conv);
        if let Some(dfinal) = dfinal {
            // the rows left behind are the last of the history and the frames together
            for (j, dfinal) in dfinal.conv.rows().into_iter().enumerate() {
                match (rows + j).checked_sub(HISTORY) {
                    Some(t) => dxz.slice_mut(s![t, ..d]).scaled_add(1.0, &dfinal),
                    None => dinitial.conv.row_mut(rows + j).scaled_add(1.0, &dfinal),
                }
            }
        }
        in_proj.backward(team, u, dxz.view(), grad_in)
    }

    fn projections(&self) -> &[Linear; 2] {
        self.projections.as_ref().expect("a block that has the outer maps calls `run`")
    }

    /// The norms of δ, B and C.
    fn normalise(&self, team: &Team, dbc: &mut Array2<f32>) {
        let Some([dt, b, c]) = &self.inner_norms else { return };
        let ((_, r), (_, n), width) = (self.dt_proj.dim(), self.scan.dim(), dbc.ncols());
        for_rows(team, flat_mut(dbc), width, |_, rows| {
            for row in rows.chunks_exact_mut(width) {
                dt.in_place(&mut row[..r]);
                b.in_place(&mut row[r..r + n]);
                c.in_place(&mut row[r + n..]);
            }
        });
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some([in_proj, _]) = &self.projections {
            in_proj.visit(&join(name, "in_proj"), f);
        }
        self.conv.visit(&join(name, "conv"), f);
        self.x_proj.visit(&join(name, "x_proj"), f);
        if let Some([dt, b, c]) = &self.inner_norms {
            dt.visit(&join(name, "dt_norm"), f);
            b.visit(&join(name, "b_norm"), f);
            c.visit(&join(name, "c_norm"), f);
        }
        self.dt_proj.visit(&join(name, "dt_proj"), f);
        self.scan.visit(name, f);
        if let Some([_, out_proj]) = &self.projections {
            out_proj.visit(&join(name, "out_proj"), f);
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        let (in_proj, out_proj) = self.projections.as_mut().map(|[first, last]| (first, last)).unzip();
        if let Some(in_proj) = in_proj {
            in_proj.visit_mut(&join(name, "in_proj"), f);
        }
        self.conv.visit_mut(&join(name, "conv"), f);
        self.x_proj.visit_mut(&join(name, "x_proj"), f);
        if let Some([dt, b, c]) = &mut self.inner_norms {
            dt.visit_mut(&join(name, "dt_norm"), f);
            b.visit_mut(&join(name, "b_norm"), f);
            c.visit_mut(&join(name, "c_norm"), f);
        }
        self.dt_proj.visit_mut(&join(name, "dt_proj"), f);
        self.scan.visit_mut(name, f);
        if let Some(out_proj) = out_proj {
            out_proj.visit_mut(&join(name, "out_proj"), f);
        }
    }
}
