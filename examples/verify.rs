//! Checks this crate against numbers computed elsewhere, for people who bring weights from Python or Elixir.
//!
//! ```sh
//! cargo run --release --example verify -- tests/data/{hymba,hybrids,edifice}/*    # or your own folders
//! cargo run --release --example verify -- --tolerance 1e-4 DIR…
//! cargo run --release --features lm --example verify -- tests/data/*/*               # language models as well
//! ```
//!
//! Each folder holds `config.json` (the options), `model.safetensors` (the weights) and `expected.safetensors`: an
//! `input [b, l, embed_dim]`, where rows are ragged their `lengths [b]`, and what the other program makes of them under
//! any of the names below. The names of the weights tell whether the model is a `hymba` or an `edifice`
//! (`Edifice.SSM.Hymba`, for which `intermediates.safetensors`, `model.nx` and `model_data.nx` are checked as well).
//! The input is also given to `step` frame by frame.
//!
//! | tensor | compared with |
//! |---|---|
//! | `output`, `output_f64` `[b, h]` | `forward` or `forward_ragged`, `forward_train`, and the last `step` |
//! | `sequence_output` `[b, l, h]` | `forward_sequence`, and every `step` |
//! | `block_<i>.mamba`, `.attention`, `.gate`, `.output`, `.shared_output` `[b, k + l, h]` | `inspect`, meta tokens first |
//! | Edifice: `hymba_block_<i>_…`, `final_norm`, `last_timestep` | `inspect`, `forward_sequence`, `forward` |
//!
//! Where there is a `grads.safetensors` beside them, it holds the gradients of `sum(output · cotangent)` under `input` and the
//! names of the weights, and `expected.safetensors` the `cotangent [b, h]`. They are compared with `backward`: a gradient may
//! differ by 3e-4 of the largest entry of its tensor, or of a thousandth of the largest of all if that is more. What is given
//! by `--tolerance` is for outputs, not for gradients, whose size depends on the cotangent.
//!
//! # Language models
//!
//! With `--features lm`, a folder may hold a language model as the Hugging Face Hub has it, told by `"model_type": "hymba"` in
//! `config.json` or by weights called `model.layers.…`. Its `expected.safetensors` holds `input_ids [b, n]`, where rows are
//! padded also `attention_mask [b, n]` (ones at the real tokens, padding on either side) or `lengths [b]` (padding behind), and
//! what the published code makes of them. Only real tokens are compared; rows are fed together and each alone.
//!
//! | tensor | compared with |
//! |---|---|
//! | `logits`, `logits_f64` `[b, n, V]` | `forward`, `step` token by token, and at the last token `prefill` or `prefill_ragged` |
//! | `uncached_step_logits` `[b, s, V]` (also `…_f64`) | the prompt, and then `greedy_ids [b, s]` fed to `step` one by one |
//! | `step_logits` `[b, s, V]` | the same, while the prompt and what follows fit into `sliding_window` |
//! | `greedy_ids` `[b, s]` | `generate_batch`, equally far; no tolerance here |
//! | `hidden_states.<i>` `[b, M + n, H]` | `inspect`, meta tokens first |
//! | `cache_prefill.<i>.conv`, `.ssm`, `.k`, `.v` | `LmState::layer` after the prompt |
//! | `cache_final.<i>.…` | the same after all `greedy_ids` but the last, which nobody feeds |
//!
//! The published code decodes with a window that is one token shorter than that of its prompts. Where that makes a difference,
//! `step_logits`, `greedy_ids` and the caches behind the first windowed layer say nothing about this crate and are left out. Of
//! a cache, the rows that both programs keep are compared. `logits_bf16_compute` and `step_logits_f64` are for information.
//!
//! A folder of a language model may hold `train.safetensors` in place of `expected.safetensors`: `ids [b, n]`, `lengths [b]` and
//! perhaps `loss_mask [b, n]`, the mean cross-entropy `loss` of the next tokens and their `logits [b, n, V]`; beside it
//! `grads.safetensors`, the gradients of the loss by every parameter, with the tolerance said above, and `adamw.safetensors`, `losses
//! [4]` and the weights `final.NAME` of three steps of AdamW at a rate of 0.001, betas 0.9 and 0.95 and a decay of 0.1. The loss is
//! compared with `forward_train`, gradients with `backward`. Losses may differ by 1e-5, and so may weights in the mean.
//!
//! One with low-rank adapters holds the model in `base`, what the PEFT library wrote in `adapter`, and in `expected.safetensors` the
//! same as above with the adapter, `base_logits` without it, and `grad.NAME` by its tensors; `logits` merged and apart may differ by
//! 1e-5 of the largest.
//!
//! # Exit status
//!
//! The exit status is 0 if all agree, 1 if any does not or a folder cannot be read, 2 if the arguments make no sense.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hymba::ndarray::{Array2, Array3, ArrayD, Axis, IxDyn, concatenate};
use hymba::{BlockInspection, Hymba, HymbaOptions, Variant};

