//! What using the crate as a stranger brought to light: every fault once found has its smallest input here, with the right answer.

#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "lm")]
#[path = "../common/tiny_lm.rs"]
mod tiny_lm;

mod encoder;
#[cfg(feature = "lm")]
mod folders;
#[cfg(feature = "lm")]
mod generation;
mod series;
#[cfg(feature = "tokenizer")]
mod text;
#[cfg(feature = "lm")]
mod threads;
mod training;
