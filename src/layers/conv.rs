//! The short causal convolution in front of the scan, one filter per channel.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, Slice, s};
use rand::RngExt;

use super::batch::{Spans, rows_of};
use super::{Buffer, Lazy, Rng, flat, flat_mut};
use crate::kernels::conv::{ConvGradient, TAPS, conv, conv_backward, conv_silu};
use crate::kernels::math::{self, Silu};
use crate::kernels::rows::Rows;
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};

/// Rows the convolution looks back.
pub(crate) const HISTORY: usize = TAPS - 1;

/// silu(bias + Σᵢ weight\[·, i\] ⊙ x_{t−3+i}), weight `[d, 4]` and bias `[d]`.
#[derive(Clone)]
pub(crate) struct CausalConv {
    weight: Array2<f32>,
    bias: Array1<f32>,
    /// Taps in files, at most [`TAPS`]; the first ones are zero.
    taps: usize,
    /// Whether files have a bias; otherwise it is zero.
    has_bias: bool,
    /// weightᵀ `[4, d]`, so that channels lie side by side.
    across: Lazy<Array2<f32>>,
}

impl CausalConv {
    pub(crate) fn zeros(d: usize, taps: usize, has_bias: bool) -> Self {
        let weight = Array2::zeros((d, TAPS));
        CausalConv { weight, bias: Array1::zeros(d), taps, has_bias, across: Lazy::new() }
    }

    /// A gradient of this layer, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Self::zeros(self.bias.len(), self.taps, self.has_bias)
    }

    /// Weights uniform in ±1/√taps; the bias stays zero.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.across.forget();
        let bound = 1.0 / (self.taps as f32).sqrt();
        let mut weight = self.weight.slice_axis_mut(Axis(1), Slice::from(TAPS - self.taps..));
        weight.mapv_inplace(|_| rng.random_range(-bound..=bound));
    }

    /// Parameters of such a layer.
    pub(crate) fn count(d: usize) -> Option<usize> {
        d.checked_mul(TAPS + 1)
    }

    /// The first d columns of x, sequence by sequence → out `[rows, d]`. `histories` `[3, d]` hold the rows in front of each
    /// sequence, oldest first, and are brought up to date.
    pub(crate) fn forward<'a>(
        &self,
        team: &Team,
        spans: &Spans,
        x: Rows,
        histories: impl Iterator<Item = &'a mut Array2<f32>>,
        out: &mut [f32],
    ) {
        /// Rows that one thread takes at a time.
        const ROWS: usize = 128;
        let d = self.bias.len();
        let mut pieces = Vec::new();
        for ((span, history), out) in spans.iter().zip(histories).zip(spans.split(out, d)) {
            let x = x.skip_rows(span.start);
            for (i, out) in out.chunks_mut(ROWS * d).enumerate() {
                let before =
                    if i == 0 { history.clone() } else { copy_rows(x.skip_rows(i * ROWS - HISTORY), HISTORY, d) };
                pieces.push((x.skip_rows(i * ROWS), before, out));
            }
            // the rows left behind are the last of the history and the frames together
            let kept = HISTORY.saturating_sub(span.len());
            let mut left = copy_rows(x.skip_rows(span.len().saturating_sub(HISTORY)), HISTORY - kept, d);
            if kept > 0 {
                left = ndarray::concatenate![Axis(0), history.slice(s![HISTORY - kept.., ..]), left];
            }
            *history = left;
        }
        team.for_each(pieces, |(x, before, out)| {
            conv_silu(x, flat(&before), flat(self.across()), flat(&self.bias), out);
        });
    }

    /// The gradient of [`forward`](Self::forward), for sequences that all began with `history` in front of x, the d columns of
    /// `[rows, ·]` from `column` on. `dout` `[rows, d]` is that of the output and is overwritten. Writes the same columns of `dx`
    /// `[rows, ·]` and adds to `dhistory` `[3, d]`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        x: ArrayView2<f32>,
        column: usize,
        history: ArrayView2<f32>,
        dout: &mut [f32],
        dx: &mut Array2<f32>,
        dhistory: &mut Array2<f32>,
        grad: &mut CausalConv,
    ) {
        let (d, stride) = (self.bias.len(), x.ncols());
        let across = self.across();
        // what the sequences share is summed afterwards, in their order
        let gradients = team.map(
            spans.iter().zip(spans.split(dout, d)).zip(spans.split(flat_mut(dx), stride)).collect(),
            |((span, dout), dx)| {
                let x = Rows { data: rows_of(span, flat(&x), stride), stride }.skip_columns(column);
                let mut before_silu = Buffer::uninit((span.len(), d));
                conv(x, flat(&history), flat(across), flat(&self.bias), flat_mut(&mut before_silu));
                math::map_backward::<Silu>(flat(&before_silu), dout);
                let (mut dweight, mut dbias) = (Array2::zeros(across.dim()), Array1::zeros(d));
                let mut dbefore = Array2::zeros((HISTORY, d));
                let gradient = ConvGradient {
                    dx: &mut dx[column..],
                    stride,
                    before: flat_mut(&mut dbefore),
                    weight: flat_mut(&mut dweight),
                    bias: flat_mut(&mut dbias),
                };
                conv_backward(x, flat(&history), flat(across), dout, gradient);
                (dweight, dbias, dbefore)
            },
        );
        grad.across.forget();
        for (dweight, dbias, dbefore) in gradients {
            grad.weight += &dweight.t();
            grad.bias += &dbias;
            *dhistory += &dbefore;
        }
    }

    fn across(&self) -> &Array2<f32> {
        self.across.get(|| self.weight.t().as_standard_layout().into_owned())
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        let weight = self.weight.slice_axis(Axis(1), Slice::from(TAPS - self.taps..));
        f(&join(name, "weight"), Parameter::Array(weight.into_dyn()));
        if self.has_bias {
            f(&join(name, "bias"), Parameter::Array(self.bias.view().into_dyn()));
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.across.forget();
        let weight = self.weight.slice_axis_mut(Axis(1), Slice::from(TAPS - self.taps..));
        f(&join(name, "weight"), ParameterMut::Array(weight.into_dyn()));
        if self.has_bias {
            f(&join(name, "bias"), ParameterMut::Array(self.bias.view_mut().into_dyn()));
        }
    }
}

