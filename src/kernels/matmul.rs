//! x·Wᵀ with W packed once: every product of floats, and the tiles of those with bf16 on both sides.
//!
//! W `[n, k]` is cut into panels of [`PANEL`] outputs; a panel holds, for each of the k inputs, its outputs' weights side
//! by side and aligned to 64 bytes. A tile of the product, a few rows of x by one panel, stays in registers over the
//! whole of k: each weight is read once for all rows of the tile, in the order it lies in memory, and nothing is packed
//! during the call.
//!
//! Every output is one sum over k in ascending order (bf16 pairs in the CPU's own), whatever the shape of the product and however
//! it is shared among threads. So a row's result does not depend on the batch it is in.

use ndarray::{ArrayViewMut2, ShapeBuilder};

use super::clock::{Part, Work, timed, timed_product};
use super::parallel;
use super::simd::{Kernel, LANES, Simd, dispatch};

/// Outputs of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// Half a panel's weights for one input: a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [f32; LANES]);

/// A panel's weights for one input.
pub(crate) type PanelRow = [Line; 2];

pub(crate) const ZERO_ROW: PanelRow = [Line([0.0; LANES]); 2];

/// The inputs that meet one [`Weights`], and how they are multiplied.
pub(crate) trait Inputs: Copy {
    /// Multiplications one after the other that it takes.
    const STEPS: usize;
    /// What is multiplied in a step, in all lanes.
    type Wide<S: Simd>: Copy;
    fn splat<S: Simd>(self, s: S, step: usize) -> Self::Wide<S>;
    /// x·w + sum
    fn multiply<S: Simd>(s: S, x: Self::Wide<S>, w: Self::Wide<S>, sum: S::V) -> S::V;
}

impl<const N: usize> Inputs for [f32; N] {
    const STEPS: usize = N;
    type Wide<S: Simd> = S::V;

    #[inline(always)]
    fn splat<S: Simd>(self, s: S, step: usize) -> S::V {
        s.splat(self[step])
    }

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::V, w: S::V, sum: S::V) -> S::V {
        s.mul_add(x, w, sum)
    }
}

/// A panel's weights for one or several inputs, in whatever type they are stored.
pub(crate) trait Weights<X: Inputs>: Copy {
    /// The most rows of a tile for which the compiler keeps the sums in registers.
    const MAX_ROWS: usize;
    /// Panels side by side for one row or two, which leave registers for them: the sums of one do not wait for those of
    /// another. But memory is read fastest from one end to the other.
    const PANELS: usize;
    /// How many bytes ahead they are fetched for few rows: 0 if that is left to the CPU.
    const AHEAD: usize;
    /// Those of a step, for either half of the panel.
    fn load<S: Simd>(&self, s: S, step: usize) -> [X::Wide<S>; 2];
}

impl Weights<[f32; 1]> for PanelRow {
    const MAX_ROWS: usize = 12;
    const PANELS: usize = 4;
    const AHEAD: usize = 0;

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, _step: usize) -> [S::V; 2] {
        [s.load(&self[0].0), s.load(&self[1].0)]
    }
}

/// A matrix `[n, k]` in panels, with a bias `[n]`; a `W` holds the weights for N inputs.
pub(crate) struct Packed<W = PanelRow, const N: usize = 1> {
    /// n, the outputs.
    pub(crate) n: usize,
    /// k, the inputs: a multiple of N.
    pub(crate) k: usize,
    /// `[n / PANEL, k / N]`, the last panel filled up with zeros.
    pub(crate) panels: Vec<W>,
    /// `[n / PANEL]`; empty without a bias.
    pub(crate) bias: Vec<PanelRow>,
}

