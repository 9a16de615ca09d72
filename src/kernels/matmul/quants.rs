//! Weights of 8 and of 4 bits: how they are chosen, and how they lie in memory and in files.

use half::bf16;

use crate::kernels::simd::{LANES, Simd};

/// Inputs that share a scale.
pub(crate) const BLOCK: usize = 32;

/// A word for each output of a panel.
type Words = [[u32; LANES]; 2];

/// Quads of a block. A quad is the bytes of four inputs, the first in the low bits.
pub(super) const QUADS: usize = BLOCK / 4;

/// A panel's weights for [`BLOCK`] inputs.
pub(crate) trait Quants: Copy + Send + Sync + 'static {
    const ZERO: Self;
    /// The offset with which bytes are stored.
    const BIAS: u8;
    /// The least quantised value.
    const LEAST: f32;
    /// The largest quantised value.
    const MOST: f32;
    /// Bytes that a row of a block takes in files.
    const FILE_BYTES: usize;
    /// Whether AVX-VNNI is of use beside AVX2.
    const AVX_VNNI: bool;
    /// The scale and the quantised values of the nearest weights, stored with the offset [`BIAS`](Self::BIAS).
    fn nearest<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> (bf16, [u8; BLOCK]);
    /// The scales as pairs, the first half of the outputs in the low bits.
    fn scales(&self) -> &[u32; LANES];
    fn scales_mut(&mut self) -> &mut [u32; LANES];
    fn set(&mut self, output: usize, quants: &[u8; BLOCK]);
    fn get(&self, output: usize) -> [u8; BLOCK];
    /// The weights for four of the inputs, of the first or the second half of the outputs.
    fn load<S: Simd>(&self, s: S, quad: usize, half: usize) -> S::I;
    /// The sums of a block, which start with `start`, are begun,
    #[inline(always)]
    fn begin<S: Simd>(s: S, start: S::I) -> S::I {
        s.begin(start)
    }
    /// get all quads of a block,
    #[inline(always)]
    fn dot<S: Simd>(s: S, w: S::I, x: S::I, sums: S::I) -> S::I {
        s.dot(w, x, sums)
    }
    /// The same for one of four quads x.
    #[inline(always)]
    fn dot_lane<S: Simd, const LANE: usize>(s: S, w: S::I, x: &[u32; 4], sums: S::I) -> S::I {
        s.dot_lane::<LANE>(w, x, sums)
    }
    /// and are ended.
    #[inline(always)]
    fn end<S: Simd>(_s: S, sums: S::I, _start: S::I) -> S::I {
        sums
    }
    /// All of that at once, for one half of the outputs, as [`Simd::dot_rows`].
    fn dot_rows<S: Simd, const R: usize>(
        &self,
        s: S,
        x: [&[u32; QUADS]; R],
        starts: [u32; R],
        half: usize,
    ) -> [S::I; R];
    /// The quantised values as they are in files, and back.
    fn to_file(quants: &[u8; BLOCK], bytes: &mut Vec<u8>);
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
pub(crate) struct Q8Block {
    scales: [u32; LANES],
    quads: [Words; QUADS],
}

/// Each byte holds an input of one quad in its low bits, and of the next one in its high bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q4Block {
    scales: [u32; LANES],
    pairs: [Words; QUADS / 2],
}

impl Quants for Q8Block {
    const ZERO: Self = Q8Block { scales: [0; LANES], quads: [[[0x8080_8080; LANES]; 2]; QUADS] };
    const BIAS: u8 = 128;
    const LEAST: f32 = -127.0;
    const MOST: f32 = 127.0;
    const FILE_BYTES: usize = BLOCK;
    const AVX_VNNI: bool = true;

    #[inline(always)]
    fn nearest<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> (bf16, [u8; BLOCK]) {
        let scale = bf16::from_f32(largest(numbers).abs() / 127.0);
        let [low, high] = load(s, numbers);
        let quants = [quant::<S, Self>(s, low, scale), quant::<S, Self>(s, high, scale)];
        (scale, bytes::<S, Self>(s, quants))
    }

