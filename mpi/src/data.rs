//! Where series come from.

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Args;
use hymba::Task;
use hymba::ndarray::Array2;
use hymba::series::{ReadOptions, SeriesSet};
use hymba::train::{Collective, Dataset, Targets};
use hymba_mpi::World;

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
    /// What this rank trains on. The classes are those of the first file.
    pub fn read(&self, world: &mut World) -> Result<Dataset, Box<dyn Error>> {
        let (rank, size) = (world.rank(), world.size());
        let (first, step) = if self.sharded { (rank, size) } else { (0, 1) };
        if let Some(count) = self.synthetic {
            return Ok(waves((first..count).step_by(step))?);
        }
        if self.sharded && self.files.len() < size {
            return Err(format!("{} files for {size} ranks: with --sharded each needs one", self.files.len()).into());
        }
        let sets = self.files.iter().skip(first).step_by(step).map(|file| read(file));
        let sets = sets.collect::<hymba::Result<Vec<_>>>()?;
        let task = serde_json::to_vec(&sets[0].task()?)?;
        let task: Task = serde_json::from_slice(&world.of_rank_0(task))?;
        let all = sets.into_iter().map(|set| set.into_dataset(&task)).collect::<hymba::Result<Vec<_>>>()?;
        joined(&task, all)
    }

    /// What is measured on at the end, for a predictor of the task of `data`.
    pub fn test(&self, data: &Dataset) -> hymba::Result<Option<Dataset>> {
        self.test.as_ref().map(|file| read(file)?.into_dataset(data.task())).transpose()
    }
}

fn read(file: &Path) -> hymba::Result<SeriesSet> {
    let mut set = SeriesSet::read(file, &ReadOptions::default())?;
    set.fill_missing();
    set.notes.iter().for_each(|note| eprintln!("{}: {note}", file.display()));
    Ok(set)
}

/// The series of several sets as one.
fn joined(task: &Task, sets: Vec<Dataset>) -> Result<Dataset, Box<dyn Error>> {
    let (mut series, mut classes, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for set in sets {
        if set.task() != task {
            return Err("a file has classes that the first does not have: name all in its @classLabel".into());
        }
        series.extend_from_slice(set.series());
        match set.targets() {
            Targets::Classes(all) => classes.extend(all),
            Targets::Values(all) => values.extend(all),
            _ => return Err("a file has targets of frames".into()),
        }
    }
    let targets = match task.is_classification() {
        true => Targets::Classes(classes),
        false => Targets::Values(Array2::from_shape_vec((values.len(), 1), values)?),
    };
    Ok(Dataset::new(task, series, targets)?)
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
