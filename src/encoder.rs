//! The encoder: sequences of frames in, vectors out.

mod block;
mod blocks;
mod edifice;
mod fed;
mod feed_forward;
mod files;
mod fingerprint;
mod memory;
mod model;
mod options;
mod parts;
mod pattern;
mod serial;
mod shared;
mod size;
mod storage;
mod streaming;
mod summary;
mod training;
mod variant;

pub(crate) use block::sequences;
pub use block::{BlockInspection, HymbaBlock};
pub use blocks::Block;
pub use fed::FedBlock;
pub(crate) use fingerprint::of_numbers;
pub use model::{Hymba, Inspection};
pub use options::HymbaOptions;
pub use pattern::Pattern;
pub use serial::SerialBlock;
pub use shared::SharedBlock;
pub(crate) use size::{Keeps, check_fits, check_lengths, check_size, first_storage, fits};
pub use streaming::HymbaState;
pub(crate) use streaming::no_such_row;
pub use training::TrainCache;
pub(crate) use training::{frames, padded};
pub use variant::Variant;
