//! The training of a language model, for the `verify` example.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use hymba::HymbaLm;
use hymba::lm::LoadOptions;
use hymba::ndarray::{Array2, Array3, ArrayD, Axis, IxDyn, s};
use hymba::train::{AdamW, AdamWOptions, Parameters};

use crate::compare::{Comparison, Tolerance};
use crate::tensors::{self, Tensors};
use crate::{GRADIENT_TOLERANCE, GRADIENTS};

/// Tokens, their loss and their logits.
pub const TRAINING: &str = "train.safetensors";
/// Losses and weights of three steps.
const STEPS: &str = "adamw.safetensors";

pub const LOSS: Tolerance = Tolerance { absolute: 1e-5, relative: 0.0 };
pub const LOGITS: Tolerance = Tolerance { absolute: 3e-4, relative: 0.0 };
/// Of the mean over a tensor: weights with next to no gradient go either way.
const WEIGHTS: Tolerance = Tolerance { absolute: 1e-5, relative: 0.0 };

/// Rows of tokens, without their padding, and which of them are predicted.
pub struct TokenRows {
    pub rows: Vec<Vec<u32>>,
    pub masks: Option<Vec<Vec<bool>>>,
}

impl TokenRows {
    pub fn new(file: &Tensors) -> Result<Self, String> {
        let ids: Array2<f32> = tensors::get(file, "ids")?;
        let lengths = file.get("lengths").ok_or("there is no tensor lengths")?;
        if lengths.shape() != [ids.nrows()]
            || lengths.iter().any(|&length| length < 1.0 || length as usize > ids.ncols())
        {
            return Err(format!("ids has shape {:?}, which does not go with lengths {lengths}", ids.dim()));
        }
        let of_row = |of: &Array2<f32>, row: usize| of.row(row).to_vec()[..lengths[row] as usize].to_vec();
        let rows = (0..ids.nrows()).map(|row| of_row(&ids, row).into_iter().map(|id| id as u32).collect()).collect();
        let masks = match file.contains_key("loss_mask") {
            true => {
                let mask: Array2<f32> = tensors::get(file, "loss_mask")?;
                Some(
                    (0..ids.nrows())
                        .map(|row| of_row(&mask, row).into_iter().map(|mark| mark != 0.0).collect())
                        .collect(),
                )
            }
            false => None,
        };
        Ok(TokenRows { rows, masks })
    }

    /// The logits after every token, zero past the end of a row `[b, n, V]`.
    pub fn logits(&self, lm: &HymbaLm, n: usize) -> hymba::Result<ArrayD<f32>> {
        let mut all = Array3::zeros((self.rows.len(), n, lm.config().vocab_size));
        for (row, ids) in self.rows.iter().enumerate() {
            let logits = lm.forward(&Array2::from_shape_fn((1, ids.len()), |(_, i)| ids[i]))?;
            all.slice_mut(s![row, ..ids.len(), ..]).assign(&logits.index_axis(Axis(0), 0));
        }
        Ok(all.into_dyn())
    }
}

/// Checks one folder and prints a line per comparison.
pub fn verify(folder: &Path, tolerance: Option<Tolerance>) -> Result<Vec<Comparison>, Box<dyn Error>> {
    let given = tensors::read(&folder.join(TRAINING))?;
    let rows = TokenRows::new(&given).map_err(|error| format!("{TRAINING}: {error}"))?;
    let mut lm = HymbaLm::from_dir_with(folder, &LoadOptions::default().trainable(true), |_| {})?;
    println!("  hymba_lm in training, num_hidden_layers {}, rows {}", lm.config().num_hidden_layers, rows.rows.len());
    let mut comparisons = Vec::new();
    let mut add = |comparison: Comparison| {
        println!("  {comparison}");
        comparisons.push(comparison);
    };

    let (loss, cache) = lm.forward_train(&rows.rows, rows.masks.as_deref())?;
    if let Some(expected) = given.get("loss") {
        add(of_numbers("loss", &[loss.mean()], expected, tolerance.unwrap_or(LOSS)));
    }
    if let Some(expected) = given.get("logits") {
        let logits = rows.logits(&lm, expected.shape().get(1).copied().unwrap_or_default())?;
        add(Comparison::new("logits".into(), &logits, expected, |_| false, tolerance.unwrap_or(LOGITS)));
    }
    let mut gradient = lm.zeros_like();
    lm.backward(&cache, &mut gradient)?;
    if folder.join(GRADIENTS).exists() {
        gradients(&by_name(&gradient), &tensors::read(&folder.join(GRADIENTS))?).into_iter().for_each(&mut add);
    }
    if folder.join(STEPS).exists() {
        let expected = tensors::read(&folder.join(STEPS))?;
        let losses = three_steps(&mut lm, &rows)?;
        if let Some(expected) = expected.get("losses") {
            add(of_numbers("losses of AdamW", &losses, expected, LOSS));
        }
        let weights = by_name(&lm);
        for (name, expected) in &expected {
            if let Some(weight) = name.strip_prefix("final.") {
                add(mean_of(&format!("{weight} after AdamW"), weights.get(weight), expected));
            }
        }
    }
    Ok(comparisons)
}

