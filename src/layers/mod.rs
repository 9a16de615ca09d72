//! The layers: one file each, read top to bottom: struct, `zeros` and `init`, `forward`, `forward_train`, `backward`, `step`,
//! `visit`, tests.
//!
//! The contract. Activations are `[rows, width]`, a batch's sequences one after the other. `forward` keeps nothing and equals
//! what `forward_train` returns beside a cache, which holds what `backward` reads and nothing else. `backward` turns the
//! gradient of the output into that of the input and *adds* those of the parameters to `grad`, a further value of the layer's
//! own type. `step`, folded over frames, equals `forward`. `visit` and `visit_mut` walk the parameters in a fixed order under the names they
//! have in files, and that one walk serves saving, loading, counting and the summary. Layers trust their shapes: what the
//! user gives is checked once, at the model's door.

mod attention;
mod buffer;
mod conv;
mod dropout;
mod ffn;
mod gate;
mod linear;
mod mamba;
mod norm;
mod scan;

use std::sync::OnceLock;

use ndarray::{ArrayBase, ArrayViewD, ArrayViewMutD, Data, Dimension};

pub use attention::MetaTokenAttention;
pub(crate) use attention::{AttentionCache, AttentionState, init_meta_tokens};
pub(crate) use buffer::Buffer;
pub(crate) use conv::CausalConv;
pub(crate) use dropout::dropout;
pub(crate) use ffn::FeedForward;
pub(crate) use gate::Gate;
pub(crate) use linear::Linear;
pub use mamba::MambaBranch;
pub(crate) use mamba::{MambaCache, MambaState};
pub(crate) use norm::LayerNorm;
#[cfg(feature = "lm")]
pub(crate) use scan::ScanRows;
pub(crate) use scan::{SelectiveScan, TimeStep};

/// What is called with every parameter and its name in files.
pub(crate) type Visitor<'f, 'a> = dyn FnMut(&str, ArrayViewD<'a, f32>) + 'f;
/// As [`Visitor`], for changing the parameters.
pub(crate) type VisitorMut<'f, 'a> = dyn FnMut(&str, ArrayViewMutD<'a, f32>) + 'f;

/// The generator behind every `seed` of this crate: ChaCha with 8 rounds, the same numbers on every platform.
pub(crate) type Rng = rand::rngs::ChaCha8Rng;

/// Something computed from the parameters when first needed and kept until they change.
pub(crate) struct Derived<T>(OnceLock<T>);

impl<T> Derived<T> {
    pub(crate) const fn new() -> Self {
        Derived(OnceLock::new())
    }

    /// Two threads that need it at the same time may both compute it, and one result is kept. Waiting for the other instead
    /// could deadlock: a thread that computes may have to take up another task in between, and that task may wait for it.
    pub(crate) fn get(&self, compute: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.0.get() {
            return value;
        }
        let value = compute();
        self.0.get_or_init(|| value)
    }

    /// To be called wherever parameters are lent out for changing.
    pub(crate) fn forget(&mut self) {
        self.0 = OnceLock::new();
    }
}

/// A clone computes its own.
impl<T> Clone for Derived<T> {
    fn clone(&self) -> Self {
        Derived::new()
    }
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

/// The numbers of an array in row-major order. The arrays that layers pass to each other and keep all lie in memory that
/// way.
pub(crate) fn flat<S: Data<Elem = f32>, D: Dimension>(array: &ArrayBase<S, D>) -> &[f32] {
    array.as_slice().expect("arrays inside the model are in standard layout")
}

/// As [`flat`], for writing.
pub(crate) fn flat_mut<D: Dimension>(array: &mut ndarray::Array<f32, D>) -> &mut [f32] {
    array.as_slice_mut().expect("arrays inside the model are in standard layout")
}

/// `name` under `prefix`: `blocks.0` and `norm` give `blocks.0.norm`.
pub(crate) fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}