    fn scales(&self) -> &[u32; LANES] {
        &self.scales
    }

    fn scales_mut(&mut self) -> &mut [u32; LANES] {
        &mut self.scales
    }

    fn set(&mut self, output: usize, quants: &[u8; BLOCK]) {
        for (quad, bytes) in self.quads.iter_mut().zip(quants.as_chunks().0) {
            quad[output / LANES][output % LANES] = u32::from_le_bytes(*bytes);
        }
    }

    fn get(&self, output: usize) -> [u8; BLOCK] {
        let mut quants = [0; BLOCK];
        for (quad, bytes) in self.quads.iter().zip(quants.as_chunks_mut().0) {
            *bytes = quad[output / LANES][output % LANES].to_le_bytes();
        }
        quants
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, quad: usize, half: usize) -> S::I {
        s.load_int(&self.quads[quad][half & 1])
    }

    #[inline(always)]
    fn dot_rows<S: Simd, const R: usize>(
        &self,
        s: S,
        x: [&[u32; QUADS]; R],
        starts: [u32; R],
        half: usize,
    ) -> [S::I; R] {
        s.dot_rows(x, starts, &self.quads, half)
    }

    fn to_file(quants: &[u8; BLOCK], bytes: &mut Vec<u8>) {
        bytes.extend(quants);
    }

    fn of_file(bytes: &[u8]) -> [u8; BLOCK] {
        bytes.try_into().expect("the bytes of a block")
    }
}

impl Quants for Q4Block {
    const ZERO: Self = Q4Block { scales: [0; LANES], pairs: [[[0x8888_8888; LANES]; 2]; QUADS / 2] };
    const BIAS: u8 = 8;
    const LEAST: f32 = -8.0;
    const MOST: f32 = 7.0;
    const FILE_BYTES: usize = BLOCK / 2;
    /// A sum of products by `maddubs` takes two instructions here, and fewer registers: 1.6 times as fast on a Sapphire Rapids.
    const AVX_VNNI: bool = false;

    /// Of several scales, the one with the least squared error.
    #[inline(always)]
    fn nearest<S: Simd>(s: S, numbers: &[f32; BLOCK]) -> (bf16, [u8; BLOCK]) {
        let (largest, [low, high]) = (largest(numbers), load(s, numbers));
        let (mut best, mut least) = (bf16::from_f32(largest / DIVISORS[0]), f32::INFINITY);
        for divisor in DIVISORS {
            let scale = bf16::from_f32(largest / divisor);
            let (mut errors, whole) = (s.splat(0.0), s.splat(scale.to_f32()));
            for x in [low, high] {
                // not fused, so that all instruction sets choose the same scale
                let error = s.sub(x, s.mul(quant::<S, Self>(s, x, scale), whole));
                errors = s.add(errors, s.mul(error, error));
            }
            let error = s.sum(errors);
            // without a branch, which would be mispredicted half of the time
            (best, least) = (if error < least { scale } else { best }, if error < least { error } else { least });
        }
        let quants = [quant::<S, Self>(s, low, best), quant::<S, Self>(s, high, best)];
        (best, bytes::<S, Self>(s, quants))
    }

    fn scales(&self) -> &[u32; LANES] {
        &self.scales
    }

    fn scales_mut(&mut self) -> &mut [u32; LANES] {
        &mut self.scales
    }

    fn set(&mut self, output: usize, quants: &[u8; BLOCK]) {
        for (pair, bytes) in self.pairs.iter_mut().zip(quants.as_chunks::<8>().0) {
            let byte = |i: usize| bytes[i] & 0xf | bytes[i + 4] << 4;
            pair[output / LANES][output % LANES] = u32::from_le_bytes([0, 1, 2, 3].map(byte));
        }
    }

