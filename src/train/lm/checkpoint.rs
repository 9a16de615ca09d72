//! A training of a language model in a folder: `training.json`, and what it goes with.
//!
//! The weights after epoch e are `weights-e.safetensors`, the optimiser `optimizer-e.safetensors`. `training.json` is written last
//! and replaced in a single step; only then files of earlier epochs are removed, but for the weights of the best.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{LmEpoch, LmTrainerOptions, State, best_epoch};
use crate::files::saved::{self as files, VERSION};
use crate::files::tensors::Source;
use crate::files::{Target, header, replace};
use crate::parameters::{Parameter, ParameterMut};
use crate::train::{AdamW, Parameters, views};
use crate::{Error, HymbaLm, LoraOptions, Result};

const FILE: &str = "training.json";
/// Longest `training.json` that is read.
const MAX_LENGTH: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved<H = Vec<LmEpoch>, O = LmTrainerOptions> {
    version: u32,
    options: O,
    /// Fingerprint of the data.
    data: u64,
    /// Of the adapter that is trained, if it is one.
    #[serde(default)]
    lora: Option<LoraOptions>,
    history: H,
}

/// The metadata entry of weights.
#[derive(Serialize)]
struct Version {
    version: u32,
}

fn weights(folder: &Path, epoch: usize) -> PathBuf {
    folder.join(format!("weights-{epoch}.safetensors"))
}

fn optimizer(folder: &Path, epoch: usize) -> PathBuf {
    folder.join(format!("optimizer-{epoch}.safetensors"))
}

/// Makes the folder, which must not have a training in it.
pub(super) fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
    if folder.join(FILE).exists() {
        let reason = "it holds a training already: continue it by LmTrainer::resume, or choose another folder";
        return Err(Error::Checkpoint { path: folder.to_path_buf(), reason: reason.into() });
    }
    Ok(())
}

/// Writes the state after the last epoch of its history.
pub(super) fn write(folder: &Path, options: &LmTrainerOptions, state: &State, data: u64) -> Result<()> {
    let epoch = state.history.len();
    let tensors = views(&state.lm).into_iter().map(|(name, array)| (name, Parameter::Array(array)));
    files::write(Target::File(&weights(folder, epoch)), &Version { version: VERSION }, tensors)?;
    state.optimizer.save(optimizer(folder, epoch))?;
    let saved = Saved { version: VERSION, options, data, lora: state.lm.lora_options(), history: &state.history };
    let path = folder.join(FILE);
    replace(&path, |file| {
        serde_json::to_writer(&mut *file, &saved)?;
        file.write_all(b"\n")
    })
    .map_err(|source| Error::io(&path, source))?;
    let best = best_epoch(&state.history);
    for earlier in 0..epoch {
        // what cannot be removed is in nobody's way
        let _ = fs::remove_file(optimizer(folder, earlier));
        if earlier != best {
            let _ = fs::remove_file(weights(folder, earlier));
        }
    }
    Ok(())
}

/// Puts the weights that the folder holds into `lm`. Returns the options, the state, and the fingerprint of the data.
pub(super) fn read(folder: &Path, mut lm: HymbaLm) -> Result<(LmTrainerOptions, State, u64)> {
    let mut source = Source::open(&folder.join(FILE))?;
    let text = source.text(MAX_LENGTH)?;
    let unusable =
        |reason: String| source.error(format!("it is no checkpoint of a training: {}", header::printable(&reason)));
    let Saved { version, options, data, lora, history }: Saved =
        serde_json::from_str(&text).map_err(|error| unusable(error.to_string()))?;
    options.validate().map_err(|error| unusable(error.to_string()))?;
    if version != VERSION || history.len() > options.epochs {
        return Err(unusable(format!("version {version}, {} of {} epochs done", history.len(), options.epochs)));
    }
    lora.map_or(Ok(()), |lora| check_lora(&lora, &lm))?;
    let (epoch, best) = (history.len(), best_epoch(&history));
    read_weights(&weights(folder, best), &mut lm)?;
    let best_weights = super::copy_of(&lm);
    read_weights(&weights(folder, epoch), &mut lm)?;
    let optimizer = AdamW::load(optimizer(folder, epoch), &lm)?;
    Ok((options, State { lm, optimizer, history, best: best_weights }, data))
}

/// Refuses a model whose adapter computes something else than that of the training.
fn check_lora(saved: &LoraOptions, lm: &HymbaLm) -> Result<()> {
    let Some(own) = lm.lora_options() else {
        return Err(Error::State(
            "the training is that of an adapter, and the model has none that is active: add one by add_lora".into(),
        ));
    };
    let all = |options: &LoraOptions| {
        [
            ("rank", options.rank.to_string()),
            ("alpha", options.alpha.to_string()),
            ("rslora", options.rslora.to_string()),
            ("dropout", options.dropout.to_string()),
            ("maps", format!("{:?}", options.maps)),
        ]
    };
    match all(&own).into_iter().zip(all(saved)).find(|(own, saved)| own != saved) {
        None => Ok(()),
        Some(((option, given), (_, saved))) => Err(Error::Option {
            option,
            given,
            allowed: format!("the adapter of the training that is resumed has {saved}: add one of the same options"),
        }),
    }
}

fn read_weights(path: &Path, lm: &mut HymbaLm) -> Result<()> {
    let (mut tensors, _) = header::read(Source::open(path)?)?;
    files::fill(&mut tensors, None, &mut |place| {
        Parameters::visit_mut(lm, &mut |name, array| place(name, ParameterMut::Array(array)));
    })
}