#[path = "support/compare.rs"]
mod compare;
#[cfg(feature = "lm")]
#[path = "support/verify_lm.rs"]
mod language_model;
#[cfg(feature = "lm")]
#[path = "support/verify_lora.rs"]
mod lora;
#[cfg(feature = "lm")]
#[path = "support/published.rs"]
mod published;
#[path = "support/tensors.rs"]
mod tensors;
#[cfg(feature = "lm")]
#[path = "support/verify_training.rs"]
mod training;

use compare::{Comparison, Tolerance};
use tensors::Tensors;

const WEIGHTS: &str = "model.safetensors";
const EXPECTED: &str = "expected.safetensors";
const GRADIENTS: &str = "grads.safetensors";
/// A gradient may differ by this share of the largest entry of its tensor, or of a thousandth of the largest of all.
const GRADIENT_TOLERANCE: f64 = 3e-4;
/// How the names of a language model's weights start.
const LM_WEIGHTS: &str = "model.layers.";
/// What `step` is compared with at every frame even where the folder holds the last one only.
const OWN_SEQUENCE: &str = "forward_sequence";
const USAGE: &str = "usage: verify [--tolerance X] DIR…
Each DIR holds config.json, model.safetensors and expected.safetensors of a hymba or edifice encoder, or of a Hymba language
model (hymba_lm, in builds with --features lm).";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match parse(arguments) {
        Ok((tolerance, folders)) => verify_all(tolerance, &folders),
        Err(error) => {
            eprintln!("verify: {error}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(arguments: Vec<String>) -> Result<(Option<Tolerance>, Vec<PathBuf>), String> {
    let mut tolerance = None;
    let mut folders = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--tolerance" {
            let value = arguments.next().unwrap_or_default();
            match value.parse::<f64>() {
                Ok(absolute) if absolute >= 0.0 && absolute.is_finite() => {
                    tolerance = Some(Tolerance { absolute, relative: 0.0 });
                }
                _ => return Err(format!("--tolerance needs a number such as 1e-5, found `{value}`")),
            }
        } else if argument.starts_with('-') {
            return Err(format!("unknown option {argument}"));
        } else {
            folders.push(PathBuf::from(argument));
        }
    }
    if folders.is_empty() {
        return Err("no folder given".into());
    }
    Ok((tolerance, folders))
}

fn verify_all(tolerance: Option<Tolerance>, paths: &[PathBuf]) -> ExitCode {
    let mut comparisons = Vec::new();
    let mut unchecked = 0;
    for path in paths {
        if path.is_file() {
            println!("{}: not a folder, passed over\n", path.display());
            continue;
        }
        println!("{}", path.display());
        match verify(path, tolerance) {
            Ok(of_this_folder) => comparisons.extend(of_this_folder.into_iter().map(|comparison| (path, comparison))),
            Err(error) => {
                println!("  FAILED  {error}");
                unchecked += 1;
            }
        }
        println!();
    }

    let failed = comparisons.iter().filter(|(_, comparison)| !comparison.holds()).count();
    println!("{} comparisons, {failed} failed; {unchecked} folders could not be checked", comparisons.len());
    if let Some((folder, worst)) = comparisons.iter().rev().max_by(|(_, a), (_, b)| a.strain.total_cmp(&b.strain)) {
        let title = if worst.holds() { "closest to its tolerance" } else { "worst" };
        println!("{title}, in {}:\n  {worst}", folder.display());
    }
    if failed == 0 && unchecked == 0 && !comparisons.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The encoder that a folder holds; the weights' names tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Hymba,
    Edifice,
}

