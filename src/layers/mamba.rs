//! The Mamba branch (Mamba-1, arXiv 2312.00752, figure 3 and algorithm 2).

use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut3, s};
use rand::RngExt;

use super::batch::{Batch, Spans, copied, for_rows, for_rows_summed, needed};
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
    inner: InnerCache,
    /// `[rows, d]`, after the gate, or `only` some rows of that.
    y: Buffer,
}

/// What [`MambaBranch::run_backward`] reads beside xz.
pub(crate) struct InnerCache {
    /// `[rows, d]`
    v: Buffer,
    /// `[rows, r | n | n]` before the inner norms, if there are any.
    before_norms: Option<Buffer>,
    /// `[rows, r | n | n]`
    dbc: Buffer,
    /// Δ `[rows, d]`
    delta: Buffer,
    /// The states `[·, n·d]` at the start of every 16 frames of each sequence.
    checkpoints: Buffer,
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

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        let [in_proj, out_proj] = match &mut self.projections {
            Some([in_proj, out_proj]) => [Some(in_proj), Some(out_proj)],
            None => [None, None],
        };
        let inner = [in_proj, Some(&mut self.x_proj), Some(&mut self.dt_proj), out_proj];
        for (map, tensor) in inner.into_iter().zip(["in_proj", "x_proj", "dt_proj", "out_proj"]) {
            map.into_iter().for_each(|map| f(join(name, tensor), map));
        }
    }

    /// W_x and W_dt.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn inner_linears(&self) -> [&Linear; 2] {
        [&self.x_proj, &self.dt_proj]
    }

    /// As [`inner_linears`](Self::inner_linears), for changing them.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn inner_linears_mut(&mut self) -> [&mut Linear; 2] {
        [&mut self.x_proj, &mut self.dt_proj]
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
        let xz = in_proj.forward_needed(batch.team, u, self.z_needed(only)); // [rows, d | d]
        let y = self.run(batch, layer, xz.view(), None); // [rows, d]
        out_proj.forward(batch.team, needed(&y, only).view())
    }

    /// Where `only` some rows of the output are computed, z is needed in these alone.
    fn z_needed<'a>(&self, only: Option<&'a [usize]>) -> Option<(&'a [usize], usize)> {
        only.map(|rows| (rows, self.scan.dim().0))
    }

    /// Everything between the outer maps: xz `[rows, ·]`, of which the last 2d columns are xi and z → y ⊙ silu(z) `[rows, d]`.
    pub(crate) fn run(
        &self,
        batch: &mut Batch,
        layer: usize,
        xz: ArrayView2<f32>,
        cache: Option<&mut InnerCache>,
    ) -> Buffer {
        let (team, spans) = (batch.team, &batch.spans);
        let (d, n) = self.scan.dim();
        let width = xz.ncols();
        let all = Rows { data: flat(&xz), stride: width };

        // v = silu(conv(xi))                                 [rows, d]
        let mut v = Buffer::uninit((xz.nrows(), d));
        let histories = batch.states.iter_mut().map(|state| &mut state.layers[layer].mamba.conv);
        self.conv.forward(team, spans, all.skip_columns(width - 2 * d), histories, flat_mut(&mut v));
        // [δ | B | C] = v·W_xᵀ                               [rows, r | n | n]
        let mut dbc = self.x_proj.forward(team, v.view());
        let before_norms = self.inner_norms.as_ref().filter(|_| cache.is_some()).map(|_| copied(team, &dbc));
        self.normalise(team, &mut dbc);
        // Δ = softplus(δ·W_dtᵀ + b_dt)                       [rows, d]
        let mut delta = self.dt_proj.forward(team, dbc.view());
        // S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ v_t) B_tᵀ      [d, n]
        // out_t = (S_t C_t + D ⊙ v_t) ⊙ silu(z_t)            [rows, d]
        let bc = Rows { data: flat(&dbc), stride: dbc.ncols() };
        let input = ScanRows { v: Rows { data: flat(&v), stride: d }, bc, xz: all };
        let states = batch.states.iter_mut().map(|state| &mut state.layers[layer].mamba.scan);
        match cache {
            None => self.scan.forward(team, spans, &mut delta, input, states, None),
            Some(cache) => {
                let kept = (cache.checkpoints.nrows(), n, d);
                let kept = ArrayViewMut3::from_shape(kept, flat_mut(&mut cache.checkpoints)).expect("n·d numbers each");
                let y = self.scan.forward(team, spans, &mut delta, input, states, Some(kept));
                (cache.v, cache.before_norms, cache.dbc, cache.delta) = (v, before_norms, dbc, delta);
                y
            }
        }
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        layer: usize,
        u: ArrayView2<f32>,
        only: Option<&[usize]>,
    ) -> (Buffer, MambaCache) {
        let [in_proj, out_proj] = self.projections();
        let xz = in_proj.forward_needed(batch.team, u, self.z_needed(only));
        let (mut y, inner) = self.run_train(batch, layer, xz.view());
        if let Some(rows) = only {
            y = y.rows_at(rows);
        }
        let _seeded = batch.team.seeded_at(only);
        (out_proj.forward(batch.team, y.view()), MambaCache { xz, inner, y })
    }

    /// As [`run`](Self::run); returns also what [`run_backward`](Self::run_backward) reads.
    pub(crate) fn run_train(&self, batch: &mut Batch, layer: usize, xz: ArrayView2<f32>) -> (Buffer, InnerCache) {
        let (d, n) = self.scan.dim();
        let mut cache = InnerCache {
            v: Buffer::empty(),
            before_norms: None,
            dbc: Buffer::empty(),
            delta: Buffer::empty(),
            checkpoints: Buffer::uninit((SelectiveScan::num_checkpoints(&batch.spans), n * d)),
        };
        (self.run(batch, layer, xz, Some(&mut cache)), cache)
    }

    /// The gradient of [`forward_train`](Self::forward_train) at u, for sequences that all began with the state `initial`: dy
    /// of the shape of the output → du `[rows, h]`. `dfinal` is the gradient of the state after the rows of a single sequence, if it was
    /// used. Adds that of the state before to `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        only: Option<&[usize]>,
        u: ArrayView2<f32>,
        cache: &MambaCache,
        initial: &MambaState,
        dy: ArrayView2<f32>,
        dfinal: Option<&MambaState>,
        grad: &mut MambaBranch,
        dinitial: &mut MambaState,
    ) -> Buffer {
        let [in_proj, out_proj] = self.projections();
        let seeded = team.seeded_at(only);
        let dout = out_proj.backward(team, cache.y.view(), dy, &mut grad.projections_mut()[1]);
        drop(seeded);
        let dout = dout.spread(only, u.nrows()); // [rows, d]
        let mut dxz = Buffer::uninit(cache.xz.dim()); // [rows, d | d]
        let xz = cache.xz.view();
        self.run_backward(team, spans, xz, &cache.inner, initial, &dout, dfinal, grad, dinitial, &mut dxz);
        in_proj.backward_needed(team, u, dxz.view(), self.z_needed(only), &mut grad.projections_mut()[0])
    }

    /// The gradient of [`run_train`](Self::run_train), for sequences that all began with the state `initial`: `dout` `[rows, d]` is
    /// that of the output. Writes the last 2d columns of `dxz` `[rows, ·]`. `dfinal` and `dinitial` are as in
    /// [`backward`](Self::backward).
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn run_backward(
        &self,
        team: &Team,
        spans: &Spans,
        xz: ArrayView2<f32>,
        cache: &InnerCache,
        initial: &MambaState,
        dout: &Array2<f32>,
        dfinal: Option<&MambaState>,
        grad: &mut MambaBranch,
        dinitial: &mut MambaState,
        dxz: &mut Array2<f32>,
    ) {
        let (d, n) = self.scan.dim();
        let checkpoints = ArrayView3::from_shape((cache.checkpoints.nrows(), n, d), flat(&cache.checkpoints));
        let (rows, width) = cache.dbc.dim();
        // S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ v_t) B_tᵀ,  out_t = (S_t C_t + D ⊙ v_t) ⊙ silu(z_t),  Δ = softplus(…): that of what
        // goes into softplus, of v and z [rows, d], and of B | C [rows, 2n]
        let (mut ddelta, mut dv) = (Buffer::uninit((rows, d)), Buffer::uninit((rows, d)));
        let mut ddbc = Buffer::uninit((rows, width));
        let gradient = ScanRowsGradient { delta: &mut ddelta, v: &mut dv, bc: &mut ddbc, xz: dxz };
        let input = ScanRows {
            v: Rows { data: flat(&cache.v), stride: d },
            bc: Rows { data: flat(&cache.dbc), stride: width },
            xz: Rows { data: flat(&xz), stride: xz.ncols() },
        };
        self.scan.backward(
            team,
            spans,
            &cache.delta,
            input,
            checkpoints.expect("n·d numbers each"),
            dout,
            gradient,
            dfinal.map(|dfinal| &dfinal.scan),
            &mut dinitial.scan,
            &mut grad.scan,
        );
        // δ·W_dtᵀ + b_dt                                     dδ [rows, r]
        let dlow = self.dt_proj.backward(team, cache.dbc.view(), ddelta.view(), &mut grad.dt_proj);
        ddbc.slice_mut(s![.., ..dlow.ncols()]).assign(&*dlow);
        // [δ | B | C] = v·W_xᵀ                               dv [rows, d], beside that of the scan
        self.normalise_backward(team, cache.before_norms.as_deref(), &mut ddbc, grad);
        self.x_proj.backward_add(team, cache.v.view(), ddbc.view(), &mut dv, &mut grad.x_proj);
        // v = silu(conv(xi))                                 dxi [rows, d]
        let (history, column) = (initial.conv.view(), xz.ncols() - 2 * d);
        let (dv, dhistory) = (flat_mut(&mut dv), &mut dinitial.conv);
        self.conv.backward(team, spans, xz, column, history, dv, dxz, dhistory, &mut grad.conv);
        if let Some(dfinal) = dfinal {
            // the rows left behind are the last of the history and the frames together
            for (j, dfinal) in dfinal.conv.rows().into_iter().enumerate() {
                match (rows + j).checked_sub(HISTORY) {
                    Some(t) => dxz.slice_mut(s![t, column..column + d]).scaled_add(1.0, &dfinal),
                    None => dinitial.conv.row_mut(rows + j).scaled_add(1.0, &dfinal),
                }
            }
        }
    }

    fn projections(&self) -> &[Linear; 2] {
        self.projections.as_ref().expect("a block that has the outer maps calls `run`")
    }

    fn projections_mut(&mut self) -> &mut [Linear; 2] {
        self.projections.as_mut().expect("a gradient has the maps of its branch")
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

    /// The gradient of the norms of δ, B and C at `before` `[rows, r | n | n]`: d becomes that of what went into them.
    fn normalise_backward(
        &self,
        team: &Team,
        before: Option<&Array2<f32>>,
        d: &mut Array2<f32>,
        grad: &mut MambaBranch,
    ) {
        let (Some(norms), Some(before), Some(grads)) = (&self.inner_norms, before, &mut grad.inner_norms) else {
            return;
        };
        let ((_, r), (_, n), width) = (self.dt_proj.dim(), self.scan.dim(), d.ncols());
        let parts = [0..r, r..r + n, r + n..width];
        let sums = for_rows_summed(team, flat_mut(d), width, width, |first, rows, sums| {
            for (i, d) in rows.chunks_exact_mut(width).enumerate() {
                let before = &flat(before)[(first + i) * width..][..width];
                for (norm, part) in norms.iter().zip(&parts) {
                    norm.in_place_backward(&before[part.clone()], &mut d[part.clone()], &mut sums[part.clone()]);
                }
            }
        });
        grads.iter_mut().zip(parts).for_each(|(grad, part)| grad.add(&sums[part]));
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
