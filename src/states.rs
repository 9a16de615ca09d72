//! States of sequences in files: both models save and load theirs so.

use std::io::Write;
use std::path::Path;

use ndarray::Array2;
use safetensors::Dtype;
use serde::Serialize;

use crate::files::Target;
use crate::files::float::Float;
use crate::files::saved::write_metadata;
use crate::files::tensors::{MAX_TENSORS, Tensors};
use crate::layers::{KvCache, KvStorage, LayerState, SequenceState, flat};
use crate::{Error, Result};

/// More rows than anybody feeds: positions in a file are not believed beyond it.
const MOST_ROWS: u64 = 1 << 40;

/// What a tensor of the file holds.
enum Part<'a> {
    Array(&'a Array2<f32>),
    Kv(&'a KvCache, &'static str),
}

/// The name of a tensor.
fn name(row: usize, layer: usize, what: &str) -> String {
    format!("rows.{row}.layers.{layer}.{what}")
}

/// The name of an array that a model keeps of a row besides its layers.
pub(crate) fn more_name(row: usize, what: &str) -> String {
    format!("rows.{row}.{what}")
}

/// Writes states, with `saved` in the metadata. It takes little memory besides them.
///
/// # Errors
///
/// [`Error::State`] if there are too many for a file; [`Error::Io`] when the file cannot be written; an old file is then untouched.
#[cfg(feature = "lm")]
pub(crate) fn write(path: &Path, saved: &impl Serialize, rows: &[SequenceState]) -> Result<()> {
    write_with(path, saved, rows, Vec::new())
}

/// As [`write`], with `more` arrays.
pub(crate) fn write_with(
    path: &Path,
    saved: &impl Serialize,
    rows: &[SequenceState],
    more: Vec<(String, &Array2<f32>)>,
) -> Result<()> {
    let mut tensors = Vec::new();
    let mut parts = Vec::new();
    for (name, array) in more {
        tensors.push((name, Dtype::F32, array.shape().to_vec()));
        parts.push((Float::F32, Part::Array(array)));
    }
    for (r, row) in rows.iter().enumerate() {
        for (l, layer) in row.layers.iter().enumerate() {
            let mamba = &layer.mamba;
            for (what, array) in [("conv", &mamba.conv), ("scan", &mamba.scan)] {
                tensors.push((name(r, l, what), Dtype::F32, array.shape().to_vec()));
                parts.push((Float::F32, Part::Array(array)));
            }
            if let Some(kv) = &layer.kv {
                let (heads, rows, key, value) = kv.dim_at(row.position);
                let (dtype, float) = types(kv.storage());
                for (what, width) in [("keys", key), ("values", value)] {
                    tensors.push((name(r, l, what), dtype, vec![heads, rows, width]));
                    parts.push((float, Part::Kv(kv, what)));
                }
            }
        }
    }
    if tensors.len() > MAX_TENSORS {
        return Err(Error::State(format!("it has {} rows, too many for one file; select some", rows.len())));
    }
    write_metadata(Target::File(path), saved, &tensors, &mut |i, file: &mut dyn Write| {
        let (float, part) = &parts[i];
        let (mut bytes, mut result) = (Vec::new(), Ok(()));
        let mut write = |numbers: &[f32]| {
            if result.is_ok() {
                bytes.clear();
                float.encode(numbers, &mut bytes);
                result = file.write_all(&bytes);
            }
        };
        match part {
            Part::Array(array) => array.rows().into_iter().for_each(|row| write(flat(&row))),
            Part::Kv(kv, what) => kv.write(what, &mut write),
        }
        result
    })
}

/// Reads the states at these `positions` that [`write`] wrote; `empty` makes one of which only the sizes matter, and which has seen
/// at least `least` rows when it is full.
///
/// # Errors
///
/// [`Error::Format`] when the file is damaged or hostile, [`Error::Tensors`] when it has other tensors than such states.
#[cfg(feature = "lm")]
pub(crate) fn read(
    tensors: &mut Tensors,
    positions: &[usize],
    least: usize,
    empty: &dyn Fn() -> Vec<LayerState>,
) -> Result<Vec<SequenceState>> {
    read_with(tensors, positions, least, empty, &[]).map(|(rows, _)| rows)
}

/// As [`read`], with `more` arrays of each row, of these shapes: see [`more_name`].
#[allow(clippy::type_complexity)]
pub(crate) fn read_with(
    tensors: &mut Tensors,
    positions: &[usize],
    least: usize,
    empty: &dyn Fn() -> Vec<LayerState>,
    more: &[(&str, (usize, usize))],
) -> Result<(Vec<SequenceState>, Vec<Vec<Array2<f32>>>)> {
    let layers = empty();
    let of_a_row: usize = layers.iter().map(|layer| if layer.kv.is_some() { 4 } else { 2 }).sum();
    // one row may be lacking tensors, which are then listed; for a great many the list would fill the memory
    if positions.len() > tensors.names().len().div_ceil(of_a_row)
        || positions.iter().any(|&position| position < least || position as u64 > MOST_ROWS)
    {
        return Err(tensors.error("its rows and their positions do not fit together"));
    }
    let mut places = Vec::new();
    for (r, &position) in positions.iter().enumerate() {
        places.extend(more.iter().map(|(what, dim)| (more_name(r, what), vec![dim.0, dim.1])));
        for (l, layer) in layers.iter().enumerate() {
            places.push((name(r, l, "conv"), layer.mamba.conv.shape().to_vec()));
            places.push((name(r, l, "scan"), layer.mamba.scan.shape().to_vec()));
            if let Some(kv) = &layer.kv {
                let (heads, rows, key, value) = kv.dim_at(position);
                places.push((name(r, l, "keys"), vec![heads, rows, key]));
                places.push((name(r, l, "values"), vec![heads, rows, value]));
            }
        }
    }
    tensors.check(&places.into_iter().collect(), Vec::new())?;

    let (mut rows, mut others) = (Vec::new(), Vec::new());
    for (r, &position) in positions.iter().enumerate() {
        let mut arrays = Vec::new();
        for (what, dim) in more {
            let mut array = Array2::zeros(*dim);
            tensors.read_into(&more_name(r, what), array.view_mut().into_dyn())?;
            arrays.push(array);
        }
        others.push(arrays);
        let mut row = SequenceState { position, layers: empty() };
        for (l, layer) in row.layers.iter_mut().enumerate() {
            tensors.read_into(&name(r, l, "conv"), layer.mamba.conv.view_mut().into_dyn())?;
            tensors.read_into(&name(r, l, "scan"), layer.mamba.scan.view_mut().into_dyn())?;
            if let Some(kv) = &mut layer.kv {
                kv.restore(position, &mut |what, take| tensors.read_numbers(&name(r, l, what), take))?;
            }
        }
        rows.push(row);
    }
    Ok((rows, others))
}

fn types(storage: KvStorage) -> (Dtype, Float) {
    match storage {
        KvStorage::F32 => (Dtype::F32, Float::F32),
        KvStorage::Bf16 => (Dtype::BF16, Float::BF16),
    }
}
