//! Adapters in folders, as the PEFT library has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::Path;

use ndarray::{ArrayD, ArrayViewMutD};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Adapted, LORA_NAMES, LoraCoverage, LoraOptions, ParameterMut, check_memory, check_room, hold, is_lora, zeros,
};
use crate::files::header::{self, printable};
use crate::files::saved::fill;
use crate::files::tensors::Source;
use crate::files::{Target, replace, stored};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// The prefix that PEFT puts in front of the names of a checkpoint.
const PREFIX: &str = "base_model.model.";
/// Longest configuration that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// PEFT's configuration: the keys that are read, and the others, some of which must hold nothing.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    lora_dropout: f64,
    /// What is in the folder beside low-rank parts.
    modules_to_save: Option<Vec<String>>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Keys of other kinds of adapters, which are refused unless they hold nothing.
const UNSUPPORTED: [&str; 15] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
];

fn holds_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Whether low-rank parts with these initial values go with the weights as they are in the checkpoint: PiSSA, OLoRA,
/// CorDA, LoftQ and others take a part out of them.
fn keeps_weights(init_lora_weights: &Value) -> bool {
    match init_lora_weights {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => ["gaussian", "eva", "orthogonal"].iter().any(|kept| name.eq_ignore_ascii_case(kept)),
        _ => false,
    }
}

/// Reads an adapter from a folder, holds it by this name, and activates it. Nothing is changed where there is an error.
pub(crate) fn load(model: &mut impl Adapted, name: &str, folder: &Path) -> Result<LoraCoverage> {
    check_room(model, name)?;
    let (options, modules) = read_config(folder, model)?;
    let (mut tensors, _) = header::read(Source::open(&folder.join(WEIGHTS))?)?;
    let mut maps = model.maps();
    // before memory is taken
    let is_there = |name: &str, dim: (usize, usize)| {
        let shapes = [[options.rank, dim.1], [dim.0, options.rank]];
        let [a, b] = in_files(name).map(|name| tensors.shape(&name).map(<[usize]>::to_vec));
        a.is_some_and(|a| a == shapes[0]) && b.is_some_and(|b| b == shapes[1])
    };
    maps.retain(|(name, dim)| is_there(name, *dim));
    check_memory(&maps, options.rank)?;
    if maps.is_empty() {
        return Err(tensors.error(format!("it has no tensors of rank {} for a map of this model", options.rank)));
    }
    let mut parts = zeros(&maps, &options);
    let is_saved = |module: &str| modules.iter().any(|saved| saved == module);
    let around = model.around_shapes().into_iter().filter(|(module, ..)| is_saved(module));
    let mut around: BTreeMap<_, _> = around.map(|(_, name, shape)| (name, ArrayD::zeros(shape))).collect();
    fill(&mut tensors, None, &mut |place| {
        for (name, part) in &mut parts {
            let [a, b] = in_files(name);
            let mut put = |name: &str, array: Option<ArrayViewMutD<f32>>| {
                array.into_iter().for_each(|array| place(name, ParameterMut::Array(array)))
            };
            put(&a, part.a.rows_mut().map(|rows| rows.into_dyn()));
            put(&b, part.b.rows_mut().map(|rows| rows.into_dyn()));
        }
        for (name, array) in &mut around {
            place(&format!("{PREFIX}{name}"), ParameterMut::Array(array.view_mut()));
        }
    })?;
    model.set_around(around).map_err(|error| tensors.error(format!("{modules:?} of it cannot be used: {error}")))?;
    Ok(hold(model, name, &options, &maps, parts))
}

/// The options that a configuration gives, without maps, and the modules that the folder has beside low-rank parts.
fn read_config(folder: &Path, model: &impl Adapted) -> Result<(LoraOptions, Vec<String>)> {
    let mut source = Source::open(&folder.join(CONFIG))?;
    let text = source.text(MAX_CONFIG)?;
    let config: Config = serde_json::from_str(&text).map_err(|error| {
        source.error(format!("not a usable adapter_config.json: {}", printable(&error.to_string())))
    })?;
    if config.peft_type != "LORA" {
        return Err(source.error(format!("peft_type is {:?}; only \"LORA\" is supported", config.peft_type)));
    }
    let other_bias = config.others.get("bias").is_some_and(|bias| bias != "none");
    let unsupported =
        UNSUPPORTED.into_iter().find(|key| config.others.get(*key).is_some_and(|value| !holds_nothing(value)));
    if let Some(key) = unsupported.or(other_bias.then_some("bias")) {
        let value = printable(&config.others[key].to_string());
        return Err(source.error(format!("{key} is {value}: not supported, only plain LoRA is")));
    }
    if let Some(value) = config.others.get("init_lora_weights").filter(|value| !keeps_weights(value)) {
        let value = printable(&value.to_string());
        return Err(source.error(format!(
            "init_lora_weights is {value}: such an adapter changes the base weights; convert it to plain LoRA"
        )));
    }
    let modules = config.modules_to_save.unwrap_or_default();
    let known: BTreeSet<_> = model.around_shapes().into_iter().map(|(module, ..)| module).collect();
    if let Some(module) = modules.iter().find(|module| !known.contains(&module[..])) {
        let module = printable(module);
        return Err(source.error(format!(
            "modules_to_save has {module:?}: for this kind of model only {known:?} can be saved beside low-rank parts"
        )));
    }
    let Config { r: rank, lora_alpha: alpha, use_rslora: rslora, lora_dropout: dropout, .. } = config;
    let options = LoraOptions { rank, alpha, rslora, dropout, maps: Vec::new() };
    options.validate().map_err(|error| source.error(error.to_string()))?;
    Ok((options, modules))
}

/// Writes the active adapter to a folder. PEFT's `task_type` is one of its names, or none.
pub(crate) fn save(model: &impl Adapted, folder: &Path, task_type: Option<&str>) -> Result<()> {
    let Some(options) = model.active().and_then(|name| model.options_of(name)) else {
        return Err(Error::State("the model has no active adapter; add one by add_lora".into()));
    };
    fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
    let mut arrays = Vec::new();
    model.visit_every(&mut |name, parameter| {
        if is_lora(name) {
            arrays.push((format!("{PREFIX}{name}"), parameter.shape(), parameter));
        }
    });
    let mut modules = BTreeSet::new();
    for (module, name, parameter) in model.around() {
        modules.insert(module);
        arrays.push((format!("{PREFIX}{name}"), parameter.shape(), parameter));
    }
    stored::write(Target::File(&folder.join(WEIGHTS)), &[("format", "pt")], &arrays)?;
    let config = json!({
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": null,
        "inference_mode": true,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "use_rslora": options.rslora,
        "use_dora": false,
        "lora_dropout": options.dropout,
        "bias": "none",
        "fan_in_fan_out": false,
        "target_modules": options.maps,
        "modules_to_save": Some(modules).filter(|modules| !modules.is_empty()),
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    let path = folder.join(CONFIG);
    let text = serde_json::to_string_pretty(&config).map_err(|error| Error::format(&path, error.to_string()))?;
    replace(&path, |file| file.write_all(text.as_bytes())).map_err(|source| Error::io(&path, source))
}

/// What A and B of a map are called in files.
fn in_files(map: &str) -> [String; 2] {
    LORA_NAMES.map(|part| format!("{PREFIX}{map}.{part}"))
}
