//! The language model's part of the `verify` example.

use std::collections::BTreeSet;
use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::lm::{HymbaLmConfig, LmLayerState};
use hymba::ndarray::{Array2, Array3, ArrayD, Axis, IxDyn, arr1, s};
use hymba::{GenerateOptions, HymbaLm};

use crate::EXPECTED;
use crate::compare::{Comparison, Tolerance};
use crate::encoder::shortened;
use crate::published::{self, Prompt};
use crate::tensors::{self, Tensors};

/// The published code in `f32` is off by up to a quarter of this from itself in `f64`.
const LOGITS: Tolerance = Tolerance { absolute: 3e-4, relative: 0.0 };
const STATES: Tolerance = Tolerance { absolute: 1e-4, relative: 0.0 };
const EXACT: Tolerance = Tolerance { absolute: 0.0, relative: 0.0 };
/// What the model is given.
const GIVEN: [&str; 3] = ["input_ids", "attention_mask", "lengths"];
/// Other arithmetic than that of this crate, or the published decoding beyond its window.
const INFORMATIVE: [&str; 2] = ["logits_bf16_compute", "step_logits_f64"];
/// What is reached by feeding `greedy_ids`.
const OF_STEPS: [&str; 4] = ["uncached_step_logits", "uncached_step_logits_f64", "step_logits", "cache_final."];
/// Names that go on with the number of a layer.
const OF_LAYERS: [&str; 3] = ["hidden_states.", "cache_prefill.", "cache_final."];

/// Checks one folder and prints a line per comparison.
pub fn verify(folder: &Path, tolerance: Option<Tolerance>) -> Result<Vec<Comparison>, Box<dyn Error>> {
    let expected = tensors::read(&folder.join(EXPECTED))?;
    let prompt = Prompt::new(&expected).map_err(|error| format!("{EXPECTED}: {error}"))?;
    let (b, n) = prompt.real.dim();
    let greedy = published::ids(&expected, "greedy_ids").map_err(|error| format!("{EXPECTED}: {error}"))?;
    if let Some(greedy) = greedy.as_ref().filter(|greedy| greedy.nrows() != b || greedy.is_empty()) {
        let shape = greedy.shape();
        return Err(format!("{EXPECTED}: greedy_ids has shape {shape:?}, and there are {b} rows of input_ids").into());
    }
    let lm = HymbaLm::from_dir(folder)?;
    let config = lm.config();
    let padded = if prompt.is_padded() { ", padded" } else { "" };
    println!(
        "  hymba_lm, num_hidden_layers {}, vocab_size {}, input_ids {:?}{padded}, steps {}",
        config.num_hidden_layers,
        config.vocab_size,
        (b, n),
        greedy.as_ref().map_or(0, Array2::ncols)
    );

    let mut checks = Checks { expected: &expected, tolerance, done: BTreeSet::new(), comparisons: Vec::new() };
    whole(&lm, &prompt, &mut checks)?;
    hidden_states(&lm, &prompt, &mut checks)?;
    let all: Vec<usize> = (0..b).collect();
    let case = Case { config, prompt: &prompt };
    let together = [Fed::new(&lm, &prompt, &all, greedy.as_ref())?];
    case.check(&together, if b > 1 { "rows together" } else { "" }, &mut checks);
    if b > 1 {
        let alone = all.iter().map(|&row| Fed::new(&lm, &prompt, &[row], greedy.as_ref()));
        let alone = alone.collect::<Result<Vec<_>, _>>()?;
        case.check(&alone, "rows alone", &mut checks);
    }
    if let Some(greedy) = &greedy {
        let options = GenerateOptions::default().max_tokens(greedy.ncols()).stop_tokens(Some(vec![]));
        let chosen = lm.generate_batch(&prompt.rows, &options, |_, _| ControlFlow::Continue(()))?;
        let wrong = greedy.indexed_iter().find_map(|((row, step), &expected)| {
            let chosen = chosen[row].ids.get(step).copied();
            (case.is_within(row, step) && chosen != Some(expected)).then_some((row, step, chosen, expected))
        });
        let what = label("greedy_ids", "generate_batch");
        // no tolerance makes a wrong token right
        let comparison = match wrong {
            Some((row, step, Some(chosen), expected)) => {
                Comparison::failed(what, &format!("chose {chosen} at step {step} of row {row}, expected {expected}"))
            }
            Some((row, step, None, _)) => Comparison::failed(what, &format!("ended at step {step} of row {row}")),
            None => Comparison { what, tolerance: EXACT, difference: Ok(0.0), strain: 0.0 },
        };
        checks.add("greedy_ids", comparison);
    }
    checks.finish()
}

/// How far back a layer sees; `None` in one that sees everything.
fn window(config: &HymbaLmConfig, layer: usize) -> Option<usize> {
    let global = config.global_attn_idx.as_ref().is_none_or(|global| global.contains(&layer));
    config.sliding_window.filter(|_| !global)
}

