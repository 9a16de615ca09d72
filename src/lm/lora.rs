//! Low-rank adapters (LoRA) of the linear maps, in files as the PEFT library has them.

use std::fs;
use std::io::Write;
use std::path::Path;

use ndarray::ArrayViewMutD;
use rand::SeedableRng;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::lora_options::{LoraOptions, is_lora};
use super::model::HymbaLm;
use super::names::HEAD_MAP;
use crate::files::header::{self, printable};
use crate::files::saved::fill;
use crate::files::tensors::Source;
use crate::files::{Target, replace, stored};
use crate::kernels::memory::fits as fits_memory;
use crate::layers::{LORA_NAMES, Linear, LowRank, Rng};
use crate::parameters::{Parameter, ParameterMut, fits};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of the names of a checkpoint.
const PREFIX: &str = "base_model.model.";
/// Longest configuration that is read.
const MAX_CONFIG: u64 = 1 << 20;

/// What low-rank parts cover.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoraCoverage {
    /// The names of the maps that have one, and their shapes `[out, in]`.
    pub maps: Vec<(String, [usize; 2])>,
    /// Numbers in all A and B.
    pub parameters: usize,
}

/// What PEFT's configuration must say, and what it may not: what a key that changes the arithmetic holds where it does nothing.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// Keys of other kinds of adapters, which are refused unless they hold nothing.
const UNSUPPORTED: [&str; 16] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
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

/// Whether low-rank parts that began so stand beside the weights as they are in the checkpoint: PiSSA, OLoRA, CorDA, LoftQ and
/// others take a part out of them.
fn keeps_weights(init_lora_weights: &Value) -> bool {
    match init_lora_weights {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => ["gaussian", "eva", "orthogonal"].iter().any(|kept| name.eq_ignore_ascii_case(kept)),
        _ => false,
    }
}

impl HymbaLm {
    /// Adds new low-rank parts to the maps whose names fit, in place of those there are. From now on only these are trained, and the
    /// weights themselves, narrow ones too, stay as they are. B is zero, so nothing changes yet; A is drawn from `seed`.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if the rank or alpha is out of range, a pattern fits no map, or the parts do not fit into memory. Nothing is
    /// changed then.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions, LoraOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let mut lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let covered = lm.add_lora(&LoraOptions::default().rank(4).maps(["in_proj", "out_proj"]), 0)?;
    /// assert_eq!(covered.maps.len(), 2 * 32);
    /// println!("{:.1} % of the parameters", 100.0 * covered.parameters as f64 / lm.num_parameters() as f64);
    /// assert!(lm.add_lora(&LoraOptions::default().maps(["q_proj"]), 0).is_err()); // that is a part of in_proj here
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn add_lora(&mut self, options: &LoraOptions, seed: u64) -> Result<LoraCoverage> {
        options.validate()?;
        let mut maps = Vec::new();
        self.visit_maps(&mut |name, map| maps.push((name, map.dim())));
        let does_fit = |pattern: &str, name: &str| fits(pattern, name) || fits(&format!("*.{pattern}"), name);
        if let Some(pattern) = options.maps.iter().find(|pattern| !maps.iter().any(|(name, _)| does_fit(pattern, name)))
        {
            let some: Vec<_> = maps.iter().take(7).map(|(name, _)| &name[..]).collect();
            return Err(Error::Option {
                option: "maps",
                given: pattern.clone(),
                allowed: format!("no map has such a name; there are {}, …", some.join(", ")),
            });
        }
        maps.retain(|(name, _)| options.maps.iter().any(|pattern| does_fit(pattern, name)));
        check_memory(&maps, options.rank)?;
        let mut rng = Rng::seed_from_u64(seed);
        let parts = maps.into_iter().map(|(name, (outputs, inputs))| {
            let mut part = LowRank::zeros(inputs, outputs, options.rank, options.scale());
            part.init(&mut rng);
            (name, part)
        });
        let parts = parts.collect();
        Ok(self.set_lora(options.clone(), parts))
    }

