//! NEON, and the instructions with which later ARM CPUs multiply bytes and bfloat16: four bytes (`sdot`), four unsigned
//! bytes by signed ones (`usdot`), pairs of bfloat16 (`bfdot`), and those of [`matrices`]. Rust has no stable functions
//! for these: they are assembly.

use super::{BF16_HIGH, EXPONENT_MAGIC, Kernel, LANES, Line, NIBBLES, Simd, Words, dot_bf16, pair};
use std::arch::aarch64::*;
use std::arch::asm;

mod matrices;

#[target_feature(enable = "neon")]
pub(super) fn run_neon<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<PLAIN>(()))
}

#[target_feature(enable = "neon,dotprod")]
pub(super) fn run_neon_dot<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<DOT>(()))
}

#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) fn run_neon_i8mm<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<I8MM>(()))
}

#[target_feature(enable = "neon,dotprod,i8mm,bf16")]
pub(super) fn run_neon_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Neon::<BF16>(()))
}

/// What there is besides NEON.
const PLAIN: u8 = 0;
/// And `sdot`.
const DOT: u8 = 1;
/// And `usdot` and `usmmla`.
const I8MM: u8 = 2;
/// And `bfdot` and `bfmmla`.
const BF16: u8 = 3;

/// The vectors of sixteen lanes.
const QUARTERS: usize = LANES / 4;

/// Exists only inside the functions above.
#[derive(Clone, Copy)]
pub(super) struct Neon<const MORE: u8>(());

/// An instruction that adds to the first vector a product of the other two.
macro_rules! accumulate {
    ($instruction:literal, $sum:expr, $a:expr, $b:expr, $lane:literal) => {{
        let mut sum = $sum;
        asm!(concat!($instruction, $lane), inout(vreg) sum, in(vreg) $a, in(vreg) $b, options(pure, nomem, nostack, preserves_flags));
        sum
    }};
}

/// The same, by one of the four lanes of the last.
macro_rules! accumulate_lane {
    ($lane:expr, $instruction:literal, $sum:expr, $a:expr, $b:expr) => {
        match const { $lane } {
            0 => accumulate!($instruction, $sum, $a, $b, "[0]"),
            1 => accumulate!($instruction, $sum, $a, $b, "[1]"),
            2 => accumulate!($instruction, $sum, $a, $b, "[2]"),
            _ => accumulate!($instruction, $sum, $a, $b, "[3]"),
        }
    };
}

/// The same of all quarters of these. Without closures, which might be compiled without the instructions.
macro_rules! quarters {
    (|$($x:ident),+| $do:expr) => {
        unsafe { [quarters!(0, $($x),+; $do), quarters!(1, $($x),+; $do), quarters!(2, $($x),+; $do), quarters!(3, $($x),+; $do)] }
    };
    ($i:literal, $($x:ident),+; $do:expr) => {{
        $(let $x = $x[$i];)+
        $do
    }};
}

/// Where the quarters begin.
const BEGIN: [usize; QUARTERS] = [0, 4, 8, 12];

