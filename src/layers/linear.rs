//! A linear map: y = x·Wᵀ + b.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

use super::{Across, Buffer, LowRank, Rng, Weight, all_rows, flat, flat_mut};
use crate::kernels::matmul::{Packed, Storage};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};

/// W `[out, in]` and, where there is one, b `[out]`; W may have a low-rank part.
#[derive(Clone)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Array1<f32>>,
    low_rank: Option<Box<LowRank>>,
}

impl Linear {
    /// All zero; to be trained.
    pub(crate) fn zeros(inputs: usize, outputs: usize, bias: bool) -> Self {
        Self::with_weight(Weight::zeros(outputs, inputs), bias)
    }

    /// All zero, stored in this type or, for `None`, to be trained.
    pub(crate) fn zeros_as(inputs: usize, outputs: usize, bias: bool, storage: Option<Storage>) -> Self {
        Self::with_weight(Weight::new(outputs, inputs, storage), bias)
    }

    /// See [`Weight::store_as`].
    pub(crate) fn store_as(&mut self, storage: Option<Storage>) {
        self.weight.store_as(storage);
    }

    /// With this weight, and a bias of zero if there is one.
    pub(crate) fn with_weight(weight: Weight, bias: bool) -> Self {
        let (outputs, _) = weight.dim();
        Linear { weight, bias: bias.then(|| Array1::zeros(outputs)), low_rank: None }
    }