/// What has been compared so far.
struct Checks<'a> {
    expected: &'a Tensors,
    tolerance: Option<Tolerance>,
    /// Names that have been dealt with.
    done: BTreeSet<String>,
    comparisons: Vec<Comparison>,
}

impl Checks<'_> {
    fn has(&self, name: &str) -> bool {
        self.expected.contains_key(name)
    }

    /// Compares a value with the tensor of its name, if there is one.
    fn check(
        &mut self,
        name: &str,
        how: &str,
        given: &ArrayD<f32>,
        usual: Tolerance,
        left_out: impl Fn(&IxDyn) -> bool,
    ) {
        if let Some(expected) = self.expected.get(name) {
            let tolerance = self.tolerance.unwrap_or(usual);
            self.add(name, Comparison::new(label(name, how), given, expected, left_out, tolerance));
        }
    }

    /// Compares one row of a batch after the other, where rows need not be alike.
    fn check_rows(
        &mut self,
        name: &str,
        how: &str,
        rows: usize,
        row: impl Fn(usize, &ArrayD<f64>) -> Result<(ArrayD<f32>, ArrayD<f64>), String>,
    ) {
        let Some(expected) = self.expected.get(name) else {
            return;
        };
        let tolerance = self.tolerance.unwrap_or(STATES);
        let what = label(name, how);
        if expected.ndim() == 0 || expected.len_of(Axis(0)) != rows {
            let reason = format!("has shape {:?}, expected a batch of {rows}", expected.shape());
            return self.add(name, Comparison::failed(what, &reason));
        }
        let compared =
            expected.outer_iter().enumerate().map(|(index, expected)| match row(index, &expected.to_owned()) {
                Ok((given, expected)) => Comparison::new(what.clone(), &given, &expected, |_| false, tolerance),
                Err(reason) => Comparison::failed(what.clone(), &reason),
            });
        let worst = Comparison::worst_row(compared);
        self.add(name, worst.unwrap_or_else(|| Comparison::failed(what, "has no rows")));
    }

    fn add(&mut self, name: &str, comparison: Comparison) {
        println!("  {comparison}");
        self.comparisons.push(comparison);
        self.done.insert(name.into());
    }

    /// Says what was not compared, and why; what should have been is a failure.
    fn finish(mut self) -> Result<Vec<Comparison>, Box<dyn Error>> {
        let (mut information, mut others) = (Vec::new(), Vec::new());
        for name in self.expected.keys() {
            if self.done.contains(name) || GIVEN.contains(&name.as_str()) {
                continue;
            }
            let starts = |names: &[&str]| names.iter().any(|start| name.starts_with(start));
            if INFORMATIVE.contains(&name.as_str()) {
                information.push(name.as_str());
            } else if starts(&OF_STEPS) && !self.has("greedy_ids") {
                self.add(name, Comparison::failed(name.clone(), "there are no greedy_ids to feed for it"));
            } else if starts(&OF_LAYERS) {
                self.add(name, Comparison::failed(name.clone(), "the model has nothing of this name"));
            } else {
                others.push(name.as_str());
            }
        }
        if self.comparisons.is_empty() {
            return Err(format!("{EXPECTED} has nothing that the model gives, such as logits").into());
        }
        if !information.is_empty() {
            println!("  skipped {}: for information only", information.join(", "));
        }
        if !others.is_empty() {
            println!("  skipped {} tensors the model does not show: {}", others.len(), shortened(&others));
        }
        Ok(self.comparisons)
    }
}

fn label(name: &str, how: &str) -> String {
    if how.is_empty() { name.into() } else { format!("{name} ({how})") }
}

/// The logits after every token of the prompt, from one pass over it and from single steps.
fn whole(lm: &HymbaLm, prompt: &Prompt, checks: &mut Checks) -> hymba::Result<()> {
    let names = ["logits", "logits_f64"];
    if !names.iter().any(|name| checks.has(name)) {
        return Ok(());
    }
    let (b, n) = prompt.real.dim();
    let padding = |index: &IxDyn| !prompt.real[[index[0], index[1]]];
    let mut at_once = Array3::zeros((b, n, lm.config().vocab_size));
    let mut steps = at_once.clone();
    if !prompt.is_padded() {
        at_once = lm.forward(&Array2::from_shape_fn((b, n), |(row, place)| prompt.rows[row][place]))?;
    }
    for (row, ids) in prompt.rows.iter().enumerate() {
        if prompt.is_padded() {
            let logits = lm.forward(&arr1(ids).insert_axis(Axis(0)))?;
            for (place, logits) in prompt.places(row).zip(logits.index_axis(Axis(0), 0).rows()) {
                at_once.slice_mut(s![row, place, ..]).assign(&logits);
            }
        }
        let mut state = lm.new_state(1);
        for (place, &id) in prompt.places(row).zip(ids) {
            let logits = lm.step(&arr1(&[id]), &mut state)?;
            steps.slice_mut(s![row, place, ..]).assign(&logits.row(0));
        }
    }
    let how = if prompt.is_padded() { "rows alone" } else { "" };
    let (at_once, steps) = (at_once.into_dyn(), steps.into_dyn());
    for name in names {
        checks.check(name, how, &at_once, LOGITS, padding);
        checks.check(name, "every step", &steps, LOGITS, padding);
    }
    Ok(())
}

