//! Formats of files, with every check of untrusted bytes. They know no model.

pub(crate) mod comparison;
pub(crate) mod float;
#[cfg(feature = "lm")]
pub(crate) mod folder;
pub(crate) mod header;
pub(crate) mod nx;
mod replace;
pub(crate) mod saved;
pub(crate) mod stored;
pub(crate) mod tensors;
mod write;

pub(crate) use replace::replace;
pub(crate) use write::Target;
#[cfg(all(test, feature = "lm"))]
pub(crate) use write::write_streamed;
