//! x·Wᵀ with W packed once: every product of the crate.
//!
//! W `[n, k]` is cut into panels of [`PANEL`] outputs; a panel holds, for each of the k inputs, its outputs' weights side
//! by side and aligned to 64 bytes ([`packed`]). A tile of the product, a few rows of x by one panel, stays in registers over the
//! whole of k ([`product`]): each weight is read once for all rows of the tile, in the order it lies in memory, and nothing is
//! packed during the call. Weights may be narrower than `f32` ([`matrix`]): they are widened in registers, or multiplied as they
//! are ([`bfloat16`], [`quantized`]). What a product is made of is in [`operands`].
//!
//! Every output is one sum over k in ascending order (bf16 pairs in the CPU's own), whatever the shape of the product and however
//! it is shared among threads ([`blocks`]). So a row's result does not depend on the batch it is in.

use std::ops::Range;

use ndarray::{ArrayViewMut2, ShapeBuilder};

use super::profiler::timed_product;
use super::rows::{Out, Rows};
use super::simd::Isa;
use super::team::Team;
use operands::Floats;
use product::{Product, product_at};

pub(crate) use gradient::{STRIP, matmul_across, matmul_gradient};
pub(crate) use matrix::Matrix;
pub use matrix::Storage;
pub(crate) use packed::{PANEL, Packed, PanelRow};
pub(crate) use quants::BLOCK;

#[cfg(all(target_arch = "x86_64", target_pointer_width = "64", target_os = "linux"))]
#[allow(unsafe_code)]
mod amx;
mod bfloat16;
mod blocks;
mod gradient;
mod matrix;
mod operands;
mod packed;
mod pairs;
mod product;
mod quantized;
mod quants;

/// out `[m, n]` = x `[m, k]` · Wᵀ + bias, or added to it, on the threads of the team.
pub(crate) fn matmul(team: &Team, x: Rows, m: usize, w: &Packed, out: &mut [f32], mode: Out) {
    let out = ArrayViewMut2::from_shape((m, w.n), out).expect("room for m rows");
    blocks::multiply(Isa::current(), team, Floats::<1>(x), w, w.all(), out, mode);
}

/// The columns `outputs` of the product (from a multiple of [`PANEL`] on), summed over `inputs` only, on the threads of the team.
/// Row i of `x` starts with input `inputs.start`; `out` is `[m, outputs]`, the numbers of a row side by side.
pub(crate) fn matmul_columns(
    team: &Team,
    x: Rows,
    w: &Packed,
    outputs: Range<usize>,
    inputs: Range<usize>,
    out: ArrayViewMut2<f32>,
    mode: Out,
) {
    debug_assert!(outputs.start.is_multiple_of(PANEL) && outputs.end <= w.n && inputs.end <= w.k);
    blocks::multiply(Isa::current(), team, Floats::<1>(x), w, [outputs, inputs], out, mode);
}