// SAFETY of every block below: a `Neon` exists only where the CPU has NEON, and what `MORE` says; the pointers come from references
// to sixteen numbers or to four.
impl<const MORE: u8> Simd for Neon<MORE> {
    type V = [float32x4_t; QUARTERS];
    type I = [uint32x4_t; QUARTERS];
    const TILE_ROWS: usize = 6;
    const TILE_LINES: usize = 1;
    const BY_LANE: bool = true;
    const LANE_ROWS: usize = 4;
    const BY_PAIRS: bool = MORE >= I8MM;
    const DOT_ROWS: usize = if Self::BY_PAIRS { 6 } else { 4 };

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        unsafe { [vdupq_n_f32(x); QUARTERS] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        let at = BEGIN;
        quarters!(|at| vld1q_f32(x.as_ptr().add(at)))
    }
    #[inline(always)]
    fn store(self, v: Self::V, x: &mut [f32; LANES]) {
        let at = BEGIN;
        let [_, _, _, _] = quarters!(|at, v| vst1q_f32(x.as_mut_ptr().add(at), v));
    }
    #[inline(always)]
    fn load_int(self, x: &[u32; LANES]) -> Self::I {
        let at = BEGIN;
        quarters!(|at| vld1q_u32(x.as_ptr().add(at)))
    }
    #[inline(always)]
    fn store_int(self, v: Self::I, x: &mut [u32; LANES]) {
        let at = BEGIN;
        let [_, _, _, _] = quarters!(|at, v| vst1q_u32(x.as_mut_ptr().add(at), v));
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|a, b| vaddq_f32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|a, b| vsubq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|a, b| vmulq_f32(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|a, b| vdivq_f32(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        quarters!(|a, b, c| vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn mul_add_lane<const LANE: usize>(self, a: Self::V, b: &[f32; 4], c: Self::V) -> Self::V {
        let b = unsafe { vld1q_f32(b.as_ptr()) };
        quarters!(|a, c| {
            match const { LANE } {
                0 => vfmaq_laneq_f32::<0>(c, a, b),
                1 => vfmaq_laneq_f32::<1>(c, a, b),
                2 => vfmaq_laneq_f32::<2>(c, a, b),
                _ => vfmaq_laneq_f32::<3>(c, a, b),
            }
        })
    }
    #[inline(always)]
    fn six_rows(self, x: [&[[f32; 4]]; 6], w: &[[Line; 2]], line: usize, sums: &mut [Self::V; 6]) -> usize {
        let fours = x.iter().fold(w.len() / 4, |least, x| least.min(x.len()));
        if fours > 0 {
            // SAFETY: so many times four inputs there are, and weights for them
            unsafe { six_rows(fours, x.map(|x| x.as_ptr().cast()), w[0][line & 1].0.as_ptr(), sums) }
        }
        4 * fours
    }
    // not vmaxq_f32: that is NaN where one of them is
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|a, b| vbslq_f32(vcgtq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        quarters!(|a, b| vbslq_f32(vcltq_f32(a, b), a, b))
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        quarters!(|n| {
            let biased = vreinterpretq_u32_f32(vaddq_f32(n, vdupq_n_f32(EXPONENT_MAGIC)));
            vreinterpretq_f32_u32(vshlq_n_u32::<23>(biased))
        })
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        unsafe {
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        }
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3]))) }
    }

    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::V {
        let at = BEGIN;
        quarters!(|at| {
            let (halves, wide): (uint16x4_t, float32x4_t);
            halves = vld1_u16(x.as_ptr().add(at));
            asm!("fcvtl {0:v}.4s, {1:v}.4h", lateout(vreg) wide, in(vreg) halves, options(pure, nomem, nostack, preserves_flags));
            wide
        })
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::V {
        let at = BEGIN;
        quarters!(|at| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().add(at)))))
    }
    #[inline(always)]
    fn low_bf16(self, x: Self::I) -> Self::V {
        quarters!(|x| vreinterpretq_f32_u32(vshlq_n_u32::<16>(x)))
    }
    #[inline(always)]
    fn high_bf16(self, x: Self::I) -> Self::V {
        quarters!(|x| vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(BF16_HIGH))))
    }
    #[inline(always)]
    fn dot_bf16(self, a: Self::I, b: Self::I, c: Self::V) -> Self::V {
        if const { MORE >= BF16 } {
            return quarters!(|a, b, c| accumulate!("bfdot {0:v}.4s, {1:v}.8h, {2:v}.8h", c, a, b, ""));
        }
        dot_bf16(self, a, b, c)
    }
    #[inline(always)]
    fn dot_bf16_lane<const LANE: usize>(self, a: Self::I, b: &[[u16; 2]; 4], c: Self::V) -> Self::V {
        if const { MORE >= BF16 } {
            let pairs = unsafe { vld1q_u16(b.as_ptr().cast()) };
            return quarters!(|a, c| accumulate_lane!(LANE, "bfdot {0:v}.4s, {1:v}.8h, {2:v}.2h", c, a, pairs));
        }
        dot_bf16(self, a, self.splat_int(pair(b[LANE])), c)
    }
    #[inline(always)]
    fn dot_rows_bf16<const R: usize>(
        self,
        x: [&[[u16; 2]]; R],
        w: &[Words],
        half: usize,
        sums: &mut [Self::V],
    ) -> usize {
        if const { MORE >= BF16 && R >= 4 && R <= 6 } {
            return unsafe { matrices::dot_bf16(x, w, half, sums) };
        }
        0
    }

    #[inline(always)]
    fn splat_int(self, x: u32) -> Self::I {
        unsafe { [vdupq_n_u32(x); QUARTERS] }
    }
    #[inline(always)]
    fn begin(self, start: Self::I) -> Self::I {
        if const { MORE >= I8MM } { start } else { self.splat_int(0) }
    }
    #[inline(always)]
    fn dot(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        if const { MORE >= I8MM } {
            return quarters!(|a, b, c| accumulate!("usdot {0:v}.4s, {1:v}.16b, {2:v}.16b", c, a, b, ""));
        }
        self.dot_nibbles(less_128(a), b, c)
    }
    #[inline(always)]
    fn dot_lane<const LANE: usize>(self, a: Self::I, b: &[u32; 4], c: Self::I) -> Self::I {
        if const { MORE >= I8MM } {
            let quads = unsafe { vld1q_u32(b.as_ptr()) };
            return quarters!(|a, c| accumulate_lane!(LANE, "usdot {0:v}.4s, {1:v}.16b, {2:v}.4b", c, a, quads));
        }
        self.dot_nibbles_lane::<LANE>(less_128(a), b, c)
    }
    /// Of bytes with a sign as well.
    #[inline(always)]
    fn dot_nibbles(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        if const { MORE >= DOT } {
            return quarters!(|a, b, c| accumulate!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", c, a, b, ""));
        }
        quarters!(|a, b, c| {
            let (a, b) = (vreinterpretq_s8_u32(a), vreinterpretq_s8_u32(b));
            // no sum of two products overflows 16 bits: there is no −128 in b
            let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
            let pairs = vpaddq_s16(low, vmull_high_s8(a, b));
            vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(c), pairs))
        })
    }
    #[inline(always)]
    fn dot_nibbles_lane<const LANE: usize>(self, a: Self::I, b: &[u32; 4], c: Self::I) -> Self::I {
        if const { MORE >= DOT } {
            let quads = unsafe { vld1q_u32(b.as_ptr()) };
            return quarters!(|a, c| accumulate_lane!(LANE, "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b", c, a, quads));
        }
        self.dot_nibbles(a, self.splat_int(b[LANE]), c)
    }
    #[inline(always)]
    fn dot_rows<const R: usize, const N: usize>(
        self,
        x: [&[u32; 8]; R],
        starts: [u32; R],
        w: &[[[u32; LANES]; 2]; N],
        half: usize,
    ) -> [Self::I; R] {
        if const { MORE >= I8MM && R >= 4 && R <= 6 } {
            return unsafe { matrices::dot_bytes(x, starts, w, half) };
        }
        unreachable!("not by pairs of rows")
    }
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        quarters!(|x| vandq_u32(x, vdupq_n_u32(NIBBLES)))
    }
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        quarters!(|x| vreinterpretq_u32_u8(vshrq_n_u8::<4>(vreinterpretq_u8_u32(x))))
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::V {
        quarters!(|x| vcvtq_f32_s32(vreinterpretq_s32_u32(x)))
    }
}

