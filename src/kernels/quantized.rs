//! Matrices of 8 or 4 bits a weight, and their products in whole numbers.
//!
//! [`BLOCK`] consecutive inputs of an output share a scale, a bfloat16: a weight is its scale times a whole number of −127 …
//! 127, or of −8 … 7. For the product the inputs are brought to 8 bits, too, each block of a row with a scale of its own. The
//! products of a block are summed exactly, in whole numbers, and the blocks in ascending order in `f32`; so an output is the
//! same bits for any number of rows and threads.
//!
//! The CPU multiplies bytes without a sign by bytes with one. So weights are kept 128 (or 8) too high, and every sum starts
//! with as many times the inputs' sum below zero.

use std::ops::Range;

use half::bf16;
use ndarray::{ArrayViewMut2, Axis};

use super::clock::timed_product;
use super::matmul::{AHEAD, Out, PANEL, Rows, finish};
use super::parallel;
use super::simd::{Kernel, LANES, Level, Simd, dispatch, dispatch_whole_at};
use super::team::Team;

/// Inputs that share a scale.
pub(crate) const BLOCK: usize = 32;

/// Lanes of [`PANEL`] outputs.
type Words = [[u32; LANES]; 2];

/// Four inputs' bytes, the first in the low bits.
const QUADS: usize = BLOCK / 4;

/// A panel's weights for [`BLOCK`] inputs.
pub(crate) trait Quants: Copy + Send + Sync + 'static {
    const ZERO: Self;
    /// What the bytes are too high by.
    const BIAS: u8;
    /// The least quotient.
    const LEAST: f32;
    /// The largest quotient.
    const MOST: f32;
    /// Bytes that a row of a block takes in files.
    const FILE_BYTES: usize;
    /// The scale and the quotients of the nearest weights there are; these are too high by [`BIAS`](Self::BIAS).
    fn nearest<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> (bf16, [u8; BLOCK]);
    /// The scales as pairs, the first half of the outputs in the low bits.
    fn scales(&self) -> &[u32; LANES];
    fn scales_mut(&mut self) -> &mut [u32; LANES];
    fn set(&mut self, output: usize, quotients: &[u8; BLOCK]);
    fn get(&self, output: usize) -> [u8; BLOCK];
    /// The weights for four of the inputs.
    fn load<S: Simd>(&self, s: S, quad: usize) -> [S::I; 2];
    /// Quotients as they stand in files, and back.
    fn to_file(quotients: &[u8; BLOCK], bytes: &mut Vec<u8>);
    fn of_file(bytes: &[u8]) -> [u8; BLOCK];

    fn scale(&self, output: usize) -> bf16 {
        bf16::from_bits((self.scales()[output % LANES] >> (16 * (output / LANES))) as u16)
    }

    fn set_scale(&mut self, output: usize, scale: bf16) {
        let (pair, shift) = (&mut self.scales_mut()[output % LANES], 16 * (output / LANES));
        *pair = *pair & !(0xffff << shift) | u32::from(scale.to_bits()) << shift;
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Eight {
    scales: [u32; LANES],
    quads: [Words; QUADS],
}

/// Each byte holds an input of one quad in its low bits, and of the next one in its high bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Four {
    scales: [u32; LANES],
    pairs: [Words; QUADS / 2],
}

impl Quants for Eight {
    const ZERO: Self = Eight { scales: [0; LANES], quads: [[[0x8080_8080; LANES]; 2]; QUADS] };
    const BIAS: u8 = 128;
    const LEAST: f32 = -127.0;
    const MOST: f32 = 127.0;
    const FILE_BYTES: usize = BLOCK;

    #[inline(always)]
    fn nearest<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> (bf16, [u8; BLOCK]) {
        let scale = bf16::from_f32(largest(numbers).abs() / 127.0);
        let [low, high] = load(s, numbers);
        let quotients = [quotient::<S, Self>(s, low, scale), quotient::<S, Self>(s, high, scale)];
        (scale, bytes::<S, Self>(s, quotients))
    }

    fn scales(&self) -> &[u32; LANES] {
        &self.scales
    }

    fn scales_mut(&mut self) -> &mut [u32; LANES] {
        &mut self.scales
    }

    fn set(&mut self, output: usize, quotients: &[u8; BLOCK]) {
        for (quad, bytes) in self.quads.iter_mut().zip(quotients.as_chunks().0) {
            quad[output / LANES][output % LANES] = u32::from_le_bytes(*bytes);
        }
    }