    fn get(&self, output: usize) -> [u8; BLOCK] {
        let mut quants = [0; BLOCK];
        for (pair, eight) in self.pairs.iter().zip(quants.as_chunks_mut::<8>().0) {
            for (i, byte) in pair[output / LANES][output % LANES].to_le_bytes().into_iter().enumerate() {
                (eight[i], eight[i + 4]) = (byte & 0xf, byte >> 4);
            }
        }
        quants
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, quad: usize, half: usize) -> S::I {
        // two quads after each other load the same words, which the compiler sees
        let words = s.load_int(&self.pairs[quad / 2][half & 1]);
        if quad.is_multiple_of(2) { s.low_nibbles(words) } else { s.high_nibbles(words) }
    }

    #[inline(always)]
    fn begin<S: Simd>(s: S, start: S::I) -> S::I {
        s.begin_nibbles(start)
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, w: S::I, x: S::I, sums: S::I) -> S::I {
        s.dot_nibbles(w, x, sums)
    }

    #[inline(always)]
    fn dot_lane<S: Simd, const LANE: usize>(s: S, w: S::I, x: &[u32; 4], sums: S::I) -> S::I {
        s.dot_nibbles_lane::<LANE>(w, x, sums)
    }

    #[inline(always)]
    fn end<S: Simd>(s: S, sums: S::I, start: S::I) -> S::I {
        s.end_nibbles(sums, start)
    }

    #[inline(always)]
    fn dot_rows<S: Simd, const R: usize>(
        &self,
        s: S,
        x: [&[u32; QUADS]; R],
        starts: [u32; R],
        half: usize,
    ) -> [S::I; R] {
        s.dot_rows(x, starts, &self.pairs, half)
    }

    fn to_file(quants: &[u8; BLOCK], bytes: &mut Vec<u8>) {
        bytes.extend(quants.as_chunks().0.iter().map(|[first, second]| first & 0xf | second << 4));
    }

    fn of_file(bytes: &[u8]) -> [u8; BLOCK] {
        let mut quants = [0; BLOCK];
        for (pair, byte) in quants.as_chunks_mut().0.iter_mut().zip(bytes) {
            *pair = [byte & 0xf, byte >> 4];
        }
        quants
    }
}

/// The divisors tried: the number of largest magnitude in a block of 4 bits over one of them is the scale. −8 maps that
/// number exactly to the value of that magnitude, the others trade its accuracy for that of the rest. Against −8 alone
/// they lower the error by a twentieth.
const DIVISORS: [f32; 8] = [-8.0, -6.9, -7.15, -7.4, -7.65, -7.9, -8.3, -8.6];

/// The number of the largest magnitude, or NaN if there is one that is not finite.
#[inline(always)]
pub(super) fn largest(numbers: &[f32; BLOCK]) -> f32 {
    // magnitudes are in the order of their bits; the sign comes last
    let bits = numbers.iter().fold(0, |largest, x| x.to_bits().rotate_left(1).max(largest));
    let largest = f32::from_bits(bits.rotate_right(1));
    if largest.is_finite() { largest } else { f32::NAN }
}

/// Added to a number of −2²² … 2²², it leaves the nearest whole number, to even in the middle, in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;

/// 1/scale, or 0 where that is too large.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
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
fn quant<S: Simd, Q: Quants>(s: S, x: S::V, scale: bf16) -> S::V {
    let round = s.splat(ROUND);
    // first into range: beyond it, rounding would be wrong
    let x = s.mul(x, s.splat(inverse(scale.to_f32())));
    let x = s.max(s.min(x, s.splat(Q::MOST)), s.splat(Q::LEAST));
    s.sub(s.add(x, round), round)
}

#[inline(always)]
fn bytes<S: Simd, Q: Quants>(s: S, quants: [S::V; 2]) -> [u8; BLOCK] {
    let mut numbers = [[0.0; LANES]; 2];
    for (quants, numbers) in quants.into_iter().zip(&mut numbers) {
        s.store(s.add(quants, s.splat(ROUND + f32::from(Q::BIAS))), numbers);
    }
    let mut bytes = [0; BLOCK];
    for (byte, number) in bytes.iter_mut().zip(numbers.as_flattened()) {
        *byte = number.to_bits() as u8;
    }
    bytes
}
