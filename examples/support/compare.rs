//! Compares the numbers of two programs, one line per tensor.

#![allow(dead_code, reason = "each example uses a part of this file")]

use std::fmt;

use hymba::ndarray::{ArrayD, Dimension, IxDyn};

/// How far a value may be from the one expected: `absolute + relative · |expected|`.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    pub absolute: f64,
    pub relative: f64,
}

impl fmt::Display for Tolerance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0e}", self.absolute)?;
        if self.relative > 0.0 { write!(f, " + {:.0e} of the value", self.relative) } else { Ok(()) }
    }
}

/// The result for one tensor.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// What was compared.
    pub what: String,
    /// What was allowed.
    pub tolerance: Tolerance,
    /// The largest absolute difference, or why there is none.
    pub difference: Result<f64, String>,
    /// The largest part of its tolerance that a difference takes: at most 1 is good, infinite is beyond numbers.
    pub strain: f64,
}

impl Comparison {
    /// Compares every element but those at `padding`. A NaN or an infinity on either side is a failure.
    pub fn new(
        what: String,
        given: &ArrayD<f32>,
        expected: &ArrayD<f64>,
        padding: impl Fn(&IxDyn) -> bool,
        tolerance: Tolerance,
    ) -> Self {
        if given.shape() != expected.shape() {
            let difference = Err(format!("has shape {:?}, expected {:?}", given.shape(), expected.shape()));
            return Comparison { what, tolerance, difference, strain: f64::INFINITY };
        }
        let (mut largest, mut strain) = (0.0f64, 0.0f64);
        for ((index, &given), &expected) in given.indexed_iter().zip(expected) {
            if padding(&index) {
                continue;
            }
            let difference = (f64::from(given) - expected).abs();
            if !difference.is_finite() {
                let difference =
                    Err(format!("is {given} at {:?}, expected {expected}", index.as_array_view().to_vec()));
                return Comparison { what, tolerance, difference, strain: f64::INFINITY };
            }
            if difference > 0.0 {
                largest = largest.max(difference);
                strain = strain.max(difference / (tolerance.absolute + tolerance.relative * expected.abs()));
            }
        }
        Comparison { what, tolerance, difference: Ok(largest), strain }
    }

    /// A tensor that there is nothing to compare with.
    pub fn failed(what: String, reason: &str) -> Self {
        let tolerance = Tolerance { absolute: 0.0, relative: 0.0 };
        Comparison { what, tolerance, difference: Err(reason.into()), strain: f64::INFINITY }
    }

    /// The worst of the comparisons of the rows of a batch; where there is no difference to tell, with the number of the row.
    pub fn worst_row(rows: impl Iterator<Item = Comparison>) -> Option<Self> {
        let (row, mut worst) = rows.enumerate().max_by(|(_, a), (_, b)| a.strain.total_cmp(&b.strain))?;
        worst.difference = worst.difference.map_err(|reason| format!("row {row} {reason}"));
        Some(worst)
    }

    /// Whether every difference is within the tolerance.
    pub fn holds(&self) -> bool {
        self.strain <= 1.0
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}  {:<40} ", if self.holds() { "ok    " } else { "FAILED" }, self.what)?;
        match &self.difference {
            Ok(difference) => write!(f, "differs by {difference:.1e}, allowed {}", self.tolerance),
            Err(fault) => f.write_str(fault),
        }
    }
}
