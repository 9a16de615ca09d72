//! NVIDIA's Hymba language model on any CPU: Hymba-1.5B, base and instruct, and any size of the same architecture.
//!
//! | to | call |
//! |---|---|
//! | read a folder of the Hugging Face Hub | [`HymbaLm::from_dir`], [`HymbaLm::from_dir_with`] and [`LoadOptions`] |
//! | keep a model in one piece | [`HymbaLm::to_bytes`], [`write_to`](HymbaLm::write_to), [`from_bytes`](HymbaLm::from_bytes), [`read_from`](HymbaLm::read_from) |
//! | continue a text | [`HymbaLm::generate_text`] with a [`Tokenizer`] (feature `tokenizer`) |
//! | hold a conversation | [`Chat`] (feature `tokenizer`) |
//! | continue token ids | [`HymbaLm::generate`]; many prompts together: [`HymbaLm::generate_batch`] |
//! | run your own loop | [`HymbaLm::new_state`], [`prefill`](HymbaLm::prefill), [`step`](HymbaLm::step), and a [`Sampler`] |
//! | fork, save, continue | `state.clone()`, [`HymbaLm::save_state`], [`HymbaLm::load_state`] |
//! | score | [`HymbaLm::log_likelihood`] |
//! | fine-tune | [`HymbaLm::add_lora`], [`load_lora`](HymbaLm::load_lora), [`save_lora`](HymbaLm::save_lora), [`merge_lora`](HymbaLm::merge_lora); of several adapters one at a time: [`set_lora`](HymbaLm::set_lora) |
//! | train | [`HymbaLm::build`] or [`LoadOptions::trainable`], [`LmTrainer`](crate::train::LmTrainer); or by hand: [`HymbaLm::forward_train`], [`backward`](HymbaLm::backward), [`AdamW`](crate::train::AdamW) |
//! | compare with other implementations | [`HymbaLm::forward`], [`inspect`](HymbaLm::inspect), [`LmState::layer`] |
//!
//! Every layer runs attention and Mamba side by side between two shared projections. With the letters of the published
//! configuration (H hidden_size, E = mamba_expand·H, M meta tokens, W sliding_window):
//!
//! ```text
//! [q | k | v | u | z] = rms(x)·W_inᵀ            layers that use another's keys and values have no k, v
//! attention: grouped queries, rotary; sees meta tokens, itself and W tokens before it, in global layers all
//! mamba:     Mamba-1 with norms on δ, B and C
//! x += (rms₁(attention) + rms₂(mamba))/2 · W_outᵀ
//! x += MLP(rms(x))                              silu-gated, or relu²
//! ```
//!
//! The weights themselves are NVIDIA's, under their own licence, and not part of this crate, which downloads nothing.

mod adapters;
mod arrays;
mod block;
#[cfg(feature = "tokenizer")]
mod chat;
mod config;
mod files;
mod generate;
mod image;
mod load_options;
mod lookahead;
mod loss;
mod model;
mod names;
mod python_json;
mod quantization;
mod random;
mod sample;
mod size;
mod state;
mod state_file;
#[cfg(feature = "tokenizer")]
mod text;
mod training;

pub use crate::layers::KvStorage;
pub use crate::lora::{LoraCoverage, LoraOptions};
#[cfg(feature = "tokenizer")]
pub use chat::{Chat, TextGeneration};
pub use config::{HymbaLmConfig, KeyQueryNorm, MlpActivation, Quantization, RopeType, TorchDtype};
pub use files::Loading;
pub use generate::{FinishReason, Generation, LogLikelihood, RowOptions};
pub use load_options::{Arithmetic, LoadOptions};
pub use loss::LmLoss;
pub use model::{HymbaLm, LmInspection};
pub(crate) use python_json::python_json;
pub use sample::{
    Choice, FrequencyPenalty, GenerateOptions, LogitBias, LogitsProcessor, OnPrompt, PresencePenalty, Processor,
    Sampler, log_prob, log_probs,
};
pub use state::{LmLayerState, LmState};
#[cfg(feature = "tokenizer")]
pub use text::{ChatOptions, ChatTemplate, Message, Role, StopMatcher, StopStream, TextStream, Tokenizer};
pub use training::LmTrainCache;
