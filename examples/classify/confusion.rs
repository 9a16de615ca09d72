//! Which classes were taken for which.

use std::fmt;

use hymba::ndarray::{Array2, Axis};

/// Counts by class and prediction. Printed as a table, or where that would be too wide as a list of the most frequent
/// mistakes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    labels: Vec<String>,
    /// `[class, predicted]`
    counts: Array2<usize>,
}

impl Confusion {
    /// Nothing counted yet.
    pub fn new(labels: &[String]) -> Self {
        Confusion { labels: labels.to_vec(), counts: Array2::zeros((labels.len(), labels.len())) }
    }

    /// One series of `class`, taken for `predicted`.
    pub fn count(&mut self, class: usize, predicted: usize) {
        self.counts[[class, predicted]] += 1;
    }

    /// How many predictions are right.
    pub fn right(&self) -> usize {
        self.counts.diag().sum()
    }

    /// The share of predictions that are right.
    pub fn accuracy(&self) -> f32 {
        self.right() as f32 / self.counts.sum() as f32
    }

    /// The accuracy of one that always says the most frequent class.
    pub fn share_of_most_frequent(&self) -> f32 {
        let most = self.counts.sum_axis(Axis(1)).into_iter().max().unwrap_or(0);
        most as f32 / self.counts.sum() as f32
    }
}

impl fmt::Display for Confusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Widest table.
        const COLUMNS: usize = 110;
        let width = |label: &String| label.chars().count();
        let cell = self.labels.iter().map(width).max().unwrap_or(0).max(self.counts.iter().max().map_or(1, digits)) + 1;
        if (cell + 1) * (self.labels.len() + 2) > COLUMNS { self.list(f) } else { self.table(f, cell) }
    }
}

impl Confusion {
    fn table(&self, f: &mut fmt::Formatter<'_>, cell: usize) -> fmt::Result {
        write!(f, "{:>cell$} │", "")?;
        for label in &self.labels {
            write!(f, " {label:>cell$}")?;
        }
        writeln!(f, " │ right   ← predicted")?;
        for (i, (label, row)) in self.labels.iter().zip(self.counts.rows()).enumerate() {
            write!(f, "{label:>cell$} │")?;
            for count in row {
                match count {
                    0 => write!(f, " {:>cell$}", "·")?,
                    count => write!(f, " {count:>cell$}")?,
                }
            }
            match row.sum() {
                0 => writeln!(f, " │ (no series)")?,
                all => writeln!(f, " │ {:5.1} %", 100.0 * row[i] as f32 / all as f32)?,
            }
        }
        Ok(())
    }

    fn list(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 10;
        let mut mistakes: Vec<_> = self
            .counts
            .indexed_iter()
            .filter(|((class, predicted), count)| class != predicted && **count > 0)
            .collect();
        mistakes.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        writeln!(f, "({} classes, too many for a table; the most frequent mistakes)", self.labels.len())?;
        for ((class, predicted), count) in mistakes.iter().take(SHOWN) {
            let all = self.counts.row(*class).sum();
            writeln!(f, "  {count} of the {all} of `{}` taken for `{}`", self.labels[*class], self.labels[*predicted])?;
        }
        match mistakes.len() {
            0 => writeln!(f, "  none"),
            len if len > SHOWN => writeln!(f, "  and {} other pairs", len - SHOWN),
            _ => Ok(()),
        }
    }
}

fn digits(count: &usize) -> usize {
    count.to_string().len()
}