/// The products of one of four inputs of six rows, which are in v0 to v5, added to the sums in v8 to v31. The weights
/// come from the addresses given, one half after the other.
macro_rules! one_of_four {
    ($lane:literal, $low:literal, $high:literal) => {
        concat!(
            "ldp q6, q7, [{w}",
            $low,
            "\n",
            one_of_four!($lane, "v8", "v9", "v0"),
            one_of_four!($lane, "v12", "v13", "v1"),
            one_of_four!($lane, "v16", "v17", "v2"),
            one_of_four!($lane, "v20", "v21", "v3"),
            one_of_four!($lane, "v24", "v25", "v4"),
            one_of_four!($lane, "v28", "v29", "v5"),
            "ldp q6, q7, [{w}, #",
            $high,
            "]\n",
            one_of_four!($lane, "v10", "v11", "v0"),
            one_of_four!($lane, "v14", "v15", "v1"),
            one_of_four!($lane, "v18", "v19", "v2"),
            one_of_four!($lane, "v22", "v23", "v3"),
            one_of_four!($lane, "v26", "v27", "v4"),
            one_of_four!($lane, "v30", "v31", "v5"),
        )
    };
    ($lane:literal, $first:literal, $second:literal, $row:literal) => {
        concat!(
            "fmla ",
            $first,
            ".4s, v6.4s, ",
            $row,
            ".s[",
            $lane,
            "]\n",
            "fmla ",
            $second,
            ".4s, v7.4s, ",
            $row,
            ".s[",
            $lane,
            "]\n",
        )
    };
}

