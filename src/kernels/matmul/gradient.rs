//! The gradient of a matrix: a product of two operands that are both packed for it.

use std::cell::Cell;

use ndarray::ArrayViewMut2;

use super::blocks::{Block, blocks};
use super::packed::{PANEL, Packed, PanelRow};
use super::product::{Left, LeftTile, Product, Weights};
use crate::kernels::clock::timed_product;
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{LANES, Simd, dispatch};
use crate::kernels::team::Team;

/// grad `[n, k]` += dyᵀ·x for dy `[m, n]` and x `[m, k]`: the gradient of a matrix from those of its outputs.
pub(crate) fn matmul_gradient(team: &Team, dy: Rows, n: usize, x: Rows, k: usize, m: usize, grad: &mut [f32]) {
    thread_local! {
        static SCRATCH: [Cell<Vec<PanelRow>>; 2] = const { [Cell::new(Vec::new()), Cell::new(Vec::new())] };
    }
    let [for_dy, for_x] = SCRATCH.with(|scratch| [scratch[0].take(), scratch[1].take()]);
    let dy = Packed::refill_from_columns(team, n, m, |i| dy.row(i, n), for_dy);
    let x = Packed::refill_from_columns(team, k, m, |i| x.row(i, k), for_x);
    let grad = ArrayViewMut2::from_shape((n, k), grad).expect("room for n rows");
    team.for_each(blocks(team, grad, ROWS), |Block { row, column, out }| {
        let (n, outputs, inputs) = (out.nrows(), column..column + out.ncols(), 0..x.k);
        timed_product(n, outputs.len(), x.k, || {
            dispatch(Product { x: Columns(&dy, row), w: &x, outputs, inputs, out, mode: Out::Add });
        });
    });
    SCRATCH.with(|scratch| {
        scratch[0].set(dy.panels);
        scratch[1].set(x.panels);
    });
}

/// Rows that pass over a panel together.
const ROWS: usize = 120;

/// The columns of a packed matrix `[m, k]` from this one on: it is read transposed.
#[derive(Clone, Copy)]
struct Columns<'a>(&'a Packed, usize);

/// Columns of a panel that are the rows of one tile.
const COLUMN_TILE: usize = 8;

/// Eight columns of a panel, as rows.
#[derive(Clone, Copy)]
struct PanelColumns<'a> {
    panel: &'a [PanelRow],
    first: usize,
}

impl LeftTile<[f32; 1]> for PanelColumns<'_> {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> [f32; 1] {
        let (line, lane) = (self.first / LANES, self.first % LANES);
        let (tiles, _): (&[[f32; COLUMN_TILE]], _) = self.panel[i][line].0.as_chunks();
        [tiles[lane / COLUMN_TILE][row]]
    }
}

impl Left for Columns<'_> {
    type Inputs = [f32; 1];

    #[inline(always)]
    fn by_panels<S: Simd, W: Weights<[f32; 1]>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        panel: usize,
        panels: usize,
    ) {
        let (Columns(x, first), m) = (product.x, product.out.nrows());
        for panel in panel..panel + panels {
            for row in (0..m).step_by(COLUMN_TILE) {
                let column = first + row;
                let columns = PanelColumns { panel: &x.panels[column / PANEL * x.k..][..x.k], first: column % PANEL };
                product.tile::<S, COLUMN_TILE, 1>(s, columns, row, COLUMN_TILE.min(m - row), panel);
            }
        }
    }
}
