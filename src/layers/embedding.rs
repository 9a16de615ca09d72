//! The vectors of token ids, which may serve as the output map as well.

use ndarray::{ArrayView2, ArrayViewMut2};

use super::batch::for_rows;
use super::{Across, Buffer, Weight, flat, flat_mut};
use crate::kernels::matmul::Packed;
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::Team;
use crate::parameters::{Visitor, VisitorMut};

/// A vector for each token, `[v, h]`.
pub(crate) struct Embedding {
    weight: Weight,
}

impl Embedding {
    pub(crate) fn new(weight: Weight) -> Self {
        Embedding { weight }
    }

    /// A gradient of this embedding, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        Embedding { weight: self.weight.zeros_like() }
    }

    /// From now on the vectors cannot be trained.
    pub(crate) fn freeze(&mut self) {
        self.weight.freeze();
    }

    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }

    /// See [`Weight::end_training`].
    pub(crate) fn end_training(&mut self) {
        self.weight.end_training();
    }

    /// From now on they can be trained.
    pub(crate) fn thaw(&mut self) {
        self.weight.store_as(None);
    }

    /// The vectors `[v, h]`, if they can be trained.
    pub(crate) fn rows_mut(&mut self) -> Option<ArrayViewMut2<'_, f32>> {
        self.weight.rows_mut()
    }

    /// The vectors of some tokens → `[ids, h]`
    pub(crate) fn forward(&self, team: &Team, ids: &[u32]) -> Buffer {
        let (_, h) = self.weight.dim();
        let mut x = Buffer::uninit((ids.len(), h));
        for_rows(team, flat_mut(&mut x), h, |first, x| {
            for (id, row) in ids[first..].iter().zip(x.chunks_exact_mut(h)) {
                self.weight.row(*id as usize, row);
            }
        });
        x
    }

    /// The products of x `[rows, h]` with the vector of each token → `[rows, v]`
    pub(crate) fn logits(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        let (v, h) = self.weight.dim();
        let mut logits = Buffer::uninit((x.nrows(), v));
        let rows = Rows { data: flat(&x), stride: h };
        self.weight.multiply(team, rows, x.nrows(), None, flat_mut(&mut logits), Out::Set);
        logits
    }

    /// The gradient of [`forward`](Self::forward): adds the rows of dx `[ids, h]` to those of their tokens.
    pub(crate) fn backward(&self, ids: impl Iterator<Item = u32>, dx: ArrayView2<f32>, grad: &mut Embedding) {
        if let Some(mut rows) = grad.weight.rows_mut() {
            for (id, dx) in ids.zip(dx.rows()) {
                rows.row_mut(id as usize).scaled_add(1.0, &dx);
            }
        }
    }

    /// The gradient of [`logits`](Self::logits) at x `[rows, h]`: d `[rows, v]` → that of x. `across` is
    /// [`across`](Self::across) of this embedding.
    pub(crate) fn logits_backward(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        d: ArrayView2<f32>,
        across: &Packed,
        grad: &mut Embedding,
    ) -> Buffer {
        let rows = Rows { data: flat(&x), stride: x.ncols() };
        self.weight.backward_by(team, rows, d, across, &mut grad.weight)
    }

    /// The vectors in the order in which products with the gradient of the logits read them.
    pub(crate) fn across(&self, team: &Team) -> Across<'_> {
        self.weight.across(team)
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.weight.visit(name, f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.weight.visit_mut(name, f);
    }
}
