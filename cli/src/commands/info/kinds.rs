//! What kinds of files and folders there are, and how each is looked at: by its names, then by reading it whole.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use hymba::Task;
use hymba::lm::{HymbaLmConfig, LoadOptions};
use hymba::series::{ReadOptions, SeriesSet};
use hymba::{Ensemble, Hymba, HymbaLm, KernelPredictor, Predictor};
use serde_json::{Map, Value};

use super::Facts;
use crate::header;
use crate::load;

/// Their options are not in the file.
const EDIFICE: &str = "weights of Edifice.SSM.Hymba, for Hymba::load_edifice";

pub fn look(path: &Path) -> Result<Facts> {
    let about = fs::metadata(path).with_context(|| path.display().to_string())?;
    if about.is_dir() { folder(path) } else { file(path, about.len()) }
}

fn folder(path: &Path) -> Result<Facts> {
    let has = |name: &str| path.join(name).is_file();
    let mut facts = Facts { bytes: bytes(path)?, ..Facts::default() };
    if has("adapter_config.json") {
        facts.kind = "low-rank adapter of a language model";
        match object(&path.join("adapter_config.json")) {
            Ok(options) => facts.options = options,
            Err(error) => facts.problem = Some(format!("{error:#}")),
        }
        match header::read(&path.join("adapter_model.safetensors")) {
            Ok(header) => facts.parameters = Some(header.numbers),
            Err(error) => facts.problem = Some(format!("{error:#}")),
        }
    } else if has("training.json") {
        facts.kind = "checkpoint of a training";
        match object(&path.join("training.json")) {
            Ok(saved) => {
                let epochs = saved.get("history").and_then(Value::as_array).map_or(0, Vec::len);
                facts.options.insert("epochs_done".into(), epochs.into());
                facts.options.insert("options".into(), saved.get("options").cloned().unwrap_or_default());
            }
            Err(error) => facts.problem = Some(format!("{error:#}")),
        }
    } else if has("config.json") {
        facts.kind = "language model";
        language_model(path, &mut facts);
    } else {
        bail!("{}: nothing in this folder is known; a model has a config.json in it", path.display());
    }
    Ok(facts)
}

fn language_model(path: &Path, facts: &mut Facts) {
    let config = match HymbaLmConfig::from_file(path.join("config.json")) {
        Ok(config) => config,
        Err(error) => return facts.problem = Some(error.to_string()),
    };
    facts.parameters = config.num_parameters();
    facts.options = options_of(&config);
    let text = match path.join("tokenizer.json").is_file() {
        true => match hymba::lm::Tokenizer::from_dir(path) {
            Ok(tokenizer) => format!("tokenizer of {} tokens", tokenizer.vocab_size()),
            Err(error) => return facts.problem = Some(error.to_string()),
        },
        false if config.vocab_size == 256 => "bytes".into(),
        false => "no tokenizer.json: only token ids can be used".into(),
    };
    facts.options.insert("text".into(), text.into());
    match load::read(path, &LoadOptions::default()) {
        Ok(lm) => facts.memory = Some(lm.num_bytes()),
        Err(error) => facts.problem = Some(format!("{error:#}")),
    }
}

fn file(path: &Path, bytes: u64) -> Result<Facts> {
    let mut facts = Facts { bytes, ..Facts::default() };
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension.to_ascii_lowercase().as_str() {
        "nx" => {
            facts.kind = EDIFICE;
        }
        "ts" | "csv" | "tsv" => {
            facts.kind = "series";
            match SeriesSet::read(path, &ReadOptions::default()) {
                Ok(set) => facts.options = series(&set),
                Err(error) => facts.problem = Some(error.to_string()),
            }
        }
        "json" | "txt" | "md" => bail!("{}: not a file of a model or of series; give its folder", path.display()),
        _ => safetensors(path, &mut facts)?,
    }
    Ok(facts)
}

fn series(set: &SeriesSet) -> Map<String, Value> {
    let lengths = || set.cases.iter().map(|case| case.frames.nrows());
    let targets = match set.task() {
        Ok(Task::Regress { .. }) => "numbers".into(),
        Ok(task) => task.labels().to_vec().into(),
        Err(_) => Value::Null,
    };
    let facts = [
        ("series", set.cases.len().into()),
        ("channels", set.channels.clone().into()),
        ("shortest", lengths().min().into()),
        ("longest", lengths().max().into()),
        ("targets", targets),
        ("notes", set.notes.clone().into()),
    ];
    facts.into_iter().map(|(name, value)| (name.to_string(), value)).collect()
}

fn encoder(model: hymba::Result<Hymba>, facts: &mut Facts) {
    match model {
        Ok(model) => {
            facts.parameters = Some(model.num_parameters());
            facts.memory = Some(model.num_bytes());
        }
        Err(error) => facts.problem = Some(error.to_string()),
    }
}

fn safetensors(path: &Path, facts: &mut Facts) -> Result<()> {
    let header = header::read(path)?;
    let names = header.names.iter();
    facts.parameters = Some(header.numbers);
    let Some(saved) = header.saved else {
        facts.kind = "safetensors file without options";
        facts.options.insert("tensors".into(), header.names.len().into());
        if names.clone().any(|name| name.starts_with("hymba_block_")) {
            facts.kind = EDIFICE;
        } else if path.parent().is_some_and(|folder| folder.join("config.json").exists()) {
            facts.options.insert("note".into(), "beside a config.json: its folder may be a model".into());
        }
        return Ok(());
    };
    let has = |key: &str| saved.get(key).is_some_and(|value| !value.is_null());
    let problem = if has("fingerprint") || has("positions") {
        facts.kind = "state of a stream or a conversation";
        None
    } else if has("config") {
        facts.kind = "language model in one file";
        let lm = fs::File::open(path).map_err(anyhow::Error::from).and_then(|file| Ok(HymbaLm::read_from(file)?));
        let error = match lm {
            Ok(lm) => {
                (facts.parameters, facts.memory) = (Some(lm.num_parameters()), Some(lm.num_bytes()));
                facts.options = options_of(lm.config());
                return Ok(());
            }
            Err(error) => format!("{error:#}"),
        };
        Some(error)
    } else if has("kernels") && saved.contains_key("encoder") {
        facts.kind = "predictor: kernels, perhaps with an encoder";
        Ensemble::load(path).err().map(|error| error.to_string())
    } else if has("kernels") {
        facts.kind = "predictor: kernels";
        KernelPredictor::load(path).err().map(|error| error.to_string())
    } else if has("task") {
        facts.kind = "predictor: an encoder with a head";
        let predictor = Predictor::load(path);
        (facts.parameters, facts.memory) =
            predictor.as_ref().map_or((facts.parameters, None), |it| (Some(it.num_parameters()), Some(it.num_bytes())));
        predictor.err().map(|error| error.to_string())
    } else if has("options") {
        facts.kind = "encoder";
        encoder(Hymba::load(path), facts);
        facts.problem.take()
    } else {
        facts.kind = "part of a checkpoint";
        None
    };
    facts.problem = problem;
    facts.options = saved;
    Ok(())
}

fn options_of(config: &HymbaLmConfig) -> Map<String, Value> {
    // as in the file, in its order
    match serde_json::to_value(config) {
        Ok(Value::Object(options)) => options,
        _ => Map::new(),
    }
}

/// Bytes of all files of a folder itself.
fn bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let about = fs::metadata(entry?.path())?;
        bytes += if about.is_file() { about.len() } else { 0 };
    }
    Ok(bytes)
}

fn object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
