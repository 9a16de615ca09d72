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
mod state_file;
#[cfg(feature = "tokenizer")]
mod text;

pub use cache::KvStorage;
pub use config::{HymbaLmConfig, KeyQueryNorm, MlpActivation, RopeType, TorchDtype};
#[cfg(feature = "tokenizer")]
pub use converse::{Chat, TextGeneration};
pub use files::{LoadOptions, Loading};
pub use generate::{FinishReason, Generation, LogLikelihood};
pub use model::{HymbaLm, LmInspection};
pub use sample::{Choice, GenerateOptions, Sampler};
pub use state::{LmLayerState, LmState};
#[cfg(feature = "tokenizer")]
pub use text::{ChatOptions, ChatTemplate, Message, Role, StopMatcher, TextStream, Tokenizer};
