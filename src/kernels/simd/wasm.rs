//! WebAssembly's vectors of 128 bits. Whether a module has them is decided when it is compiled (`-C target-feature=+simd128`): where
//! it is loaded, they are there.

use super::{BF16_HIGH, EXPONENT_MAGIC, LANES, NIBBLES, Simd};
use std::arch::wasm32::*;

/// Four times four lanes. A product and its sum are rounded one by one, as on the scalar path: the instruction that may round once
/// belongs to relaxed-simd, whose results differ from machine to machine.
#[derive(Clone, Copy)]
pub(super) struct Simd128;

/// Each of four vectors from those of one or more operands.
#[inline(always)]
fn each(f: impl Fn(usize) -> v128) -> [v128; 4] {
    [f(0), f(1), f(2), f(3)]
}

/// `c` and the products of four bytes of `a`, from 0 to 255, with four of `b`, from −127 to 127, in each of four lanes.
#[inline(always)]
fn dot(a: v128, b: v128, c: v128) -> v128 {
    // the bytes at even places and those at odd ones, as 16 bits: no sum of two products overflows 32
    let even = i32x4_dot_i16x8(v128_and(a, i16x8_splat(0xff)), i16x8_shr(i16x8_shl(b, 8), 8));
    let odd = i32x4_dot_i16x8(u16x8_shr(a, 8), i16x8_shr(b, 8));
    i32x4_add(i32x4_add(c, even), odd)
}

// SAFETY of every block below: the pointers come from references to sixteen numbers, of which a quarter starts at every fourth.
impl Simd for Simd128 {
    type V = [v128; 4];
    type I = [v128; 4];
    // on x86-64, where engines have sixteen registers
    const TILE_ROWS: usize = 3;
    const TILE_LINES: usize = 1;
    const DOT_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [f32x4_splat(x); 4]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        each(|i| unsafe { v128_load(x.as_ptr().add(4 * i).cast()) })
    }
    #[inline(always)]
    fn store(self, v: Self::V, x: &mut [f32; LANES]) {
        for (i, v) in v.into_iter().enumerate() {
            unsafe { v128_store(x.as_mut_ptr().add(4 * i).cast(), v) }
        }
    }
    #[inline(always)]
    fn load_int(self, x: &[u32; LANES]) -> Self::I {
        each(|i| unsafe { v128_load(x.as_ptr().add(4 * i).cast()) })
    }
    #[inline(always)]
    fn store_int(self, v: Self::I, x: &mut [u32; LANES]) {
        for (i, v) in v.into_iter().enumerate() {
            unsafe { v128_store(x.as_mut_ptr().add(4 * i).cast(), v) }
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| f32x4_add(a[i], b[i]))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| f32x4_sub(a[i], b[i]))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| f32x4_mul(a[i], b[i]))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| f32x4_div(a[i], b[i]))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| f32x4_add(f32x4_mul(a[i], b[i]), c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // pmax(b, a) is b < a ? a : b
        each(|i| f32x4_pmax(b[i], a[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| f32x4_pmin(b[i], a[i]))
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        each(|i| i32x4_shl(f32x4_add(n[i], f32x4_splat(EXPONENT_MAGIC)), 23))
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        // each time the first half plus the second
        let four = f32x4_add(f32x4_add(v[0], v[2]), f32x4_add(v[1], v[3]));
        let two = f32x4_add(four, i32x4_shuffle::<2, 3, 2, 3>(four, four));
        f32x4_extract_lane::<0>(two) + f32x4_extract_lane::<1>(two)
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        let four = f32x4_pmax(f32x4_pmax(v[0], v[1]), f32x4_pmax(v[2], v[3]));
        let two = f32x4_pmax(four, i32x4_shuffle::<2, 3, 2, 3>(four, four));
        f32x4_extract_lane::<0>(two).max(f32x4_extract_lane::<1>(two))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::V {
        each(|i| i32x4_shl(unsafe { u32x4_load_extend_u16x4(x.as_ptr().add(4 * i)) }, 16))
    }
    #[inline(always)]
    fn low_bf16(self, x: Self::I) -> Self::V {
        x.map(|x| i32x4_shl(x, 16))
    }
    #[inline(always)]
    fn high_bf16(self, x: Self::I) -> Self::V {
        x.map(|x| v128_and(x, u32x4_splat(BF16_HIGH)))
    }
    #[inline(always)]
    fn splat_int(self, x: u32) -> Self::I {
        [u32x4_splat(x); 4]
    }
    #[inline(always)]
    fn dot(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        each(|i| dot(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        x.map(|x| v128_and(x, u32x4_splat(NIBBLES)))
    }
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        x.map(|x| v128_and(u32x4_shr(x, 4), u32x4_splat(NIBBLES)))
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::V {
        x.map(|x| f32x4_convert_i32x4(x))
    }
}
