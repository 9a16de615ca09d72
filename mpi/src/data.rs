//! Where series come from.

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Args;
use hymba::Task;
use hymba::ndarray::Array2;
use hymba::series::{ReadOptions, SeriesSet, Target};
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
    /// Each rank reads only a part of the files: with 2 ranks every second one, each with its share of the series
    #[arg(long)]
    pub sharded: bool,
    /// Instead of files, this many generated waves of 20 to 100 frames and three frequencies
    #[arg(long, conflicts_with_all = ["files", "test"])]
    synthetic: Option<usize>,
}

impl Source {
    /// The series this rank trains on. The classes are those of all files.
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
        let task = self.task(&sets, world)?;
        let all = sets.into_iter().map(|set| set.into_dataset(&task)).collect::<hymba::Result<Vec<_>>>()?;
        joined(&task, all)
    }

    /// To predict numbers if the first file has some, and else to tell the classes of all files apart, whichever rank reads them.
    fn task(&self, sets: &[SeriesSet], world: &mut World) -> Result<Task, Box<dyn Error>> {
        let has_numbers = sets[0].cases.iter().any(|case| matches!(case.target, Target::Value(_)));
        if world.of_rank_0(vec![u8::from(has_numbers)]) == [1] {
            return Ok(Task::Regress { outputs: 1 });
        }
        let mut labels = Vec::new();
        // in the order of the files, so that it is the same for any number of ranks
        for file in 0..self.files.len() {
            let (reader, place) = if self.sharded { (file % world.size(), file / world.size()) } else { (0, file) };
            if world.rank() == reader {
                labels = sets[place].labels_with(&labels);
            }
            labels = serde_json::from_slice(&world.of_rank(reader, serde_json::to_vec(&labels)?))?;
        }
        match labels.len() {
            0 => Err("the files have no targets: no classes and no numbers to predict".into()),
            1 => Err(format!("all series are of the class `{}`; at least two classes are needed", labels[0]).into()),
            _ => Ok(Task::classify(labels)),
        }
    }

    /// The test series, for a predictor of the task of `data`, and how many more are of classes that it does not know.
    pub fn test(&self, data: &Dataset) -> Result<Option<(Dataset, usize)>, Box<dyn Error>> {
        let Some(file) = &self.test else { return Ok(None) };
        let (set, task) = (read(file)?, data.task());
        set.compare_labels(task).iter().for_each(|note| eprintln!("{}: {note}", file.display()));
        let test = set.into_dataset(task)?;
        if test.width() != data.width() {
            let (width, other) = (test.width(), data.width());
            return Err(
                format!("{}: its frames have width {width}, those of the training {other}", file.display()).into()
            );
        }
        let Targets::Classes(classes) = test.targets() else { return Ok(Some((test, 0))) };
        let known: Vec<usize> = (0..classes.len()).filter(|&i| classes[i] < task.labels().len()).collect();
        if known.is_empty() {
            return Err(format!("{}: no series is of a class of the training files", file.display()).into());
        }
        let series = known.iter().map(|&i| test.series()[i].clone()).collect();
        let targets = Targets::Classes(known.iter().map(|&i| classes[i]).collect());
        Ok(Some((Dataset::new(task, series, targets)?, classes.len() - known.len())))
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
        series.extend_from_slice(set.series());
        match set.targets() {
            Targets::Classes(all) => classes.extend(all),
            Targets::Values(all) => values.extend(all),
            _ => return Err("a file has a target for each frame, not for each series".into()),
        }
    }
    let targets = match task.is_classification() {
        true => Targets::Classes(classes),
        false => Targets::Values(Array2::from_shape_vec((values.len(), 1), values)?),
    };
    Ok(Dataset::new(task, series, targets)?)
}

/// Some waves of three frequencies, with noise from −1.5 to 1.5.
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
