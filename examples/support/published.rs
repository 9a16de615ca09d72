//! How the published code of the language model lays out its tokens and its caches.

#![allow(dead_code, reason = "each example uses a part of this file")]

use hymba::ndarray::{Array2, ArrayD, Axis, Ix2};

use crate::tensors::Tensors;

/// Tokens of rows of perhaps different lengths, as they stand in the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The real tokens of each row.
    pub rows: Vec<Vec<u32>>,
    /// `[b, n]`: where those stand.
    pub real: Array2<bool>,
}

impl Prompt {
    /// Reads `input_ids [b, n]` and, where rows are padded, `attention_mask [b, n]` (ones at the real tokens, which may be at
    /// either end) or `lengths [b]` (of rows with the padding behind them).
    pub fn new(expected: &Tensors) -> Result<Prompt, String> {
        let ids = matrix(expected, "input_ids")?.ok_or("there is no tensor input_ids")?;
        let (b, n) = ids.dim();
        if b == 0 || n == 0 {
            return Err(format!("input_ids has shape [{b}, {n}], and no tokens"));
        }
        let mut real = Array2::from_elem((b, n), true);
        if let Some(lengths) = expected.get("lengths") {
            let fits = |&length: &f64| length.fract() == 0.0 && (1.0..=n as f64).contains(&length);
            if lengths.shape() != [b] || !lengths.iter().all(fits) {
                return Err(format!("input_ids has shape [{b}, {n}], which does not go with lengths {lengths}"));
            }
            real = Array2::from_shape_fn((b, n), |(row, place)| (place as f64) < lengths[row]);
        }
        if let Some(mask) = matrix(expected, "attention_mask")? {
            if mask.dim() != (b, n) || !mask.iter().all(|&mark| mark == 0.0 || mark == 1.0) {
                return Err(format!("attention_mask must be zeros and ones of shape [{b}, {n}], as input_ids has"));
            }
            let mask = mask.mapv(|mark| mark == 1.0);
            // the mask knows on which side the padding is
            let count = |real: &Array2<bool>| real.map_axis(Axis(1), |row| row.iter().filter(|real| **real).count());
            if expected.contains_key("lengths") && count(&mask) != count(&real) {
                return Err("attention_mask and lengths do not agree".into());
            }
            real = mask;
        }
        for (row, real) in real.rows().into_iter().enumerate() {
            // a padding in the middle would be a gap in the text
            let runs = real.to_vec().chunk_by(|a, b| a == b).filter(|run| run[0]).count();
            if runs != 1 {
                return Err(format!("attention_mask has {runs} runs of real tokens in row {row}, not one"));
            }
        }
        let rows = ids.rows().into_iter().zip(real.rows());
        let rows = rows
            .map(|(ids, real)| ids.iter().zip(real).filter(|(_, real)| **real).map(|(&value, _)| id(value)).collect());
        let rows = rows.collect::<Result<_, _>>().map_err(|fault: String| format!("input_ids: {fault}"))?;
        Ok(Prompt { rows, real })
    }

    /// Whether some of the tokens are padding.
    pub fn is_padded(&self) -> bool {
        self.real.iter().any(|real| !real)
    }

    /// Where the last real token of a row stands.
    pub fn last(&self, row: usize) -> usize {
        self.real.row(row).iter().rposition(|real| *real).unwrap_or(0)
    }

    /// Where the real tokens of a row stand.
    pub fn places(&self, row: usize) -> impl Iterator<Item = usize> {
        self.real.row(row).into_iter().enumerate().filter(|(_, real)| **real).map(|(place, _)| place)
    }
}

/// The ids `[b, s]` of a tensor, if it is there.
pub fn ids(expected: &Tensors, name: &str) -> Result<Option<Array2<u32>>, String> {
    let Some(values) = matrix(expected, name)? else {
        return Ok(None);
    };
    let ids = values.iter().map(|&value| id(value)).collect::<Result<_, _>>();
    let ids = Array2::from_shape_vec(values.dim(), ids.map_err(|fault| format!("{name}: {fault}"))?);
    ids.map(Some).map_err(|error| format!("{name}: {error}"))
}

fn id(value: f64) -> Result<u32, String> {
    if value.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&value) {
        Ok(value as u32)
    } else {
        Err(format!("{value} is not the id of a token"))
    }
}

fn matrix(expected: &Tensors, name: &str) -> Result<Option<Array2<f64>>, String> {
    let Some(values) = expected.get(name) else {
        return Ok(None);
    };
    match values.clone().into_dimensionality::<Ix2>() {
        Ok(values) => Ok(Some(values)),
        Err(_) => Err(format!("{name} must have two axes, its shape is {:?}", values.shape())),
    }
}

/// Whether what the published code decodes at step `step` after a prompt of `length` tokens can be compared. Its decoding sees
/// one token less than its prompts, so from the step on at which that makes a difference it goes another way. Step 0 is the end
/// of the prompt.
pub fn is_within(window: Option<usize>, length: usize, step: usize) -> bool {
    step == 0 || window.is_none_or(|window| length + step <= window)
}

/// The rows of a published cache of keys or values `[heads, rows, width]` that this crate has too, in its order: those of the
/// `meta` tokens and the last `count` others. `real` tells of every token seen, without the meta tokens, whether it is more than
/// padding. A published cache holds the rows of all of them, or where it was trimmed of the last ones.
pub fn cached_rows(cache: &ArrayD<f64>, meta: usize, real: &[bool], count: usize) -> Result<ArrayD<f64>, String> {
    let &[_, rows, _] = cache.shape() else {
        return Err(format!("has shape {:?} in a row of the batch, not three axes", cache.shape()));
    };
    let seen = meta + real.len();
    let first = rows.checked_sub(meta).and_then(|others| real.len().checked_sub(others));
    let places: Vec<usize> = match first {
        Some(first) => (first..real.len()).filter(|&token| real[token]).map(|token| meta + token - first).collect(),
        None => return Err(format!("has {rows} tokens, expected {meta} meta tokens and others, {seen} at most")),
    };
    match places.len().checked_sub(count) {
        Some(older) => Ok(cache.select(Axis(1), &[(0..meta).collect(), places[older..].to_vec()].concat())),
        None => Err(format!("has {} tokens besides {meta} meta tokens, expected {count} at least", places.len())),
    }
}

/// The last `count` of the inputs `[E, K]` that a published cache keeps for the convolution, in the order of this crate:
/// `[count, E]`.
pub fn cached_inputs(cache: &ArrayD<f64>, taps: usize, count: usize) -> Result<ArrayD<f64>, String> {
    match *cache.shape() {
        [_, kept] if kept == taps && count <= kept => {
            let places: Vec<usize> = (kept - count..kept).collect();
            Ok(cache.select(Axis(1), &places).reversed_axes())
        }
        _ => Err(format!("has shape {:?} in a row of the batch, expected [E, {taps}]", cache.shape())),
    }
}
