//! The walk over all parameters, which loading, saving and counting share.

use ndarray::{ArrayViewD, ArrayViewMutD};

use crate::kernels::matrix::Matrix;

/// A parameter: a big matrix in the type it is stored in, or numbers in the order of the file.
pub(super) enum Parameter<'a> {
    Matrix(&'a Matrix),
    Numbers(ArrayViewD<'a, f32>),
}

/// As [`Parameter`], to be changed.
pub(super) enum ParameterMut<'a> {
    Matrix(&'a mut Matrix),
    Numbers(ArrayViewMutD<'a, f32>),
}

/// What is called with every parameter and its name in files.
pub(super) type Visitor<'f, 'a> = dyn FnMut(&str, Parameter<'a>) + 'f;
/// As [`Visitor`], for changing the parameters.
pub(super) type VisitorMut<'f, 'a> = dyn FnMut(&str, ParameterMut<'a>) + 'f;

impl Parameter<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Parameter::Matrix(matrix) => matrix.dim().0 * matrix.dim().1,
            Parameter::Numbers(numbers) => numbers.len(),
        }
    }
}

impl ParameterMut<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            ParameterMut::Matrix(matrix) => matrix.dim().0 * matrix.dim().1,
            ParameterMut::Numbers(numbers) => numbers.len(),
        }
    }
}
