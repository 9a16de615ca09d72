//! NVIDIA's Hymba language model on any CPU.

mod config;
mod sample;
#[cfg(feature = "tokenizer")]
mod text;
