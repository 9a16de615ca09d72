//! Matrices in bfloat16, and products in which the inputs are rounded to bfloat16 as well.
//!
//! bfloat16 lies in pairs: a lane of 32 bits holds two consecutive inputs' weights of one output, of which a shift makes the
//! first number and a mask the second. That is also what CPUs multiply that have instructions for bfloat16: AVX-512 takes
//! sixteen pairs at once, NEON four, and a tile of AMX is sixteen lines of sixteen pairs. They want both sides in bfloat16 and sum in
//! `f32`. Each way of doing it sums every output in an order of its own, the same for any number of rows.

use ndarray::ArrayViewMut2;

use super::blocks::multiply as multiply_blocks;
use super::operands::{Inputs, LeftRows};
use super::packed::Packed;
use super::pairs::PairRow;
use crate::kernels::memory::{Scratch, with_scratch};
use crate::kernels::profiler::{Cost, Stage, timed};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Isa, Kernel, LANES, Simd, dispatch_at, pair};
use crate::kernels::team::Team;

/// Two inputs in bfloat16.
impl Inputs for [u16; 2] {
    const STEPS: usize = 1;
    type Four = [[u16; 2]; 4];
    type Wide<S: Simd> = S::I;

    #[inline(always)]
    fn fours(x: &[Self]) -> &[Self::Four] {
        x.as_chunks().0
    }

    #[inline(always)]
    fn splat<S: Simd>(self, s: S, _step: usize) -> S::I {
        s.splat_int(pair(self))
    }

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::I, w: S::I, sum: S::V) -> S::V {
        s.dot_bf16(x, w, sum)
    }

    #[inline(always)]
    fn multiply_lane<S: Simd, const LANE: usize>(s: S, x: &[[u16; 2]; 4], w: S::I, sum: S::V) -> S::V {
        s.dot_bf16_lane::<LANE>(w, x, sum)
    }
}

impl LeftRows for Rows<'_, u16> {
    type Inputs = [u16; 2];

    fn skip_rows(self, rows: usize) -> Self {
        Rows::skip_rows(self, rows)
    }

    #[inline(always)]
    fn address(self, row: usize, input: usize) -> *const () {
        self.data.as_ptr().wrapping_add(row * self.stride + input).cast()
    }

    #[inline(always)]
    fn inputs(&self, row: usize, count: usize) -> &[[u16; 2]] {
        self.row(row, count).as_chunks().0
    }
}

/// Whether there are instructions for it. Without them rounding the inputs would only add to the work.
pub(crate) fn pays(level: Isa) -> bool {
    level.has_bf16()
}

/// Inputs of a tile: rows of rounded inputs are filled up with zeros to a multiple of it.
const TILE_INPUTS: usize = 2 * LANES;

/// out `[m, n]` = x `[m, k]` · Wᵀ, or added to it, with x rounded to bfloat16.
pub(super) fn multiply(
    level: Isa,
    team: &Team,
    x: Rows,
    k: usize,
    w: &Packed<PairRow, 2>,
    out: ArrayViewMut2<f32>,
    mode: Out,
) {
    /// Rows that one thread rounds at a time.
    const ROWS: usize = 16;
    thread_local! {
        static ROUNDED: Scratch<u16> = const { Scratch::new(Vec::new()) };
    }
    let (m, stride) = (out.nrows(), k.next_multiple_of(TILE_INPUTS));
    with_scratch(&ROUNDED, m * stride, |rounded| {
        team.for_each(rounded.chunks_mut((ROWS * stride).max(1)).enumerate(), |(i, to)| {
            timed(Stage::Packing, Cost::numbers(2 * to.len()), || {
                dispatch_at(level, Round { x, k, first: i * ROWS, to, stride });
            });
        });
        let x = Rows { data: &*rounded, stride };
        #[cfg(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux"))]
        if level == Isa::Amx {
            return tiles::multiply(level, team, x, w, out, mode);
        }
        multiply_blocks(level, team, x, w, w.all(), out, mode);
    });
}

/// Rounds some rows of inputs.
struct Round<'a> {
    x: Rows<'a>,
    k: usize,
    first: usize,
    /// `[rows, stride]`
    to: &'a mut [u16],
    stride: usize,
}

