//! Series from files: how they are read, and models of them.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use hymba::ndarray::{Array2, ArrayView1};
use hymba::series::{Column, CsvLayout, ReadOptions, SeriesSet, TargetKind, TimeInput};
use hymba::{Ensemble, KernelPredictor, Predictor, Task, argmax, softmax};
use serde_json::Value;

use crate::header;

/// How a file of series is read. What ends in .csv or .tsv is a table, everything else in the format .ts of the UEA and UCR archives.
#[derive(Args, Clone)]
#[command(next_help_heading = "Reading")]
pub struct ReadArgs {
    /// Column of the target: its name, or its place from 0 [default: target, class or label].
    #[arg(long, value_name = "COLUMN")]
    target: Option<String>,
    /// Whether the targets are classes or numbers [default: numbers if there are fractions].
    #[arg(long, value_enum, value_name = "KIND")]
    targets: Option<Kind>,
    /// Whether a row of a table is a series or a frame [default: a frame, if there are columns of id and time].
    #[arg(long, value_enum, value_name = "WHAT")]
    row: Option<Row>,
    /// Column of the series that a frame belongs to.
    #[arg(long, value_name = "COLUMN")]
    id: Option<String>,
    /// Column of the times of frames.
    #[arg(long, value_name = "COLUMN")]
    time_column: Option<String>,
    /// The table has no row of names at the top.
    #[arg(long)]
    no_header: bool,
    /// Character that separates the columns of a table.
    #[arg(long, value_name = "C")]
    delimiter: Option<char>,
    /// Timestamps: dropped (even), or an input: the time since the previous frame (delta), or its logarithm (log-delta).
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Time::Even)]
    time: Time,
}

#[derive(ValueEnum, Clone, Copy)]
enum Kind {
    Classes,
    Numbers,
}

#[derive(ValueEnum, Clone, Copy)]
enum Row {
    Series,
    Frame,
}

#[derive(ValueEnum, Clone, Copy)]
enum Time {
    Even,
    Delta,
    LogDelta,
}

impl ReadArgs {
    /// The series of a file, without gaps; what is to be known of them goes to stderr.
    pub fn read(&self, path: &Path) -> Result<SeriesSet> {
        let kind = match self.targets {
            None => TargetKind::Auto,
            Some(Kind::Classes) => TargetKind::Classes,
            Some(Kind::Numbers) => TargetKind::Values,
        };
        self.read_as(path, kind)
    }

    /// As [`read`](Self::read), without what is to be predicted.
    pub fn read_inputs(&self, path: &Path) -> Result<SeriesSet> {
        self.read_as(path, TargetKind::Ignored)
    }

    fn read_as(&self, path: &Path, kind: TargetKind) -> Result<SeriesSet> {
        let column = |text: &String| text.parse().map_or_else(|_| Column::Name(text.clone()), Column::Index);
        let mut options = ReadOptions::default().header(!self.no_header);
        options.target = self.target.as_ref().map(column);
        options.id = self.id.as_ref().map(column);
        options.time_column = self.time_column.as_ref().map(column);
        options.delimiter = self.delimiter;
        options.target_kind = kind;
        options.layout = self.row.map(|row| match row {
            Row::Series => CsvLayout::Wide,
            Row::Frame => CsvLayout::Long,
        });
        options.time = match self.time {
            Time::Even => TimeInput::Even,
            Time::Delta => TimeInput::Delta,
            Time::LogDelta => TimeInput::LogDelta,
        };
        let mut set = SeriesSet::read(path, &options)?;
        set.fill_missing();
        set.notes.iter().for_each(|note| eprintln!("{}: {note}", path.display()));
        Ok(set)
    }

    /// As [`read`](Self::read), to measure a model of this task on: the targets of a table are of its kind, whatever they look like.
    pub fn read_for(&self, path: &Path, task: &Task) -> Result<SeriesSet> {
        let kind = if task.is_classification() { Kind::Classes } else { Kind::Numbers };
        ReadArgs { targets: self.targets.or(Some(kind)), ..self.clone() }.read(path)
    }
}

/// A trained model of series.
pub enum Model {
    Ensemble(Box<Ensemble>),
    Kernels(Box<KernelPredictor>),
    Encoder(Box<Predictor>),
}

impl Model {
    pub fn load(path: &PathBuf) -> Result<Model> {
        let Some(saved) = header::read(path)?.saved else {
            bail!("{}: not a model that `hymba train` wrote; `hymba info` says what it is", path.display());
        };
        let has = |key: &str| saved.get(key).is_some_and(|value| !value.is_null());
        Ok(match (has("kernels"), saved.contains_key("encoder"), has("task")) {
            (true, true, _) => Model::Ensemble(Box::new(Ensemble::load(path)?)),
            (true, false, _) => Model::Kernels(Box::new(KernelPredictor::load(path)?)),
            (false, _, true) => Model::Encoder(Box::new(Predictor::load(path)?)),
            _ => bail!("{}: not a predictor; `hymba info` says what it is", path.display()),
        })
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        let saved = match self {
            Model::Ensemble(ensemble) => ensemble.save(path),
            Model::Kernels(kernels) => kernels.save(path),
            Model::Encoder(predictor) => predictor.save(path),
        };
        Ok(saved?)
    }

    pub fn task(&self) -> &Task {
        match self {
            Model::Ensemble(ensemble) => ensemble.task(),
            Model::Kernels(kernels) => kernels.task(),
            Model::Encoder(predictor) => predictor.task(),
        }
    }

    /// `[series, outputs]`: logits of classes, or numbers.
    pub fn predict(&self, series: &[Array2<f32>]) -> Result<Array2<f32>> {
        Ok(match self {
            Model::Ensemble(ensemble) => ensemble.predict(series)?,
            Model::Kernels(kernels) => kernels.predict(series)?,
            Model::Encoder(predictor) => predictor.predict_series(series)?,
        })
    }
}

/// The prediction for one series or frame.
pub struct Answer {
    pub said: Said,
    /// Probabilities of the classes or labels, or the numbers themselves.
    pub numbers: Vec<f32>,
}

pub enum Said {
    /// The most probable class.
    Class(String),
    /// The labels that are more probable than not.
    Labels(Vec<String>),
    Numbers,
}

impl Answer {
    /// Of the outputs for one series or frame.
    pub fn of(task: &Task, outputs: ArrayView1<f32>) -> Answer {
        let labels = task.labels();
        if task.is_multi_label() {
            let numbers = outputs.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect::<Vec<f32>>();
            let right = labels.iter().zip(&numbers).filter(|(_, probability)| **probability > 0.5);
            return Answer { said: Said::Labels(right.map(|(label, _)| label.clone()).collect()), numbers };
        }
        match labels.get(argmax(&*outputs).into_scalar()) {
            Some(class) => Answer { said: Said::Class(class.clone()), numbers: softmax(&*outputs).to_vec() },
            None => Answer { said: Said::Numbers, numbers: outputs.to_vec() },
        }
    }

    /// The probability of each class or label.
    pub fn probabilities(&self, task: &Task) -> Value {
        let named = task.labels().iter().cloned().zip(self.numbers.iter().map(|&number| number.into()));
        Value::Object(named.collect())
    }
}