impl Kind {
    fn of(weights: &[String]) -> Result<Kind, String> {
        let have = |name: &str| weights.iter().any(|weight| weight == name);
        if have("final_norm.weight") {
            Ok(Kind::Hymba)
        } else if have("final_norm.gamma") {
            Ok(Kind::Edifice)
        } else {
            let some = weights.iter().take(3).map(|weight| format!("{weight:?}, ")).collect::<String>();
            Err(format!(
                "{WEIGHTS} has none of \"final_norm.weight\" (hymba), \"final_norm.gamma\" (edifice) and \"{LM_WEIGHTS}…\" \
                 (hymba_lm), but {some}…"
            ))
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Hymba => "hymba",
            Kind::Edifice => "edifice",
        }
    }

    /// The rounding of the original programs in `f32`, times about ten.
    fn tolerance(self) -> Tolerance {
        match self {
            Kind::Hymba => Tolerance { absolute: 1e-5, relative: 0.0 },
            Kind::Edifice => Tolerance { absolute: 2e-5, relative: 0.0 },
        }
    }

    fn load(self, file: &Path, options: HymbaOptions) -> hymba::Result<Hymba> {
        match self {
            Kind::Hymba => Hymba::load_with(file, options),
            Kind::Edifice => Hymba::load_edifice(file, options),
        }
    }

    /// Everything that the model of a folder gives for the input.
    fn run(self, folder: &Path, model: &Hymba, input: &Input) -> Result<Values, Box<dyn Error>> {
        let mut values = Values::default();
        whole(self, model, input, &mut values)?;
        frame_by_frame(model, input, &mut values)?;
        if self == Kind::Edifice {
            other_files(folder, model, input, &mut values)?;
        }
        Ok(values)
    }

    /// What the files call the parts of block `index`.
    fn block_names(self, index: usize) -> [String; 5] {
        match self {
            Kind::Hymba => {
                ["mamba", "attention", "gate", "output", "shared_output"].map(|part| format!("block_{index}.{part}"))
            }
            Kind::Edifice => ["mamba_out_proj", "attn_out_proj", "fusion_gate", "ffn_residual", "shared"]
                .map(|part| format!("hymba_block_{}_{part}", index + 1)),
        }
    }
}

fn options(folder: &Path, kind: Kind) -> Result<HymbaOptions, String> {
    let path = folder.join("config.json");
    let fault = |reason: String| format!("{}: {reason}", path.display());
    let text = std::fs::read_to_string(&path).map_err(|error| fault(error.to_string()))?;
    let mut options: HymbaOptions = serde_json::from_str(&text).map_err(|error| fault(error.to_string()))?;
    if kind == Kind::Edifice {
        options.variant = Variant::Edifice;
    }
    options.dropout = 0.0; // which other program would draw the same?
    Ok(options)
}

