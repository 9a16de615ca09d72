//! The gradient of a matrix: a product of two operands that are both packed for it.

use std::cell::Cell;
use std::ops::Range;

use ndarray::{ArrayViewMut2, Axis};

use super::blocks::{Block, grid};
use super::operands::{LeftTile, Weights};
use super::packed::{PANEL, Packed, PanelRow, ZERO_ROW, arrange, panel_row, parts};
use super::product::{Left, Product};
use crate::kernels::profiler::timed_product;
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Simd, dispatch};
use crate::kernels::team::Team;

/// Rows that pass over a panel together.
const ROWS: usize = 120;
/// Frames that are brought into order and summed before their sums are added to the gradient: they stay in near caches.
const FRAMES: usize = 256;
/// Columns of the left operand that lie side by side: a multiple of the rows of every tile.
pub(crate) const STRIP: usize = 12;

type StripRow = [f32; STRIP];

/// grad `[n, k]` += dyᵀ·x for dy `[m, n]` and x `[m, k]`: the gradient of a matrix from those of its outputs.
///
/// Each thread brings into order what its blocks of the gradient are made of. Two blocks may do that with the same columns, but nobody
/// reads what another has just written, and nobody waits before the end.
pub(crate) fn matmul_gradient(team: &Team, dy: Rows, n: usize, x: Rows, k: usize, m: usize, grad: &mut [f32]) {
    let grad = ArrayViewMut2::from_shape((n, k), grad).expect("room for n rows");
    team.for_each(cut(grad, team.threads()), |Block { row, column, out }| {
        add_block(dy.skip_columns(row), x.skip_columns(column), m, out);
    });
}

/// As [`matmul_gradient`], for the first columns of dy and x, on this thread.
fn add_block(dy: Rows, x: Rows, m: usize, mut grad: ArrayViewMut2<f32>) {
    thread_local! {
        static STRIPS: Cell<Vec<StripRow>> = const { Cell::new(Vec::new()) };
        static PANELS: Cell<Vec<PanelRow>> = const { Cell::new(Vec::new()) };
    }
    let (mut strips, mut panels) = (STRIPS.take(), PANELS.take());
    let ((n, k), alone) = (grad.dim(), Team::alone());
    for first in (0..m).step_by(FRAMES) {
        let frames = FRAMES.min(m - first);
        let (dy, x) = (dy.skip_rows(first), x.skip_rows(first));
        strips.resize(n.div_ceil(STRIP) * frames, [0.0; STRIP]);
        panels.resize(k.div_ceil(PANEL) * frames, ZERO_ROW);
        for (first, strips) in parts(&alone, n, frames, STRIP, &mut strips) {
            arrange([n, frames, STRIP], 0..frames, |i| dy.row(i, n), strip_row, first, strips);
        }
        for (first, panels) in parts(&alone, k, frames, PANEL, &mut panels) {
            arrange([k, frames, PANEL], 0..frames, |i| x.row(i, k), panel_row, first, panels);
        }
        let x = Packed::<PanelRow, 1> { n: k, k: frames, panels, bias: Vec::new() };
        for (i, out) in grad.axis_chunks_iter_mut(Axis(0), ROWS).enumerate() {
            let columns = Tiled(Columns { strips: &strips, frames, first: i * ROWS });
            timed_product(out.nrows(), k, frames, || {
                dispatch(Product {
                    x: columns,
                    next: None,
                    w: &x,
                    outputs: 0..k,
                    inputs: 0..frames,
                    out,
                    mode: Out::Add,
                });
            });
        }
        panels = x.panels;
    }
    STRIPS.set(strips);
    PANELS.set(panels);
}

/// Cuts a gradient into blocks: as few as keep the threads busy, for each brings its own operands into order.
fn cut(grad: ArrayViewMut2<f32>, threads: usize) -> Vec<Block> {
    /// Rows, or columns, of a block that is not cut again while there is one for each thread.
    const ENOUGH: usize = 256;
    let (n, k) = grad.dim();
    let (mut height, mut width, mut count) = (n, k, 1);
    while count < 2 * threads && threads > 1 {
        let longer = height.max(width);
        if longer < 2 * PANEL || count >= threads && longer < 2 * ENOUGH {
            break;
        }
        match height >= width {
            true => height = height.div_ceil(2).next_multiple_of(STRIP),
            false => width = width.div_ceil(2).next_multiple_of(PANEL),
        }
        count *= 2;
    }
    grid(grad, height, width)
}

/// out `[m, n]` = xᵀ·Wᵀ, or added to it, for the first m columns of x `[k, ·]`, on this thread. Rows of x go on to a multiple of
/// [`STRIP`] numbers, whatever these are.
pub(crate) fn matmul_across(x: Rows, m: usize, w: &Packed, out: &mut [f32], mode: Out) {
    debug_assert!(m.next_multiple_of(STRIP) <= x.stride && x.data.len() >= w.k * x.stride);
    let out = ArrayViewMut2::from_shape((m, w.n), out).expect("room for m rows");
    timed_product(m, w.n, w.k, || {
        dispatch(Product { x: Tiled(Across(x)), next: None, w, outputs: 0..w.n, inputs: 0..w.k, out, mode });
    });
}

/// At most [`STRIP`] numbers, filled up with zeros.
fn strip_row(numbers: &[f32]) -> StripRow {
    numbers.first_chunk().copied().unwrap_or_else(|| {
        let mut row = [0.0; STRIP];
        row[..numbers.len()].copy_from_slice(numbers);
        row
    })
}

