//! A training in a folder: `training.json`, and the files of predictors and of the optimiser that it goes with.
//!
//! The predictor after epoch e is `model-e.safetensors`, the optimiser `optimizer-e.safetensors`, the moving average of the weights,
//! if there is one, `average-e.safetensors`. `training.json` is written
//! last and replaced in a single step: until then the files of the epoch before are what counts, and only after that they
//! are removed. Of models the last and the best are kept.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{EpochMetrics, State, TrainerOptions, best_epoch};
use crate::files::header::printable;
use crate::files::replace;
use crate::files::saved::VERSION;
use crate::files::tensors::Source;
use crate::lora::Adapted;
use crate::train::AdamW;
use crate::{Error, Predictor, Result};

const FILE: &str = "training.json";
/// Longest `training.json` that is read, several times what the most epochs need.
const MAX_LENGTH: u64 = 64 << 20;

pub(super) struct Checkpoint<'a> {
    folder: &'a Path,
}

/// The contents of `training.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<H = Vec<EpochMetrics>, O = TrainerOptions> {
    version: u32,
    options: O,
    /// Fingerprint of the data.
    data: u64,
    history: H,
    /// As in [`State`].
    #[serde(default)]
    before_schedule: usize,
}

impl<'a> Checkpoint<'a> {
    pub(super) fn new(folder: &'a Path) -> Self {
        Checkpoint { folder }
    }

    /// Makes the folder, which must not have a training in it. What a process leaves that is killed before the first
    /// `training.json` is none.
    pub(super) fn create(&self) -> Result<()> {
        fs::create_dir_all(self.folder).map_err(|source| Error::io(self.folder, source))?;
        if self.folder.join(FILE).exists() || self.files().iter().any(|path| epoch_of(path).is_some_and(|e| e > 0)) {
            return Err(Error::Checkpoint {
                path: self.folder.to_path_buf(),
                reason: "it holds a training already: continue it by Trainer::resume, or choose another folder".into(),
            });
        }
        Ok(())
    }

    /// Writes the state after the last epoch of its history.
    pub(super) fn write(&self, options: &TrainerOptions, state: &State, data: u64) -> Result<()> {
        let (epoch, best) = (state.history.len(), best_epoch(&state.history));
        state.predictor.save(self.model(epoch))?;
        state.optimizer.save(self.optimizer(epoch))?;
        state.average.as_ref().map_or(Ok(()), |average| average.save(self.average(epoch)))?;
        let State { history, before_schedule, .. } = state;
        let saved = Saved { version: VERSION, options, data, history, before_schedule: *before_schedule };
        let path = self.folder.join(FILE);
        replace(&path, |file| {
            serde_json::to_writer(&mut *file, &saved)?;
            file.write_all(b"\n")
        })
        .map_err(|source| Error::io(&path, source))?;
        let [kept, best] = [epoch, best].map(|epoch| self.kept(options, epoch));
        self.clean(&[self.model(epoch), self.optimizer(epoch), kept, best]);
        Ok(())
    }

    /// Removes the files of earlier epochs, and what a killed process left half-written.
    fn clean(&self, needed: &[PathBuf]) {
        for path in self.files() {
            let name = name_of(&path);
            let half_written = name.starts_with(".hymba-") && name.ends_with(".tmp");
            if half_written || epoch_of(&path).is_some() && !needed.contains(&path) {
                // what cannot be removed is in nobody's way
                let _ = fs::remove_file(&path);
            }
        }
    }

    fn files(&self) -> Vec<PathBuf> {
        fs::read_dir(self.folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    }

    /// Options, state and the fingerprint of the data.
    pub(super) fn read(&self) -> Result<(TrainerOptions, State, u64)> {
        let path = self.folder.join(FILE);
        let mut source = Source::open(&path).map_err(|error| match error {
            Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => Error::Checkpoint {
                path: self.folder.to_path_buf(),
                reason: format!("it holds no training to continue: no {FILE}"),
            },
            error => error,
        })?;
        if source.length() > MAX_LENGTH {
            return Err(source.error(format!("{} bytes, and at most {MAX_LENGTH} are read", source.length())));
        }
        let mut text = vec![0; source.length() as usize];
        source.fill(&mut text)?;
        let unusable = |reason: &str| source.error(format!("it is no checkpoint of a training: {}", printable(reason)));
        let Saved { version, options, data, history, before_schedule }: Saved =
            serde_json::from_slice(&text).map_err(|error| unusable(&error.to_string()))?;
        if version != VERSION {
            return Err(unusable(&format!("it has version {version}, but only {} is read", VERSION)));
        }
        options.validate().map_err(|error| unusable(&error.to_string()))?;
        if history.len() > options.epochs {
            return Err(unusable(&format!("{} of {} epochs are done", history.len(), options.epochs)));
        }

        if before_schedule > history.len() {
            return Err(unusable(&format!("its schedule begins after {before_schedule} of {} epochs", history.len())));
        }

        let (epoch, best) = (history.len(), best_epoch(&history));
        let predictor = Predictor::load(self.model(epoch))?;
        let optimizer = AdamW::load(self.optimizer(epoch), &predictor)?;
        let average = options.average.map(|_| Predictor::load(self.average(epoch))).transpose()?;
        let best = match best == epoch {
            true => average.as_ref().unwrap_or(&predictor).clone(),
            false => Predictor::load(self.kept(&options, best))?,
        };
        let same = |other: &Predictor| sizes(other) == sizes(&predictor);
        if !same(&best) || !average.as_ref().is_none_or(same) {
            return Err(unusable("its models have different tasks, options, adapters or types of weights"));
        }
        Ok((options, State { predictor, average, best, optimizer, history, before_schedule }, data))
    }

    fn model(&self, epoch: usize) -> PathBuf {
        self.folder.join(format!("model-{epoch}.safetensors"))
    }

    fn average(&self, epoch: usize) -> PathBuf {
        self.folder.join(format!("average-{epoch}.safetensors"))
    }

    /// What would be the result if this were the best epoch.
    fn kept(&self, options: &TrainerOptions, epoch: usize) -> PathBuf {
        if options.average.is_some() { self.average(epoch) } else { self.model(epoch) }
    }

    fn optimizer(&self, epoch: usize) -> PathBuf {
        self.folder.join(format!("optimizer-{epoch}.safetensors"))
    }
}

/// What the models of a training must have in common for walks over the numbers of two at a time.
fn sizes(predictor: &Predictor) -> impl PartialEq {
    let mut parameters = Vec::new();
    predictor.visit_parameters(&mut |name, parameter| {
        parameters.push((name.to_string(), parameter.shape(), parameter.storage()));
    });
    let adapters = predictor.loras().into_iter().map(|name| (name.to_string(), predictor.options_of(name)));
    let active = predictor.lora().map(str::to_string);
    let of = (predictor.task().clone(), predictor.predictor_options().clone());
    (of, active, adapters.collect::<Vec<_>>(), parameters)
}

/// The e of `model-e.safetensors`, `optimizer-e.safetensors` or `average-e.safetensors`; `None` for files that are not ours.
fn epoch_of(path: &Path) -> Option<usize> {
    let name = name_of(path).strip_suffix(".safetensors")?;
    let epoch = ["model-", "optimizer-", "average-"].iter().find_map(|prefix| name.strip_prefix(prefix))?;
    if epoch.bytes().all(|byte| byte.is_ascii_digit()) { epoch.parse().ok() } else { None }
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