/// The first `count` rows of x, d columns of each.
fn copy_rows(x: Rows, count: usize, d: usize) -> Array2<f32> {
    let mut rows = Array2::zeros((count, d));
    rows.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| row.assign(&ArrayView1::from(x.row(i, d))));
    rows
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn pieces_of_any_length_continue_each_other() {
        let (d, l) = (5, 11);
        let mut conv = CausalConv::zeros(d, TAPS, true);
        conv.init(&mut Rng::seed_from_u64(1));
        let x = Array2::from_shape_fn((l, d + 2), |(i, j)| (i * 3 + j * 5 % 7) as f32 / 10.0 - 1.0);
        let rows = Rows { data: flat(&x), stride: d + 2 };
        let run = |x: Rows, history: &mut Array2<f32>, out: &mut [f32]| {
            let spans = Spans::new([out.len() / d]);
            conv.forward(&Team::alone(), &spans, x, std::iter::once(history), out);
        };
        let (mut whole, mut history) = (vec![0.0; l * d], Array2::zeros((HISTORY, d)));
        run(rows, &mut history, &mut whole);
        for piece in 1..l {
            let (mut pieces, mut past) = (vec![0.0; l * d], Array2::zeros((HISTORY, d)));
            for from in (0..l).step_by(piece) {
                let to = l.min(from + piece);
                run(rows.skip_rows(from), &mut past, &mut pieces[from * d..to * d]);
            }
            assert_eq!(whole, pieces);
            assert_eq!(history, past);
        }
    }
}