/// Sums, inputs and weights take all 32 registers, in an order that the compiler does not find.
///
/// # Safety
///
/// There are so many times four inputs from each pointer to some, and as many lines of weights, each the first of two.
#[inline(always)]
unsafe fn six_rows(fours: usize, x: [*const f32; 6], w: *const f32, sums: &mut [[float32x4_t; QUARTERS]; 6]) {
    let [a, b, c, d, e, f] = sums;
    // SAFETY: as the caller promises; the last read is of the last four inputs and their weights
    unsafe {
        asm!(
            "2:",
            "ldr q0, [{a}], #16", "ldr q1, [{b}], #16", "ldr q2, [{c}], #16",
            "ldr q3, [{d}], #16", "ldr q4, [{e}], #16", "ldr q5, [{f}], #16",
            one_of_four!("0", "], #512", "-480"),
            one_of_four!("1", ", #-384]", "-352"),
            one_of_four!("2", ", #-256]", "-224"),
            one_of_four!("3", ", #-128]", "-96"),
            "subs {fours}, {fours}, #1",
            "b.ne 2b",
            a = inout(reg) x[0] => _, b = inout(reg) x[1] => _, c = inout(reg) x[2] => _,
            d = inout(reg) x[3] => _, e = inout(reg) x[4] => _, f = inout(reg) x[5] => _,
            w = inout(reg) w => _,
            fours = inout(reg) fours => _,
            inout("v8") a[0], inout("v9") a[1], inout("v10") a[2], inout("v11") a[3],
            inout("v12") b[0], inout("v13") b[1], inout("v14") b[2], inout("v15") b[3],
            inout("v16") c[0], inout("v17") c[1], inout("v18") c[2], inout("v19") c[3],
            inout("v20") d[0], inout("v21") d[1], inout("v22") d[2], inout("v23") d[3],
            inout("v24") e[0], inout("v25") e[1], inout("v26") e[2], inout("v27") e[3],
            inout("v28") f[0], inout("v29") f[1], inout("v30") f[2], inout("v31") f[3],
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            options(readonly, nostack),
        );
    }
}

/// Bytes from 0 to 255, less 128: with a sign.
#[inline(always)]
fn less_128(x: [uint32x4_t; QUARTERS]) -> [uint32x4_t; QUARTERS] {
    quarters!(|x| veorq_u32(x, vdupq_n_u32(0x8080_8080)))
}
