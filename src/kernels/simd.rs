//! Sixteen lanes of `f32` on whatever the CPU has; the instruction sets are in `x86.rs`, `neon.rs` and `wasm.rs`, their
//! choice in `isa.rs`. This module, `matmul/amx.rs`, [`team`](super::team) and `memory` are the only places of the
//! crate with `unsafe` code.
//!
//! A kernel is a struct of its arguments that implements [`Kernel`]; its `run` is written once, in safe code, over the
//! operations of [`Simd`]. [`dispatch`] compiles it for every instruction set and picks one at run time. A value of a
//! type implementing `Simd` is the proof that the CPU has the instructions, which is why its methods are safe.
//!
//! The environment variable `HYMBA_SIMD=scalar|avx2|avx2-vnni|avx512|neon` forces a path (if the CPU has it), so that tests can prove
//! each one was taken. `avx512` and less leaves out AMX.

pub(crate) use isa::Isa;

mod isa;

/// Numbers in one vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// Sixteen numbers side by side: a cache line. Of a matrix, half a panel's weights for one input.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [f32; LANES]);

/// Two lines of words: of a matrix in bfloat16, a panel's weights for two inputs, the first of them in the low bits.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Words(pub [[u32; LANES]; 2]);

/// A kernel: a struct of arguments whose `run` must be `#[inline(always)]`, so that it is compiled inside the function
/// that turns the instruction set on.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Vector operations of one instruction set. A new one needs only those without a default; the second half, for numbers
/// of 16, 8 and 4 bits, is for language models and small files, in plain code where there is nothing better.
pub(crate) trait Simd: Copy {
    /// Sixteen numbers.
    type V: Copy;
    /// Sixteen whole numbers of 32 bits, or sixteen times four of 8.
    type I: Copy;
    /// Rows and vectors of the product tile whose sums fit the register file beside what is multiplied. The rows divide 12.
    const TILE_ROWS: usize;
    const TILE_LINES: usize;
    /// Whether [`prefetch`](Self::prefetch) does anything.
    const PREFETCHES: bool = false;
    /// Whether an instruction multiplies vectors by one lane of another: then products load four inputs at a time.
    const BY_LANE: bool = false;
    /// Rows of a tile for which the compiler keeps the sums in registers then, if [`six_rows`](Self::six_rows) is not for it.
    const LANE_ROWS: usize = Self::TILE_ROWS;
    /// Whether tiles of four rows and more are computed by [`dot_rows`](Self::dot_rows), which takes up to six.
    const BY_PAIRS: bool = false;
    /// As `TILE_ROWS`, by `TILE_LINES` lines of whole numbers: at most six.
    const DOT_ROWS: usize = 4;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn store(self, v: Self::V, x: &mut [f32; LANES]);
    fn load_int(self, x: &[u32; LANES]) -> Self::I;
    fn store_int(self, v: Self::I, x: &mut [u32; LANES]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a·b + c for one of four numbers b.
    #[inline(always)]
    fn mul_add_lane<const LANE: usize>(self, a: Self::V, b: &[f32; 4], c: Self::V) -> Self::V {
        self.mul_add(a, self.splat(b[LANE]), c)
    }
    /// Adds to the sums of six rows their inputs' products with one of the two lines of weights of each input, and says of how many
    /// inputs: where the compiler does not keep all of that in registers.
    #[inline(always)]
    fn six_rows(self, _x: [&[[f32; 4]]; 6], _w: &[[Line; 2]], _line: usize, _sums: &mut [Self::V; 6]) -> usize {
        0
    }
    /// The larger of a and b; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of a and b; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;

    /// 2^n for whole n in −126 … 127.
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        let n = floats(self, n);
        self.load(&lanewise(|i| f32::from_bits((n[i] + EXPONENT_MAGIC).to_bits() << 23)))
    }
    /// The sum of the lanes, in an order fixed for all instruction sets.
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// The largest lane, if none is NaN.
    fn largest(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    /// The first numbers of `x`, at most sixteen; the other lanes are zero.
    #[inline(always)]
    fn load_some(self, x: &[f32]) -> Self::V {
        match x.first_chunk() {
            Some(full) => self.load(full),
            None => {
                let mut lanes = [0.0; LANES];
                lanes[..x.len()].copy_from_slice(x);
                self.load(&lanes)
            }
        }
    }

    /// Writes as many lanes as `x` holds, at most sixteen.
    #[inline(always)]
    fn store_some(self, v: Self::V, x: &mut [f32]) {
        match x.first_chunk_mut() {
            Some(full) => self.store(v, full),
            None => {
                let mut lanes = [0.0; LANES];
                self.store(v, &mut lanes);
                let len = x.len();
                x.copy_from_slice(&lanes[..len]);
            }
        }
    }
    /// Prefetches the cache line at this address. Any address will do.
    #[inline(always)]
    fn prefetch<T>(self, _address: *const T) {}

    // numbers of 16 bits

    /// Sixteen numbers stored as IEEE half precision.
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::V {
        self.load(&lanewise(|i| {
            let sign = u32::from(x[i] & 0x8000) << 16;
            let rest = u32::from(x[i] & 0x7fff) << 13;
            // the exponent's bias is 127 instead of 15; a product gets subnormal numbers right, too
            let finite = f32::from_bits(rest) * f32::from_bits((127 + 112) << 23);
            let special = f32::from_bits(rest | 0xff << 23);
            f32::from_bits(if rest < 0x1f << 23 { finite } else { special }.to_bits() | sign)
        }))
    }
    /// Sixteen numbers of which only the upper halves are kept: bf16.
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::V {
        self.load(&lanewise(|i| f32::from_bits(u32::from(x[i]) << 16)))
    }
    /// Of sixteen pairs of numbers stored as bfloat16, those in the low bits.
    #[inline(always)]
    fn low_bf16(self, x: Self::I) -> Self::V {
        let x = ints(self, x);
        self.load(&lanewise(|i| f32::from_bits(x[i] << 16)))
    }
    /// Of sixteen pairs of numbers stored as bfloat16, those in the high bits.
    #[inline(always)]
    fn high_bf16(self, x: Self::I) -> Self::V {
        let x = ints(self, x);
        self.load(&lanewise(|i| f32::from_bits(x[i] & BF16_HIGH)))
    }
    /// In each lane, the products of two pairs of numbers stored as bfloat16, and `c`, summed. An instruction for it takes subnormal
    /// numbers for zero.
    #[inline(always)]
    fn dot_bf16(self, a: Self::I, b: Self::I, c: Self::V) -> Self::V {
        dot_bf16(self, a, b, c)
    }
    /// As [`dot_bf16`](Self::dot_bf16) by one of four pairs b.
    #[inline(always)]
    fn dot_bf16_lane<const LANE: usize>(self, a: Self::I, b: &[[u16; 2]; 4], c: Self::V) -> Self::V {
        self.dot_bf16(a, self.splat_int(pair(b[LANE])), c)
    }
    /// Adds to the sums of some rows their pairs' products with one of the two lines of weights of each pair, and says of how many
    /// pairs: where there are instructions for several rows. The bits are those of [`dot_bf16`](Self::dot_bf16).
    #[inline(always)]
    fn dot_rows_bf16<const R: usize>(
        self,
        _x: [&[[u16; 2]]; R],
        _w: &[Words],
        _half: usize,
        _sums: &mut [Self::V],
    ) -> usize {
        0
    }

    // whole numbers

    #[inline(always)]
    fn splat_int(self, x: u32) -> Self::I {
        self.load_int(&[x; LANES])
    }
    /// The initial sums for [`dot`](Self::dot): `start`, which cancels the offset of 128 in `a`, or 0 where `dot`
    /// subtracts 128 itself.
    #[inline(always)]
    fn begin(self, start: Self::I) -> Self::I {
        start
    }
    /// In each lane, the sum of the products of four bytes of `a`, from 0 to 255, and four of `b`, from −127 to 127,
    /// and `c`; of `a` − 128 where [`begin`](Self::begin) ignores `start`.
    #[inline(always)]
    fn dot(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        let (a, b, c) = (ints(self, a), ints(self, b), ints(self, c));
        self.load_int(&lanewise_int(|i| {
            let product = |byte: u32| {
                let unsigned = (a[i] >> (8 * byte) & 0xff).cast_signed();
                unsigned * ((b[i] << (24 - 8 * byte)).cast_signed() >> 24)
            };
            c[i].wrapping_add((product(0) + product(1) + product(2) + product(3)).cast_unsigned())
        }))
    }
    /// As [`dot`](Self::dot) by one of four times four bytes b.
    #[inline(always)]
    fn dot_lane<const LANE: usize>(self, a: Self::I, b: &[u32; 4], c: Self::I) -> Self::I {
        self.dot(a, self.splat_int(b[LANE]), c)
    }
    /// As [`begin`](Self::begin), for [`dot_nibbles`](Self::dot_nibbles) and an offset of 8.
    #[inline(always)]
    fn begin_nibbles(self, start: Self::I) -> Self::I {
        start
    }
    /// As [`dot`](Self::dot) for bytes of `a` from 0 to 15, at most eight times before [`end_nibbles`](Self::end_nibbles).
    #[inline(always)]
    fn dot_nibbles(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        self.dot(a, b, c)
    }
    /// As [`dot_nibbles`](Self::dot_nibbles) by one of four times four bytes b.
    #[inline(always)]
    fn dot_nibbles_lane<const LANE: usize>(self, a: Self::I, b: &[u32; 4], c: Self::I) -> Self::I {
        self.dot_nibbles(a, self.splat_int(b[LANE]), c)
    }
    /// The sums that [`dot_nibbles`](Self::dot_nibbles) made.
    #[inline(always)]
    fn end_nibbles(self, sums: Self::I, _start: Self::I) -> Self::I {
        sums
    }
    /// The sums of four rows to six, begun and ended, by one of two lines of weights for each four of 32 inputs: weights of 8 bits, or of
    /// 4 in half as many lines. Only where products are [by pairs](Self::BY_PAIRS).
    #[inline(always)]
    fn dot_rows<const R: usize, const N: usize>(
        self,
        _x: [&[u32; 8]; R],
        _starts: [u32; R],
        _w: &[[[u32; LANES]; 2]; N],
        _half: usize,
    ) -> [Self::I; R] {
        unreachable!("not by pairs of rows")
    }
    /// The low four bits of each byte.
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        let x = ints(self, x);
        self.load_int(&lanewise_int(|i| x[i] & NIBBLES))
    }
    /// The high four bits of each byte, moved down.
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        let x = ints(self, x);
        self.load_int(&lanewise_int(|i| x[i] >> 4 & NIBBLES))
    }
    /// Signed numbers of 32 bits, to the nearest.
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::V {
        let x = ints(self, x);
        self.load(&lanewise(|i| x[i].cast_signed() as f32))
    }
}