/// The losses before each of three steps and after the last.
fn three_steps(lm: &mut HymbaLm, rows: &TokenRows) -> hymba::Result<Vec<f64>> {
    let options = AdamWOptions::default().learning_rate(1e-3).betas(0.9, 0.95).epsilon(1e-8).weight_decay(0.1);
    let mut optimizer = AdamW::new(lm, options)?;
    let (mut gradient, mut losses) = (lm.zeros_like(), Vec::new());
    for _ in 0..3 {
        let loss = lm.accumulate(&rows.rows, rows.masks.as_deref(), &mut gradient)?;
        optimizer.step_accumulated(lm, &mut gradient, loss.tokens as f64)?;
        losses.push(loss.mean());
    }
    losses.push(lm.forward_train(&rows.rows, rows.masks.as_deref())?.0.mean());
    Ok(losses)
}

/// A gradient may differ by a share of the largest entry of its tensor, or of a thousandth of the largest of all.
pub fn gradients(given: &BTreeMap<String, ArrayD<f32>>, expected: &Tensors) -> Vec<Comparison> {
    let largest = |tensor: &ArrayD<f64>| tensor.iter().fold(0.0, |largest: f64, entry| largest.max(entry.abs()));
    let of_all = expected.values().map(largest).fold(0.0, f64::max);
    let mut comparisons = Vec::new();
    for (name, expected) in expected {
        let what = format!("gradient of {name}");
        let absolute = GRADIENT_TOLERANCE * largest(expected).max(1e-3 * of_all);
        comparisons.push(match given.get(name).and_then(|given| in_shape(given, expected)) {
            Some(given) => Comparison::new(what, &given, expected, |_| false, Tolerance { absolute, relative: 0.0 }),
            None => Comparison::failed(what, "the model has none of this name and size"),
        });
    }
    for name in given.keys().filter(|name| !expected.contains_key(*name)) {
        comparisons.push(Comparison::failed(format!("gradient of {name}"), "is not in the file"));
    }
    comparisons
}

/// Files have some axes of length 1 more.
fn in_shape(given: &ArrayD<f32>, expected: &ArrayD<f64>) -> Option<ArrayD<f32>> {
    given.to_shape(IxDyn(expected.shape())).ok().map(|given| given.to_owned())
}

pub fn of_numbers(what: &str, given: &[f64], expected: &ArrayD<f64>, tolerance: Tolerance) -> Comparison {
    if given.len() != expected.len() {
        return Comparison::failed(what.into(), &format!("has shape {:?}", expected.shape()));
    }
    // differences in f64, against 0
    let differences: Vec<f32> = given.iter().zip(expected).map(|(given, expected)| (given - expected) as f32).collect();
    let zeros = ArrayD::zeros(IxDyn(&[given.len()]));
    Comparison::new(what.into(), &hymba::ndarray::arr1(&differences).into_dyn(), &zeros, |_| false, tolerance)
}

fn mean_of(what: &str, given: Option<&ArrayD<f32>>, expected: &ArrayD<f64>) -> Comparison {
    let Some(given) = given.and_then(|given| in_shape(given, expected)) else {
        return Comparison::failed(what.into(), "the model has none of this name and size");
    };
    let sum: f64 = given.iter().zip(expected).map(|(given, expected)| (f64::from(*given) - expected).abs()).sum();
    let mean = hymba::ndarray::arr0((sum / expected.len().max(1) as f64) as f32).into_dyn();
    Comparison::new(format!("{what}, mean"), &mean, &ArrayD::zeros(IxDyn(&[])), |_| false, WEIGHTS)
}

pub fn by_name(model: &impl Parameters) -> BTreeMap<String, ArrayD<f32>> {
    let mut all = BTreeMap::new();
    model.visit(&mut |name, array| {
        all.insert(name.to_string(), array.to_owned());
    });
    all
}
