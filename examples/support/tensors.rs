//! Reads a safetensors file into named arrays of `f64`, in which every `f32` and every small integer is exact, and writes one.

#![allow(dead_code, reason = "each example uses a part of this file")]

use std::collections::BTreeMap;
use std::path::Path;

use hymba::ndarray::{Array, ArrayD, Dimension};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// The tensors of a file by name.
pub type Tensors = BTreeMap<String, ArrayD<f64>>;

/// The names of the tensors of a file, in alphabetical order.
pub fn names(path: &Path) -> Result<Vec<String>, String> {
    let bytes = bytes(path)?;
    let mut names: Vec<String> = parse(path, &bytes)?.names().into_iter().map(str::to_string).collect();
    names.sort();
    Ok(names)
}

/// Reads all tensors of a file. The bytes may stand at any alignment.
pub fn read(path: &Path) -> Result<Tensors, String> {
    let fault = |reason: String| format!("{}: {reason}", path.display());
    let bytes = bytes(path)?;
    let mut tensors = Tensors::new();
    for (name, tensor) in parse(path, &bytes)?.iter() {
        let values = match tensor.dtype() {
            Dtype::F32 => numbers(tensor.data(), |bytes| f32::from_le_bytes(bytes).into()),
            Dtype::F64 => numbers(tensor.data(), f64::from_le_bytes),
            // half of an f32
            Dtype::BF16 => numbers(tensor.data(), |[low, high]| f32::from_le_bytes([0, 0, low, high]).into()),
            Dtype::I64 => numbers(tensor.data(), |bytes| i64::from_le_bytes(bytes) as f64),
            Dtype::I32 => numbers(tensor.data(), |bytes| i32::from_le_bytes(bytes).into()),
            Dtype::U8 | Dtype::BOOL => numbers(tensor.data(), |[byte]| byte.into()),
            other => return Err(fault(format!("{name} is {other:?}; write it as F32, F64 or I64"))),
        };
        let array =
            ArrayD::from_shape_vec(tensor.shape(), values).map_err(|error| fault(format!("{name}: {error}")))?;
        tensors.insert(name.to_string(), array);
    }
    Ok(tensors)
}

/// Writes tensors to a file, as F64.
pub fn write(path: &Path, tensors: &Tensors) -> Result<(), String> {
    let fault = |reason: String| format!("{}: {reason}", path.display());
    let bytes: Vec<Vec<u8>> =
        tensors.values().map(|tensor| tensor.iter().flat_map(|number| number.to_le_bytes()).collect()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for ((name, tensor), bytes) in tensors.iter().zip(&bytes) {
        let view = TensorView::new(Dtype::F64, tensor.shape().to_vec(), bytes);
        views.push((name, view.map_err(|error| fault(format!("{name}: {error}")))?));
    }
    let file = safetensors::serialize(views, None).map_err(|error| fault(error.to_string()))?;
    std::fs::write(path, file).map_err(|error| fault(error.to_string()))
}

fn bytes(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>, String> {
    SafeTensors::deserialize(bytes).map_err(|error| format!("{}: not a safetensors file: {error}", path.display()))
}

fn numbers<const N: usize>(data: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    data.as_chunks::<N>().0.iter().map(|&bytes| number(bytes)).collect()
}

/// The tensor called `name`, in `f32` and with the number of axes asked for.
pub fn get<D: Dimension>(tensors: &Tensors, name: &str) -> Result<Array<f32, D>, String> {
    let tensor = tensors.get(name).ok_or_else(|| format!("there is no tensor {name}"))?;
    let array = tensor.mapv(|value| value as f32).into_dimensionality::<D>();
    array.map_err(|_| format!("{name} has the wrong number of axes: its shape is {:?}", tensor.shape()))
}
