//! Where series come from.

use std::error::Error;
use std::path::PathBuf;

use clap::Args;
use hymba::Task;
use hymba::ndarray::Array2;
use hymba::train::{Dataset, Targets};

#[derive(Args)]
pub struct Source {
    /// The training series, in the .ts format
    #[arg(required_unless_present = "synthetic")]
    files: Vec<PathBuf>,
    /// Series to measure on at the end
    #[arg(long)]
    test: Option<PathBuf>,
    /// Every rank reads a part of the files only: with 2 ranks every second one, each with its share of the series
    #[arg(long)]
    pub sharded: bool,
    /// In place of files, so many waves of 20 to 100 frames and three frequencies
    #[arg(long, conflicts_with_all = ["files", "test"])]
    synthetic: Option<usize>,
}

impl Source {
    /// What this rank trains on.
    pub fn read(&self, rank: usize, size: usize) -> Result<Dataset, Box<dyn Error>> {
        let step = if self.sharded { size } else { 1 };
        let first = if self.sharded { rank } else { 0 };
        let Some(count) = self.synthetic else { return Err("files".into()) };
        Ok(waves((first..count).step_by(step))?)
    }

    pub fn test(&self, _: &Dataset) -> Result<Option<Dataset>, Box<dyn Error>> {
        Ok(None)
    }
}

/// Some waves of three frequencies with as much noise.
fn waves(indices: impl Iterator<Item = usize> + Clone) -> hymba::Result<Dataset> {
    // a number from 0 to 1 for each place, as good as random
    let number = |i: usize, t: usize| ((i * 7919 + t * 104_729 + i * t * 31) % 65_537) as f32 / 65_537.0;
    let wave = |i: usize| {
        let (phase, frequency) = (6.3 * number(i, 1), [0.3, 0.5, 0.8][i % 3]);
        Array2::from_shape_fn((20 + (80.0 * number(i, 2)) as usize, 1), |(t, _)| {
            (frequency * t as f32 + phase).sin() + 3.0 * (number(i, t + 3) - 0.5)
        })
    };
    let classes = indices.clone().map(|i| i % 3).collect();
    Dataset::new(&Task::classify(["slow", "middle", "fast"]), indices.map(wave).collect(), Targets::Classes(classes))
}