impl Packed {
    /// Packs the matrix with these n rows of k numbers, and the bias `[n]`, if any.
    pub(crate) fn from_rows<'a>(n: usize, k: usize, row: impl Fn(usize) -> &'a [f32], bias: Option<&[f32]>) -> Self {
        let mut panels = vec![ZERO_ROW; n.div_ceil(PANEL) * k];
        for output in 0..n {
            let panel = &mut panels[output / PANEL * k..][..k];
            let (line, lane) = (output % PANEL / LANES, output % LANES);
            for (to, &weight) in panel.iter_mut().zip(row(output)) {
                to[line].0[lane] = weight;
            }
        }
        let bias = bias.map_or(Vec::new(), |bias| bias.chunks(PANEL).map(panel_row).collect());
        Packed { n, k, panels, bias }
    }

    /// Packs the matrix with these k columns of n numbers.
    pub(crate) fn from_columns<'a>(n: usize, k: usize, column: impl Fn(usize) -> &'a [f32]) -> Self {
        let mut panels = Vec::with_capacity(n.div_ceil(PANEL) * k);
        for first in (0..n).step_by(PANEL) {
            let outputs = first..n.min(first + PANEL);
            panels.extend((0..k).map(|input| panel_row(&column(input)[outputs.clone()])));
        }
        Packed { n, k, panels, bias: Vec::new() }
    }
}

/// At most [`PANEL`] numbers, filled up with zeros.
fn panel_row(numbers: &[f32]) -> PanelRow {
    // copies of a length known beforehand are a few instructions
    if let Some((low, high)) = numbers.split_first_chunk()
        && let Ok(high) = high.try_into()
    {
        return [Line(*low), Line(high)];
    }
    let mut row = ZERO_ROW;
    for (line, numbers) in row.iter_mut().zip(numbers.chunks(LANES)) {
        line.0[..numbers.len()].copy_from_slice(numbers);
    }
    row
}

/// Rows of numbers in memory, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T = f32> {
    pub data: &'a [T],
    pub stride: usize,
}

impl<'a, T: Copy> Rows<'a, T> {
    /// Without the first columns.
    pub(crate) fn skip_columns(self, column: usize) -> Self {
        Rows { data: self.data.get(column..).unwrap_or(&[]), ..self }
    }

    /// The first `width` numbers of row `i`.
    pub(crate) fn row(&self, i: usize, width: usize) -> &'a [T] {
        &self.data[i * self.stride..][..width]
    }
}

/// What becomes of the numbers that `out` holds before a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Out {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}

/// out `[m, n]` = x `[m, k]` · Wᵀ + bias, on several threads if that pays.
pub(crate) fn matmul(x: Rows, m: usize, w: &Packed, out: &mut [f32], mode: Out) {
    let half = m.div_ceil(2).next_multiple_of(12);
    if half < m && half * w.n * w.k >= parallel::MIN_WORK {
        let (top, bottom) = out.split_at_mut(half * w.n);
        let below = Rows { data: &x.data[half * x.stride..], ..x };
        parallel::join(|| matmul(x, half, w, top, mode), || matmul(below, m - half, w, bottom, mode));
    } else {
        matmul_part(x, m, w, 0..w.n, 0..w.k, out, w.n, mode);
    }
}

/// The columns `outputs` of the product (from a multiple of [`PANEL`] on), summed over `inputs` only, on this thread.
/// Row i of `x` starts with input `inputs.start`; row i of `out`, at `i * out_stride`, with column `outputs.start`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn matmul_part(
    x: Rows,
    m: usize,
    w: &Packed,
    outputs: std::ops::Range<usize>,
    inputs: std::ops::Range<usize>,
    out: &mut [f32],
    out_stride: usize,
    mode: Out,
) {
    debug_assert!(outputs.start.is_multiple_of(PANEL) && outputs.end <= w.n && inputs.end <= w.k);
    let shape = (m, outputs.len()).strides((out_stride, 1));
    let out = ArrayViewMut2::from_shape(shape, out).expect("room for m rows");
    timed_product(m, outputs.len(), inputs.len(), || {
        dispatch(Product { x: Floats::<1>(x), w, outputs, inputs, out, mode })
    });
}