/// What `inspect` shows of each row.
fn hidden_states(lm: &HymbaLm, prompt: &Prompt, checks: &mut Checks) -> hymba::Result<()> {
    let layers = lm.config().num_hidden_layers;
    let name = |layer: usize| format!("hidden_states.{layer}");
    if !(0..=layers).any(|layer| checks.has(&name(layer))) {
        return Ok(());
    }
    let (b, n) = prompt.real.dim();
    let meta = lm.config().num_memory_tokens;
    let mut states = vec![Array3::<f32>::zeros((b, meta + n, lm.config().hidden_size)); layers + 1];
    for (row, ids) in prompt.rows.iter().enumerate() {
        let places: Vec<usize> = (0..meta).chain(prompt.places(row).map(|place| meta + place)).collect();
        for (all, of_row) in states.iter_mut().zip(&lm.inspect(ids)?.hidden_states) {
            for (&place, state) in places.iter().zip(of_row.rows()) {
                all.slice_mut(s![row, place, ..]).assign(&state);
            }
        }
    }
    let padding = |index: &IxDyn| index[1] >= meta && !prompt.real[[index[0], index[1] - meta]];
    for (layer, states) in states.into_iter().enumerate() {
        checks.check(&name(layer), "", &states.into_dyn(), STATES, padding);
    }
    Ok(())
}

/// What some rows of a batch give when they are fed the prompt and then `greedy_ids` one by one.
struct Fed {
    /// The logits after the prompt `[rows, V]`.
    last: Array2<f32>,
    /// The logits that chose each of the ids `[rows, S, V]`.
    steps: Array3<f32>,
    /// The states of each row and layer after the prompt, and after the last id but one.
    after_prompt: Vec<Vec<LmLayerState>>,
    at_the_end: Vec<Vec<LmLayerState>>,
}

impl Fed {
    fn new(lm: &HymbaLm, prompt: &Prompt, rows: &[usize], greedy: Option<&Array2<u32>>) -> hymba::Result<Fed> {
        let ids: Vec<&[u32]> = rows.iter().map(|&row| &prompt.rows[row][..]).collect();
        let mut state = lm.new_state(rows.len());
        let last = if prompt.is_padded() {
            lm.prefill_ragged(&ids, &mut state)?
        } else {
            lm.prefill(&Array2::from_shape_fn((ids.len(), ids[0].len()), |(row, i)| ids[row][i]), &mut state)?
        };
        let layers = |state: &hymba::LmState| {
            let of_row = |row| (0..lm.config().num_hidden_layers).map_while(|layer| state.layer(row, layer)).collect();
            (0..rows.len()).map(of_row).collect::<Vec<Vec<LmLayerState>>>()
        };
        let after_prompt = layers(&state);
        let count = greedy.map_or(0, Array2::ncols);
        let mut steps = Array3::zeros((rows.len(), count, lm.config().vocab_size));
        let mut logits = last.clone();
        for step in 0..count {
            if let Some(greedy) = greedy.filter(|_| step > 0) {
                logits = lm.step(&greedy.column(step - 1).select(Axis(0), rows), &mut state)?;
            }
            steps.slice_mut(s![.., step, ..]).assign(&logits);
        }
        Ok(Fed { last, steps, after_prompt, at_the_end: layers(&state) })
    }
}

/// What the published values are of.
#[derive(Clone, Copy)]
struct Case<'a> {
    config: &'a HymbaLmConfig,
    prompt: &'a Prompt,
}

