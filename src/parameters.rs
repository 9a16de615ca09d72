//! The one walk over parameters: saving, loading, counting, the summary and the optimiser use it.
//!
//! Every layer has `visit` and `visit_mut`, which call a visitor with each of its parameters under the name it has in files, in a
//! fixed order.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{ArrayViewD, ArrayViewMutD};

use crate::kernels::matmul::{Matrix, Storage};

/// A parameter of a model, borrowed in the form in which it is stored.
#[derive(Debug)]
#[non_exhaustive]
pub enum Parameter<'a> {
    /// Numbers that can be trained, in the shape they have in files.
    Array(ArrayViewD<'a, f32>),
    /// A matrix in the order in which products read it, maybe narrower than `f32`.
    Stored(StoredMatrix<'a>),
}

/// As [`Parameter`], to be changed.
pub(crate) enum ParameterMut<'a> {
    Array(ArrayViewMutD<'a, f32>),
    Stored(&'a mut Matrix),
}

/// A matrix `[out, in]` that is stored for products only.
#[derive(Clone, Copy)]
pub struct StoredMatrix<'a>(pub(crate) &'a Matrix);

/// Called with every parameter and its name in files.
pub(crate) type Visitor<'f, 'a> = dyn FnMut(&str, Parameter<'a>) + 'f;
/// As [`Visitor`], for changing the parameters.
pub(crate) type VisitorMut<'f, 'a> = dyn FnMut(&str, ParameterMut<'a>) + 'f;

impl Parameter<'_> {
    /// The shape, as in files.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Parameter::Array(array) => array.shape().to_vec(),
            Parameter::Stored(matrix) => matrix.shape().to_vec(),
        }
    }

    /// How many numbers it has.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether it has no numbers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type it is stored in, if it is stored for products only.
    pub fn storage(&self) -> Option<Storage> {
        match self {
            Parameter::Array(_) => None,
            Parameter::Stored(matrix) => Some(matrix.storage()),
        }
    }

    /// Bytes of memory it takes. (Of matrices that can be trained, products make a packed copy besides.)
    pub fn num_bytes(&self) -> usize {
        match self {
            Parameter::Array(array) => array.len() * size_of::<f32>(),
            Parameter::Stored(matrix) => matrix.0.num_bytes(),
        }
    }
}

impl StoredMatrix<'_> {
    /// `[out, in]`
    pub fn shape(&self) -> [usize; 2] {
        let (outputs, inputs) = self.0.dim();
        [outputs, inputs]
    }

    /// The type its weights are stored in.
    pub fn storage(&self) -> Storage {
        self.0.storage()
    }

    /// Bits per weight: 32, 16, 8 or 4. (In 8 and 4 bits, every 32 weights share a scale of 16 bits besides.)
    pub fn bits(&self) -> usize {
        match self.0.storage() {
            Storage::F32 => 32,
            Storage::F16 | Storage::Bf16 => 16,
            Storage::Q8 => 8,
            Storage::Q4 => 4,
        }
    }

    /// The weights of one output `[in]`, widened.
    ///
    /// # Panics
    ///
    /// If there is no such output.
    pub fn row(&self, output: usize) -> Vec<f32> {
        let (outputs, inputs) = self.0.dim();
        assert!(output < outputs, "output {output} of {outputs}");
        let mut numbers = vec![0.0; inputs];
        self.0.row(output, &mut numbers);
        numbers
    }
}

impl fmt::Debug for StoredMatrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredMatrix").field("shape", &self.shape()).field("bits", &self.bits()).finish()
    }
}

impl ParameterMut<'_> {
    #[cfg(feature = "lm")]
    pub(crate) fn len(&self) -> usize {
        match self {
            ParameterMut::Array(array) => array.len(),
            ParameterMut::Stored(matrix) => matrix.dim().0 * matrix.dim().1,
        }
    }
}

/// `name` under `prefix`: `blocks.0` and `norm` give `blocks.0.norm`.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// Whether `name` is `pattern` with some text in place of each `*`.
pub(crate) fn fits(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        // the first place is the best: it leaves the most for what follows
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(end)
}

/// A number for a set of weights, which no other has in this process.
pub(crate) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// `Debug` of a layer: the names and shapes of its parameters, not their numbers.
macro_rules! debug_shapes {
    ($layer:ident) => {
        impl std::fmt::Debug for $layer {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!(stringify!($layer), " "))?;
                let mut map = f.debug_map();
                self.visit("", &mut |name, parameter| {
                    map.entry(&name, &parameter.shape());
                });
                map.finish()
            }
        }
    };
}
pub(crate) use debug_shapes;
