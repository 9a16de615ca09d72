//! Missing values.

use ndarray::{Array2, ArrayView1, s};

use super::SeriesSet;

impl SeriesSet {
    /// Closes the gaps of all series: frames at the end without any value are cut off, and in a gap each value is the one before it;
    /// at the beginning the first one after it, and 0 where a channel has none at all. [`notes`](Self::notes) say how much
    /// was done.
    ///
    /// ```
    /// use hymba::ndarray::array;
    /// use hymba::series::{ReadOptions, SeriesSet};
    ///
    /// let mut set = SeriesSet::from_ts("@dimensions 2\n@data\n?,1,?,2,?:3,?,?,4,?\n", &ReadOptions::default())?;
    /// set.fill_missing();
    /// assert_eq!(set.cases[0].frames, array![[1.0, 3.0], [1.0, 3.0], [1.0, 3.0], [2.0, 4.0]]);
    /// assert_eq!(set.notes.len(), 3);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn fill_missing(&mut self) {
        let (mut cut, mut missing, mut gaps, mut leading, mut silent, mut empty) = (0, 0, 0, 0, 0, 0);
        for case in &mut self.cases {
            cut += cut_end(&mut case.frames);
            let known = |column: ArrayView1<f32>| column.iter().position(|value| !value.is_nan());
            let first: Vec<Option<usize>> = case.frames.columns().into_iter().map(known).collect();
            if first.iter().all(Option::is_none) {
                empty += 1;
            } else {
                silent += first.iter().filter(|first| first.is_none()).count();
            }
            leading += first.into_iter().flatten().sum::<usize>();
            let filled = fill(&mut case.frames);
            missing += filled;
            gaps += usize::from(filled > 0);
        }
        for (count, what) in [
            (cut, "frames at the ends of series hold no value at all: they are cut off"),
            (empty, "series hold no value at all: each is one frame of zeros"),
            (silent, "dimensions of single series hold no value at all: they are zeros"),
            (leading, "values are missing at the beginnings of series: each takes the first value after it"),
        ] {
            if count > 0 {
                self.notes.push(format!("{count} {what}"));
            }
        }
        if missing > 0 {
            self.notes.push(format!(
                "{missing} values are missing in {gaps} series; in a gap each takes the value before it"
            ));
        }
    }
}

/// Returns how many were missing.
fn fill(frames: &mut Array2<f32>) -> usize {
    let mut missing = 0;
    for mut column in frames.columns_mut() {
        let mut known = column.iter().copied().find(|value| !value.is_nan()).unwrap_or(0.0);
        for value in column.iter_mut() {
            if value.is_nan() {
                *value = known;
                missing += 1;
            }
            known = *value;
        }
    }
    missing
}

/// Cuts off the frames at the end of which every value is missing: files of equal lengths are made from series of unequal
/// ones that way. The first frame stays. Returns how many were cut off.
fn cut_end(frames: &mut Array2<f32>) -> usize {
    let known = frames.rows().into_iter().rposition(|row| row.iter().any(|value| !value.is_nan()));
    let (before, kept) = (frames.nrows(), known.map_or(1, |last| last + 1));
    frames.slice_collapse(s![..kept.min(before), ..]);
    before - frames.nrows()
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    #[test]
    fn missing_values_take_the_one_before() {
        let nan = f32::NAN;
        let mut frames = array![[nan, nan, 1.0], [2.0, nan, nan], [nan, nan, nan], [4.0, nan, 3.0]];
        assert_eq!(fill(&mut frames), 8);
        assert_eq!(frames, array![[2.0, 0.0, 1.0], [2.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.0, 3.0]]);
        assert_eq!(fill(&mut frames), 0);
    }

    #[test]
    fn frames_missing_at_the_end_are_cut_off() {
        let nan = f32::NAN;
        let mut frames = array![[nan, nan], [1.0, nan], [nan, nan], [nan, 2.0], [nan, nan], [nan, nan]];
        assert_eq!(cut_end(&mut frames), 2);
        assert_eq!((frames.nrows(), frames[[3, 1]]), (4, 2.0));
        assert_eq!(cut_end(&mut frames), 0);
        let mut nothing = array![[nan], [nan]];
        assert_eq!((cut_end(&mut nothing), nothing.nrows()), (1, 1));
    }
}
