//! AVX-512 and AVX2.

use super::{BF16_HIGH, EXPONENT_MAGIC, Kernel, LANES, NIBBLES, Simd, dot_bf16};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(super) fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<PLAIN>(()))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) fn run_avx512_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<VNNI>(()))
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vnni,avx2,fma,f16c")]
pub(super) fn run_avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512::<BF16>(()))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2::<PLAIN>(()))
}

#[target_feature(enable = "avx2,avxvnni,fma,f16c")]
pub(super) fn run_avx2_vnni<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2::<VNNI>(()))
}

/// The lanes of both, each time the first half plus the second: the order of [`Simd::sum`].
#[inline(always)]
unsafe fn sum_halves(low: __m256, high: __m256) -> f32 {
    // SAFETY: the caller has AVX2
    unsafe {
        let eight = _mm256_add_ps(low, high);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// All bits of sixteen lanes, and none of sixteen more: from number 16 − n on, those of the first n lanes.
static FIRST_LANES: [i32; 2 * LANES] = {
    let mut lanes = [0; 2 * LANES];
    let mut i = 0;
    while i < LANES {
        lanes[i] = -1;
        i += 1;
    }
    lanes
};

/// What there is besides AVX-512F and AVX-512BW, or besides AVX2, FMA and F16C.
const PLAIN: u8 = 0;
const VNNI: u8 = 1;
/// And VNNI.
const BF16: u8 = 2;

/// Exists only inside [`run_avx512`], [`run_avx512_vnni`] and [`run_avx512_bf16`].
#[derive(Clone, Copy)]
pub(super) struct Avx512<const MORE: u8>(());

// SAFETY of every block below: an `Avx512` exists only where the CPU has AVX-512F and AVX-512BW, and what `MORE` says;
// the pointers come from references to sixteen numbers, or to the fewer that are read or written.
impl<const MORE: u8> Simd for Avx512<MORE> {
    type V = __m512;
    type I = __m512i;
    const TILE_ROWS: usize = 12;
    const TILE_LINES: usize = 2;
    const PREFETCHES: bool = true;
    const DOT_ROWS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, x: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
    }
    // only the lanes that `x` holds are read or written
    #[inline(always)]
    fn load_some(self, x: &[f32]) -> __m512 {
        match x.first_chunk() {
            Some(full) => self.load(full),
            None => unsafe { _mm512_maskz_loadu_ps((1 << x.len()) - 1, x.as_ptr()) },
        }
    }
    #[inline(always)]
    fn store_some(self, v: __m512, x: &mut [f32]) {
        match x.first_chunk_mut() {
            Some(full) => self.store(v, full),
            None => unsafe { _mm512_mask_storeu_ps(x.as_mut_ptr(), (1 << x.len()) - 1, v) },
        }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> __m512 {
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves))
        }
    }
    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            sum_halves(_mm512_castps512_ps256(v), high)
        }
    }
    #[inline(always)]
    fn exp2_whole(self, n: __m512) -> __m512 {
        unsafe {
            let biased = _mm512_castps_si512(_mm512_add_ps(n, _mm512_set1_ps(EXPONENT_MAGIC)));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn low_bf16(self, x: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)) }
    }
    #[inline(always)]
    fn high_bf16(self, x: __m512i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(BF16_HIGH.cast_signed()))) }
    }
    #[inline(always)]
    fn dot_bf16(self, a: __m512i, b: __m512i, c: __m512) -> __m512 {
        if MORE >= BF16 {
            // the same 512 bits, of another type
            let pairs = |x: __m512i| unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
            return unsafe { _mm512_dpbf16_ps(c, pairs(a), pairs(b)) };
        }
        dot_bf16(self, a, b, c)
    }
    #[inline(always)]
    fn load_int(self, x: &[u32; LANES]) -> __m512i {
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_int(self, v: __m512i, x: &mut [u32; LANES]) {
        unsafe { _mm512_storeu_si512(x.as_mut_ptr().cast(), v) }
    }
    #[inline(always)]
    fn splat_int(self, x: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(x.cast_signed()) }
    }
    #[inline(always)]
    fn dot(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        unsafe {
            if MORE >= VNNI {
                return _mm512_dpbusd_epi32(c, a, b);
            }
            // the bytes at even places and those at odd ones, as 16 bits: no sum of two products overflows 32
            let even = _mm512_and_si512(a, _mm512_set1_epi16(0xff));
            let odd = _mm512_srli_epi16::<8>(a);
            let even = _mm512_madd_epi16(even, _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(b)));
            let odd = _mm512_madd_epi16(odd, _mm512_srai_epi16::<8>(b));
            _mm512_add_epi32(_mm512_add_epi32(c, even), odd)
        }
    }
    #[inline(always)]
    fn begin_nibbles(self, start: __m512i) -> __m512i {
        if MORE >= VNNI { start } else { self.splat_int(0) }
    }
    #[inline(always)]
    fn dot_nibbles(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        if MORE >= VNNI {
            return self.dot(a, b, c);
        }
        // sums of two products in 16 bits: eight of them are at most 8 · 2 · 15 · 127 = 30480
        unsafe { _mm512_add_epi16(c, _mm512_maddubs_epi16(a, b)) }
    }
    #[inline(always)]
    fn end_nibbles(self, sums: __m512i, start: __m512i) -> __m512i {
        if MORE >= VNNI {
            return sums;
        }
        unsafe { _mm512_add_epi32(start, _mm512_madd_epi16(sums, _mm512_set1_epi16(1))) }
    }
    #[inline(always)]
    fn low_nibbles(self, x: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(x, _mm512_set1_epi32(NIBBLES.cast_signed())) }
    }
    #[inline(always)]
    fn high_nibbles(self, x: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi32::<4>(x), _mm512_set1_epi32(NIBBLES.cast_signed())) }
    }
    #[inline(always)]
    fn to_float(self, x: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

/// Exists only inside [`run_avx2`] and [`run_avx2_vnni`].
#[derive(Clone, Copy)]
pub(super) struct Avx2<const MORE: u8>(());

// SAFETY of every block below: an `Avx2` exists only where the CPU has AVX2, FMA and F16C, and what `MORE` says; the pointers come
// from references to sixteen numbers, of which the second half starts at the eighth, or to the fewer that are read or written.
impl<const MORE: u8> Simd for Avx2<MORE> {
    type V = [__m256; 2];
    type I = [__m256i; 2];
    const TILE_ROWS: usize = 6;
    const TILE_LINES: usize = 1;
    const PREFETCHES: bool = true;
    // with VNNI the compiler keeps no more than two rows in registers: 0.060 instructions per multiply-add, and 0.094 with six rows
    const DOT_ROWS: usize = if MORE >= VNNI { 2 } else { 4 };

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: Self::V, x: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(x.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(x.as_mut_ptr().add(8), v[1]);
        }
    }
    // only the lanes that `x` holds are read or written
    #[inline(always)]
    fn load_some(self, x: &[f32]) -> Self::V {
        match x.first_chunk() {
            Some(full) => self.load(full),
            None => unsafe {
                let mask = FIRST_LANES.as_ptr().add(LANES - x.len());
                let [low, high] = [mask, mask.add(8)].map(|mask| _mm256_loadu_si256(mask.cast()));
                [_mm256_maskload_ps(x.as_ptr(), low), _mm256_maskload_ps(x.as_ptr().wrapping_add(8), high)]
            },
        }
    }
    // by halves, as masked stores are slow on many CPUs
    #[inline(always)]
    fn store_some(self, v: Self::V, x: &mut [f32]) {
        match x.first_chunk_mut() {
            Some(full) => self.store(v, full),
            None => unsafe {
                let (mut to, mut eight, count) = (x.as_mut_ptr(), v[0], x.len());
                if count & 8 != 0 {
                    _mm256_storeu_ps(to, eight);
                    (to, eight) = (to.add(8), v[1]);
                }
                let mut four = _mm256_castps256_ps128(eight);
                if count & 4 != 0 {
                    _mm_storeu_ps(to, four);
                    (to, four) = (to.add(4), _mm256_extractf128_ps::<1>(eight));
                }
                if count & 2 != 0 {
                    _mm_store_sd(to.cast(), _mm_castps_pd(four));
                    (to, four) = (to.add(2), _mm_movehl_ps(four, four));
                }
                if count & 1 != 0 {
                    _mm_store_ss(to, four);
                }
            },
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::V {
        unsafe {
            let widen = |halves| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
            [widen(_mm_loadu_si128(x.as_ptr().cast())), widen(_mm_loadu_si128(x.as_ptr().add(8).cast()))]
        }
    }
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(v[0], v[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        unsafe { sum_halves(v[0], v[1]) }
    }
    #[inline(always)]
    fn exp2_whole(self, n: Self::V) -> Self::V {
        unsafe {
            let magic = _mm256_set1_ps(EXPONENT_MAGIC);
            let low = _mm256_castps_si256(_mm256_add_ps(n[0], magic));
            let high = _mm256_castps_si256(_mm256_add_ps(n[1], magic));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high))]
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u16; LANES]) -> Self::V {
        unsafe {
            let [low, high] = [x.as_ptr(), x.as_ptr().add(8)];
            [_mm256_cvtph_ps(_mm_loadu_si128(low.cast())), _mm256_cvtph_ps(_mm_loadu_si128(high.cast()))]
        }
    }
    #[inline(always)]
    fn low_bf16(self, x: Self::I) -> Self::V {
        let half = |x| unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)) };
        [half(x[0]), half(x[1])]
    }
    #[inline(always)]
    fn high_bf16(self, x: Self::I) -> Self::V {
        let mask = unsafe { _mm256_set1_epi32(BF16_HIGH.cast_signed()) };
        let half = |x| unsafe { _mm256_castsi256_ps(_mm256_and_si256(x, mask)) };
        [half(x[0]), half(x[1])]
    }
    #[inline(always)]
    fn load_int(self, x: &[u32; LANES]) -> Self::I {
        unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(8).cast())] }
    }
    #[inline(always)]
    fn store_int(self, v: Self::I, x: &mut [u32; LANES]) {
        unsafe {
            _mm256_storeu_si256(x.as_mut_ptr().cast(), v[0]);
            _mm256_storeu_si256(x.as_mut_ptr().add(8).cast(), v[1]);
        }
    }
    #[inline(always)]
    fn splat_int(self, x: u32) -> Self::I {
        unsafe { [_mm256_set1_epi32(x.cast_signed()); 2] }
    }
    #[inline(always)]
    fn begin(self, start: Self::I) -> Self::I {
        if MORE >= VNNI { start } else { self.splat_int(0) }
    }
    #[inline(always)]
    fn dot(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        if MORE >= VNNI {
            return unsafe { [_mm256_dpbusd_avx_epi32(c[0], a[0], b[0]), _mm256_dpbusd_avx_epi32(c[1], a[1], b[1])] };
        }
        let half = |a, b, c| unsafe {
            // the sign of a goes to b: then no sum of two products overflows 16 bits
            let a = _mm256_xor_si256(a, _mm256_set1_epi8(i8::MIN));
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
            _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        };
        [half(a[0], b[0], c[0]), half(a[1], b[1], c[1])]
    }
    #[inline(always)]
    fn begin_nibbles(self, _: Self::I) -> Self::I {
        self.splat_int(0)
    }
    #[inline(always)]
    fn dot_nibbles(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I {
        let half = |a, b, c| unsafe { _mm256_add_epi16(c, _mm256_maddubs_epi16(a, b)) };
        [half(a[0], b[0], c[0]), half(a[1], b[1], c[1])]
    }
    #[inline(always)]
    fn end_nibbles(self, sums: Self::I, start: Self::I) -> Self::I {
        let half = |sums, start| unsafe { _mm256_add_epi32(start, _mm256_madd_epi16(sums, _mm256_set1_epi16(1))) };
        [half(sums[0], start[0]), half(sums[1], start[1])]
    }
    #[inline(always)]
    fn low_nibbles(self, x: Self::I) -> Self::I {
        unsafe {
            let mask = _mm256_set1_epi32(NIBBLES.cast_signed());
            [_mm256_and_si256(x[0], mask), _mm256_and_si256(x[1], mask)]
        }
    }
    #[inline(always)]
    fn high_nibbles(self, x: Self::I) -> Self::I {
        unsafe { self.low_nibbles([_mm256_srli_epi32::<4>(x[0]), _mm256_srli_epi32::<4>(x[1])]) }
    }
    #[inline(always)]
    fn to_float(self, x: Self::I) -> Self::V {
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
