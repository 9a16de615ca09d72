//! The product itself, in tiles that stay in registers: some rows of x by a panel or a few of W.

use ndarray::ArrayViewMut2;

use super::packed::{Line, PANEL, Packed, PanelRow};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::simd::{Kernel, LANES, Simd};

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
    /// Without the first rows.
    fn skip_rows(self, rows: usize) -> Self;
    /// The first `count` numbers of a row, as many at a time as meet one of the weights.
    fn inputs(&self, row: usize, count: usize) -> &[Self::Inputs];
}

/// Rows of floats, N at a time.
#[derive(Clone, Copy)]
pub(crate) struct Floats<'a, const N: usize>(pub Rows<'a>);

impl<const N: usize> LeftRows for Floats<'_, N> {
    type Inputs = [f32; N];

    fn skip_rows(self, rows: usize) -> Self {
        Floats(self.0.skip_rows(rows))
    }

    #[inline(always)]
    fn inputs(&self, row: usize, count: usize) -> &[[f32; N]] {
        self.0.row(row, count).as_chunks().0
    }
}

/// Some rows of the left operand.
pub(super) trait LeftTile<X>: Copy {
    /// What meets the weights number i.
    fn at(self, row: usize, i: usize) -> X;
}

impl<const R: usize, X: Copy> LeftTile<X> for [&[X]; R] {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> X {
        self[row][i]
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
    pub(super) fn tile<S: Simd, const R: usize, const P: usize>(
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