/// grad `[n, k]` += dyᵀ·x for dy `[m, n]` and x `[m, k]`: the gradient of a matrix from those of its outputs.
pub(crate) fn matmul_gradient(dy: Rows, n: usize, x: Rows, k: usize, m: usize, grad: &mut [f32]) {
    let work = Work::numbers(2 * m * (n + k));
    let (dy, x) = timed(Part::Packing, work, || {
        (Packed::from_columns(n, m, |i| dy.row(i, n)), Packed::from_columns(k, m, |i| x.row(i, k)))
    });
    gradient_rows(&dy, 0, n, &x, grad);
}

/// The rows from `first` on of the product in [`matmul_gradient`], as many as `grad` holds.
fn gradient_rows(dy: &Packed, first: usize, n: usize, x: &Packed, grad: &mut [f32]) {
    let half = n.div_ceil(2).next_multiple_of(COLUMN_TILE);
    if half < n && half * x.n * x.k >= parallel::MIN_WORK {
        let (top, bottom) = grad.split_at_mut(half * x.n);
        parallel::join(
            || gradient_rows(dy, first, half, x, top),
            || gradient_rows(dy, first + half, n - half, x, bottom),
        );
    } else {
        let out = ArrayViewMut2::from_shape((n, x.n), grad).expect("room for n rows");
        let (outputs, inputs) = (0..x.n, 0..x.k);
        timed_product(n, x.n, x.k, || {
            dispatch(Product { x: Columns(dy, first), w: x, outputs, inputs, out, mode: Out::Add });
        });
    }
}

/// The left operand of a product.
pub(crate) trait Left: Copy {
    type Inputs: Inputs;
    /// Computes some panels of the product, side by side where there are rows few enough.
    fn by_panels<S: Simd, W: Weights<Self::Inputs>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        panel: usize,
        panels: usize,
    );
}

/// A left operand in rows.
pub(crate) trait LeftRows: Copy {
    type Inputs: Inputs;
    /// The first `count` numbers of a row, as many at a time as meet one of the weights.
    fn inputs(&self, row: usize, count: usize) -> &[Self::Inputs];
}

/// Rows of floats, N at a time.
#[derive(Clone, Copy)]
pub(crate) struct Floats<'a, const N: usize>(pub Rows<'a>);

impl<const N: usize> LeftRows for Floats<'_, N> {
    type Inputs = [f32; N];

    #[inline(always)]
    fn inputs(&self, row: usize, count: usize) -> &[[f32; N]] {
        self.0.row(row, count).as_chunks().0
    }
}

/// The columns of a packed matrix `[m, k]` from this one on: it is read transposed.
#[derive(Clone, Copy)]
struct Columns<'a>(&'a Packed, usize);

/// Columns of a panel that are the rows of one tile.
const COLUMN_TILE: usize = 8;

/// Some rows of the left operand.
trait LeftTile<X>: Copy {
    /// What meets the weights number i.
    fn at(self, row: usize, i: usize) -> X;
}

impl<const R: usize, X: Copy> LeftTile<X> for [&[X]; R] {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> X {
        self[row][i]
    }
}

/// Eight columns of a panel, as rows.
#[derive(Clone, Copy)]
struct PanelColumns<'a> {
    panel: &'a [PanelRow],
    first: usize,
}

impl LeftTile<[f32; 1]> for PanelColumns<'_> {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> [f32; 1] {
        let (line, lane) = (self.first / LANES, self.first % LANES);
        let (tiles, _): (&[[f32; COLUMN_TILE]], _) = self.panel[i][line].0.as_chunks();
        [tiles[lane / COLUMN_TILE][row]]
    }
}

/// The columns `outputs` of a product, summed over `inputs`, as in [`matmul_part`].
pub(crate) struct Product<'a, X, W, const N: usize> {
    pub x: X,
    pub w: &'a Packed<W, N>,
    pub outputs: std::ops::Range<usize>,
    /// From a multiple of N to one.
    pub inputs: std::ops::Range<usize>,
    /// `[m, outputs]`, the numbers of a row side by side.
    pub out: ArrayViewMut2<'a, f32>,
    pub mode: Out,
}

