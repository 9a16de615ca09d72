//! A low-rank part beside the matrix of a linear map (LoRA, arXiv 2106.09685).

use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use super::batch::{add_array, for_rows};
use super::{Buffer, Dropout, Rng, Weight, all_rows, flat_mut};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::Team;
use crate::parameters::{Visitor, VisitorMut, join};

/// scale · B·A beside W `[out, in]`, with A `[r, in]` and B `[out, r]`. In training passes whose rows have seeds
/// ([`Team::seeded`]), A reads x after dropout.
#[derive(Clone)]
pub(crate) struct LowRank {
    pub a: Weight,
    pub b: Weight,
    scale: f32,
    dropout: Dropout,
}

impl LowRank {
    pub(crate) fn zeros(inputs: usize, outputs: usize, rank: usize, scale: f32, dropout: Dropout) -> Self {
        LowRank { a: Weight::zeros(rank, inputs), b: Weight::zeros(outputs, rank), scale, dropout }
    }

    /// A gradient of it, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        LowRank { a: self.a.zeros_like(), b: self.b.zeros_like(), scale: self.scale, dropout: self.dropout }
    }

    /// A as a linear map starts, and B zero: so it changes nothing yet.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.a.init(rng);
    }

    /// y `[m, out]` += scale · (x·Aᵀ)·Bᵀ for x `[m, in]`
    pub(crate) fn add_to(&self, team: &Team, x: Rows, m: usize, y: &mut [f32]) {
        let dropped = self.dropped(team, x, m);
        let down = self.down(team, dropped.as_ref().map_or(x, |(x, _)| all_rows(x)), m);
        self.b.multiply(team, all_rows(&down), m, None, y, Out::Add);
    }

    /// x `[m, in]` after dropout, and the seeds of its rows, where there is any.
    fn dropped(&self, team: &Team, x: Rows, m: usize) -> Option<(Buffer, Arc<[u64]>)> {
        let seeds = team.row_seeds().filter(|_| !self.dropout.is_none())?;
        let inputs = self.a.dim().1;
        let mut dropped = Buffer::uninit((m, inputs));
        for_rows(team, flat_mut(&mut dropped), inputs, |first, rows| {
            let rows = rows.chunks_exact_mut(inputs).enumerate();
            rows.for_each(|(i, row)| row.copy_from_slice(x.row(first + i, inputs)));
        });
        self.dropout.apply_by_row(team, &seeds, &mut dropped);
        Some((dropped, seeds))
    }

    /// scale · x·Aᵀ `[m, r]`
    fn down(&self, team: &Team, x: Rows, m: usize) -> Buffer {
        let mut down = Buffer::uninit((m, self.a.dim().0));
        self.a.multiply(team, x, m, None, flat_mut(&mut down), Out::Set);
        *down *= self.scale;
        down
    }

    /// The gradient of [`add_to`](Self::add_to) at x: for dy `[m, out]`, adds to dx `[m, in]`.
    pub(crate) fn backward(&self, team: &Team, x: Rows, dy: ArrayView2<f32>, dx: &mut Array2<f32>, grad: &mut LowRank) {
        let dropped = self.dropped(team, x, dy.nrows());
        let x = dropped.as_ref().map_or(x, |(x, _)| all_rows(x));
        let down = self.down(team, x, dy.nrows());
        let mut ddown = self.b.backward(team, all_rows(&down), dy, &mut grad.b);
        *ddown *= self.scale;
        let mut more = self.a.backward(team, x, ddown.view(), &mut grad.a);
        if let Some((_, seeds)) = &dropped {
            self.dropout.apply_by_row(team, seeds, &mut more);
        }
        add_array(team, &more, dx);
    }

    /// Adds row `output` of scale · B·A to `numbers` `[in]`.
    pub(crate) fn add_row(&self, output: usize, numbers: &mut [f32]) {
        let (rank, inputs) = self.a.dim();
        let (mut of_b, mut of_a) = (vec![0.0; rank], vec![0.0; inputs]);
        self.b.row(output, &mut of_b);
        let mut sum = vec![0.0; inputs];
        for (i, b) in of_b.into_iter().enumerate() {
            self.a.row(i, &mut of_a);
            sum.iter_mut().zip(&of_a).for_each(|(sum, a)| *sum += b * a);
        }
        numbers.iter_mut().zip(sum).for_each(|(number, sum)| *number += self.scale * sum);
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.a.visit(&join(name, LORA_NAMES[0]), f);
        self.b.visit(&join(name, LORA_NAMES[1]), f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.a.visit_mut(&join(name, LORA_NAMES[0]), f);
        self.b.visit_mut(&join(name, LORA_NAMES[1]), f);
    }
}

/// The names of A and B, after that of their map.
pub(crate) const LORA_NAMES: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