    fn get(&self, output: usize) -> [u8; BLOCK] {
        let mut quotients = [0; BLOCK];
        for (quad, bytes) in self.quads.iter().zip(quotients.as_chunks_mut().0) {
            *bytes = quad[output / LANES][output % LANES].to_le_bytes();
        }
        quotients
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, quad: usize) -> [S::I; 2] {
        let [low, high] = &self.quads[quad];
        [s.load_whole(low), s.load_whole(high)]
    }

    fn to_file(quotients: &[u8; BLOCK], bytes: &mut Vec<u8>) {
        bytes.extend(quotients);
    }

    fn of_file(bytes: &[u8]) -> [u8; BLOCK] {
        bytes.try_into().expect("the bytes of a block")
    }
}

impl Quants for Four {
    const ZERO: Self = Four { scales: [0; LANES], pairs: [[[0x8888_8888; LANES]; 2]; QUADS / 2] };
    const BIAS: u8 = 8;
    const LEAST: f32 = -8.0;
    const MOST: f32 = 7.0;
    const FILE_BYTES: usize = BLOCK / 2;

    /// Of some scales, that with the least squared error.
    #[inline(always)]
    fn nearest<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> (bf16, [u8; BLOCK]) {
        let (largest, [low, high]) = (largest(numbers), load(s, numbers));
        let (mut best, mut least) = (bf16::from_f32(largest / DIVISORS[0]), f32::INFINITY);
        for divisor in DIVISORS {
            let scale = bf16::from_f32(largest / divisor);
            let (mut errors, whole) = (s.splat(0.0), s.splat(scale.to_f32()));
            for x in [low, high] {
                // not fused, so that all instruction sets choose the same scale
                let error = s.sub(x, s.mul(quotient::<S, Self>(s, x, scale), whole));
                errors = s.add(errors, s.mul(error, error));
            }
            let error = s.sum(errors);
            // without a branch, which would be mispredicted half of the time
            (best, least) = (if error < least { scale } else { best }, if error < least { error } else { least });
        }
        let quotients = [quotient::<S, Self>(s, low, best), quotient::<S, Self>(s, high, best)];
        (best, bytes::<S, Self>(s, quotients))
    }

    fn scales(&self) -> &[u32; LANES] {
        &self.scales
    }

    fn scales_mut(&mut self) -> &mut [u32; LANES] {
        &mut self.scales
    }

    fn set(&mut self, output: usize, quotients: &[u8; BLOCK]) {
        for (pair, bytes) in self.pairs.iter_mut().zip(quotients.as_chunks::<8>().0) {
            let byte = |i: usize| bytes[i] & 0xf | bytes[i + 4] << 4;
            pair[output / LANES][output % LANES] = u32::from_le_bytes([0, 1, 2, 3].map(byte));
        }
    }

    fn get(&self, output: usize) -> [u8; BLOCK] {
        let mut quotients = [0; BLOCK];
        for (pair, eight) in self.pairs.iter().zip(quotients.as_chunks_mut::<8>().0) {
            for (i, byte) in pair[output / LANES][output % LANES].to_le_bytes().into_iter().enumerate() {
                (eight[i], eight[i + 4]) = (byte & 0xf, byte >> 4);
            }
        }
        quotients
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, quad: usize) -> [S::I; 2] {
        // two quads after each other load the same words, which the compiler sees
        let [low, high] = &self.pairs[quad / 2];
        let (low, high) = (s.load_whole(low), s.load_whole(high));
        if quad.is_multiple_of(2) {
            [s.low_nibbles(low), s.low_nibbles(high)]
        } else {
            [s.high_nibbles(low), s.high_nibbles(high)]
        }
    }

    fn to_file(quotients: &[u8; BLOCK], bytes: &mut Vec<u8>) {
        bytes.extend(quotients.as_chunks().0.iter().map(|[first, second]| first & 0xf | second << 4));
    }

    fn of_file(bytes: &[u8]) -> [u8; BLOCK] {
        let mut quotients = [0; BLOCK];
        for (pair, byte) in quotients.as_chunks_mut().0.iter_mut().zip(bytes) {
            *pair = [byte & 0xf, byte >> 4];
        }
        quotients
    }
}

/// What the number of largest magnitude in a block of 4 bits is divided by for a scale: −8 maps it to the one quotient of that
/// magnitude, the others let it be off for the sake of the rest. Against −8 alone they lower the error by a twentieth.
const DIVISORS: [f32; 8] = [-8.0, -6.9, -7.15, -7.4, -7.65, -7.9, -8.3, -8.6];