    /// Reads low-rank parts from a folder that the PEFT library or [`save_lora`](Self::save_lora) wrote, `adapter_config.json` and
    /// `adapter_model.safetensors`, and uses them in place of those there are. Its `lora_dropout` is not applied in training here.
    ///
    /// The folder need not be trusted.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when a file cannot be read; [`Error::Format`] when one is damaged, or says that it is another kind of adapter,
    /// such as DoRA, or one that changes the weights, such as PiSSA; [`Error::Tensors`] when it has none for maps of this model, others, or in other shapes. Nothing is changed then.
    pub fn load_lora(&mut self, folder: impl AsRef<Path>) -> Result<LoraCoverage> {
        let folder = folder.as_ref();
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
            return Err(
                source.error(format!("{key} is {value}: only plain LoRA is supported, in which it does nothing"))
            );
        }
        if let Some(value) = config.others.get("init_lora_weights").filter(|value| !keeps_weights(value)) {
            let value = printable(&value.to_string());
            return Err(source.error(format!(
                "init_lora_weights is {value}: such an adapter changes the weights that it was made on; save it as plain LoRA"
            )));
        }
        let options =
            LoraOptions { rank: config.r, alpha: config.lora_alpha, rslora: config.use_rslora, maps: Vec::new() };
        options.validate().map_err(|error| source.error(error.to_string()))?;