/// The columns of a matrix in strips, from `first` on: it is read transposed.
#[derive(Clone, Copy)]
struct Columns<'a> {
    strips: &'a [StripRow],
    frames: usize,
    first: usize,
}

/// R columns of a strip, as rows.
#[derive(Clone, Copy)]
struct StripColumns<'a, const R: usize> {
    strip: &'a [StripRow],
    first: usize,
}

impl<const R: usize> LeftTile<[f32; 1]> for StripColumns<'_, R> {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> [f32; 1] {
        let (tiles, _): (&[[f32; R]], _) = self.strip[i].as_chunks();
        [tiles[self.first / R][row]]
    }

    /// The rows lie side by side: four of them are loaded at a time, of six the first or the last.
    #[inline(always)]
    fn multiply_lane<S: Simd, const LANE: usize>(self, s: S, row: usize, i: usize, w: S::V, sum: S::V) -> S::V {
        let (fours, _) = self.strip.as_chunks::<4>();
        let (tiles, _): (&[[f32; R]], _) = fours[i][LANE].as_chunks();
        let tile = &tiles[self.first / R];
        let (Some(first), Some(last)) = (tile.first_chunk(), tile.last_chunk()) else {
            return s.mul_add(s.splat(tile[row]), w, sum);
        };
        match if row < 4 { row } else { row + 4 - R } {
            0 => s.mul_add_lane::<0>(w, first, sum),
            1 => s.mul_add_lane::<1>(w, first, sum),
            lane => match (row < 4, lane) {
                (true, 2) => s.mul_add_lane::<2>(w, first, sum),
                (true, _) => s.mul_add_lane::<3>(w, first, sum),
                (false, 2) => s.mul_add_lane::<2>(w, last, sum),
                (false, _) => s.mul_add_lane::<3>(w, last, sum),
            },
        }
    }
}

impl<'a> ByColumns for Columns<'a> {
    type Tile<const R: usize> = StripColumns<'a, R>;

    #[inline(always)]
    fn tile<const R: usize>(self, first: usize, inputs: Range<usize>) -> Self::Tile<R> {
        let column = self.first + first;
        StripColumns { strip: &self.strips[column / STRIP * self.frames..][inputs], first: column % STRIP }
    }
}

/// Rows whose columns are read as rows.
#[derive(Clone, Copy)]
struct Across<'a>(Rows<'a>);

/// R columns of them.
#[derive(Clone, Copy)]
struct AcrossColumns<'a, const R: usize> {
    x: Rows<'a>,
    first: usize,
}

impl<const R: usize> LeftTile<[f32; 1]> for AcrossColumns<'_, R> {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> [f32; 1] {
        let columns: &[f32; R] = self.x.data[i * self.x.stride + self.first..].first_chunk().expect("a whole tile");
        [columns[row]]
    }

    #[inline(always)]
    fn multiply_lane<S: Simd, const LANE: usize>(self, s: S, row: usize, i: usize, w: S::V, sum: S::V) -> S::V {
        s.mul_add(s.splat(self.at(row, 4 * i + LANE)[0]), w, sum)
    }
}

impl<'a> ByColumns for Across<'a> {
    type Tile<const R: usize> = AcrossColumns<'a, R>;

    #[inline(always)]
    fn tile<const R: usize>(self, first: usize, _: Range<usize>) -> Self::Tile<R> {
        AcrossColumns { x: self.0, first }
    }
}

/// A left operand whose columns are the rows of a product.
trait ByColumns: Copy {
    type Tile<const R: usize>: LeftTile<[f32; 1]>;

    /// R of them, from `first` on, of some inputs.
    fn tile<const R: usize>(self, first: usize, inputs: Range<usize>) -> Self::Tile<R>;
}

/// As the left side of a product, in tiles of the size that fits the registers.
#[derive(Clone, Copy)]
struct Tiled<X>(X);

impl<X: ByColumns> Tiled<X> {
    #[inline(always)]
    fn tiles<S: Simd, W: Weights<[f32; 1]>, const N: usize, const R: usize, const L: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        line: usize,
    ) {
        let m = product.out.nrows();
        for row in (0..m).step_by(R) {
            let columns = product.x.0.tile::<R>(row, product.inputs.clone());
            product.tile::<S, R, L>(s, columns, row, R.min(m - row), line);
        }
    }
}

impl<X: ByColumns> Left for Tiled<X> {
    type Inputs = [f32; 1];
    /// They have just been brought into order.
    const FAR_WEIGHTS: bool = false;

    #[inline(always)]
    fn lines<S: Simd, W: Weights<[f32; 1]>>(_: usize) -> usize {
        S::TILE_LINES
    }

    #[inline(always)]
    fn by_lines<S: Simd, W: Weights<[f32; 1]>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        line: usize,
        _: usize,
    ) {
        match (S::TILE_ROWS, S::TILE_LINES) {
            (12, 2) => Self::tiles::<S, W, N, 12, 2>(s, product, line),
            (6, 1) => Self::tiles::<S, W, N, 6, 1>(s, product, line),
            (3, 1) => Self::tiles::<S, W, N, 3, 1>(s, product, line),
            _ => Self::tiles::<S, W, N, 2, 2>(s, product, line),
        }
    }
}