    /// A gradient of this map, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Linear {
            low_rank: self.low_rank.as_ref().map(|low_rank| Box::new(low_rank.zeros_like())),
            ..Self::with_weight(self.weight.zeros_like(), self.bias.is_some())
        }
    }

    /// Weights uniform in ±1/√in, bias zero.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.weight.init(rng);
    }

    /// W, if it can be trained.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn rows_mut(&mut self) -> Option<ArrayViewMut2<'_, f32>> {
        self.weight.rows_mut()
    }

    /// Multiplies the weights, if they can be trained.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn scale(&mut self, factor: f32) {
        self.weight.rows_mut().into_iter().for_each(|mut rows| rows *= factor);
    }

    /// Sets each number of the bias.
    pub(crate) fn init_bias(&mut self, mut value: impl FnMut() -> f32) {
        self.weight.forget();
        self.bias.iter_mut().flatten().for_each(|bias| *bias = value());
    }

    /// out and in.
    pub(crate) fn dim(&self) -> (usize, usize) {
        self.weight.dim()
    }

    /// Parameters of such a map.
    pub(crate) fn count(inputs: usize, outputs: usize, bias: bool) -> Option<usize> {
        inputs.checked_add(usize::from(bias))?.checked_mul(outputs)
    }

    /// x `[rows, in]` → `[rows, out]`. Rows may be longer than `in`; the rest is ignored.
    pub(crate) fn forward(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        let mut y = Buffer::uninit((x.nrows(), self.dim().0));
        self.multiply(team, all_rows(&x), x.nrows(), flat_mut(&mut y), Out::Set);
        y
    }

    /// As [`forward`](Self::forward); given some rows and an output, those from that output on are needed in these rows only: the
    /// others may be 0.
    pub(crate) fn forward_needed(&self, team: &Team, x: ArrayView2<f32>, needed: Option<(&[usize], usize)>) -> Buffer {
        match needed {
            Some((only, first)) if self.low_rank.is_none() => {
                self.weight.multiply_needed(team, x, self.bias.as_ref().map(flat), only, first)
            }
            _ => self.forward(team, x),
        }
    }

    /// y `[rows, out]` += x·Wᵀ + b
    pub(crate) fn add_to(&self, team: &Team, x: ArrayView2<f32>, y: &mut Array2<f32>) {
        self.multiply(team, all_rows(&x), x.nrows(), flat_mut(y), Out::Add);
    }

    fn multiply(&self, team: &Team, x: Rows, m: usize, y: &mut [f32], mode: Out) {
        self.weight.multiply(team, x, m, self.bias.as_ref().map(flat), y, mode);
        if let Some(low_rank) = &self.low_rank {
            low_rank.add_to(team, x, m, y);
        }
    }

    /// The gradient of [`forward`](Self::forward) at x: dy `[rows, out]` → dx `[rows, in]`.
    ///
    /// dx = dy·W, dW += dyᵀ·x, db += Σ_rows dy
    pub(crate) fn backward(&self, team: &Team, x: ArrayView2<f32>, dy: ArrayView2<f32>, grad: &mut Linear) -> Buffer {
        if dy.is_empty() {
            // nobody read the output, and the transpose would be made for nothing
            return Buffer::zeros((dy.nrows(), self.dim().1));
        }
        self.backward_by(team, x, dy, &self.across(team), grad)
    }

    /// The gradient of [`forward_needed`](Self::forward_needed): dy is 0 where y is not needed.
    pub(crate) fn backward_needed(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        needed: Option<(&[usize], usize)>,
        grad: &mut Linear,
    ) -> Buffer {
        match needed {
            Some((only, first)) if self.low_rank.is_none() => {
                if let Some(bias) = &mut grad.bias {
                    add_rows(team, flat(&dy), flat_mut(bias));
                }
                self.weight.backward_needed(team, x, dy, only, first, &mut grad.weight)
            }
            _ => self.backward(team, x, dy, grad),
        }
    }

    /// W in the order in which products with dy read it.
    pub(crate) fn across(&self, team: &Team) -> Across<'_> {
        self.weight.across(team)
    }

    /// As [`backward`](Self::backward), with what [`across`](Self::across) gave.
    pub(crate) fn backward_by(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        across: &Packed,
        grad: &mut Linear,
    ) -> Buffer {
        let mut dx = Buffer::uninit((dy.nrows(), self.dim().1));
        self.backward_to(team, x, dy, across, grad, &mut dx, Out::Set);
        dx
    }

    /// As [`backward`](Self::backward), added to dx.
    pub(crate) fn backward_add(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        dx: &mut Array2<f32>,
        grad: &mut Linear,
    ) {
        if dy.is_empty() {
            return;
        }
        self.backward_to(team, x, dy, &self.across(team), grad, dx, Out::Add);
    }

    #[allow(clippy::too_many_arguments)]
    fn backward_to(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        across: &Packed,
        grad: &mut Linear,
        dx: &mut Array2<f32>,
        mode: Out,
    ) {
        if let Some(bias) = &mut grad.bias {
            add_rows(team, flat(&dy), flat_mut(bias));
        }
        self.weight.backward_to(team, all_rows(&x), dy, across, &mut grad.weight, dx, mode);
        if let (Some(low_rank), Some(grad)) = (&self.low_rank, &mut grad.low_rank) {
            low_rank.backward(team, all_rows(&x), dy, dx, grad);
        }
    }

    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }

    /// See [`Weight::end_training`].
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn end_training(&mut self) {
        self.weight.end_training();
        if let Some(low_rank) = &mut self.low_rank {
            low_rank.a.end_training();
            low_rank.b.end_training();
        }
    }

    /// Sets or removes the low-rank part.
    pub(crate) fn set_low_rank(&mut self, low_rank: Option<Box<LowRank>>) {
        self.low_rank = low_rank;
    }

    /// Removes the low-rank part, and gives it.
    pub(crate) fn take_low_rank(&mut self) -> Option<Box<LowRank>> {
        self.low_rank.take()
    }

    /// Adds the low-rank part to W, row by row, and removes it.
    pub(crate) fn merge(&mut self) {
        if let Some(low_rank) = self.low_rank.take() {
            self.weight.change_rows(|output, row| low_rank.add_row(output, row));
        }
    }

    /// From now on W is for products only, and has no gradient.
    pub(crate) fn freeze(&mut self) {
        self.weight.freeze();
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.weight.visit(&join(name, "weight"), f);
        if let Some(bias) = &self.bias {
            f(&join(name, "bias"), Parameter::Array(bias.view().into_dyn()));
        }
        if let Some(low_rank) = &self.low_rank {
            low_rank.visit(name, f);
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.weight.visit_mut(&join(name, "weight"), f);
        if let Some(bias) = &mut self.bias {
            f(&join(name, "bias"), ParameterMut::Array(bias.view_mut().into_dyn()));
        }
        if let Some(low_rank) = &mut self.low_rank {
            low_rank.visit_mut(name, f);
        }
    }
}

/// sum `[width]` += Σ of the rows of x `[rows, width]`
fn add_rows(team: &Team, x: &[f32], sum: &mut [f32]) {
    /// Columns that one thread takes at a time at least: the longer a piece of a row, the sooner memory sends it.
    const COLUMNS: usize = 128;
    let width = sum.len();
    let count = width.div_ceil(team.threads()).max(1).next_multiple_of(COLUMNS);
    team.for_each(sum.chunks_mut(count).enumerate(), |(i, sum)| {
        let columns = i * count..i * count + sum.len();
        timed(Stage::Elementwise, Cost::numbers(x.len() / width * sum.len()), || {
            for row in x.chunks_exact(width) {
                sum.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, x)| *sum += x);
            }
        });
    });
}
