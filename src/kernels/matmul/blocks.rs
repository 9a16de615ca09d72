//! How a product is shared among threads: in blocks of rows and columns, which depend on its size, the number of threads and their
//! instruction set; the results do not.

use std::ops::Range;

use ndarray::{ArrayViewMut2, Axis};

use super::operands::{LeftRows, Weights};
use super::packed::{PANEL, Packed};
use super::product::{Product, product_at};
use crate::kernels::profiler::timed_product;
use crate::kernels::rows::Out;
use crate::kernels::simd::Isa;
use crate::kernels::team::Team;

/// Rows that pass over the panels together where all panels stay in a near cache, at least. A multiple of the rows of every tile.
const FEW_ROWS: usize = 24;
/// The same on CPUs with AVX-512, whose second-level cache holds them beside the panels: that makes half as many
/// blocks, each of which reads all panels.
const WIDE_ROWS: usize = 48;
/// The same where the panels do not stay in a near cache, so that the weights are read from far away only a few times.
const MANY_ROWS: usize = 480;
/// Bytes of weights that stay in a near cache.
const NEAR: usize = 2 << 20;
/// Bytes of rows and of what is made of them that stay in the second cache, which is smaller on most CPUs without AVX-512, beside the
/// weights they pass over.
const ROWS_NEAR: usize = 192 << 10;

/// Numbers of rows that no near cache holds: they are fetched before their turn.
const ROWS_FAR: usize = 256 << 10;

/// out = x `[m, inputs]` · Wᵀ + bias, or added to it, block by block among the team: some `outputs`, summed over some `inputs`.
pub(crate) fn multiply<X, W, const N: usize>(
    level: Isa,
    team: &Team,
    x: X,
    w: &Packed<W, N>,
    [outputs, inputs]: [Range<usize>; 2],
    out: ArrayViewMut2<f32>,
    mode: Out,
) where
    X: LeftRows + Sync,
    W: Weights<X::Inputs> + Sync,
{
    let rows = match size_of_val(&*w.panels) <= NEAR {
        true if level > Isa::Scalar && level < Isa::Avx512 => {
            (ROWS_NEAR / (4 * (w.k + w.n).max(1))).clamp(FEW_ROWS, MANY_ROWS)
        }
        true if level >= Isa::Avx512 => WIDE_ROWS,
        true => FEW_ROWS,
        false => MANY_ROWS,
    };
    let (m, threads) = (out.nrows(), team.threads());
    let are_far = m * inputs.len() >= ROWS_FAR;
    team.for_each(blocks(team, out, rows), |Block { row, column, out }| {
        // where blocks have all columns, the other threads take as many rows each before it is this one's turn again
        let after = row + threads * out.nrows();
        let next = (are_far && out.ncols() == outputs.len() && after < m).then(|| x.skip_rows(after));
        let (first, inputs) = (outputs.start + column, inputs.clone());
        timed_product(out.nrows(), out.ncols(), inputs.len(), || {
            let (x, outputs) = (x.skip_rows(row), first..first + out.ncols());
            product_at(level, Product { x, next, w, outputs, inputs, out, mode });
        });
    });
}

/// A part of a product, and where it begins.
pub(super) struct Block<'a> {
    pub row: usize,
    pub column: usize,
    pub out: ArrayViewMut2<'a, f32>,
}

/// The blocks of a product, of about `rows` rows each, or fewer where they would not do for all threads. There are several per thread, so
/// that none waits long for the others; a thread alone takes all columns at once.
fn blocks<'a>(team: &Team, out: ArrayViewMut2<'a, f32>, rows: usize) -> Vec<Block<'a>> {
    /// Blocks per thread.
    const EACH: usize = 8;
    /// The same where each thread has rows of its own.
    const EACH_OF_OWN: usize = 2;
    /// The rows of a tile on most CPUs, or a multiple of them.
    const TILE: usize = 6;
    let ((m, n), threads) = (out.dim(), team.threads());
    // as even as can be
    let groups = (m / rows).max(1);
    let panels = n.div_ceil(PANEL);
    let own = threads.min(m / FEW_ROWS);
    if groups < own {
        // columns outside, rows inside: threads that take turns keep to their rows, as a rule, which lie in their caches from one
        // product to the next
        let width = (panels * own / (EACH_OF_OWN * threads)).clamp(1, 8);
        let mut blocks = grid(out, m.div_ceil(own).next_multiple_of(TILE), width * PANEL);
        blocks.sort_by_key(|block| (block.column, block.row));
        return blocks;
    }
    let width = match threads {
        1 => panels,
        // few rows: several panels side by side, which do not wait for each other's sums
        _ if m <= 6 => 4,
        _ => (panels * groups / (EACH * threads)).clamp(1, 8),
    };
    grid(out, m.div_ceil(groups).next_multiple_of(FEW_ROWS), width * PANEL)
}

/// Blocks of `height` rows and `width` columns, those at the ends smaller, those of the same rows one after the other.
pub(super) fn grid(mut out: ArrayViewMut2<f32>, height: usize, width: usize) -> Vec<Block> {
    let (mut row, mut all) = (0, Vec::new());
    while out.nrows() > 0 {
        let size = height.min(out.nrows());
        let (mut here, below) = out.split_at(Axis(0), size);
        let mut column = 0;
        while here.ncols() > 0 {
            let size = width.min(here.ncols());
            let (block, right) = here.split_at(Axis(1), size);
            all.push(Block { row, column, out: block });
            (here, column) = (right, column + width);
        }
        (out, row) = (below, row + height);
    }
    all
}

/// The columns of a product in strips of all rows, each with its first column. For few rows a strip has several panels;
/// the last ones have one panel each, so that no thread waits long for the others.
#[cfg_attr(not(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux")), allow(dead_code))]
pub(super) fn strips(mut out: ArrayViewMut2<f32>) -> Vec<(usize, ArrayViewMut2<f32>)> {
    let wide = if out.nrows() <= 6 { 4 * PANEL } else { PANEL };
    let (mut strips, mut first) = (Vec::new(), 0);
    while out.ncols() > 0 {
        let left = out.ncols();
        let width = if left > 2 * wide { wide } else { PANEL.min(left) };
        let (here, rest) = out.split_at(Axis(1), width);
        strips.push((first, here));
        (out, first) = (rest, first + width);
    }
    strips
}
