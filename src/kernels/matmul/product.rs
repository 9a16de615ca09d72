//! The product itself, in tiles that stay in registers: some rows of x by some lines of W, a line being the sixteen outputs of
//! half a panel. How many depends on the registers there are, the order of a sum does not.

use ndarray::ArrayViewMut2;

use super::operands::{Inputs, LeftRows, LeftTile, Weights};
use super::packed::{Line, PANEL, Packed};
use crate::kernels::rows::Out;
use crate::kernels::simd::{Isa, Kernel, LANES, Simd, dispatch_bf16_at};

/// How many bytes ahead the weights are fetched of which a tile reads one half.
const HALVES_AHEAD: usize = 4096;
/// Weights of a line between two fetches of a line of the next panel: more at once would keep what is needed now waiting.
const PIECE: usize = 8;

/// The columns `outputs` of a product, summed over `inputs`, as in [`matmul_part`].
pub(crate) struct Product<'a, X, W, const N: usize> {
    pub x: X,
    /// Rows, as many at most, that this thread may multiply next: they are fetched on the way.
    pub next: Option<X>,
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

    /// Lines outside, rows inside: weights are fetched once and stay in a near cache while all rows pass.
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let wide = X::lines::<S, W>(self.out.nrows());
        let end = self.outputs.end.div_ceil(LANES);
        let mut line = self.outputs.start / LANES;
        while line < end {
            // a whole panel is there even if the matrix ends in its first half
            let lines = if line + wide <= end { wide } else { wide.min(2) };
            X::by_lines(s, &mut self, line, lines);
            line += lines;
        }
    }
}