impl Kernel for Round<'_> {
    type Output = ();

    /// A plain loop, which the compiler turns into vectors.
    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        for (i, to) in self.to.chunks_exact_mut(self.stride).enumerate() {
            let (numbers, rest) = to.split_at_mut(self.k);
            for (to, x) in numbers.iter_mut().zip(self.x.row(self.first + i, self.k)) {
                *to = round(*x);
            }
            rest.fill(0);
        }
    }
}

/// The nearest bfloat16, the even one in the middle.
#[inline(always)]
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // NaN stays NaN
    let bits = if x.is_nan() { bits | 0x0040_0000 } else { nearest };
    (bits >> 16) as u16
}

#[cfg(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux"))]
mod tiles {
    use super::super::amx::Tiles;
    use super::super::blocks::strips;
    use super::super::packed::PANEL;
    use super::super::product::finish;
    use super::*;
    use crate::kernels::profiler::timed_product;

    pub(super) fn multiply(
        level: Isa,
        team: &Team,
        x: Rows<u16>,
        w: &Packed<PairRow, 2>,
        out: ArrayViewMut2<f32>,
        mode: Out,
    ) {
        team.for_each(strips(out), |(first, out)| {
            timed_product(out.nrows(), out.ncols(), w.k, || dispatch_at(level, TileProduct { x, w, first, out, mode }));
        });
    }