        let (mut tensors, _) = header::read(Source::open(&folder.join(WEIGHTS))?)?;
        let mut maps = Vec::new();
        self.visit_maps(&mut |name, map| maps.push((name, map.dim())));
        // before memory is taken
        let is_there = |name: &str, dim: (usize, usize)| {
            let shapes = [[options.rank, dim.1], [dim.0, options.rank]];
            let [a, b] = in_files(name).map(|name| tensors.shape(&name).map(<[usize]>::to_vec));
            a.is_some_and(|a| a == shapes[0]) && b.is_some_and(|b| b == shapes[1])
        };
        maps.retain(|(name, dim)| is_there(name, *dim));
        check_memory(&maps, options.rank)?;
        let parts = maps
            .into_iter()
            .map(|(name, (outputs, inputs))| (name, LowRank::zeros(inputs, outputs, options.rank, options.scale())));
        let mut parts: Vec<(String, LowRank)> = parts.collect();
        if parts.is_empty() {
            return Err(tensors.error(format!("it has no tensors of rank {} for a map of this model", options.rank)));
        }
        fill(&mut tensors, None, &mut |place| {
            for (name, part) in &mut parts {
                let [a, b] = in_files(name);
                let mut put = |name: &str, array: Option<ArrayViewMutD<f32>>| {
                    array.into_iter().for_each(|array| place(name, ParameterMut::Array(array)))
                };
                put(&a, part.a.rows_mut().map(|rows| rows.into_dyn()));
                put(&b, part.b.rows_mut().map(|rows| rows.into_dyn()));
            }
        })?;
        let options = LoraOptions { maps: parts.iter().map(|(name, _)| name.clone()).collect(), ..options };
        Ok(self.set_lora(options, parts))
    }

    /// Writes the low-rank parts to a folder, which is made if there is none, as the PEFT library reads them.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if there are none, and [`Error::Io`] when a file cannot be written.
    pub fn save_lora(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let Some(options) = &self.lora else {
            return Err(Error::State("the model has no low-rank parts; add some by add_lora".into()));
        };
        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let mut arrays = Vec::new();
        self.visit(&mut |name, parameter| match parameter {
            Parameter::Array(_) if is_lora(name) => {
                arrays.push((format!("{PREFIX}{name}"), parameter.shape(), parameter))
            }
            _ => {}
        });
        stored::write(Target::File(&folder.join(WEIGHTS)), &[("format", "pt")], &arrays)?;
        let maps: Vec<_> =
            arrays.iter().filter_map(|(name, ..)| name.strip_prefix(PREFIX)?.strip_suffix(".lora_A.weight")).collect();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": null,
            "inference_mode": true,
            "r": options.rank,
            "lora_alpha": options.alpha,
            "use_rslora": options.rslora,
            "use_dora": false,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "target_modules": maps,
            "modules_to_save": null,
            "rank_pattern": {},
            "alpha_pattern": {},
        });
        let path = folder.join(CONFIG);
        let text = serde_json::to_string_pretty(&config).map_err(|error| Error::format(&path, error.to_string()))?;
        replace(&path, |file| file.write_all(text.as_bytes())).map_err(|source| Error::io(&path, source))
    }

    /// Adds the low-rank parts to the weights, row by row, so that they cost nothing any more. Weights in f32 then give what the parts
    /// gave apart, to rounding; narrower ones are rounded again. Matrices that could be trained before there were parts can be trained again.
    pub fn merge_lora(&mut self) {
        self.visit_maps(&mut |_, map| map.merge());
        self.thaw();
        self.lora_changed(None);
    }

    /// Removes the low-rank parts: the model is again as it was without, and what could be trained then can be again.
    pub fn remove_lora(&mut self) {
        self.visit_maps(&mut |_, map| map.set_low_rank(None));
        self.thaw();
        self.lora_changed(None);
    }

    /// Whether maps have low-rank parts.
    pub fn has_lora(&self) -> bool {
        self.lora.is_some()
    }

    /// Refuses to write the weights alone where low-rank parts belong to them.
    pub(super) fn check_no_lora(&self) -> Result<()> {
        match self.has_lora() {
            false => Ok(()),
            true => Err(Error::State(
                "the model has low-rank parts, which are not written with it: save them by save_lora, or add them to the weights by \
                 merge_lora"
                    .into(),
            )),
        }
    }

    /// Sets the parts of these maps, and removes all others.
    fn set_lora(&mut self, options: LoraOptions, mut parts: Vec<(String, LowRank)>) -> LoraCoverage {
        let mut covered = LoraCoverage { maps: Vec::new(), parameters: 0 };
        self.frozen |= self.embedding.rows_mut().is_some();
        self.embedding.freeze();
        self.visit_maps(&mut |name, map| {
            map.freeze();
            let part = parts.iter().position(|(of, _)| *of == name).map(|i| parts.swap_remove(i).1);
            if let Some(part) = &part {
                let ((outputs, inputs), (rank, _)) = (map.dim(), part.a.dim());
                covered.parameters += rank * (outputs + inputs);
                covered.maps.push((name, [outputs, inputs]));
            }
            map.set_low_rank(part);
        });
        self.lora_changed(Some(options));
        covered
    }

    /// Makes the matrices again what can be trained, if they were before there were low-rank parts.
    fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            self.embedding.thaw();
            self.visit_maps(&mut |_, map| map.store_as(None));
        }
    }

    fn lora_changed(&mut self, options: Option<LoraOptions>) {
        self.lora = options;
        self.walk_mut(&mut |_, _: ParameterMut| {}); // states and what follows from the weights are forgotten
    }

    /// Calls `f` with every map that may have a part, and its name in files.
    fn visit_maps<'a>(&'a mut self, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.blocks.iter_mut().for_each(|block| block.visit_maps(f));
        if let Some(head) = &mut self.head {
            f(HEAD_MAP.into(), head);
        }
    }
}

/// What A and B of a map are called in files.
fn in_files(map: &str) -> [String; 2] {
    LORA_NAMES.map(|part| format!("{PREFIX}{map}.{part}"))
}

/// Checks that there is room for the low-rank parts of all these maps, `(out, in)` each.
fn check_memory(maps: &[(String, (usize, usize))], rank: usize) -> Result<()> {
    let rows =
        maps.iter().fold(0usize, |sum, (_, (outputs, inputs))| sum.saturating_add(*outputs).saturating_add(*inputs));
    match fits_memory(rows.saturating_mul(rank).saturating_mul(size_of::<f32>())) {
        true => Ok(()),
        false => Err(Error::Option {
            option: "rank",
            given: rank.to_string(),
            allowed: "the low-rank parts do not fit into memory; make it smaller".into(),
        }),
    }
}
