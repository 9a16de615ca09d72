//! The Mamba branch between the projections that it shares with attention: Mamba-1 with three more norms.

use ndarray::{Array1, Array2, ArrayViewMut2, Axis, Slice};

use super::config::HymbaLmConfig;
use super::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};
use super::pass::{Pass, by_pieces, row_blocks};
use crate::kernels::conv::TAPS;
use crate::kernels::math::{self, Softplus};
use crate::kernels::matmul::{Out, Rows};
use crate::kernels::matrix::{Matrix, Storage};
use crate::kernels::norm::rms_norm_in_place;
use crate::kernels::scan::selective_scan_part;
use crate::layers::{Buffer, CausalConv, ScanRows, SelectiveScan, TimeStep, flat, flat_mut, join};

/// Channels of the scan that one thread takes at a time.
const STRIP: usize = 320;

/// The branch of one layer.
pub(super) struct MambaHead {
    /// R
    rank: usize,
    /// N
    states: usize,
    /// Taps in files, at most [`TAPS`]; the others are zero.
    taps: usize,
    conv: CausalConv,
    conv_bias: bool,
    /// `[R + 2N, E]`
    x_proj: Matrix,
    /// Norms of δ `[R]`, B `[N]` and C `[N]`.
    inner_norms: Option<[Array1<f32>; 3]>,
    epsilon: f32,
    /// `[E, R]`
    dt_proj: Matrix,
    dt_bias: Array1<f32>,
    scan: SelectiveScan,
}

