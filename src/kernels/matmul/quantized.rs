//! Matrices of 8 or 4 bits per weight, and their products in integers.
//!
//! [`BLOCK`] consecutive inputs of an output share a scale, a bfloat16: a weight is its scale times an integer of −127
//! … 127, or of −8 … 7. For the product the inputs are quantised to 8 bits, too, each block of a row with a scale of
//! its own. The products of a block are summed exactly, in integers, and the blocks in ascending order in `f32`; so an
//! output is the same bits for any number of rows and threads.
//!
//! The CPU multiplies unsigned bytes by signed ones. So weights are stored with an offset of 128 (or 8), and every sum
//! starts at −offset · Σx, which cancels it.

use std::ops::Range;

use half::bf16;
use ndarray::{ArrayViewMut2, Axis};

use super::packed::PANEL;
use super::product::finish;
pub(crate) use super::quants::{BLOCK, Q4Block, Q8Block};
use super::quants::{QUADS, Quants, ROUND, inverse, largest};
use crate::kernels::memory::{Scratch, filled, with_scratch};
use crate::kernels::profiler::{Cost, Stage, timed, timed_product};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Isa, Kernel, LANES, Simd, dispatch, dispatch_int_at};
use crate::kernels::team::Team;

/// A block of a row of inputs, quantised to 8 bits.
#[derive(Clone, Copy, Default)]
struct Inputs {
    quads: [u32; QUADS],
    scale: f32,
    /// Where the sums of a block start: the sum of all inputs, times −[`BIAS`](Quants::BIAS).
    start: u32,
}

/// Quantises some rows of inputs to 8 bits.
struct Narrow<'a> {
    x: Rows<'a>,
    k: usize,
    bias: u8,
    first: usize,
    /// `[rows, k / BLOCK]`
    to: &'a mut [Inputs],
}

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        for (i, to) in self.to.chunks_exact_mut(self.k.div_ceil(BLOCK)).enumerate() {
            let (blocks, rest) = self.x.row(self.first + i, self.k).as_chunks();
            for (to, numbers) in to.iter_mut().zip(blocks) {
                *to = narrow(numbers, self.bias);
            }
            if !rest.is_empty() {
                let mut numbers = [0.0; BLOCK];
                numbers[..rest.len()].copy_from_slice(rest);
                to[blocks.len()] = narrow(&numbers, self.bias);
            }
        }
    }
}

/// Plain loops, which the compiler turns into vectors.
#[inline(always)]
fn narrow(numbers: &[f32; BLOCK], bias: u8) -> Inputs {
    let scale = largest(numbers).abs() / 127.0;
    let inverse = inverse(scale);
    let mut bytes = [0; BLOCK];
    let mut sum = 0;
    for (byte, x) in bytes.iter_mut().zip(numbers) {
        *byte = (x * inverse + ROUND).to_bits() as u8;
        sum += i32::from(byte.cast_signed());
    }
    let mut quads = [0; QUADS];
    for (quad, bytes) in quads.iter_mut().zip(bytes.as_chunks().0) {
        *quad = u32::from_le_bytes(*bytes);
    }
    Inputs { quads, scale, start: (-i32::from(bias) * sum).cast_unsigned() }
}

/// A matrix `[n, k]` in panels, k filled up with zeros.
#[derive(Clone)]
pub(crate) struct Quantized<Q> {
    n: usize,
    k: usize,
    /// `[n / PANEL, k / BLOCK]`
    blocks: Vec<Q>,
}

impl<Q: Quants> Quantized<Q> {
    pub(crate) fn zeros(n: usize, k: usize) -> Self {
        Quantized { n, k, blocks: filled(n.div_ceil(PANEL) * k.div_ceil(BLOCK), Q::ZERO) }
    }

    pub(crate) fn num_bytes(&self) -> usize {
        size_of_val(self.blocks.as_slice())
    }

    /// Blocks of a row.
    fn width(&self) -> usize {
        self.k.div_ceil(BLOCK)
    }

    fn panel(&self, row: usize) -> &[Q] {
        &self.blocks[row / PANEL * self.width()..][..self.width()]
    }