impl<X: Left, W: Weights<X::Inputs>, const N: usize> Product<'_, X, W, N> {
    /// The first `rows` of R rows, the first of which is `row`, by L lines from `line` on.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // with plain indices the compiler keeps all sums in registers
    pub(super) fn tile<S: Simd, const R: usize, const L: usize>(
        &mut self,
        s: S,
        x: impl LeftTile<X::Inputs>,
        row: usize,
        rows: usize,
        line: usize,
    ) {
        let count = self.inputs.len() / N;
        let mut w: [&[W]; L] = [&[]; L];
        for (l, w) in w.iter_mut().enumerate() {
            *w = &self.w.panels[((line + l) / 2 * self.w.k + self.inputs.start) / N..][..count];
        }
        let streamed = L > 2 || self.out.nrows() <= W::MAX_ROWS;
        // memory is read fastest from one end to the other, but a tile may read one half of a panel. So while all rows pass over a
        // panel, the next one is fetched, or the first rows to pass over it fetch both halves
        let halves = L == 1 && S::TILE_LINES == 1;
        let pieces = halves && S::PREFETCHES && X::FAR_WEIGHTS;
        let leads = row == 0 && if pieces { line == self.outputs.start / LANES } else { line.is_multiple_of(2) };
        let fetches = halves && leads;
        if self.mode == Out::Add {
            // what the sums are added to may be far away: it comes while they are made
            for r in 0..rows {
                let to = self.out.row(row + r).as_ptr().wrapping_add(line * LANES - self.outputs.start);
                (0..L).for_each(|l| s.prefetch(to.wrapping_add(l * LANES)));
            }
        }
        let mut sums = [[s.splat(0.0); L]; R];
        let mut first = 0;
        if S::BY_LANE {
            if L == 1 && W::BY_SIX {
                first = x.begin(s, w[0], line, sums.as_flattened_mut());
            }
            if first == 0 {
                first = match X::Inputs::STEPS {
                    1 => by_lanes::<S, X, W, R, L, 4>(s, x, w, line, &mut sums),
                    _ => by_lanes::<S, X, W, R, L, 2>(s, x, w, line, &mut sums),
                };
            }
        }
        let (mut ahead, bytes) = if pieces { self.next_panel::<R>(row, line) } else { (w[0].as_ptr(), 0) };
        while first < count {
            let mut end = count;
            if pieces {
                s.prefetch(ahead);
                ahead = ahead.wrapping_byte_add(bytes);
                end = count.min(first + PIECE);
            }
            for i in first..end {
                for l in (0..L).step_by(2) {
                    if W::AHEAD > 0 && streamed {
                        // a product of few rows waits for memory, and the CPU alone looks not far enough ahead
                        let ahead = w[l].as_ptr().wrapping_add(i).wrapping_byte_add(W::AHEAD);
                        for line in (0..size_of::<W>()).step_by(size_of::<Line>()) {
                            s.prefetch(ahead.wrapping_byte_add(line));
                        }
                    }
                }
                if fetches {
                    let ahead = w[0].as_ptr().wrapping_add(i).wrapping_byte_add(HALVES_AHEAD);
                    for line in (0..size_of::<W>()).step_by(size_of::<Line>()) {
                        s.prefetch(ahead.wrapping_byte_add(line));
                    }
                }
                for l in (0..L).step_by(2) {
                    for step in 0..X::Inputs::STEPS {
                        // the two halves of a panel, or one of them
                        let first = if L == 1 { line } else { 0 };
                        let low = w[l][i].load(s, step, first);
                        let high = if L == 1 { low } else { w[l][i].load(s, step, 1) };
                        for r in 0..R {
                            let x = x.at(r, i).splat(s, step);
                            sums[r][l] = X::Inputs::multiply(s, x, low, sums[r][l]);
                            if L > 1 {
                                sums[r][l + 1] = X::Inputs::multiply(s, x, high, sums[r][l + 1]);
                            }
                        }
                    }
                }
            }
            first = end;
        }
        for (r, sums) in sums.into_iter().enumerate().take(rows) {
            let row = self.out.row_mut(row + r).into_slice().expect("numbers side by side");
            for (l, sum) in sums.into_iter().enumerate() {
                let line = line + l;
                let Some(out) = row.get_mut(line * LANES - self.outputs.start..) else { break };
                let bias = self.w.bias.get(line / 2).map(|bias| &bias[line % 2]);
                finish(s, sum, out, bias, self.mode);
            }
        }
    }

    /// Where R rows, from `row` on, that pass over a half of a panel begin to fetch the next panel, and how many bytes they go on after
    /// each [`PIECE`].
    #[inline(always)]
    fn next_panel<const R: usize>(&self, row: usize, line: usize) -> (*const W, usize) {
        let (m, panel) = (self.out.nrows(), line / 2 + 1);
        if panel * PANEL >= self.w.n {
            return (self.w.panels.as_ptr(), 0);
        }
        let start = self.w.panels.as_ptr().wrapping_add((panel * self.w.k + self.inputs.start) / N);
        let (passes, passed) = (2 * m, line % 2 * m + row);
        let bytes = self.inputs.len() / N * size_of::<W>();
        (start.wrapping_byte_add(bytes / passes * passed), (PIECE * size_of::<W>() * R).div_ceil(passes))
    }
}

/// Computes a product on one instruction set. A call of its own: it is much code, which several places share.
#[inline(never)]
pub(crate) fn product_at<X: Left, W: Weights<X::Inputs>, const N: usize>(level: Isa, product: Product<X, W, N>) {
    dispatch_bf16_at(level, product);
}

/// The left operand of a product.
pub(crate) trait Left: Copy {
    type Inputs: Inputs;
    /// Whether the weights may lie in a far cache or in memory.
    const FAR_WEIGHTS: bool;
    /// Lines of W that all rows pass over together.
    fn lines<S: Simd, W: Weights<Self::Inputs>>(rows: usize) -> usize;
    /// Computes `lines` lines of the product.
    fn by_lines<S: Simd, W: Weights<Self::Inputs>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        line: usize,
        lines: usize,
    );
}

/// Lines of one set of the first-level cache, on most CPUs.
const WAYS: usize = 8;

/// Whether the same numbers of all rows share one set of the first-level cache, where there are two rows at least: more rows than the
/// set has ways would drive each other out of it.
#[inline(always)]
fn collide<X: LeftRows>(x: X) -> bool {
    /// All sets, one line each.
    const BYTES: usize = 4096;
    let [first, second] = [0, 1].map(|row| x.inputs(row, 0).as_ptr().addr());
    second.abs_diff(first).is_multiple_of(BYTES)
}

