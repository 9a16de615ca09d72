//! NVIDIA's Hymba language model on any CPU.

mod attention;
mod block;
mod cache;
mod config;
#[cfg(feature = "tokenizer")]
mod converse;
mod files;
mod generate;
mod mamba;
mod model;
mod parameters;
mod pass;
mod rope;
mod sample;
mod state;
#[cfg(feature = "tokenizer")]
mod text;

pub use config::{HymbaLmConfig, KeyQueryNorm, MlpActivation, RopeType, TorchDtype};