/// The columns `outputs` of the product (from a multiple of [`PANEL`] on), summed over `inputs` only, on this thread.
/// Row i of `x` starts with input `inputs.start`; row i of `out`, at `i * out_stride`, with column `outputs.start`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn matmul_part(
    x: Rows,
    m: usize,
    w: &Packed,
    outputs: Range<usize>,
    inputs: Range<usize>,
    out: &mut [f32],
    out_stride: usize,
    mode: Out,
) {
    debug_assert!(outputs.start.is_multiple_of(PANEL) && outputs.end <= w.n && inputs.end <= w.k);
    let shape = (m, outputs.len()).strides((out_stride, 1));
    let out = ArrayViewMut2::from_shape(shape, out).expect("room for m rows");
    timed_product(m, outputs.len(), inputs.len(), || {
        product_at(Isa::current(), Product { x: Floats::<1>(x), next: None, w, outputs, inputs, out, mode })
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::dispatch_at;
    use crate::kernels::team::with_team;

    fn numbers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|i| (i * step % 17) as f32 / 8.0 - 1.0).collect()
    }

    /// The plainest product there is: the oracle.
    fn reference(x: &[f32], w: &[f32], bias: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|p| x[i * k + p] as f64 * w[j * k + p] as f64).sum();
                out.push(sum + bias[j] as f64);
            }
        }
        out
    }

    #[test]
    fn every_level_equals_the_plain_product() {
        for level in Isa::ALL.into_iter().filter(|level| level.is_available()) {
            for (m, n, k) in (0..27).map(|m| (m, 33, 19)).chain((0..130).map(|n| (3, n, 7))).chain([
                (1, 130, 64),
                (2, 257, 3),
                (5, 40, 0),
                (12, 64, 130),
            ]) {
                let (x, w, bias) = (numbers(m * k, 5), numbers(n * k, 7), numbers(n, 3));
                let want = reference(&x, &w, &bias, m, n, k);
                let rows = Rows { data: &x, stride: k };
                let packed = Packed::from_rows(n, k, |i| &w[i * k..][..k], Some(&bias));
                let mut out = vec![1.0; m * n];
                for mode in [Out::Set, Out::Add] {
                    let (outputs, inputs) = (0..n, 0..k);
                    let view = ArrayViewMut2::from_shape((m, n), &mut out).unwrap();
                    let product =
                        Product { x: Floats::<1>(rows), next: None, w: &packed, outputs, inputs, out: view, mode };
                    dispatch_at(level, product);
                    let times = if mode == Out::Set { 1.0 } else { 2.0 };
                    for (got, want) in out.iter().zip(&want) {
                        assert!((*got as f64 - times * want).abs() < 1e-4, "{level:?} {m}x{n}x{k} {got} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn parts_transposes_and_strides_are_the_same_product() {
        let (m, n, k) = (7, 70, 40);
        let (x, w) = (numbers(m * k, 5), numbers(n * k, 7));
        let mut transposed = vec![0.0; n * k];
        for j in 0..n {
            for p in 0..k {
                transposed[p * n + j] = w[j * k + p];
            }
        }
        let want = reference(&x, &w, &vec![0.0; n], m, n, k);
        let packed = Packed::from_columns(n, k, |i| &transposed[i * n..][..n]);
        // columns 32.. summed over the inputs 8..31, then over the rest
        let mut out = vec![0.0; m * (n - 32)];
        for inputs in [8..31, 0..8, 31..k] {
            let rows = Rows { data: &x[inputs.start..], stride: k };
            matmul_part(rows, m, &packed, 32..n, inputs, &mut out, n - 32, Out::Add);
        }
        let mut of_team = vec![0.0; m * (n - 32)];
        with_team(usize::MAX, |team| {
            for (inputs, mode) in [(0..31, Out::Set), (31..k, Out::Add)] {
                let rows = Rows { data: &x[inputs.start..], stride: k };
                let out = ArrayViewMut2::from_shape((m, n - 32), &mut of_team).unwrap();
                matmul_columns(team, rows, &packed, 32..n, inputs, out, mode);
            }
        });
        for out in [out, of_team] {
            for i in 0..m {
                for j in 32..n {
                    assert!((out[i * (n - 32) + j - 32] as f64 - want[i * n + j]).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (m, n, k) = (100, 300, 400);
        let (x, w) = (numbers(m * k, 5), numbers(n * k, 7));
        let packed = Packed::from_rows(n, k, |i| &w[i * k..][..k], None);
        let mut all = vec![0.0; m * n];
        with_team(usize::MAX, |team| matmul(team, Rows { data: &x, stride: k }, m, &packed, &mut all, Out::Set));
        for i in [0, 13, 99] {
            let mut one = vec![0.0; n];
            matmul(&Team::alone(), Rows { data: &x[i * k..], stride: k }, 1, &packed, &mut one, Out::Set);
            assert_eq!(one, all[i * n..][..n]);
        }
    }

    #[test]
    fn gradients_of_a_matrix_equal_the_plain_product() {
        for (m, n, k) in [(1, 1, 1), (5, 9, 40), (33, 70, 3), (200, 17, 33), (3, 32, 32), (150, 300, 260)] {
            let (dy, x) = (numbers(m * n, 5), numbers(m * k, 7));
            let mut grad = vec![1.0; n * k];
            with_team(usize::MAX, |team| {
                let (dy, x) = (Rows { data: &dy, stride: n }, Rows { data: &x, stride: k });
                matmul_gradient(team, dy, n, x, k, m, &mut grad);
            });
            for j in 0..n {
                for p in 0..k {
                    let want: f64 = (0..m).map(|i| dy[i * n + j] as f64 * x[i * k + p] as f64).sum();
                    assert!((grad[j * k + p] as f64 - 1.0 - want).abs() < 1e-4, "{m}x{n}x{k}");
                }
            }
        }
    }
}