impl<X: Left, W: Weights<X::Inputs>, const N: usize> Kernel for Product<'_, X, W, N> {
    type Output = ();

    /// Panels outside, rows inside: a panel is fetched once and stays in a near cache while all rows pass.
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        const { assert!((W::PANELS == 1 || W::PANELS == 4) && W::MAX_ROWS <= 12) };
        let panels = self.outputs.end.div_ceil(PANEL);
        let mut panel = self.outputs.start / PANEL;
        let wide = if self.out.nrows() <= 2 { W::PANELS } else { 1 };
        while panel < panels {
            let width = if panel + wide <= panels { wide } else { 1 };
            X::by_panels(s, &mut self, panel, width);
            panel += width;
        }
    }
}

impl<X: LeftRows> Left for X {
    type Inputs = X::Inputs;

    #[inline(always)]
    fn by_panels<S: Simd, W: Weights<X::Inputs>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        panel: usize,
        panels: usize,
    ) {
        let m = product.out.nrows();
        let mut row = 0;
        while row < m {
            let rows = (m - row).min(S::TILE_ROWS).min(W::MAX_ROWS);
            match (rows, panels) {
                (1, 4) => product.rows::<S, 1, 4>(s, row, panel),
                (2, 4) => product.rows::<S, 2, 4>(s, row, panel),
                (1, _) => product.rows::<S, 1, 1>(s, row, panel),
                (2, _) => product.rows::<S, 2, 1>(s, row, panel),
                (3, _) => product.rows::<S, 3, 1>(s, row, panel),
                (4, _) => product.rows::<S, 4, 1>(s, row, panel),
                (5, _) => product.rows::<S, 5, 1>(s, row, panel),
                (6, _) => product.rows::<S, 6, 1>(s, row, panel),
                (7, _) => product.rows::<S, 7, 1>(s, row, panel),
                (8, _) => product.rows::<S, 8, 1>(s, row, panel),
                (9, _) => product.rows::<S, 9, 1>(s, row, panel),
                (10, _) => product.rows::<S, 10, 1>(s, row, panel),
                (11, _) => product.rows::<S, 11, 1>(s, row, panel),
                _ => product.rows::<S, 12, 1>(s, row, panel),
            }
            row += rows;
        }
    }
}

impl Left for Columns<'_> {
    type Inputs = [f32; 1];

    #[inline(always)]
    fn by_panels<S: Simd, W: Weights<[f32; 1]>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        panel: usize,
        panels: usize,
    ) {
        let (Columns(x, first), m) = (product.x, product.out.nrows());
        for panel in panel..panel + panels {
            for row in (0..m).step_by(COLUMN_TILE) {
                let column = first + row;
                let columns = PanelColumns { panel: &x.panels[column / PANEL * x.k..][..x.k], first: column % PANEL };
                product.tile::<S, COLUMN_TILE, 1>(s, columns, row, COLUMN_TILE.min(m - row), panel);
            }
        }
    }
}

impl<X: LeftRows, W: Weights<X::Inputs>, const N: usize> Product<'_, X, W, N> {
    /// R rows of x from `row` on by P panels from `panel` on.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const P: usize>(&mut self, s: S, row: usize, panel: usize) {
        let (x, count) = (self.x, self.inputs.len());
        let mut tile: [&[X::Inputs]; R] = [&[]; R];
        for (r, tile) in tile.iter_mut().enumerate() {
            *tile = x.inputs(row + r, count);
        }
        self.tile::<S, R, P>(s, tile, row, R, panel);
    }
}