/// The number of the largest magnitude, or NaN if there is one that is not finite.
#[inline(always)]
fn largest(numbers: &[f32; BLOCK]) -> f32 {
    // magnitudes are in the order of their bits; the sign comes last
    let bits = numbers.iter().fold(0, |largest, x| x.to_bits().rotate_left(1).max(largest));
    let largest = f32::from_bits(bits.rotate_right(1));
    if largest.is_finite() { largest } else { f32::NAN }
}

/// Added to a number of −2²² … 2²², it leaves the nearest whole number, to even in the middle, in the low bits.
const ROUND: f32 = 12_582_912.0;

/// 1/scale, or 0 where that is too large.
#[inline(always)]
fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

#[inline(always)]
fn load<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> [S::V; 2] {
    let (lines, _) = numbers.as_chunks();
    [s.load(&lines[0]), s.load(&lines[1])]
}

/// The nearest whole numbers to x/scale.
#[inline(always)]
fn quotient<S: Simd, Q: Quants>(s: S, x: S::V, scale: bf16) -> S::V {
    let round = s.splat(ROUND);
    // first into range: beyond it, rounding would be wrong
    let x = s.mul(x, s.splat(inverse(scale.to_f32())));
    let x = s.max(s.min(x, s.splat(Q::MOST)), s.splat(Q::LEAST));
    s.sub(s.add(x, round), round)
}

#[inline(always)]
fn bytes<S: Simd, Q: Quants>(s: S, quotients: [S::V; 2]) -> [u8; BLOCK] {
    let mut numbers = [[0.0; LANES]; 2];
    for (quotients, numbers) in quotients.into_iter().zip(&mut numbers) {
        s.store(s.add(quotients, s.splat(ROUND + f32::from(Q::BIAS))), numbers);
    }
    let mut bytes = [0; BLOCK];
    for (byte, number) in bytes.iter_mut().zip(numbers.as_flattened()) {
        *byte = number.to_bits() as u8;
    }
    bytes
}

/// A block of a row of inputs in 8 bits.
#[derive(Clone, Copy)]
struct Inputs {
    quads: [u32; QUADS],
    scale: f32,
    /// Where the sums of a block start: the sum of all inputs, times −[`BIAS`](Quants::BIAS).
    start: u32,
}

const NO_INPUTS: Inputs = Inputs { quads: [0; QUADS], scale: 0.0, start: 0 };

/// Brings some rows of inputs to 8 bits.
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
pub(crate) struct Quantized<Q> {
    n: usize,
    k: usize,
    /// `[n / PANEL, k / BLOCK]`
    blocks: Vec<Q>,
}