    fn panel_mut(&mut self, row: usize) -> &mut [Q] {
        let width = self.width();
        &mut self.blocks[row / PANEL * width..][..width]
    }

    pub(crate) fn set_row(&mut self, row: usize, numbers: &[f32]) {
        set_row(self.panel_mut(row), row % PANEL, numbers);
    }

    pub(crate) fn set_rows(&mut self, team: &Team, fill: impl Fn(usize, &mut [f32]) + Sync) {
        let (n, k) = (self.n, self.k);
        team.for_each(self.blocks.chunks_mut(k.div_ceil(BLOCK).max(1)).enumerate(), |(panel, to)| {
            let mut numbers = vec![0.0; k];
            for row in panel * PANEL..n.min((panel + 1) * PANEL) {
                fill(row, &mut numbers);
                set_row(to, row % PANEL, &numbers);
            }
        });
    }

    pub(crate) fn row(&self, row: usize, numbers: &mut [f32]) {
        for (block, numbers) in self.panel(row).iter().zip(numbers.chunks_mut(BLOCK)) {
            let scale = block.scale(row % PANEL).to_f32();
            for (number, quant) in numbers.iter_mut().zip(block.get(row % PANEL)) {
                *number = scale * (f32::from(quant) - f32::from(Q::BIAS));
            }
        }
    }

    /// As [`Matrix::multiply`](super::matrix::Matrix::multiply).
    pub(crate) fn multiply(&self, level: Isa, team: &Team, x: Rows, m: usize, mut out: ArrayViewMut2<f32>, mode: Out) {
        /// Rows that one thread quantises at a time.
        const ROWS: usize = 16;
        thread_local! {
            static INPUTS: Scratch<Inputs> = const { Scratch::new(Vec::new()) };
        }
        let level = if level == Isa::Avx2Vnni && !Q::AVX_VNNI { Isa::Avx2 } else { level };
        let width = self.width();
        with_scratch(&INPUTS, m * width, |inputs| {
            team.for_each(inputs.chunks_mut((ROWS * width).max(1)).enumerate(), |(i, to)| {
                let work = Cost::numbers(2 * BLOCK * to.len());
                let narrow = Narrow { x, k: self.k, bias: Q::BIAS, first: i * ROWS, to };
                timed(Stage::Packing, work, || dispatch_int_at(level, narrow));
            });
            let x = &*inputs;
            let columns = PANEL * if m == 1 { 4 } else { 2 };
            team.for_each(out.axis_chunks_iter_mut(Axis(1), columns).enumerate(), |(i, out)| {
                let outputs = i * columns..i * columns + out.ncols();
                timed_product(m, outputs.len(), self.k, || {
                    dispatch_int_at(level, Product { x, w: self, outputs, out, mode });
                });
            });
        });
    }
}

/// The rows of a quantised matrix as files have them.
pub(crate) trait FileRows {
    /// Appends the quants of a row.
    fn bytes(&self, row: usize, bytes: &mut Vec<u8>);
    fn set_bytes(&mut self, row: usize, bytes: &[u8]);
    /// Appends the scales of a row.
    fn scales(&self, row: usize, scales: &mut Vec<f32>);
    fn set_scales(&mut self, row: usize, scales: &[f32]);
}

impl<Q: Quants> FileRows for Quantized<Q> {
    fn bytes(&self, row: usize, bytes: &mut Vec<u8>) {
        self.panel(row).iter().for_each(|block| Q::to_file(&block.get(row % PANEL), bytes));
    }

    fn set_bytes(&mut self, row: usize, bytes: &[u8]) {
        for (block, bytes) in self.panel_mut(row).iter_mut().zip(bytes.chunks_exact(Q::FILE_BYTES)) {
            block.set(row % PANEL, &Q::of_file(bytes));
        }
    }

    fn scales(&self, row: usize, scales: &mut Vec<f32>) {
        scales.extend(self.panel(row).iter().map(|block| block.scale(row % PANEL).to_f32()));
    }

    fn set_scales(&mut self, row: usize, scales: &[f32]) {
        for (block, scale) in self.panel_mut(row).iter_mut().zip(scales) {
            block.set_scale(row % PANEL, bf16::from_f32(*scale));
        }
    }
}

