//! The short causal convolution in front of the scan, one filter a channel.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut2, s};
use rand::RngExt;

use super::{Derived, Rng, Visitor, VisitorMut, flat, flat_mut, join};
use crate::kernels::conv::{ConvGradient, TAPS, conv, conv_backward, conv_silu};
use crate::kernels::math::{self, Silu};
use crate::kernels::matmul::Rows;

/// Rows the convolution looks back.
pub(crate) const HISTORY: usize = TAPS - 1;

/// silu(bias + Σᵢ weight\[·, i\] ⊙ x_{t−3+i}), weight `[d, 4]` and bias `[d]`.
#[derive(Clone)]
pub(crate) struct CausalConv {
    weight: Array2<f32>,
    bias: Array1<f32>,
    /// weightᵀ `[4, d]`, so that channels lie side by side.
    taps: Derived<Array2<f32>>,
}

impl CausalConv {
    pub(crate) fn zeros(d: usize) -> Self {
        CausalConv { weight: Array2::zeros((d, TAPS)), bias: Array1::zeros(d), taps: Derived::new() }
    }

    /// Weights uniform in ±1/√4, bias zero.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.taps.forget();
        let bound = 1.0 / (TAPS as f32).sqrt();
        self.weight.mapv_inplace(|_| rng.random_range(-bound..=bound));
    }

    /// One sequence: the first d columns of x → out `[l, d]`. `history` `[3, d]` holds the rows in front of x, oldest first,
    /// and is brought up to date.
    pub(crate) fn step(&self, x: Rows, mut history: ArrayViewMut2<f32>, out: &mut [f32]) {
        let d = self.bias.len();
        let frames = out.len() / d;
        conv_silu(x, flat(&history.view()), flat(self.taps()), flat(&self.bias), out);

        let kept = HISTORY.saturating_sub(frames);
        for i in 0..kept {
            let (mut to, from) = history.multi_slice_mut((s![i, ..], s![i + HISTORY - kept, ..]));
            to.assign(&from);
        }
        for i in kept..HISTORY {
            history.row_mut(i).assign(&ArrayView1::from(x.row(i + frames - HISTORY, d)));
        }
    }

    /// The gradient of one sequence's forward pass, which began with `history` in front of x. `dout` `[l, d]` is that of the
    /// output and is overwritten. Writes the first d columns of `dx` `[l, ≥ d]` and adds to `dhistory` `[3, d]`.
    pub(crate) fn backward(
        &self,
        x: ArrayView2<f32>,
        history: ArrayView2<f32>,
        dout: &mut [f32],
        dx: ArrayViewMut2<f32>,
        mut dhistory: ArrayViewMut2<f32>,
        grad: &mut CausalConv,
    ) {
        let (rows, taps) = (Rows { data: flat(&x), stride: x.ncols() }, self.taps());
        let (history, stride) = (flat(&history), dx.ncols());
        let mut before_silu = vec![0.0; dout.len()];
        conv(rows, history, flat(taps), flat(&self.bias), &mut before_silu);
        math::map_backward::<Silu>(&before_silu, dout);
        let mut dtaps = Array2::zeros(taps.dim());
        let gradient = ConvGradient {
            dx: dx.into_slice().expect("whole rows"),
            stride,
            before: dhistory.as_slice_mut().expect("whole rows"),
            weight: flat_mut(&mut dtaps),
            bias: flat_mut(&mut grad.bias),
        };
        conv_backward(rows, history, flat(taps), dout, gradient);
        grad.taps.forget();
        grad.weight += &dtaps.t();
    }

    fn taps(&self) -> &Array2<f32> {
        self.taps.get(|| self.weight.t().as_standard_layout().into_owned())
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        f(&join(name, "weight"), self.weight.view().into_dyn());
        f(&join(name, "bias"), self.bias.view().into_dyn());
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.taps.forget();
        f(&join(name, "weight"), self.weight.view_mut().into_dyn());
        f(&join(name, "bias"), self.bias.view_mut().into_dyn());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array3;
    use rand::SeedableRng;

    #[test]
    fn pieces_of_any_length_continue_each_other() {
        let (d, l) = (5, 11);
        let mut conv = CausalConv::zeros(d);
        conv.init(&mut Rng::seed_from_u64(1));
        let x = Array2::from_shape_fn((l, d + 2), |(i, j)| (i * 3 + j * 5 % 7) as f32 / 10.0 - 1.0);
        let mut whole = vec![0.0; l * d];
        let mut history = Array3::zeros((2, HISTORY, d));
        let rows = Rows { data: flat(&x), stride: d + 2 };
        conv.step(rows, history.slice_mut(s![0, .., ..]), &mut whole);
        for piece in 1..l {
            history.slice_mut(s![1, .., ..]).fill(0.0);
            let mut pieces = vec![0.0; l * d];
            for from in (0..l).step_by(piece) {
                let to = l.min(from + piece);
                let out = &mut pieces[from * d..to * d];
                let rows = Rows { data: &rows.data[from * rows.stride..], ..rows };
                conv.step(rows, history.slice_mut(s![1, .., ..]), out);
            }
            assert_eq!(whole, pieces);
            assert_eq!(history.slice(s![0, .., ..]), history.slice(s![1, .., ..]));
        }
    }
}
