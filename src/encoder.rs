//! The encoder: sequences of frames in, vectors out.

mod block;
mod edifice;
mod files;
mod fingerprint;
mod memory;
mod model;
mod options;
mod storage;
mod streaming;
mod summary;
mod training;
mod variant;

pub(crate) use block::sequences;
pub use block::{BlockInspection, HymbaBlock};
pub(crate) use fingerprint::of_numbers;
pub(crate) use memory::{Keeps, check_fits, check_size};
pub(crate) use model::check_lengths;
pub use model::{Hymba, Inspection};
pub use options::{HymbaOptions, Variant};
pub(crate) use storage::first_storage;
pub use streaming::HymbaState;
pub use training::TrainCache;