fn set_row<Q: Quants>(panel: &mut [Q], output: usize, numbers: &[f32]) {
    dispatch(SetRow { panel, output, numbers });
}

struct SetRow<'a, Q> {
    panel: &'a mut [Q],
    output: usize,
    numbers: &'a [f32],
}

impl<Q: Quants> Kernel for SetRow<'_, Q> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (block, numbers) in self.panel.iter_mut().zip(self.numbers.chunks(BLOCK)) {
            let mut all = [0.0; BLOCK];
            all[..numbers.len()].copy_from_slice(numbers);
            let (scale, quants) = Q::nearest(s, &all);
            block.set_scale(self.output, scale);
            block.set(self.output, &quants);
        }
    }
}

/// The columns `outputs` of a product, from a multiple of [`PANEL`] on.
struct Product<'a, Q> {
    /// `[m, k / BLOCK]`
    x: &'a [Inputs],
    w: &'a Quantized<Q>,
    outputs: Range<usize>,
    /// `[m, outputs]`
    out: ArrayViewMut2<'a, f32>,
    mode: Out,
}

impl<Q: Quants> Kernel for Product<'_, Q> {
    type Output = ();

    /// Panels outside, rows inside, as in the products of floats.
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let m = self.out.nrows();
        for panel in self.outputs.start / PANEL..self.outputs.end.div_ceil(PANEL) {
            let mut row = 0;
            while row < m {
                // as even as can be: a tile of one row would wait for its own sums
                let left = m - row;
                let rows = left.div_ceil(left.div_ceil(S::DOT_ROWS));
                // they are no more than that, but only so does the compiler leave out the tiles that are never taken
                match rows.min(S::DOT_ROWS) {
                    1 => self.tile::<S, 1>(s, row, panel),
                    2 => self.tile::<S, 2>(s, row, panel),
                    3 => self.tile::<S, 3>(s, row, panel),
                    4 => self.tile::<S, 4>(s, row, panel),
                    5 if S::DOT_ROWS > 4 => self.tile::<S, 5>(s, row, panel),
                    _ if S::DOT_ROWS > 4 => self.tile::<S, 6>(s, row, panel),
                    _ => unreachable!("a tile that does not fit the registers"),
                }
                row += rows;
            }
        }
    }
}

impl<Q: Quants> Product<'_, Q> {
    /// R rows from `row` on by one panel.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with plain indices the compiler keeps all sums in registers
    fn tile<S: Simd, const R: usize>(&mut self, s: S, row: usize, panel: usize) {
        /// How many bytes ahead weights are fetched for few rows.
        const AHEAD: usize = 4096;
        let blocks = self.w.width();
        let w = &self.w.blocks[panel * blocks..][..blocks];
        let mut x: [&[Inputs]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + r) * blocks..][..blocks];
        }
        // whether the sums of both halves of a block, integers and floats, stay in registers: then weights are read from one
        // end to the other
        let both = 4 * R <= S::TILE_ROWS * S::TILE_LINES;
        let mut sums = [[s.splat(0.0); 2]; R];
        if S::BY_PAIRS && R >= 4 {
            half_panel::<S, Q, R>(s, x, w, 0, &mut sums);
            half_panel::<S, Q, R>(s, x, w, 1, &mut sums);
        }
        for b in 0..if S::BY_PAIRS && R >= 4 { 0 } else { blocks } {
            if R < 3 {
                let ahead = w.as_ptr().wrapping_add(b).wrapping_byte_add(AHEAD);
                for line in (0..size_of::<Q>()).step_by(64) {
                    s.prefetch(ahead.wrapping_byte_add(line));
                }
            }
            let scales = s.load_int(w[b].scales());
            let scales = [s.low_bf16(scales), s.high_bf16(scales)];
            if both {
                block::<S, Q, R, 2>(s, x, w, b, 0, scales, &mut sums);
            } else {
                block::<S, Q, R, 1>(s, x, w, b, 0, scales, &mut sums);
                block::<S, Q, R, 1>(s, x, w, b, 1, scales, &mut sums);
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let out = self.out.row_mut(row + r).into_slice().expect("numbers side by side");
            for (sum, out) in sums.into_iter().zip(out[panel * PANEL - self.outputs.start..].chunks_mut(LANES)) {
                finish(s, sum, out, None, self.mode);
            }
        }
    }
}

