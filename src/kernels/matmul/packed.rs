//! Matrices in the order in which products read them.

use std::ops::Range;

use crate::kernels::memory::filled;
use crate::kernels::profiler::{Cost, Stage, timed};
pub(crate) use crate::kernels::simd::Line;
use crate::kernels::simd::{Kernel, LANES, Simd, dispatch};
use crate::kernels::team::Team;

/// Outputs of a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// A panel's weights for one input.
pub(crate) type PanelRow = [Line; 2];

pub(crate) const ZERO_ROW: PanelRow = [Line([0.0; LANES]); 2];

/// A matrix `[n, k]` in panels, with a bias `[n]`; a `W` holds the weights for N inputs.
#[derive(Clone)]
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
    pub(crate) fn from_rows<'a>(
        n: usize,
        k: usize,
        row: impl Fn(usize) -> &'a [f32] + Sync,
        bias: Option<&[f32]>,
    ) -> Self {
        Packed::refill_from_rows(&Team::alone(), n, k, row, bias, Vec::new())
    }

    /// As [`from_rows`](Self::from_rows), on several threads and in memory that was used before.
    pub(crate) fn refill_from_rows<'a>(
        team: &Team,
        n: usize,
        k: usize,
        row: impl Fn(usize) -> &'a [f32] + Sync,
        bias: Option<&[f32]>,
        mut panels: Vec<PanelRow>,
    ) -> Self {
        panels.resize(n.div_ceil(PANEL) * k, ZERO_ROW);
        team.for_each(panels.chunks_mut(k.max(1)).enumerate(), |(panel, to)| {
            let mut rows: [&[f32]; PANEL] = [&[]; PANEL];
            let (first, count) = (panel * PANEL, PANEL.min(n - panel * PANEL));
            rows.iter_mut().enumerate().take(count).for_each(|(i, to)| *to = &row(first + i)[..k]);
            timed(Stage::Packing, Cost::numbers(2 * k * PANEL), || dispatch(Transpose { rows: &rows[..count], to }));
        });
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

    /// As [`from_columns`](Self::from_columns), on several threads and in memory that was used before.
    pub(crate) fn refill_from_columns<'a>(
        team: &Team,
        n: usize,
        k: usize,
        column: impl Fn(usize) -> &'a [f32] + Sync,
        mut panels: Vec<PanelRow>,
    ) -> Self {
        panels.resize(n.div_ceil(PANEL) * k, ZERO_ROW);
        let mut packed = Packed { n, k, panels, bias: Vec::new() };
        packed.set_columns(team, 0..k, column);
        packed
    }

    /// Overwrites some of the columns, on several threads.
    pub(crate) fn set_columns<'a>(
        &mut self,
        team: &Team,
        columns: Range<usize>,
        column: impl Fn(usize) -> &'a [f32] + Sync,
    ) {
        let sizes = [self.n, self.k, PANEL];
        let parts = parts(team, self.n, self.k, PANEL, &mut self.panels);
        team.for_each(parts, |(first, panels)| arrange(sizes, columns.clone(), &column, panel_row, first, panels));
    }
}

/// At most [`PANEL`] rows become a panel.
struct Transpose<'s> {
    rows: &'s [&'s [f32]],
    to: &'s mut [PanelRow],
}

impl Kernel for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        /// Inputs at a time: what is read and written for them stays in the nearest cache.
        const INPUTS: usize = 32;
        /// Inputs from which on they are fetched before their turn: so little is read of each row that the CPU's own prefetcher does
        /// not see it.
        const AHEAD: usize = 64;
        for (i, to) in self.to.chunks_mut(INPUTS).enumerate() {
            let mut block = [ZERO_ROW; INPUTS];
            for (output, row) in self.rows.iter().enumerate() {
                let (line, lane) = (output / LANES, output % LANES);
                for fetched in (0..INPUTS).step_by(LANES) {
                    s.prefetch(row.as_ptr().wrapping_add(i * INPUTS + AHEAD + fetched));
                }
                for (to, &weight) in block.iter_mut().zip(&row[i * INPUTS..][..to.len()]) {
                    to[line].0[lane] = weight;
                }
            }
            to.copy_from_slice(&block[..to.len()]);
        }
    }
}

/// The parts, each for one thread, of bringing k columns of n numbers into strips of `width` of them, `[n / width, k]`: each strip's first
/// number, and the strips. [`arrange`] does one.
pub(super) fn parts<'s, T>(
    team: &Team,
    n: usize,
    k: usize,
    width: usize,
    strips: &'s mut [T],
) -> impl Iterator<Item = (usize, &'s mut [T])> {
    /// Numbers of a column that are read one after the other at most: the CPU fetches them ahead.
    const NUMBERS: usize = 256;
    // as many for each thread, where there are few
    let group = (NUMBERS / width).clamp(1, n.div_ceil(width).div_ceil(team.threads()).max(1));
    strips.chunks_mut((group * k).max(1)).enumerate().map(move |(i, strips)| (i * group * width, strips))
}

