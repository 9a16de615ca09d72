//! The layers of both models, one file each (attention: a folder), to be read from top to bottom: struct, `zeros` and
//! `init`, `forward`, `forward_train`, `backward`, `visit`, and in some files tests.
//!
//! The contract. Activations are `[rows, width]`, the sequences of a [`Batch`] one after the other; what a sequence remembers
//! stands beside them in its state, so that the same `forward` reads a whole sequence, a piece of one, or the next frame.
//! `forward` keeps nothing else and equals what `forward_train` returns beside a cache, which holds what `backward` reads and
//! nothing else. `backward` turns the gradient of the output into that of the input and *adds* those of the parameters to `grad`, a
//! further value of the layer's own type, in which a weight that cannot be trained is empty. `visit` and `visit_mut` walk the
//! parameters. Layers trust their shapes: what the user gives is checked once, at the model's door.

mod attention;
mod batch;
mod buffer;
mod conv;
mod dropout;
#[cfg(feature = "lm")]
mod embedding;
mod gate;
mod kv_cache;
mod layer_norm;
mod lazy;
mod linear;
mod low_rank;
mod mamba;
mod mlp;
mod pooling;
mod rms_norm;
mod rope;
mod scan;
mod shared_kv;
mod state;
mod stem;
mod weight;

use ndarray::{ArrayBase, Data, Dimension, Ix2};

use crate::kernels::rows::Rows;

#[cfg(feature = "lm")]
pub(crate) use attention::HeadNorms;
pub use attention::MetaTokenAttention;
pub(crate) use attention::{AttentionCache, AttentionConfig, Depth, init_meta_tokens};
pub(crate) use batch::{Batch, Ends, Spans, add_array, copied, needed};
pub(crate) use buffer::Buffer;
pub(crate) use dropout::{Dropout, row_seeds, seed_at};
#[cfg(feature = "lm")]
pub(crate) use embedding::Embedding;
pub(crate) use gate::Gate;
pub use kv_cache::KvStorage;
pub(crate) use kv_cache::{KvCache, KvShape};
pub(crate) use layer_norm::LayerNorm;
pub(crate) use lazy::Lazy;
pub(crate) use linear::Linear;
pub(crate) use low_rank::{LORA_NAMES, LowRank};
#[cfg(feature = "lm")]
pub(crate) use mamba::InnerCache;
pub use mamba::MambaBranch;
pub(crate) use mamba::{MambaCache, MambaConfig};
pub(crate) use mlp::{Activation, Mlp, MlpCache};
pub use pooling::Pooling;
pub(crate) use pooling::{Pool, PoolCache, PoolState};
#[cfg(feature = "lm")]
pub(crate) use rms_norm::RmsNorm;
#[cfg(feature = "lm")]
pub(crate) use rope::{Angles, Rotary};
pub(crate) use scan::TimeStep;
#[cfg(feature = "lm")]
pub(crate) use shared_kv::SharedKv;
pub(crate) use state::{LayerState, SequenceState, StateGradient};
pub use stem::Stem;
pub(crate) use stem::{StemCache, StridedConv};
pub(crate) use weight::{Across, Weight};

/// The generator behind every `seed` of this crate: ChaCha with 8 rounds, the same numbers on every platform.
pub(crate) type Rng = rand::rngs::ChaCha8Rng;

/// An array as rows for the kernels.
pub(crate) fn all_rows<S: Data<Elem = f32>>(array: &ArrayBase<S, Ix2>) -> Rows<'_> {
    Rows { data: flat(array), stride: array.ncols() }
}

/// The numbers of an array in row-major order. The arrays that layers pass to each other and keep all lie in memory that
/// way.
pub(crate) fn flat<S: Data<Elem = f32>, D: Dimension>(array: &ArrayBase<S, D>) -> &[f32] {
    array.as_slice().expect("arrays inside the model are in standard layout")
}

/// As [`flat`], for writing.
pub(crate) fn flat_mut<D: Dimension>(array: &mut ndarray::Array<f32, D>) -> &mut [f32] {
    array.as_slice_mut().expect("arrays inside the model are in standard layout")
}