    /// The columns of a product from `first` on.
    struct TileProduct<'a> {
        x: Rows<'a, u16>,
        w: &'a Packed<PairRow, 2>,
        first: usize,
        out: ArrayViewMut2<'a, f32>,
        mode: Out,
    }

    impl Kernel for TileProduct<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(mut self, s: S) {
            let (m, n) = self.out.dim();
            let Some(mut tiles) = Tiles::new() else { unreachable!("the level says that there are tiles") };
            let mut sums = vec![[[0.0; LANES]; 2]; m];
            for column in (0..n).step_by(PANEL) {
                let pairs = self.w.k / 2;
                let panel = &self.w.panels[(self.first + column) / PANEL * pairs..][..pairs];
                sums.fill([[0.0; LANES]; 2]);
                tiles.multiply(self.x, panel, &mut sums);
                for (i, sums) in sums.iter().enumerate() {
                    let out = self.out.row_mut(i).into_slice().expect("numbers side by side");
                    for (sums, out) in sums.iter().zip(out[column..].chunks_mut(LANES)) {
                        finish(s, s.load(sums), out, None, self.mode);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matrix::{Matrix, Storage};
    use half::bf16;

    use super::*;
    use crate::kernels::team::with_team;

    /// All levels that there are, whether it pays or not.
    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|level| level.is_available())
    }

    fn packed(w: &[f32], n: usize, k: usize) -> Packed<PairRow, 2> {
        let mut packed = Packed::zeros(n, k);
        for row in 0..n {
            packed.set_row(row, &w[row * k..][..k]);
        }
        packed
    }

    /// x has rows of k numbers each `stride` apart.
    fn product(level: Isa, team: &Team, x: Rows, k: usize, w: &Packed<PairRow, 2>, out: &mut [f32], mode: Out) {
        let out = ArrayViewMut2::from_shape((out.len() / w.n, w.n), out).unwrap();
        multiply(level, team, x, k, w, out, mode);
    }

    /// Numbers that are the same in any type.
    fn whole(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| (i * step % 17) as f32 / 8.0 - 1.0).collect()
    }

    fn wave(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn every_level_equals_the_plain_product() {
        let sizes = (0..40).map(|m| (m, 33, 19)).chain((1..130).map(|n| (1, n, 7))).chain((0..130).map(|k| (2, 40, k)));
        for (m, n, k) in sizes.chain([(1, 130, 64), (100, 65, 33), (13, 129, 1300), (50, 40, 1111), (257, 31, 600)]) {
            let stride = k + 3;
            let (x, w) = (whole(m * stride, 5), whole(n * k, 7));
            let mut want = Vec::new();
            for i in 0..m {
                let row = |j| (0..k).map(|p| x[i * stride + p] as f64 * w[j * k + p] as f64).sum::<f64>();
                want.extend((0..n).map(row));
            }
            let w = packed(&w, n, k);
            for level in levels() {
                let mut out = vec![7.0; m * n];
                for (mode, times) in [(Out::Set, 1.0), (Out::Add, 2.0)] {
                    product(level, &Team::alone(), Rows { data: &x, stride }, k, &w, &mut out, mode);
                    for (got, want) in out.iter().zip(&want) {
                        // sums of sixty-fourths: exact
                        assert_eq!(*got as f64, times * want, "{level:?} {m}x{n}x{k}");
                    }
                }
            }
        }
    }

    #[test]
    fn inputs_are_rounded_and_nothing_else() {
        let (m, n, k) = (37, 70, 1601);
        let (x, w) = (wave(m * k, 0.37), wave(n * k, 0.73));
        let to_bf16 = |x: &f32| bf16::from_f32(*x).to_f32() as f64;
        for level in levels() {
            let mut out = vec![0.0; m * n];
            product(level, &Team::alone(), Rows { data: &x, stride: k }, k, &packed(&w, n, k), &mut out, Out::Set);
            for (i, out) in out.chunks(n).enumerate() {
                for (j, got) in out.iter().enumerate() {
                    let terms = x[i * k..][..k].iter().zip(&w[j * k..][..k]);
                    let (mut want, mut size) = (0.0, 0.0);
                    for (x, w) in terms {
                        let term = to_bf16(x) * to_bf16(w);
                        (want, size) = (want + term, size + term.abs());
                    }
                    let error = (*got as f64 - want).abs();
                    assert!(error < 3e-7 * size, "{level:?} {i} {j}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn a_row_depends_neither_on_its_batch_nor_on_the_team() {
        let (m, n, k) = (100, 300, 1401);
        let (x, w) = (wave(m * k, 0.37), packed(&wave(n * k, 0.73), n, k));
        for level in levels() {
            let mut all = vec![0.0; m * n];
            with_team(usize::MAX, |team| {
                product(level, team, Rows { data: &x, stride: k }, k, &w, &mut all, Out::Set);
            });
            for (first, rows) in [(0, 1), (13, 1), (50, 2), (70, 3), (20, 13), (3, 17), (1, 99)] {
                let mut some = vec![0.0; rows * n];
                let x = Rows { data: &x[first * k..], stride: k };
                product(level, &Team::alone(), x, k, &w, &mut some, Out::Set);
                assert!(some == all[first * n..][..rows * n], "{level:?} {first} {rows}");
            }
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest() {
        for bits in
            (0..=u32::MAX).step_by(4093).chain([0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0x7fff_ffff, 0xffff_ffff])
        {
            let x = f32::from_bits(bits);
            let (got, want) = (bf16::from_bits(round(x)), bf16::from_f32(x));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && x.is_nan(), "{x:e}: {got} {want}");
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        let (m, n, k) = (40, 33, 50);
        for level in levels() {
            let mut x = vec![1.0; m * k];
            (x[3 * k + 5], x[20 * k + 49]) = (f32::NAN, f32::INFINITY);
            let mut out = vec![0.0; m * n];
            let w = packed(&vec![0.5; n * k], n, k);
            product(level, &Team::alone(), Rows { data: &x, stride: k }, k, &w, &mut out, Out::Set);
            for (i, out) in out.chunks(n).enumerate() {
                let fine = |y: &f32| match i {
                    3 => y.is_nan(),
                    20 => *y == f32::INFINITY,
                    _ => *y == 25.0,
                };
                assert!(out.iter().all(fine), "{level:?} {i} {out:?}");
            }
        }
    }

    #[test]
    fn a_matrix_rounds_its_inputs_only_if_told_to() {
        let x = [1.0 + f32::EPSILON];
        let mut matrix = Matrix::zeros(1, 1, Storage::Bf16);
        matrix.set_row(0, &[1.0]);
        let mut out = [0.0];
        matrix.multiply(&Team::alone(), Rows { data: &x, stride: 1 }, 1, &mut out, Out::Set);
        assert_eq!(out, x);
        matrix.set_rounds_inputs(true);
        matrix.multiply(&Team::alone(), Rows { data: &x, stride: 1 }, 1, &mut out, Out::Set);
        assert_eq!(out, if pays(Isa::with_tiles()) { [1.0] } else { x });
    }
}