impl<X: Left, W: Weights<X::Inputs>, const N: usize> Product<'_, X, W, N> {
    /// The first `rows` of R rows, the first of which is `row`, by P panels from `panel` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with plain indices the compiler keeps all sums in registers
    fn tile<S: Simd, const R: usize, const P: usize>(
        &mut self,
        s: S,
        x: impl LeftTile<X::Inputs>,
        row: usize,
        rows: usize,
        panel: usize,
    ) {
        let count = self.inputs.len() / N;
        let mut w: [&[W]; P] = [&[]; P];
        for (p, w) in w.iter_mut().enumerate() {
            *w = &self.w.panels[((panel + p) * self.w.k + self.inputs.start) / N..][..count];
        }
        let streamed = P > 1 || self.out.nrows() <= W::MAX_ROWS;
        let mut sums = [[[s.splat(0.0); 2]; P]; R];
        for i in 0..count {
            for p in 0..P {
                if W::AHEAD > 0 && streamed {
                    // a product of few rows waits for memory, and the CPU alone looks not far enough ahead
                    let ahead = w[p].as_ptr().wrapping_add(i).wrapping_byte_add(W::AHEAD);
                    for line in (0..size_of::<W>()).step_by(size_of::<Line>()) {
                        s.prefetch(ahead.wrapping_byte_add(line));
                    }
                }
            }
            for p in 0..P {
                for step in 0..X::Inputs::STEPS {
                    let [low, high] = w[p][i].load(s, step);
                    for r in 0..R {
                        let x = x.at(r, i).splat(s, step);
                        sums[r][p][0] = X::Inputs::multiply(s, x, low, sums[r][p][0]);
                        sums[r][p][1] = X::Inputs::multiply(s, x, high, sums[r][p][1]);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate().take(rows) {
            let row = self.out.row_mut(row + r).into_slice().expect("numbers side by side");
            for (p, sums) in sums.into_iter().enumerate() {
                let first = (panel + p) * PANEL - self.outputs.start;
                finish(s, sums, &mut row[first..], self.w.bias.get(panel + p), self.mode);
            }
        }
    }
}

/// Writes the sums of a panel to the first of these numbers, or adds them; there may be fewer.
#[inline(always)]
pub(crate) fn finish<S: Simd>(s: S, sums: [S::V; 2], out: &mut [f32], bias: Option<&PanelRow>, mode: Out) {
    for (half, mut sum) in sums.into_iter().enumerate() {
        let Some(out) = out.get_mut(half * LANES..) else { break };
        let width = LANES.min(out.len());
        let out = &mut out[..width];
        if let Some(bias) = bias {
            sum = s.add(sum, s.load(&bias[half].0));
        }
        if mode == Out::Add {
            sum = s.add(s.load_some(out), sum);
        }
        s.store_some(sum, out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Level, dispatch_at};
    use super::*;

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
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
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
                    let product = Product { x: Floats::<1>(rows), w: &packed, outputs, inputs, out: view, mode };
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
        for i in 0..m {
            for j in 32..n {
                assert!((out[i * (n - 32) + j - 32] as f64 - want[i * n + j]).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_batch() {
        let (m, n, k) = (100, 300, 400);
        let (x, w) = (numbers(m * k, 5), numbers(n * k, 7));
        let packed = Packed::from_rows(n, k, |i| &w[i * k..][..k], None);
        let mut all = vec![0.0; m * n];
        matmul(Rows { data: &x, stride: k }, m, &packed, &mut all, Out::Set);
        for i in [0, 13, 99] {
            let mut one = vec![0.0; n];
            matmul(Rows { data: &x[i * k..], stride: k }, 1, &packed, &mut one, Out::Set);
            assert_eq!(one, all[i * n..][..n]);
        }
    }

    #[test]
    fn gradients_of_a_matrix_equal_the_plain_product() {
        for (m, n, k) in [(1, 1, 1), (5, 9, 40), (33, 70, 3), (200, 17, 33), (3, 32, 32), (150, 300, 260)] {
            let (dy, x) = (numbers(m * n, 5), numbers(m * k, 7));
            let mut grad = vec![1.0; n * k];
            matmul_gradient(Rows { data: &dy, stride: n }, n, Rows { data: &x, stride: k }, k, m, &mut grad);
            for j in 0..n {
                for p in 0..k {
                    let want: f64 = (0..m).map(|i| dy[i * n + j] as f64 * x[i * k + p] as f64).sum();
                    assert!((grad[j * k + p] as f64 - 1.0 - want).abs() < 1e-4, "{m}x{n}x{k}");
                }
            }
        }
    }
}