impl Case<'_> {
    /// Whether the published decoding of a row had not left its window at a step.
    fn is_within(self, row: usize, step: usize) -> bool {
        let window = (0..self.config.num_hidden_layers).find_map(|layer| window(self.config, layer));
        published::is_within(window, self.prompt.rows[row].len(), step)
    }

    /// Compares what the rows of a batch, fed together or each alone, came to.
    fn check(self, parts: &[Fed], how: &str, checks: &mut Checks) {
        let Case { config, prompt } = self;
        let (b, n) = prompt.real.dim();
        let mut last = Array3::zeros((b, n, config.vocab_size));
        for (row, logits) in parts.iter().flat_map(|part| part.last.rows()).enumerate() {
            last.slice_mut(s![row, prompt.last(row), ..]).assign(&logits);
        }
        let last = last.into_dyn();
        let not_last = |index: &IxDyn| index[1] != prompt.last(index[0]);
        let prefill = if prompt.is_padded() { "prefill_ragged" } else { "prefill" };
        let prefill = if how.is_empty() { prefill.into() } else { format!("{prefill}, {how}") };
        for name in ["logits", "logits_f64"] {
            checks.check(name, &prefill, &last, LOGITS, not_last);
        }

        let after_prompt: Vec<_> = parts.iter().flat_map(|part| &part.after_prompt).map(Vec::as_slice).collect();
        for layer in 0..config.num_hidden_layers {
            self.check_cache("cache_prefill", how, layer, 0, &after_prompt, checks);
        }
        let count = parts[0].steps.dim().1;
        if count > 0 {
            let mut steps = Array3::zeros((b, count, config.vocab_size));
            for (logits, mut row) in parts.iter().flat_map(|part| part.steps.outer_iter()).zip(steps.outer_iter_mut()) {
                row.assign(&logits);
            }
            let steps = steps.into_dyn();
            for name in ["uncached_step_logits", "uncached_step_logits_f64"] {
                checks.check(name, how, &steps, LOGITS, |_| false);
            }
            checks.check("step_logits", how, &steps, LOGITS, |index| !self.is_within(index[0], index[1]));
            let at_the_end: Vec<_> = parts.iter().flat_map(|part| &part.at_the_end).map(Vec::as_slice).collect();
            self.check_last_caches(how, count - 1, &at_the_end, checks);
        }
    }

    /// Compares the states after `decoded` tokens of those layers in which the published ones are what they should be.
    fn check_last_caches(self, how: &str, decoded: usize, rows: &[&[LmLayerState]], checks: &mut Checks) {
        // what is decoded beyond the window reaches all layers behind the first windowed one
        let layers = self.config.num_hidden_layers;
        let first = (0..layers).find(|&layer| window(self.config, layer).is_some());
        let untouched = match first {
            Some(first) if !(0..rows.len()).all(|row| self.is_within(row, decoded)) => first + 1,
            _ => layers,
        };
        for layer in 0..untouched {
            self.check_cache("cache_final", how, layer, decoded, rows, checks);
        }
        let touched: Vec<String> = (untouched..layers)
            .flat_map(|layer| ["conv", "ssm", "k", "v"].map(|part| format!("cache_final.{layer}.{part}")))
            .filter(|name| checks.has(name) && !checks.done.contains(name))
            .collect();
        if !touched.is_empty() {
            let names: Vec<&str> = touched.iter().map(String::as_str).collect();
            let count = names.len();
            println!("  skipped {count} tensors beyond the window of the published decoding: {}", shortened(&names));
            checks.done.extend(touched);
        }
    }

    /// Compares the states of the rows in one layer after the prompt and `decoded` other tokens.
    fn check_cache(
        self,
        when: &str,
        how: &str,
        layer: usize,
        decoded: usize,
        rows: &[&[LmLayerState]],
        checks: &mut Checks,
    ) {
        let (taps, meta) = (self.config.mamba_d_conv, self.config.num_memory_tokens);
        let name = |part: &str| format!("{when}.{layer}.{part}");
        checks.check_rows(&name("conv"), how, rows.len(), |row, expected| {
            // the published state keeps an input more than the convolution looks back, this crate always three
            let given = &rows[row][layer].conv;
            let count = given.nrows().min(taps);
            let given = given.slice(s![given.nrows() - count.., ..]).to_owned();
            Ok((given.into_dyn(), published::cached_inputs(expected, taps, count)?))
        });
        checks.check_rows(&name("ssm"), how, rows.len(), |row, expected| {
            Ok((rows[row][layer].scan.clone().into_dyn(), expected.clone()))
        });
        for (part, which) in [("k", 0), ("v", 1)] {
            checks.check_rows(&name(part), how, rows.len(), |row, expected| {
                let Some((keys, values)) = &rows[row][layer].keys_and_values else {
                    return Err("is of a layer that has no keys and values of its own".into());
                };
                let given = [keys, values][which];
                let held = given.dim().1 - meta;
                // after a step the published code keeps a token less in windowed layers, which its next one does not see
                let count = match window(self.config, layer) {
                    Some(window) if decoded > 0 => held.min(window),
                    _ => held,
                };
                let mut real = self.prompt.real.row(row).to_vec();
                real.resize(real.len() + decoded, true);
                let expected = published::cached_rows(expected, meta, &real, count)?;
                let places: Vec<usize> = (0..meta).chain(meta + held - count..meta + held).collect();
                Ok((given.select(Axis(1), &places).into_dyn(), expected))
            });
        }
    }
}