/// Columns in strips of [`STRIP`].
fn strips(mut rest: ArrayViewMut2<'_, f32>) -> Vec<ArrayViewMut2<'_, f32>> {
    let mut strips = Vec::new();
    while rest.ncols() > STRIP {
        let (left, right) = rest.split_at(Axis(1), STRIP);
        strips.push(left);
        rest = right;
    }
    strips.push(rest);
    strips
}

/// What the branch remembers of one row.
#[derive(Clone)]
pub(super) struct MambaState {
    /// The last inputs of the convolution `[3, E]`, oldest first.
    pub conv: Array2<f32>,
    /// Sᵀ `[N, E]`.
    pub scan: Array2<f32>,
}

impl MambaState {
    pub(super) fn num_bytes(&self) -> usize {
        (self.conv.len() + self.scan.len()) * size_of::<f32>()
    }
}

impl MambaHead {
    pub(super) fn zeros(config: &HymbaLmConfig, name: &str, storage: &dyn Fn(&str) -> Storage) -> Self {
        let (e, n, r) = (config.inner_size(), config.mamba_d_state, config.dt_rank());
        let matrix = |rows, columns, tensor| Matrix::zeros(rows, columns, storage(&join(name, tensor)));
        MambaHead {
            rank: r,
            states: n,
            taps: config.mamba_d_conv,
            conv: CausalConv::zeros(e),
            conv_bias: config.mamba_conv_bias,
            x_proj: matrix(r + 2 * n, e, "x_proj.0.weight"),
            inner_norms: config.mamba_inner_layernorms.then(|| [r, n, n].map(Array1::zeros)),
            epsilon: config.rms_norm_eps as f32,
            dt_proj: matrix(e, r, "dt_proj.0.weight"),
            dt_bias: Array1::zeros(e),
            scan: SelectiveScan::zeros(e, n, true, TimeStep::Softplus),
        }
    }

    pub(super) fn new_state(&self) -> MambaState {
        let e = self.dt_bias.len();
        MambaState { conv: Array2::zeros((TAPS - 1, e)), scan: Array2::zeros((self.states, e)) }
    }

    /// `projected` `[tokens, width]` ends with u and the gate z, E each; with a = silu(conv(u)),
    ///
    /// ```text
    /// [δ | B | C] = a·W_xᵀ, each normalised      [tokens, R | N | N]
    /// Δ = softplus(δ·W_dtᵀ + b_dt)               [tokens, E]
    /// S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t ⊙ a_t) B_tᵀ,  y_t = S_t C_t + D ⊙ a_t
    /// ```
    ///
    /// → y ⊙ silu(z) in `out` `[tokens, E]`.
    pub(super) fn forward(&self, pass: &mut Pass, layer: usize, projected: &[f32], width: usize, out: &mut [f32]) {
        let (e, r, n) = (self.dt_bias.len(), self.rank, self.states);
        let projected = Rows { data: projected, stride: width };

        let mut a = Buffer::any((pass.tokens, e));
        let parts = by_pieces(&pass.pieces, flat_mut(&mut a), e);
        let mut items = Vec::new();
        for ((piece, state), here) in pass.pieces.iter().zip(&mut pass.states).zip(parts) {
            let u = Rows { data: &projected.data[piece.rows.start * width..], ..projected }.skip_columns(width - 2 * e);
            items.push((u, state.layers[layer].mamba.conv.view_mut(), here));
        }
        pass.team.for_each(items, |(u, history, a)| self.conv.step(u, history, a));

        let mut dbc = Buffer::any((pass.tokens, r + 2 * n));
        let rows = Rows { data: flat(&a), stride: e };
        self.x_proj.multiply(pass.team, rows, pass.tokens, flat_mut(&mut dbc), Out::Set);
        if let Some([dt, b, c]) = &self.inner_norms {
            for row in flat_mut(&mut dbc).chunks_exact_mut(r + 2 * n) {
                rms_norm_in_place(&mut row[..r], flat(dt), self.epsilon);
                rms_norm_in_place(&mut row[r..r + n], flat(b), self.epsilon);
                rms_norm_in_place(&mut row[r + n..], flat(c), self.epsilon);
            }
        }

        let mut delta = Buffer::any((pass.tokens, e));
        delta.rows_mut().into_iter().for_each(|mut row| row.assign(&self.dt_bias));
        let low = Rows { data: flat(&dbc), stride: r + 2 * n };
        self.dt_proj.multiply(pass.team, low, pass.tokens, flat_mut(&mut delta), Out::Add);
        pass.team.for_each(row_blocks(flat_mut(&mut delta), e), |(_, delta)| math::map::<Softplus>(delta));

        let mut items = Vec::new();
        let parts = by_pieces(&pass.pieces, out, e);
        for ((piece, state), here) in pass.pieces.iter().zip(&mut pass.states).zip(parts) {
            let at = |rows: &Rows<'_>| piece.rows.start * rows.stride;
            let bc = Rows { data: &low.data[at(&low)..], ..low };
            let xz = Rows { data: &projected.data[at(&projected)..], ..projected };
            let v = Rows { data: &rows.data[at(&rows)..], ..rows };
            let input = self.scan.input(piece.of(flat(&delta), e), ScanRows { v, bc, xz }, None);
            let out = ArrayViewMut2::from_shape((piece.len(), e), here).expect("whole rows");
            let states = strips(state.layers[layer].mamba.scan.view_mut());
            let strips = strips(out).into_iter().zip(states).enumerate();
            items.extend(strips.map(|(i, (out, state))| (input, i * STRIP, state, out)));
        }
        pass.team.for_each(items, |(input, first, state, out)| selective_scan_part(input, first, state, out, None));
    }

    pub(super) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        let mut numbers = |tensor: &str, array| f(&join(name, tensor), Parameter::Numbers(array));
        self.conv.visit("", &mut |tensor, mut array| match tensor {
            "weight" => {
                array.slice_axis_inplace(Axis(1), Slice::from(TAPS - self.taps..));
                numbers("conv1d.weight", array);
            }
            _ if self.conv_bias => numbers("conv1d.bias", array),
            _ => {}
        });
        if let Some([dt, b, c]) = &self.inner_norms {
            numbers("dt_layernorm.weight", dt.view().into_dyn());
            numbers("B_layernorm.weight", b.view().into_dyn());
            numbers("C_layernorm.weight", c.view().into_dyn());
        }
        numbers("dt_proj.0.bias", self.dt_bias.view().into_dyn());
        self.scan.visit("", &mut |tensor, array| numbers(if tensor == "d" { "D.0" } else { "A_log.0" }, array));
        f(&join(name, "x_proj.0.weight"), Parameter::Matrix(&self.x_proj));
        f(&join(name, "dt_proj.0.weight"), Parameter::Matrix(&self.dt_proj));
    }

    pub(super) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        let mut numbers = |tensor: &str, array| f(&join(name, tensor), ParameterMut::Numbers(array));
        let (taps, bias) = (self.taps, self.conv_bias);
        self.conv.visit_mut("", &mut |tensor, mut array| match tensor {
            "weight" => {
                array.slice_axis_inplace(Axis(1), Slice::from(TAPS - taps..));
                numbers("conv1d.weight", array);
            }
            _ if bias => numbers("conv1d.bias", array),
            _ => {}
        });
        if let Some([dt, b, c]) = &mut self.inner_norms {
            numbers("dt_layernorm.weight", dt.view_mut().into_dyn());
            numbers("B_layernorm.weight", b.view_mut().into_dyn());
            numbers("C_layernorm.weight", c.view_mut().into_dyn());
        }
        numbers("dt_proj.0.bias", self.dt_bias.view_mut().into_dyn());
        self.scan.visit_mut("", &mut |tensor, array| numbers(if tensor == "d" { "D.0" } else { "A_log.0" }, array));
        f(&join(name, "x_proj.0.weight"), ParameterMut::Matrix(&mut self.x_proj));
        f(&join(name, "dt_proj.0.weight"), ParameterMut::Matrix(&mut self.dt_proj));
    }
}