impl<X: LeftRows> Left for X {
    type Inputs = X::Inputs;
    const FAR_WEIGHTS: bool = true;

    #[inline(always)]
    fn lines<S: Simd, W: Weights<X::Inputs>>(rows: usize) -> usize {
        const { assert!((W::PANELS == 1 || W::PANELS == 4) && W::MAX_ROWS <= 12) };
        match rows {
            ..=2 => {
                let fit = S::TILE_ROWS * S::TILE_LINES / rows.max(1);
                (1 << fit.ilog2()).min(2 * W::PANELS)
            }
            // few rows wait for memory, which is read fastest from one end to the other
            3..=6 => 2,
            _ => S::TILE_LINES,
        }
    }

    #[inline(always)]
    fn by_lines<S: Simd, W: Weights<X::Inputs>, const N: usize>(
        s: S,
        product: &mut Product<Self, W, N>,
        line: usize,
        lines: usize,
    ) {
        let m = product.out.nrows();
        // the sums of three rows by two lines would fit the registers of AVX2, too, but not with what they are made of
        let most = match lines > S::TILE_LINES {
            true => S::TILE_ROWS.div_ceil(4),
            false if S::BY_LANE && !W::BY_SIX => S::LANE_ROWS,
            false if S::TILE_LINES == 1 => S::TILE_ROWS.min(W::MAX_ROWS_BY_HALF),
            false if m > WAYS && collide(product.x) => S::TILE_ROWS.min(W::MAX_ROWS).min(WAYS),
            false => S::TILE_ROWS.min(W::MAX_ROWS),
        };
        // whether there are tiles of five and six rows by one line
        let wide = S::TILE_LINES == 1 && (W::BY_SIX || !S::BY_LANE);
        // of the next rows, the inputs that these lines fetch
        let ahead = product.next.filter(|_| S::PREFETCHES).map(|next| {
            let (first, count) = (product.outputs.start / LANES, product.outputs.len().div_ceil(LANES));
            let part = |line: usize| product.inputs.len() * (line - first).min(count) / count;
            (next, part(line), part(line + lines))
        });
        let mut row = 0;
        while row < m {
            // as even as can be: a tile of one row would wait for its own sums
            let rows = (m - row).div_ceil((m - row).div_ceil(most));
            // no less than they are: the compiler leaves out the tiles that are never taken
            let (rows, lines) = (rows.min(S::TILE_ROWS), lines.min(S::TILE_ROWS * S::TILE_LINES));
            match (rows, lines) {
                // tiles that do not fit the registers are not even compiled
                (1, 8) if S::TILE_ROWS > 6 => product.rows::<S, 1, 8>(s, row, line),
                (_, 8) if S::TILE_ROWS > 6 => product.rows::<S, 2, 8>(s, row, line),
                (_, 4) => product.rows::<S, 1, 4>(s, row, line),
                (1, 1) if S::TILE_LINES == 1 => product.rows::<S, 1, 1>(s, row, line),
                (2, 1) if S::TILE_LINES == 1 => product.rows::<S, 2, 1>(s, row, line),
                (3, 1) if S::TILE_LINES == 1 => product.rows::<S, 3, 1>(s, row, line),
                (4, 1) if S::TILE_LINES == 1 => product.rows::<S, 4, 1>(s, row, line),
                (5, 1) if wide => product.rows::<S, 5, 1>(s, row, line),
                (_, 1) if wide => product.rows::<S, 6, 1>(s, row, line),
                (1, _) => product.rows::<S, 1, 2>(s, row, line),
                (2, _) => product.rows::<S, 2, 2>(s, row, line),
                (3, _) if S::TILE_ROWS > 6 => product.rows::<S, 3, 2>(s, row, line),
                (4, _) if S::TILE_ROWS > 6 => product.rows::<S, 4, 2>(s, row, line),
                (5, _) if S::TILE_ROWS > 6 => product.rows::<S, 5, 2>(s, row, line),
                (6, _) if S::TILE_ROWS > 6 => product.rows::<S, 6, 2>(s, row, line),
                (7, _) if S::TILE_ROWS > 6 => product.rows::<S, 7, 2>(s, row, line),
                (8, _) if S::TILE_ROWS > 6 => product.rows::<S, 8, 2>(s, row, line),
                (9, _) if S::TILE_ROWS > 6 => product.rows::<S, 9, 2>(s, row, line),
                (10, _) if S::TILE_ROWS > 6 => product.rows::<S, 10, 2>(s, row, line),
                (11, _) if S::TILE_ROWS > 6 => product.rows::<S, 11, 2>(s, row, line),
                (12, _) if S::TILE_ROWS > 6 => product.rows::<S, 12, 2>(s, row, line),
                _ => unreachable!("a tile that does not fit the registers"),
            }
            if let Some((next, begin, end)) = ahead {
                for input in (begin.next_multiple_of(LANES)..end).step_by(LANES) {
                    for r in row..row + rows {
                        s.prefetch(next.address(r, input));
                    }
                }
            }
            row += rows;
        }
    }
}