impl<Q: Quants> Quantized<Q> {
    pub(crate) fn zeros(n: usize, k: usize) -> Self {
        Quantized { n, k, blocks: vec![Q::ZERO; n.div_ceil(PANEL) * k.div_ceil(BLOCK)] }
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

    pub(crate) fn set_rows(&mut self, fill: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let (n, k) = (self.n, self.k);
        let panels = self.blocks.chunks_mut(k.div_ceil(BLOCK).max(1)).enumerate().collect();
        parallel::for_each_if(n * k, panels, |(panel, to)| {
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
            for (number, quotient) in numbers.iter_mut().zip(block.get(row % PANEL)) {
                *number = scale * (f32::from(quotient) - f32::from(Q::BIAS));
            }
        }
    }

    /// As [`Matrix::multiply`](super::matrix::Matrix::multiply).
    pub(crate) fn multiply(
        &self,
        level: Level,
        team: &Team,
        x: Rows,
        m: usize,
        mut out: ArrayViewMut2<f32>,
        mode: Out,
    ) {
        /// Rows that one thread narrows at a time.
        const ROWS: usize = 16;
        let width = self.width();
        let mut inputs = vec![NO_INPUTS; m * width];
        if width > 0 {
            team.for_each(inputs.chunks_mut(ROWS * width).enumerate(), |(i, to)| {
                let narrow = Narrow { x, k: self.k, bias: Q::BIAS, first: i * ROWS, to };
                dispatch_whole_at(level, narrow);
            });
        }
        let x = inputs.as_slice();
        let columns = PANEL * side_by_side(m).max(2);
        team.for_each(out.axis_chunks_iter_mut(Axis(1), columns).enumerate(), |(i, out)| {
            let outputs = i * columns..i * columns + out.ncols();
            timed_product(m, outputs.len(), self.k, || {
                dispatch_whole_at(level, Product { x, w: self, outputs, out, mode });
            });
        });
    }
}

/// The rows of a quantised matrix as files have them.
pub(crate) trait FileRows {
    /// Appends the quotients of a row.
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

/// Few rows leave registers for several panels, whose sums then do not wait for each other.
fn side_by_side(m: usize) -> usize {
    match m {
        1 => 4,
        2 => 2,
        _ => 1,
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
            let (scale, quotients) = Q::nearest(s, &all);
            block.set_scale(self.output, scale);
            block.set(self.output, &quotients);
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
        let panels = self.outputs.end.div_ceil(PANEL);
        let mut panel = self.outputs.start / PANEL;
        while panel < panels {
            let wide = side_by_side(m);
            let width = if panel + wide <= panels { wide } else { 1 };
            let mut row = 0;
            while row < m {
                // as even as can be: a tile of one row would wait for its own sums
                let left = m - row;
                let rows = left.div_ceil(left.div_ceil(S::TILE_ROWS.div_ceil(2).max(2)));
                match (rows, width) {
                    (1, 4) => self.tile::<S, 1, 4>(s, row, panel),
                    (2, 2) => self.tile::<S, 2, 2>(s, row, panel),
                    (1, _) => self.tile::<S, 1, 1>(s, row, panel),
                    (2, _) => self.tile::<S, 2, 1>(s, row, panel),
                    (3, _) => self.tile::<S, 3, 1>(s, row, panel),
                    (4, _) => self.tile::<S, 4, 1>(s, row, panel),
                    (5, _) => self.tile::<S, 5, 1>(s, row, panel),
                    _ => self.tile::<S, 6, 1>(s, row, panel),
                }
                row += rows;
            }
            panel += width;
        }
    }
}

impl<Q: Quants> Product<'_, Q> {
    /// R rows from `row` on by P panels from `panel` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with plain indices the compiler keeps all sums in registers
    fn tile<S: Simd, const R: usize, const P: usize>(&mut self, s: S, row: usize, panel: usize) {
        let blocks = self.w.width();
        let mut w: [&[Q]; P] = [&[]; P];
        for (p, w) in w.iter_mut().enumerate() {
            *w = &self.w.blocks[(panel + p) * blocks..][..blocks];
        }
        let mut x: [&[Inputs]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + r) * blocks..][..blocks];
        }
        let mut sums = [[[s.splat(0.0); 2]; P]; R];
        for b in 0..blocks {
            if R * P < 6 && R < 3 {
                for p in 0..P {
                    let ahead = w[p].as_ptr().wrapping_add(b).wrapping_byte_add(AHEAD);
                    for line in (0..size_of::<Q>()).step_by(64) {
                        s.prefetch(ahead.wrapping_byte_add(line));
                    }
                }
            }
            let mut whole = [[[s.splat_whole(0); 2]; P]; R];
            for r in 0..R {
                whole[r] = [[s.splat_whole(x[r][b].start); 2]; P];
            }
            for quad in 0..QUADS {
                for p in 0..P {
                    let [low, high] = w[p][b].load(s, quad);
                    for r in 0..R {
                        let x = s.splat_whole(x[r][b].quads[quad]);
                        whole[r][p][0] = s.dot(low, x, whole[r][p][0]);
                        whole[r][p][1] = s.dot(high, x, whole[r][p][1]);
                    }
                }
            }
            for p in 0..P {
                let scales = w[p][b].scales();
                let (low, high) = (s.load_bf16_low(scales), s.load_bf16_high(scales));
                for r in 0..R {
                    let scale = s.splat(x[r][b].scale);
                    sums[r][p][0] = s.mul_add(s.mul(s.to_float(whole[r][p][0]), low), scale, sums[r][p][0]);
                    sums[r][p][1] = s.mul_add(s.mul(s.to_float(whole[r][p][1]), high), scale, sums[r][p][1]);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let out = self.out.row_mut(row + r).into_slice().expect("numbers side by side");
            for (p, sums) in sums.into_iter().enumerate() {
                finish(s, sums, &mut out[(panel + p) * PANEL - self.outputs.start..], None, self.mode);
            }
        }
    }
}

#[cfg(test)]
#[path = "quantized_tests.rs"]
mod tests;