#[inline(always)]
fn floats<S: Simd>(s: S, v: S::V) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    lanes
}

#[inline(always)]
fn ints<S: Simd>(s: S, v: S::I) -> [u32; LANES] {
    let mut lanes = [0; LANES];
    s.store_int(v, &mut lanes);
    lanes
}

/// Two numbers stored as bfloat16, the first in the low bits.
#[inline(always)]
pub(crate) fn pair([low, high]: [u16; 2]) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

/// What [`Simd::dot_bf16`] is without an instruction for it.
#[inline(always)]
fn dot_bf16<S: Simd>(s: S, a: S::I, b: S::I, c: S::V) -> S::V {
    let c = s.mul_add(s.high_bf16(a), s.high_bf16(b), c);
    s.mul_add(s.low_bf16(a), s.low_bf16(b), c)
}

/// Runs a kernel on the best instruction set of this CPU.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    dispatch_at(Isa::current(), kernel)
}

/// Runs a kernel on one instruction set; on the scalar path if the CPU lacks it.
#[inline]
pub(crate) fn dispatch_at<K: Kernel>(level: Isa, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the CPU has the instructions, as just checked (std caches the answer).
    if level >= Isa::Avx512 && Isa::Avx512.is_available() {
        return unsafe { x86::run_avx512(kernel) };
    } else if level >= Isa::Avx2 && Isa::Avx2.is_available() {
        return unsafe { x86::run_avx2(kernel) };
    }
    #[cfg(target_arch = "aarch64")]
    if level >= Isa::Neon && Isa::Neon.is_available() {
        // SAFETY: the CPU has the instructions, as just checked.
        return unsafe { neon::run_neon(kernel) };
    }
    #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
    if level == Isa::Simd128 || !cfg!(test) {
        return kernel.run(wasm::Simd128);
    }
    let _ = level;
    kernel.run(Scalar)
}