/// Adds the products of all blocks, of one half of the panel, by [`dot_rows`](Simd::dot_rows). That takes all
/// registers; with both halves of a block in turn, the compiler would spill the results of the first.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as above
fn half_panel<S: Simd, Q: Quants, const R: usize>(
    s: S,
    x: [&[Inputs]; R],
    w: &[Q],
    half: usize,
    sums: &mut [[S::V; 2]; R],
) {
    for b in 0..w.len() {
        let (mut quads, mut starts) = ([&[0; QUADS]; R], [0; R]);
        for r in 0..R {
            (quads[r], starts[r]) = (&x[r][b].quads, x[r][b].start);
        }
        let whole = w[b].dot_rows(s, quads, starts, half);
        let scales = s.load_int(w[b].scales());
        let scales = if half == 0 { s.low_bf16(scales) } else { s.high_bf16(scales) };
        for r in 0..R {
            let (sum, scale) = (&mut sums[r][half], s.splat(x[r][b].scale));
            *sum = s.mul_add(s.mul(s.to_float(whole[r]), scales), scale, *sum);
        }
    }
}

/// Adds the products of block b, of H halves of the panel from `first` on.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as above
fn block<S: Simd, Q: Quants, const R: usize, const H: usize>(
    s: S,
    x: [&[Inputs]; R],
    w: &[Q],
    b: usize,
    first: usize,
    scales: [S::V; 2],
    sums: &mut [[S::V; 2]; R],
) {
    let mut whole = [[s.splat_int(0); H]; R];
    for r in 0..R {
        whole[r] = [Q::begin(s, s.splat_int(x[r][b].start)); H];
    }
    // a loop of two rounds: unrolled, the compiler no longer keeps the sums in registers
    for four in 0..if S::BY_LANE { QUADS / 4 } else { 0 } {
        quad::<S, Q, R, H, 0>(s, x, &w[b], b, first, four, &mut whole);
        quad::<S, Q, R, H, 1>(s, x, &w[b], b, first, four, &mut whole);
        quad::<S, Q, R, H, 2>(s, x, &w[b], b, first, four, &mut whole);
        quad::<S, Q, R, H, 3>(s, x, &w[b], b, first, four, &mut whole);
    }
    for quad in 0..if S::BY_LANE { 0 } else { QUADS } {
        let mut words = [s.splat_int(0); H];
        for half in 0..H {
            words[half] = w[b].load(s, quad, first + half);
        }
        for r in 0..R {
            let x = s.splat_int(x[r][b].quads[quad]);
            for half in 0..H {
                whole[r][half] = Q::dot(s, words[half], x, whole[r][half]);
            }
        }
    }
    for r in 0..R {
        let scale = s.splat(x[r][b].scale);
        for half in 0..H {
            let whole = s.to_float(Q::end(s, whole[r][half], s.splat_int(x[r][b].start)));
            let sum = &mut sums[r][first + half];
            *sum = s.mul_add(s.mul(whole, scales[first + half]), scale, *sum);
        }
    }
}

/// Adds the products of one of four quads of a block.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as above
fn quad<S: Simd, Q: Quants, const R: usize, const H: usize, const LANE: usize>(
    s: S,
    x: [&[Inputs]; R],
    w: &Q,
    b: usize,
    first: usize,
    four: usize,
    whole: &mut [[S::I; H]; R],
) {
    let mut words = [s.splat_int(0); H];
    for half in 0..H {
        words[half] = w.load(s, 4 * four + LANE, first + half);
    }
    for r in 0..R {
        let x = &x[r][b].quads.as_chunks().0[four];
        for half in 0..H {
            whole[r][half] = Q::dot_lane::<S, LANE>(s, words[half], x, whole[r][half]);
        }
    }
}

#[cfg(test)]
mod tests;
