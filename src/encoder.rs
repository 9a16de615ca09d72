//! The encoder: sequences of frames in, vectors out.

mod block;
mod edifice;
mod files;
mod fingerprint;
mod memory;
mod model;
mod options;
mod streaming;
mod summary;
mod training;
mod variant;

pub(crate) use block::sequences;
pub use block::{BlockInspection, HymbaBlock};
pub(crate) use fingerprint::of_numbers;
pub(crate) use memory::{Keeps, check_size, fits};
pub(crate) use model::check_lengths;
pub use model::{Hymba, Inspection};
pub use options::{HymbaOptions, Variant};
pub use streaming::HymbaState;
pub(crate) use streaming::no_such_row;
pub use training::TrainCache;
pub(crate) use training::{frames, padded};