/// Checks one folder and prints a line per comparison.
fn verify(folder: &Path, tolerance: Option<Tolerance>) -> Result<Vec<Comparison>, Box<dyn Error>> {
    #[cfg(feature = "lm")]
    if folder.join(training::TRAINING).exists() {
        return training::verify(folder, tolerance);
    }
    #[cfg(feature = "lm")]
    if folder.join(lora::ADAPTER).is_dir() {
        return lora::verify(folder, tolerance);
    }
    if says_language_model(folder) {
        return language_model::verify(folder, tolerance);
    }
    let weights = tensors::names(&folder.join(WEIGHTS))?;
    if weights.iter().any(|name| name.starts_with(LM_WEIGHTS)) {
        return language_model::verify(folder, tolerance);
    }
    let kind = Kind::of(&weights)?;
    let expected = tensors::read(&folder.join(EXPECTED))?;
    let input = Input::new(&expected).map_err(|error| format!("{EXPECTED}: {error}"))?;
    let model = kind.load(&folder.join(WEIGHTS), options(folder, kind)?)?;
    println!("  {}, num_layers {}, input {:?}", kind.name(), model.options().num_layers, input.frames.dim());
    let values = kind.run(folder, &model, &input)?;

    let mut references = vec![(&expected, kind.tolerance())];
    let intermediates = folder.join("intermediates.safetensors");
    let intermediates = if intermediates.exists() { tensors::read(&intermediates)? } else { Tensors::new() };
    references.push((&intermediates, Tolerance { absolute: 1e-5, relative: 1e-5 }));
    if references.iter().all(|(tensors, _)| values.among(tensors).next().is_none()) {
        return Err(format!("{EXPECTED} has nothing that the model gives, such as output").into());
    }
    references.push((&values.own, kind.tolerance()));

    let mut comparisons = Vec::new();
    for &(tensors, usual) in &references {
        for (value, expected) in values.among(tensors) {
            let padding = |index: &IxDyn| input.is_padding(expected.shape(), index);
            let tolerance = tolerance.unwrap_or(usual);
            let comparison = Comparison::new(value.label(), &value.array, expected, padding, tolerance);
            println!("  {comparison}");
            comparisons.push(comparison);
        }
    }
    let has_gradients = folder.join(GRADIENTS).exists();
    if has_gradients {
        for comparison in gradients(kind, folder, &model, &input, &expected)? {
            println!("  {comparison}");
            comparisons.push(comparison);
        }
    }
    let names = references.iter().flat_map(|(tensors, _)| tensors.keys());
    print_skipped(names.filter(|name| !values.have(name)).map(String::as_str), has_gradients);
    Ok(comparisons)
}

/// Whether `config.json` says so; one that cannot be read says nothing, and whoever needs it will complain.
fn says_language_model(folder: &Path) -> bool {
    let config = std::fs::read(folder.join("config.json")).unwrap_or_default();
    let config = serde_json::from_slice::<serde_json::Value>(&config).unwrap_or_default();
    config["model_type"] == "hymba"
}

#[cfg(not(feature = "lm"))]
mod language_model {
    pub fn verify(
        _: &super::Path,
        _: Option<super::Tolerance>,
    ) -> Result<Vec<super::Comparison>, Box<dyn super::Error>> {
        Err("it is a language model, which this build does not know; build with --features lm".into())
    }
}

/// The gradients of `sum(output · cotangent)` by the input and by every parameter, against those of the folder.
fn gradients(
    kind: Kind,
    folder: &Path,
    model: &Hymba,
    input: &Input,
    expected: &Tensors,
) -> Result<Vec<Comparison>, Box<dyn Error>> {
    let cotangent: Array2<f32> =
        tensors::get(expected, "cotangent").map_err(|error| format!("{EXPECTED}: {error}, which {GRADIENTS} needs"))?;
    let (_, cache) = model.forward_train(&input.frames, input.ragged.then_some(&input.lengths[..]), 0)?;
    let mut gradient = model.zeros_like();
    let dinput = model.backward(&cache, &cotangent, &mut gradient)?;
    let mut given = by_name(&gradient);
    given.insert("input".into(), dinput.into_dyn());

    let mut expected = tensors::read(&folder.join(GRADIENTS))?;
    if kind == Kind::Edifice {
        expected = in_our_names(expected, model.options())?;
    }
    let largest = |tensor: &ArrayD<f64>| tensor.iter().fold(0.0, |largest: f64, entry| largest.max(entry.abs()));
    let of_all = expected.values().map(largest).fold(0.0, f64::max);
    let mut comparisons = Vec::new();
    for (name, expected) in &expected {
        let what = format!("gradient of {name}");
        let absolute = GRADIENT_TOLERANCE * largest(expected).max(1e-3 * of_all);
        comparisons.push(match given.remove(name) {
            Some(given) => Comparison::new(what, &given, expected, |_| false, Tolerance { absolute, relative: 0.0 }),
            None => Comparison::failed(what, "the model has no parameter of this name"),
        });
    }
    let missing = given.into_keys().map(|name| format!("gradient of {name}"));
    comparisons.extend(missing.map(|what| Comparison::failed(what, &format!("it is not in {GRADIENTS}"))));
    Ok(comparisons)
}

