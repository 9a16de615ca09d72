//! Arrays that come from users and go to them: as large as they like, or an error.

use ndarray::{Array, ArrayRef2, Dimension, IntoDimension};

use crate::{Error, Result};

/// b and l of ids `[b, l]`.
pub(super) fn dim_of(ids: &ArrayRef2<u32>) -> Result<(usize, usize)> {
    match ids.dim() {
        (batch, l) if batch == 0 || l == 0 => {
            Err(Error::Tokens(format!("an array of shape [{batch}, {l}] has none; both must be at least 1")))
        }
        dim => Ok(dim),
    }
}

/// The rows of ids `[b, l]`, which are copied if they do not lie in memory one after the other.
pub(super) fn rows_of<'a>(ids: &'a ArrayRef2<u32>, copy: &'a mut Vec<u32>) -> Result<Vec<&'a [u32]>> {
    let (batch, l) = dim_of(ids)?;
    let does_not_fit = |_| Error::Tokens(format!("ids of shape [{batch}, {l}] do not fit into memory"));
    let ids = match ids.as_slice() {
        Some(ids) => ids,
        None => {
            copy.try_reserve_exact(ids.len()).map_err(does_not_fit)?;
            copy.extend(ids);
            copy
        }
    };
    let mut rows = Vec::new();
    rows.try_reserve_exact(batch).map_err(does_not_fit)?;
    rows.extend(ids.chunks_exact(l));
    Ok(rows)
}

/// Zeros, if there is room for them.
pub(super) fn zeros<D: Dimension>(shape: impl IntoDimension<Dim = D>, what: &str) -> Result<Array<f32, D>> {
    let shape = shape.into_dimension();
    let mut numbers = Vec::new();
    match shape.size_checked().filter(|&count| numbers.try_reserve_exact(count).is_ok()) {
        Some(count) => {
            numbers.resize(count, 0.0);
            Ok(Array::from_shape_vec(shape, numbers).expect("as many numbers as the shape has"))
        }
        None => Err(Error::Tokens(format!(
            "{what} of shape {:?} do not fit into memory; give fewer tokens at a time",
            shape.slice()
        ))),
    }
}
