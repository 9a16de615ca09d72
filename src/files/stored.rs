//! Parameters in files, in the type they are stored in.
//!
//! A matrix is a tensor of its type. In 8 or 4 bits, with b = ⌈k / 32⌉ blocks of weights in a row, `NAME` `[n, k]` is two:
//!
//! | tensor | type and shape | |
//! |---|---|---|
//! | `NAME` in 8 bits | U8 `[n, 32·b]` | the integers, with 128 added |
//! | `NAME` in 4 bits | U8 `[n, 16·b]` | the integers, with 8 added, two in a byte, the first in the low bits |
//! | `NAME_scale` | BF16 `[n, b]` | the scale of each block, by which its integers are multiplied |

use std::io::{self, Write};

use safetensors::Dtype;

use super::float::Float;
use super::tensors::{Kind, Tensors};
use super::write::{Target, write_streamed};
use crate::Result;
use crate::kernels::matmul::{BLOCK, Matrix, Storage};
use crate::parameters::{Parameter, ParameterMut, StoredMatrix};

/// The name of the scales of a matrix.
pub(crate) fn scales_of(name: &str) -> String {
    format!("{name}_scale")
}

/// The tensors that hold a parameter of this name and shape: itself or, of a matrix in 8 or 4 bits, its scales and its bytes.
pub(crate) fn tensors(name: String, shape: Vec<usize>, storage: Option<Storage>) -> Vec<(String, Vec<usize>, Kind)> {
    match (storage.and_then(block_bytes), &shape[..]) {
        (Some(bytes), &[n, k]) => {
            let blocks = k.div_ceil(BLOCK);
            vec![(scales_of(&name), vec![n, blocks], Kind::Float), (name, vec![n, blocks * bytes], Kind::Bytes)]
        }
        _ => vec![(name, shape, Kind::Float)],
    }
}

/// Bytes of the integers of a block; `None` for types of float.
fn block_bytes(storage: Storage) -> Option<usize> {
    match storage {
        Storage::F32 | Storage::F16 | Storage::Bf16 => None,
        Storage::Q8 => Some(BLOCK),
        Storage::Q4 => Some(BLOCK / 2),
    }
}

/// One file with tensors, or several.
pub(crate) trait Files<'a> {
    /// The file that has the tensor of this name.
    fn holding(&mut self, name: &str) -> Result<&mut Tensors<'a>>;
}

impl<'a> Files<'a> for Tensors<'a> {
    fn holding(&mut self, _name: &str) -> Result<&mut Tensors<'a>> {
        Ok(self)
    }
}

/// Reads a parameter, whose tensors were checked; matrices are in the files as `in_files` says.
pub(crate) fn read<'a>(
    files: &mut impl Files<'a>,
    name: &str,
    parameter: ParameterMut,
    in_files: Option<Storage>,
) -> Result<()> {
    match parameter {
        ParameterMut::Stored(matrix) if in_files.and_then(block_bytes).is_some() => {
            let Some(quantized) = matrix.quantized_mut() else { return Ok(()) };
            let scales = scales_of(name);
            files.holding(&scales)?.read_rows(&scales, &mut |row, scales| quantized.set_scales(row, scales))?;
            files.holding(name)?.read_byte_rows(name, &mut |row, bytes| quantized.set_bytes(row, bytes))
        }
        ParameterMut::Stored(matrix) => {
            files.holding(name)?.read_rows(name, &mut |row, numbers| matrix.set_row(row, numbers))
        }
        ParameterMut::Array(array) => files.holding(name)?.read_into(name, array),
    }
}

/// Writes a safetensors file of parameters, given by name and the shape they have in files, with `metadata` in its header.
pub(crate) fn write(
    target: Target,
    metadata: &[(&str, &str)],
    parameters: &[(String, Vec<usize>, Parameter<'_>)],
) -> Result<()> {
    let (mut infos, mut parts) = (Vec::new(), Vec::new());
    for (name, shape, parameter) in parameters {
        for (part, shape, _) in tensors(name.clone(), shape.clone(), parameter.storage()) {
            let scales = part != *name;
            infos.push((part, dtype(parameter, scales), shape));
            parts.push((parameter, scales));
        }
    }
    write_streamed(target, &infos, metadata, &mut |i, file| {
        let (parameter, scales) = parts[i];
        write_numbers(parameter, scales, file)
    })
}

/// Writes the numbers of a parameter, a row or so at a time, or the scales of a matrix.
fn write_numbers(parameter: &Parameter, scales: bool, file: &mut dyn Write) -> io::Result<()> {
    const PIECE: usize = 1 << 16;
    let mut bytes = Vec::new();
    match parameter {
        Parameter::Stored(StoredMatrix(matrix)) => {
            let (rows, columns) = matrix.dim();
            let mut numbers = vec![0.0; columns];
            for row in 0..rows {
                match matrix.quantized() {
                    Some(quantized) if scales => {
                        numbers.clear();
                        quantized.scales(row, &mut numbers);
                        Float::BF16.encode(&numbers, &mut bytes);
                    }
                    Some(quantized) => quantized.bytes(row, &mut bytes),
                    None => {
                        matrix.row(row, &mut numbers);
                        float(matrix).encode(&numbers, &mut bytes);
                    }
                }
                file.write_all(&bytes)?;
                bytes.clear();
            }
        }
        Parameter::Array(array) => {
            for number in array {
                bytes.extend(number.to_le_bytes());
                if bytes.len() == PIECE {
                    file.write_all(&bytes)?;
                    bytes.clear();
                }
            }
            file.write_all(&bytes)?;
        }
    }
    Ok(())
}

/// The type of a matrix, or of its scales, in files.
fn float(matrix: &Matrix) -> Float {
    match matrix.storage() {
        Storage::F32 => Float::F32,
        Storage::F16 => Float::F16,
        Storage::Bf16 | Storage::Q8 | Storage::Q4 => Float::BF16,
    }
}

/// The type of a parameter in files, or that of its scales.
fn dtype(parameter: &Parameter, scales: bool) -> Dtype {
    match parameter {
        Parameter::Array(_) => Dtype::F32,
        Parameter::Stored(StoredMatrix(matrix)) if matrix.quantized().is_some() && !scales => Dtype::U8,
        Parameter::Stored(StoredMatrix(matrix)) => match float(matrix) {
            Float::F32 | Float::F64 => Dtype::F32,
            Float::F16 => Dtype::F16,
            Float::BF16 => Dtype::BF16,
        },
    }
}