fn by_name(model: &Hymba) -> BTreeMap<String, ArrayD<f32>> {
    let mut all = BTreeMap::new();
    model.visit(&mut |name, array| {
        all.insert(name.to_string(), array.to_owned());
    });
    all
}

/// Gradients of Edifice have the names and axes of its parameters: read as if they were a model, they have ours.
fn in_our_names(mut gradients: Tensors, options: &HymbaOptions) -> Result<Tensors, Box<dyn Error>> {
    let input = gradients.remove("input");
    let folder = tempfile::tempdir()?;
    let file = folder.path().join(GRADIENTS);
    tensors::write(&file, &gradients)?;
    let model = Hymba::load_edifice(&file, options.clone())
        .map_err(|error| error.to_string().replace(&file.display().to_string(), GRADIENTS))?;
    let mut gradients: Tensors =
        by_name(&model).into_iter().map(|(name, array)| (name, array.mapv(f64::from))).collect();
    gradients.extend(input.map(|input| ("input".to_string(), input)));
    Ok(gradients)
}

/// Says which tensors were not compared, and why.
fn print_skipped<'a>(names: impl Iterator<Item = &'a str>, has_gradients: bool) {
    let (of_gradients, inner): (Vec<&str>, Vec<&str>) = names
        .filter(|name| !["input", "lengths"].contains(name))
        .partition(|name| ["cotangent", "loss_f64"].contains(name));
    if !inner.is_empty() {
        println!("  skipped {} tensors the model does not show: {}", inner.len(), shortened(&inner));
    }
    if !of_gradients.is_empty() && !has_gradients {
        println!("  skipped {}: there is no {GRADIENTS} to go with it", of_gradients.join(", "));
    }
}

fn shortened(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    let more = if names.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
}

/// What the model is given.
struct Input {
    /// `[b, l, embed_dim]`
    frames: Array3<f32>,
    /// The number of valid frames of each row.
    lengths: Vec<usize>,
    ragged: bool,
}

impl Input {
    fn new(expected: &Tensors) -> Result<Input, String> {
        let frames: Array3<f32> = tensors::get(expected, "input")?;
        let (b, l, _) = frames.dim();
        let lengths = match expected.get("lengths") {
            Some(lengths) => lengths.iter().map(|&length| length as usize).collect(),
            None => vec![l; b],
        };
        if b == 0 || lengths.len() != b || !lengths.iter().all(|length| (1..=l).contains(length)) {
            return Err(format!("input has shape {:?}, which does not go with lengths {lengths:?}", frames.dim()));
        }
        Ok(Input { ragged: expected.contains_key("lengths"), frames, lengths })
    }

    /// Whether an element of `[b, l, …]` or `[b, k + l, …]` lies past the end of its row.
    fn is_padding(&self, shape: &[usize], index: &IxDyn) -> bool {
        match *shape {
            [_, positions, _] => positions - index[1] <= self.frames.dim().1 - self.lengths[index[0]],
            _ => false,
        }
    }

    fn encode(&self, model: &Hymba) -> hymba::Result<Array2<f32>> {
        if self.ragged { model.forward_ragged(&self.frames, &self.lengths) } else { model.forward(&self.frames) }
    }
}

/// What the model gives, each under the name of the tensor it is to be compared with.
#[derive(Default)]
struct Values {
    all: Vec<Value>,
    /// What the model is to agree with itself about.
    own: Tensors,
}

struct Value {
    name: String,
    /// How the value came about, where it is not the plain way.
    how: &'static str,
    array: ArrayD<f32>,
}

impl Value {
    fn label(&self) -> String {
        if self.how.is_empty() { self.name.clone() } else { format!("{} ({})", self.name, self.how) }
    }
}