impl<X: LeftRows, W: Weights<X::Inputs>, const N: usize> Product<'_, X, W, N> {
    /// R rows of x from `row` on by L lines from `line` on.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const L: usize>(&mut self, s: S, row: usize, line: usize) {
        let (x, count) = (self.x, self.inputs.len());
        let mut tile: [&[X::Inputs]; R] = [&[]; R];
        for (r, tile) in tile.iter_mut().enumerate() {
            *tile = x.inputs(row + r, count);
        }
        self.tile::<S, R, L>(s, tile, row, R, line);
    }
}

/// Adds to the sums of a tile as many products as there are in fours of steps, of G inputs each, and says of how many inputs.
#[inline(always)]
fn by_lanes<S: Simd, X: Left, W: Weights<X::Inputs>, const R: usize, const L: usize, const G: usize>(
    s: S,
    x: impl LeftTile<X::Inputs>,
    w: [&[W]; L],
    line: usize,
    sums: &mut [[S::V; L]; R],
) -> usize {
    let w = w.map(|w| w.as_chunks::<G>().0);
    let fours = w[0].len();
    for i in 0..fours {
        by_lane::<S, X, W, R, L, G, 0>(s, x, w, i, line, sums);
        by_lane::<S, X, W, R, L, G, 1>(s, x, w, i, line, sums);
        by_lane::<S, X, W, R, L, G, 2>(s, x, w, i, line, sums);
        by_lane::<S, X, W, R, L, G, 3>(s, x, w, i, line, sums);
    }
    G * fours
}

/// Adds one of four steps.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // as above
fn by_lane<
    S: Simd,
    X: Left,
    W: Weights<X::Inputs>,
    const R: usize,
    const L: usize,
    const G: usize,
    const LANE: usize,
>(
    s: S,
    x: impl LeftTile<X::Inputs>,
    w: [&[[W; G]]; L],
    i: usize,
    line: usize,
    sums: &mut [[S::V; L]; R],
) {
    for l in (0..L).step_by(2) {
        let w = &w[l][i][LANE * G / 4];
        let (step, first) = (LANE % (4 / G), if L == 1 { line } else { 0 });
        let low = w.load(s, step, first);
        let high = if L == 1 { low } else { w.load(s, step, 1) };
        for r in 0..R {
            sums[r][l] = x.multiply_lane::<S, LANE>(s, r, i, low, sums[r][l]);
            if L > 1 {
                sums[r][l + 1] = x.multiply_lane::<S, LANE>(s, r, i, high, sums[r][l + 1]);
            }
        }
    }
}

/// Writes the sums of a line to the first of these numbers, or adds them; there may be fewer.
#[inline(always)]
pub(crate) fn finish<S: Simd>(s: S, mut sum: S::V, out: &mut [f32], bias: Option<&Line>, mode: Out) {
    let width = LANES.min(out.len());
    let out = &mut out[..width];
    if let Some(bias) = bias {
        sum = s.add(sum, s.load(&bias.0));
    }
    if mode == Out::Add {
        sum = s.add(s.load_some(out), sum);
    }
    s.store_some(sum, out);
}
