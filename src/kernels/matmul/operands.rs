//! The operands of a product, of whatever type: inputs and the weights they meet, step by step.

use super::packed::PanelRow;
use crate::kernels::rows::Rows;
use crate::kernels::simd::Simd;

/// The inputs that meet one [`Weights`], and how they are multiplied.
pub(crate) trait Inputs: Copy {
    /// Multiplications one after the other that it takes.
    const STEPS: usize;
    /// Four lanes of consecutive inputs, for as many steps.
    type Four;
    /// What is multiplied in a step, in all lanes.
    type Wide<S: Simd>: Copy;
    fn splat<S: Simd>(self, s: S, step: usize) -> Self::Wide<S>;
    /// x·w + sum
    fn multiply<S: Simd>(s: S, x: Self::Wide<S>, w: Self::Wide<S>, sum: S::V) -> S::V;
    fn fours(x: &[Self]) -> &[Self::Four];
    /// x·w + sum for one of four lanes x.
    fn multiply_lane<S: Simd, const LANE: usize>(s: S, x: &Self::Four, w: Self::Wide<S>, sum: S::V) -> S::V;
}

impl<const N: usize> Inputs for [f32; N] {
    const STEPS: usize = N;
    type Four = [f32; 4];
    type Wide<S: Simd> = S::V;

    #[inline(always)]
    fn splat<S: Simd>(self, s: S, step: usize) -> S::V {
        s.splat(self[step])
    }

    #[inline(always)]
    fn multiply<S: Simd>(s: S, x: S::V, w: S::V, sum: S::V) -> S::V {
        s.mul_add(x, w, sum)
    }

    #[inline(always)]
    fn fours(x: &[Self]) -> &[[f32; 4]] {
        x.as_flattened().as_chunks().0
    }

    #[inline(always)]
    fn multiply_lane<S: Simd, const LANE: usize>(s: S, x: &[f32; 4], w: S::V, sum: S::V) -> S::V {
        s.mul_add_lane::<LANE>(w, x, sum)
    }
}

/// A panel's weights for one or several inputs, in whatever type they are stored.
pub(crate) trait Weights<X: Inputs>: Copy {
    /// The most rows of a tile for which the compiler keeps the sums in registers.
    const MAX_ROWS: usize;
    /// The same by one half of a panel.
    const MAX_ROWS_BY_HALF: usize = Self::MAX_ROWS;
    /// Panels side by side for one row or two, which leave registers for them: the sums of one do not wait for those of
    /// another. But memory is read fastest from one end to the other.
    const PANELS: usize;
    /// How many bytes ahead they are fetched for few rows: 0 if that is left to the CPU.
    const AHEAD: usize;
    /// Whether the sums of six rows are made by [`some_rows`](Self::some_rows) if products are [by lane](Simd::BY_LANE).
    const BY_SIX: bool = false;
    /// As [`Simd::six_rows`], or [`Simd::dot_rows_bf16`].
    fn some_rows<S: Simd, const R: usize>(
        _s: S,
        _x: [&[X]; R],
        _w: &[Self],
        _line: usize,
        _sums: &mut [S::V],
    ) -> usize {
        0
    }
    /// Those of a step, for the first or the second half of the panel.
    fn load<S: Simd>(&self, s: S, step: usize, half: usize) -> X::Wide<S>;
}

impl Weights<[f32; 1]> for PanelRow {
    const MAX_ROWS: usize = 12;
    const PANELS: usize = 4;
    const AHEAD: usize = 0;
    const BY_SIX: bool = true;

    #[inline(always)]
    fn some_rows<S: Simd, const R: usize>(
        s: S,
        x: [&[[f32; 1]]; R],
        w: &[Self],
        line: usize,
        sums: &mut [S::V],
    ) -> usize {
        match (x.as_slice().try_into(), sums.try_into()) {
            (Ok(x), Ok(sums)) => s.six_rows(<[_; 6]>::map(x, Inputs::fours), w, line, sums),
            _ => 0,
        }
    }

    #[inline(always)]
    fn load<S: Simd>(&self, s: S, _step: usize, half: usize) -> S::V {
        s.load(&self[half & 1].0)
    }
}

/// A left operand in rows.
pub(crate) trait LeftRows: Copy {
    type Inputs: Inputs;
    /// Without the first rows.
    fn skip_rows(self, rows: usize) -> Self;
    /// Where a number of a row is, or would be.
    fn address(self, row: usize, input: usize) -> *const ();
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
    fn address(self, row: usize, input: usize) -> *const () {
        self.0.data.as_ptr().wrapping_add(row * self.0.stride + input).cast()
    }

    #[inline(always)]
    fn inputs(&self, row: usize, count: usize) -> &[[f32; N]] {
        self.0.row(row, count).as_chunks().0
    }
}

/// Some rows of the left operand.
pub(crate) trait LeftTile<X: Inputs>: Copy {
    /// What meets the weights number i.
    fn at(self, row: usize, i: usize) -> X;
    /// Adds to the sums of one line the products of the first inputs, and says of how many.
    #[inline(always)]
    fn begin<S: Simd, W: Weights<X>>(self, _s: S, _w: &[W], _line: usize, _sums: &mut [S::V]) -> usize {
        0
    }
    /// x·w + sum for step number `LANE` of four, and four steps number i.
    fn multiply_lane<S: Simd, const LANE: usize>(self, s: S, row: usize, i: usize, w: X::Wide<S>, sum: S::V) -> S::V;
}

impl<const R: usize, X: Inputs> LeftTile<X> for [&[X]; R] {
    #[inline(always)]
    fn at(self, row: usize, i: usize) -> X {
        self[row][i]
    }

    #[inline(always)]
    fn begin<S: Simd, W: Weights<X>>(self, s: S, w: &[W], line: usize, sums: &mut [S::V]) -> usize {
        W::some_rows(s, self, w, line, sums)
    }

    #[inline(always)]
    fn multiply_lane<S: Simd, const LANE: usize>(self, s: S, row: usize, i: usize, w: X::Wide<S>, sum: S::V) -> S::V {
        X::multiply_lane::<S, LANE>(s, &X::fours(self[row])[i], w, sum)
    }
}
