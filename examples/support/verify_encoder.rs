//! Encoders in folders: see `verify.rs`.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use hymba::ndarray::{Array2, Array3, ArrayD, Axis, IxDyn, concatenate};
use hymba::{BlockInspection, Hymba, HymbaOptions, Variant};

use crate::compare::{Comparison, Tolerance};
use crate::tensors::{self, Tensors};
use crate::{EXPECTED, GRADIENT_TOLERANCE, GRADIENTS, LM_WEIGHTS, WEIGHTS};

/// What `step` is compared with at every frame even where the folder holds the last one only.
const OWN_SEQUENCE: &str = "forward_sequence";

/// Checks a folder of an encoder with these `weights` and prints a line per comparison.
pub fn verify(
    folder: &Path,
    tolerance: Option<Tolerance>,
    weights: &[String],
) -> Result<Vec<Comparison>, Box<dyn Error>> {
    let kind = Kind::of(weights)?;
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

pub fn shortened(names: &[&str]) -> String {
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