/// As [`dispatch_at`], for a kernel with products of whole numbers: it is compiled once more, for
/// [`Isa::Avx512Vnni`], [`Isa::Avx2Vnni`], [`Isa::NeonDot`] and [`Isa::NeonI8mm`].
#[inline]
pub(crate) fn dispatch_int_at<K: Kernel>(level: Isa, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the CPU has the instructions, as just checked.
    if level >= Isa::Avx512Vnni && Isa::Avx512Vnni.is_available() {
        return unsafe { x86::run_avx512_vnni(kernel) };
    } else if level == Isa::Avx2Vnni && level.is_available() {
        return unsafe { x86::run_avx2_vnni(kernel) };
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the CPU has the instructions, as just checked.
    if level >= Isa::NeonI8mm && Isa::NeonI8mm.is_available() {
        return unsafe { neon::run_neon_i8mm(kernel) };
    } else if level >= Isa::NeonDot && Isa::NeonDot.is_available() {
        return unsafe { neon::run_neon_dot(kernel) };
    }
    dispatch_at(level, kernel)
}

/// As [`dispatch_at`], for a kernel with products of pairs of bf16: it is compiled once more, for [`Isa::Avx512Bf16`]
/// and [`Isa::NeonBf16`].
#[inline]
pub(crate) fn dispatch_bf16_at<K: Kernel>(level: Isa, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if level >= Isa::Avx512Bf16 && Isa::Avx512Bf16.is_available() {
        // SAFETY: the CPU has the instructions, as just checked.
        return unsafe { x86::run_avx512_bf16(kernel) };
    }
    #[cfg(target_arch = "aarch64")]
    if level >= Isa::NeonBf16 && Isa::NeonBf16.is_available() {
        // SAFETY: the CPU has the instructions, as just checked.
        return unsafe { neon::run_neon_bf16(kernel) };
    }
    dispatch_at(level, kernel)
}

/// Plain arrays. The compiler makes of it what the target's baseline allows (NEON on aarch64, SSE2 on x86-64).
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

#[inline(always)]
fn lanewise(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut v = [0.0; LANES];
    for (i, lane) in v.iter_mut().enumerate() {
        *lane = f(i);
    }
    v
}

#[inline(always)]
fn lanewise_int(f: impl Fn(usize) -> u32) -> [u32; LANES] {
    let mut v = [0; LANES];
    for (i, lane) in v.iter_mut().enumerate() {
        *lane = f(i);
    }
    v
}

impl Simd for Scalar {
    type V = [f32; LANES];
    type I = [u32; LANES];
    const TILE_ROWS: usize = 2;
    const TILE_LINES: usize = 2;
    const DOT_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::V, x: &mut [f32; LANES]) {
        *x = v;
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        lanewise(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        lanewise(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        lanewise(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        lanewise(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // not f32::mul_add: without the instruction that is a slow library call
        lanewise(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        lanewise(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        lanewise(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn load_int(self, x: &[u32; LANES]) -> Self::I {
        *x
    }
    #[inline(always)]
    fn store_int(self, v: Self::I, x: &mut [u32; LANES]) {
        *x = v;
    }
}

/// The second number of a pair stored as bfloat16, which is the first half of the same `f32`.
const BF16_HIGH: u32 = 0xffff_0000;

/// The low four bits of each byte.
const NIBBLES: u32 = 0x0f0f_0f0f;

/// Adding it to a small whole number n leaves n + 127, an exponent field, in the low bits.
const EXPONENT_MAGIC: f32 = (3u32 << 22) as f32 + 127.0;

#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod wasm;
#[cfg(target_arch = "x86_64")]
mod x86;