/// Brings some of k columns of n numbers into strips of `width`, from the number `first` on. `narrow` fills up a strip's numbers of a column.
pub(super) fn arrange<'a, T>(
    sizes: [usize; 3],
    columns: Range<usize>,
    column: impl Fn(usize) -> &'a [f32],
    narrow: impl Fn(&[f32]) -> T,
    first: usize,
    strips: &mut [T],
) {
    let [_, k, width] = sizes;
    timed(Stage::Packing, Cost::numbers(2 * width * columns.len() * (strips.len() / k.max(1))), || {
        dispatch(Arrange { sizes, columns, column, narrow, first, strips });
    });
}

struct Arrange<'s, T, C, F> {
    /// n, k and the width of a strip.
    sizes: [usize; 3],
    columns: Range<usize>,
    column: C,
    narrow: F,
    first: usize,
    strips: &'s mut [T],
}

impl<'a, T, C: Fn(usize) -> &'a [f32], F: Fn(&[f32]) -> T> Kernel for Arrange<'_, T, C, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        /// Columns at a time, whose places in all strips stay in a near cache.
        const COLUMNS: usize = 16;
        let [n, k, width] = self.sizes;
        for begin in self.columns.clone().step_by(COLUMNS) {
            let columns = begin..self.columns.end.min(begin + COLUMNS);
            for (i, strip) in self.strips.chunks_exact_mut(k).enumerate() {
                let numbers = self.first + i * width..n.min(self.first + (i + 1) * width);
                for (to, input) in strip[columns.clone()].iter_mut().zip(columns.clone()) {
                    // no strip of a column is long enough for the CPU's own prefetcher
                    if input + COLUMNS < self.columns.end {
                        let ahead = (self.column)(input + COLUMNS).as_ptr().wrapping_add(numbers.start);
                        for line in (0..size_of::<T>()).step_by(size_of::<Line>()) {
                            s.prefetch(ahead.wrapping_byte_add(line));
                        }
                    }
                    *to = (self.narrow)(&(self.column)(input)[numbers.clone()]);
                }
            }
        }
    }
}

/// At most [`PANEL`] numbers, filled up with zeros.
pub(super) fn panel_row(numbers: &[f32]) -> PanelRow {
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

/// A type the numbers of a panel are stored in.
pub(crate) trait Store<const N: usize>: Copy {
    const ZERO: Self;
    /// The numbers of one output, narrowed: rounded to the nearest, to even in the middle.
    fn set(&mut self, output: usize, numbers: [f32; N]);
    fn get(&self, output: usize) -> [f32; N];
}

impl Store<1> for PanelRow {
    const ZERO: Self = ZERO_ROW;

    fn set(&mut self, output: usize, [number]: [f32; 1]) {
        self[output / LANES].0[output % LANES] = number;
    }

    fn get(&self, output: usize) -> [f32; 1] {
        [self[output / LANES].0[output % LANES]]
    }
}

impl<W, const N: usize> Packed<W, N> {
    /// All outputs, and all inputs.
    pub(super) fn all(&self) -> [Range<usize>; 2] {
        [0..self.n, 0..self.k]
    }
}

impl<W: Store<N>, const N: usize> Packed<W, N> {
    /// All zero; k is filled up to a multiple of N.
    pub(crate) fn zeros(n: usize, k: usize) -> Self {
        let k = k.next_multiple_of(N);
        Packed { n, k, panels: filled(n.div_ceil(PANEL) * k / N, W::ZERO), bias: Vec::new() }
    }

    pub(super) fn num_bytes(&self) -> usize {
        size_of_val(self.panels.as_slice())
    }

    pub(super) fn set_row(&mut self, row: usize, numbers: &[f32]) {
        let rows = self.k / N;
        set_row(&mut self.panels[row / PANEL * rows..][..rows], row % PANEL, numbers);
    }

    /// Sets every row: `fill` writes the numbers of the row it is told.
    pub(super) fn set_rows(&mut self, team: &Team, k: usize, fill: impl Fn(usize, &mut [f32]) + Sync)
    where
        W: Send,
    {
        let n = self.n;
        team.for_each(self.panels.chunks_mut((self.k / N).max(1)).enumerate(), |(panel, to)| {
            let mut numbers = vec![0.0; k];
            for row in panel * PANEL..n.min((panel + 1) * PANEL) {
                fill(row, &mut numbers);
                set_row(to, row % PANEL, &numbers);
            }
        });
    }

    pub(super) fn row(&self, row: usize, numbers: &mut [f32]) {
        let rows = self.k / N;
        let panel = &self.panels[row / PANEL * rows..][..rows];
        for (from, numbers) in panel.iter().zip(numbers.chunks_mut(N)) {
            let count = numbers.len();
            numbers.copy_from_slice(&from.get(row % PANEL)[..count]);
        }
    }
}

fn set_row<W: Store<N>, const N: usize>(panel: &mut [W], output: usize, numbers: &[f32]) {
    for (to, numbers) in panel.iter_mut().zip(numbers.chunks(N)) {
        let mut all = [0.0; N];
        all[..numbers.len()].copy_from_slice(numbers);
        to.set(output, all);
    }
}
