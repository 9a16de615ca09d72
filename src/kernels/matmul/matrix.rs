//! Matrices that stay in the type they are stored in, in the order the product reads them.
//!
//! Decoding with a model of a billion parameters is bound by memory bandwidth, so its weights are widened to `f32` in
//! registers only.

use half::f16;
use ndarray::ArrayViewMut2;
use serde::{Deserialize, Serialize};

use super::bfloat16;
use super::blocks::multiply;
use super::operands::{Floats, Weights};
use super::packed::{PANEL, Packed, PanelRow, Store};
use super::pairs::PairRow;
use super::quantized::{BLOCK, FileRows, Q4Block, Q8Block, Quantized};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Isa, LANES, Simd};
use crate::kernels::team::{Team, with_team};

/// How the numbers of a matrix are stored, in memory and in files.
///
/// | | bytes per weight | |
/// |---|---|---|
/// | `F32` | 4 | |
/// | `F16`, `Bf16` | 2 | widened in the products, whose arithmetic is f32 |
/// | `Q8` | 1.06 | integers of −127 to 127; 32 consecutive weights of a row share a scale, a bfloat16 |
/// | `Q4` | 0.56 | the same with −8 to 7 |
///
/// With `Q8` and `Q4`, products quantise the inputs to 8 bits, too, 32 at a time, and multiply integers. Outputs are
/// padded to panels of 32, so a matrix with few outputs takes more than the table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Storage {
    /// 32 bits.
    F32,
    /// IEEE half precision: 11 significant bits, up to 65504.
    F16,
    /// bfloat16: 8 significant bits, the range of f32.
    Bf16,
    /// 8 bits, and a scale for each 32 inputs.
    Q8,
    /// 4 bits, and a scale for each 32 inputs.
    Q4,
}

/// A panel's weights for one input: a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct HalfRow([[u16; LANES]; 2]);

impl Weights<[f32; 1]> for HalfRow {
    const MAX_ROWS: usize = 12;
    const PANELS: usize = 1;
    const AHEAD: usize = 4096;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, _step: usize, half: usize) -> S::V {
        s.load_f16(&self.0[half & 1])
    }
}

impl Store<1> for HalfRow {
    const ZERO: Self = HalfRow([[0; LANES]; 2]);

    fn set(&mut self, output: usize, [number]: [f32; 1]) {
        self.0[output / LANES][output % LANES] = f16::from_f32(number).to_bits();
    }

    fn get(&self, output: usize) -> [f32; 1] {
        [f16::from_bits(self.0[output / LANES][output % LANES]).to_f32()]
    }
}

/// A matrix `[n, k]`.
#[derive(Clone)]
pub(crate) struct Matrix {
    n: usize,
    k: usize,
    panels: Panels,
    /// Whether inputs are rounded to bf16 if these weights are, where that is faster.
    rounds_inputs: bool,
}

#[derive(Clone)]
enum Panels {
    F32(Packed<PanelRow, 1>),
    F16(Packed<HalfRow, 1>),
    /// With a zero more in each row if k is odd.
    Bf16(Packed<PairRow, 2>),
    Q8(Quantized<Q8Block>),
    Q4(Quantized<Q4Block>),
}

/// Evaluates the same expression for the panels of any type.
macro_rules! with_panels {
    ($panels:expr, $name:ident => $do:expr) => {
        match $panels {
            Panels::F32($name) => $do,
            Panels::F16($name) => $do,
            Panels::Bf16($name) => $do,
            Panels::Q8($name) => $do,
            Panels::Q4($name) => $do,
        }
    };
}

impl Matrix {
    /// All zero.
    pub(crate) fn zeros(n: usize, k: usize, storage: Storage) -> Matrix {
        let panels = match storage {
            Storage::F32 => Panels::F32(Packed::zeros(n, k)),
            Storage::F16 => Panels::F16(Packed::zeros(n, k)),
            Storage::Bf16 => Panels::Bf16(Packed::zeros(n, k)),
            Storage::Q8 => Panels::Q8(Quantized::zeros(n, k)),
            Storage::Q4 => Panels::Q4(Quantized::zeros(n, k)),
        };
        Matrix { n, k, panels, rounds_inputs: false }
    }