impl Values {
    /// The values that one of the tensors is to be compared with, and that tensor.
    fn among<'a>(&'a self, tensors: &'a Tensors) -> impl Iterator<Item = (&'a Value, &'a ArrayD<f64>)> {
        self.all.iter().filter_map(|value| Some((value, tensors.get(&value.name)?)))
    }

    fn have(&self, name: &str) -> bool {
        self.all.iter().any(|value| value.name == name)
    }

    fn add(&mut self, name: &str, how: &'static str, array: ArrayD<f32>) {
        self.all.push(Value { name: name.into(), how, array });
    }

    fn add_output(&mut self, how: &'static str, output: Array2<f32>) {
        for name in ["output", "output_f64", "last_timestep"] {
            self.add(name, how, output.clone().into_dyn());
        }
    }

    fn add_sequence(&mut self, how: &'static str, sequence: Array3<f32>) {
        for name in ["sequence_output", "final_norm"] {
            self.add(name, how, sequence.clone().into_dyn());
        }
    }
}

/// All frames at once.
fn whole(kind: Kind, model: &Hymba, input: &Input, values: &mut Values) -> hymba::Result<()> {
    values.add_output("", input.encode(model)?);
    let lengths = input.ragged.then_some(&input.lengths[..]);
    values.add_output("forward_train", model.forward_train(&input.frames, lengths, 0)?.0);
    let sequence = model.forward_sequence(&input.frames)?;
    values.own.insert(OWN_SEQUENCE.into(), sequence.mapv(f64::from).into_dyn());
    values.add_sequence("", sequence);
    let inspection = model.inspect(&input.frames)?;
    let parts: [fn(&BlockInspection) -> &Array3<f32>; 5] = [
        |block| &block.mamba,
        |block| &block.attention,
        |block| &block.gate,
        |block| &block.output,
        |block| &block.shared_output,
    ];
    for (index, block) in inspection.blocks.iter().enumerate() {
        for (name, part) in kind.block_names(index).iter().zip(parts) {
            let frames = part(block);
            if frames.is_empty() {
                continue; // the block has no such part
            }
            let array = match inspection.meta.get(index) {
                Some(meta) => with_meta(part(meta), frames),
                None => frames.clone(),
            };
            values.add(name, "", array.into_dyn());
        }
    }
    Ok(())
}

/// `[b, k + l, h]`: the rows of the meta tokens, which all of the batch shares, in front of those of the frames.
fn with_meta(meta: &Array3<f32>, frames: &Array3<f32>) -> Array3<f32> {
    let rows = meta.broadcast((frames.dim().0, meta.dim().1, meta.dim().2));
    rows.and_then(|rows| concatenate(Axis(1), &[rows, frames.view()]).ok()).unwrap_or_else(|| frames.clone())
}

/// The same frames one at a time.
fn frame_by_frame(model: &Hymba, input: &Input, values: &mut Values) -> hymba::Result<()> {
    let (b, l, _) = input.frames.dim();
    let h = model.options().output_size();
    let mut state = model.new_state(b);
    let mut sequence = Array3::zeros((b, l, h));
    for (frame, mut row) in input.frames.axis_iter(Axis(1)).zip(sequence.axis_iter_mut(Axis(1))) {
        row.assign(&model.step(&frame, &mut state)?);
    }
    let last = Array2::from_shape_fn((b, h), |(row, column)| sequence[[row, input.lengths[row] - 1, column]]);
    values.add_output("last step", last);
    values.add(OWN_SEQUENCE, "every step", sequence.clone().into_dyn());
    values.add_sequence("every step", sequence);
    Ok(())
}

/// The same weights in the other formats of Elixir.
fn other_files(folder: &Path, model: &Hymba, input: &Input, values: &mut Values) -> hymba::Result<()> {
    for file in ["model.nx", "model_data.nx"] {
        let path = folder.join(file);
        if path.exists() {
            let model = Hymba::load_edifice(&path, model.options().clone())?;
            values.add_output(file, input.encode(&model)?);
        }
    }
    Ok(())
}