    /// The memory that [`zeros`](Self::zeros) takes: all rows of a panel have room, whether the matrix has them or not. `None`
    /// where it cannot be counted.
    pub(crate) fn bytes(n: usize, k: usize, storage: Storage) -> Option<usize> {
        let (rows, size) = match storage {
            Storage::F32 => (k, size_of::<PanelRow>()),
            Storage::F16 => (k, size_of::<HalfRow>()),
            Storage::Bf16 => (k.div_ceil(2), size_of::<PairRow>()),
            Storage::Q8 => (k.div_ceil(BLOCK), size_of::<Q8Block>()),
            Storage::Q4 => (k.div_ceil(BLOCK), size_of::<Q4Block>()),
        };
        n.div_ceil(PANEL).checked_mul(rows)?.checked_mul(size)
    }

    /// n, the outputs, and k, the inputs.
    pub(crate) fn dim(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    pub(crate) fn storage(&self) -> Storage {
        match self.panels {
            Panels::F32(_) => Storage::F32,
            Panels::F16(_) => Storage::F16,
            Panels::Bf16(_) => Storage::Bf16,
            Panels::Q8(_) => Storage::Q8,
            Panels::Q4(_) => Storage::Q4,
        }
    }

    /// Says whether the inputs of a matrix in bf16 may be rounded to bf16, too: see [`bfloat16`].
    pub(crate) fn set_rounds_inputs(&mut self, rounds_inputs: bool) {
        self.rounds_inputs = rounds_inputs;
    }

    /// What files have of a quantised matrix.
    pub(crate) fn quantized(&self) -> Option<&dyn FileRows> {
        match &self.panels {
            Panels::Q8(quantized) => Some(quantized),
            Panels::Q4(quantized) => Some(quantized),
            _ => None,
        }
    }

    pub(crate) fn quantized_mut(&mut self) -> Option<&mut dyn FileRows> {
        match &mut self.panels {
            Panels::Q8(quantized) => Some(quantized),
            Panels::Q4(quantized) => Some(quantized),
            _ => None,
        }
    }

    /// The memory the weights take.
    pub(crate) fn num_bytes(&self) -> usize {
        with_panels!(&self.panels, panels => panels.num_bytes())
    }

    /// Sets a row to these k numbers, rounded to the nearest number of the type they are stored in.
    pub(crate) fn set_row(&mut self, row: usize, numbers: &[f32]) {
        assert!(row < self.n && numbers.len() == self.k, "row {row} of {} numbers", numbers.len());
        with_panels!(&mut self.panels, panels => panels.set_row(row, numbers));
    }

    /// Sets every row: `fill` writes the k numbers of the row it is told into the slice. On several threads.
    pub(crate) fn set_rows(&mut self, fill: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let k = self.k;
        with_team(self.n.saturating_mul(k), |team| match &mut self.panels {
            Panels::F32(panels) => panels.set_rows(team, k, fill),
            Panels::F16(panels) => panels.set_rows(team, k, fill),
            Panels::Bf16(panels) => panels.set_rows(team, k, fill),
            Panels::Q8(panels) => panels.set_rows(team, fill),
            Panels::Q4(panels) => panels.set_rows(team, fill),
        });
    }

    /// Copies a row into these k numbers.
    pub(crate) fn row(&self, row: usize, numbers: &mut [f32]) {
        assert!(row < self.n && numbers.len() == self.k, "row {row} of {} numbers", numbers.len());
        with_panels!(&self.panels, panels => panels.row(row, numbers));
    }

    /// out `[m, n]` = x `[m, k]` · Wᵀ, or added to it.
    ///
    /// Every output is a sum over k in one order, whatever m is and whoever computes it.
    pub(crate) fn multiply(&self, team: &Team, x: Rows, m: usize, out: &mut [f32], mode: Out) {
        let rounds = self.rounds_inputs && matches!(self.panels, Panels::Bf16(_));
        let level = if rounds { Isa::with_tiles() } else { Isa::current() };
        self.multiply_at(level, team, x, m, out, mode);
    }

    fn multiply_at(&self, level: Isa, team: &Team, x: Rows, m: usize, out: &mut [f32], mode: Out) {
        let out = ArrayViewMut2::from_shape((m, self.n), out).expect("room for m rows");
        if out.is_empty() {
            return;
        }
        match &self.panels {
            Panels::F32(packed) => multiply(level, team, Floats::<1>(x), packed, packed.all(), out, mode),
            Panels::F16(packed) => multiply(level, team, Floats::<1>(x), packed, packed.all(), out, mode),
            Panels::Bf16(packed) if self.rounds_inputs && bfloat16::pays(level) => {
                bfloat16::multiply(level, team, x, self.k, packed, out, mode);
            }
            Panels::Bf16(packed) => {
                let mut even = Vec::new();
                let x = if packed.k == self.k { x } else { with_a_zero(x, m, self.k, &mut even) };
                multiply(level, team, Floats::<2>(x), packed, packed.all(), out, mode);
            }
            Panels::Q8(quantized) => quantized.multiply(level, team, x, m, out, mode),
            Panels::Q4(quantized) => quantized.multiply(level, team, x, m, out, mode),
        }
    }
}

/// x with a zero after each row. An odd k is rare.
fn with_a_zero<'a>(x: Rows, m: usize, k: usize, even: &'a mut Vec<f32>) -> Rows<'a> {
    for i in 0..m {
        even.extend_from_slice(x.row(i, k));
        even.push(0.0);
    }
    Rows { data: even, stride: k + 1 }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const ALL: [Storage; 3] = [Storage::F32, Storage::F16, Storage::Bf16];

    fn levels() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|level| level.is_available())
    }

    /// Numbers that are the same in any type.
    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| (i * step % 17) as f32 / 8.0 - 1.0).collect()
    }

    fn matrix(w: &[f32], n: usize, k: usize, storage: Storage) -> Matrix {
        let mut matrix = Matrix::zeros(n, k, storage);
        for row in 0..n {
            matrix.set_row(row, &w[row * k..][..k]);
        }
        matrix
    }

    #[test]
    fn every_level_and_type_equals_the_plain_product() {
        let sizes = (0..28).map(|m| (m, 33, 19)).chain((1..130).map(|n| (1, n, 7))).chain((0..130).map(|k| (2, 40, k)));
        for (m, n, k) in sizes.chain([(1, 130, 64), (100, 65, 33), (13, 129, 128), (2, 257, 3), (3, 0, 5)]) {
            let stride = k + 3;
            let (x, w) = (numbers(m * stride, 5), numbers(n * k, 7));
            let mut want = Vec::new();
            for i in 0..m {
                let row = |j| (0..k).map(|p| x[i * stride + p] as f64 * w[j * k + p] as f64).sum::<f64>();
                want.extend((0..n).map(row));
            }
            for storage in ALL {
                let matrix = matrix(&w, n, k, storage);
                assert_eq!((matrix.dim(), matrix.storage()), ((n, k), storage));
                for level in levels() {
                    let mut out = vec![7.0; m * n];
                    for (mode, times) in [(Out::Set, 1.0), (Out::Add, 2.0)] {
                        matrix.multiply_at(level, &Team::alone(), Rows { data: &x, stride }, m, &mut out, mode);
                        for (got, want) in out.iter().zip(&want) {
                            let error = (*got as f64 - times * want).abs();
                            assert!(error < 1e-4, "{level:?} {storage:?} {m}x{n}x{k} {got} {want}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_depends_neither_on_its_batch_nor_on_the_team() {
        let (m, n, k) = (100, 300, 401);
        let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.73).sin()).collect();
        for (storage, level) in ALL.into_iter().flat_map(|storage| levels().map(move |level| (storage, level))) {
            let matrix = matrix(&w, n, k, storage);
            let mut all = vec![0.0; m * n];
            with_team(usize::MAX, |team| {
                matrix.multiply_at(level, team, Rows { data: &x, stride: k }, m, &mut all, Out::Set);
            });
            for (first, rows) in [(0, 1), (13, 1), (50, 2), (70, 3), (20, 13), (1, 99)] {
                let mut some = vec![0.0; rows * n];
                let x = Rows { data: &x[first * k..], stride: k };
                matrix.multiply_at(level, &Team::alone(), x, rows, &mut some, Out::Set);
                assert!(some == all[first * n..][..rows * n], "{storage:?} {level:?} {first} {rows}");
            }
        }
    }

    #[test]
    fn rows_come_back_rounded_to_the_nearest() {
        for (n, k) in [(1, 1), (33, 7), (70, 12)] {
            let numbers: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
            for (storage, round) in [
                (Storage::F32, (|x| x) as fn(f32) -> f32),
                (Storage::F16, |x| f16::from_f32(x).to_f32()),
                (Storage::Bf16, |x| bf16::from_f32(x).to_f32()),
            ] {
                let one_by_one = matrix(&numbers, n, k, storage);
                let mut at_once = Matrix::zeros(n, k, storage);
                at_once.set_rows(|row, to| to.copy_from_slice(&numbers[row * k..][..k]));
                for row in 0..n {
                    let want: Vec<f32> = numbers[row * k..][..k].iter().map(|x| round(*x)).collect();
                    let mut got = vec![7.0; k];
                    one_by_one.row(row, &mut got);
                    assert_eq!(got, want, "{storage:?}");
                    at_once.row(row, &mut got);
                    assert_eq!(got, want, "{storage:?}");
                }
            }
        }
        let matrix = Matrix::zeros(64, 10, Storage::Bf16);
        assert_eq!(matrix.num_bytes(), 64 * 10 * 2);
        for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Q8, Storage::Q4] {
            for (n, k) in [(0, 3), (3, 0), (1, 1), (32, 32), (33, 65)] {
                assert_eq!(Matrix::bytes(n, k, storage), Some(Matrix::zeros(n, k, storage).num_bytes()), "{storage:?}");
            }
            assert_eq!(Matrix::bytes(usize::MAX, usize::MAX, storage), None);
        }
    }

    #[test]
    fn every_number_of_sixteen_bits_is_widened_exactly() {
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        for (storage, widen) in [
            (Storage::F16, (|bits| f16::from_bits(bits).to_f32()) as fn(u16) -> f32),
            (Storage::Bf16, |bits| bf16::from_bits(bits).to_f32()),
        ] {
            // as a column of weights, times one, and as the second of two inputs' weights
            let column: Vec<f32> = (0..=u16::MAX).map(widen).collect();
            for place in 0..2 {
                let mut matrix = Matrix::zeros(column.len(), 2, storage);
                matrix.set_rows(|row, to| to[place] = column[row]);
                for level in levels() {
                    let x = [(1 - place) as f32, place as f32];
                    let mut out = vec![0.0; column.len()];
                    let mut row = [0.0; 2];
                    matrix.multiply_at(level, &Team::alone(), Rows { data: &x, stride: 2 }, 1, &mut out, Out::Set);
                    for (i, (got, want)) in out.iter().zip(&column).enumerate() {
                        matrix.row(i, &mut row);
                        // a sum that starts with zero has no −0
                        assert!(
                            same(*got, *want + 0.0) && same(row[place], *want),
                            "{level:?} {storage:?} {got} {want}"
                        );
                    }
                }
            }
        }
    }
}
