//! Hybrid Mamba-attention sequence models on the CPU, in pure Rust.
//!
//! Every block of a [`Hymba`] runs two branches side by side: a Mamba branch (a selective state space model), which carries
//! order and the far past in a state of fixed size, and an attention branch, which recalls single frames of a window and a
//! few learned meta tokens. A learned gate mixes them, feature by feature: `gate ⊙ mamba + (1 − gate) ⊙ attention`. The idea
//! is that of *Hymba: A Hybrid-head Architecture for Small Language Models* (arXiv 2411.13676); the options and their
//! defaults are those of `Edifice.SSM.Hymba` (Elixir, Axon), whose trained models [`Hymba::load_edifice`] reads.
//!
//! # A model in ten lines
//!
//! ```
//! use hymba::ndarray::{Array2, Array3};
//! use hymba::{Hymba, HymbaOptions};
//!
//! // frames of 12 numbers in, vectors of 64 out
//! let model = Hymba::build(HymbaOptions::new(12).hidden_size(64).num_layers(2))?;
//!
//! // a batch of 3 sequences of 20 frames → one vector per sequence
//! let x = Array3::<f32>::ones((3, 20, 12));
//! assert_eq!(model.forward(&x)?.dim(), (3, 64));
//!
//! // the same, frame by frame, at a cost that does not grow
//! let mut state = model.new_state(1);
//! for _ in 0..20 {
//!     let y = model.step(&Array2::ones((1, 12)), &mut state)?;
//!     assert_eq!(y.dim(), (1, 64));
//! }
//! # Ok::<(), hymba::Error>(())
//! ```
//!
//! | to | call |
//! |---|---|
//! | describe a model | [`HymbaOptions::new`] and its setters; [`recommended`](HymbaOptions::recommended), [`edifice`](HymbaOptions::edifice); other blocks: [`jamba`](HymbaOptions::jamba), [`zamba`](HymbaOptions::zamba), [`Pattern`] |
//! | build it | [`Hymba::build`] |
//! | encode sequences | [`Hymba::forward`], [`forward_ragged`](Hymba::forward_ragged) for different lengths, [`forward_sequence`](Hymba::forward_sequence) for every frame |
//! | stream | [`Hymba::new_state`], [`Hymba::step`], [`Hymba::prefill`]; [`HymbaState`] |
//! | save and load | [`Hymba::save`], [`Hymba::load`], [`to_bytes`](Hymba::to_bytes), [`from_bytes`](Hymba::from_bytes), [`load_with`](Hymba::load_with) for files made elsewhere, [`load_edifice`](Hymba::load_edifice) |
//! | classify series, predict numbers | [`Predictor`], [`PredictorOptions`]; [`Pooling`], [`Stem`], [`Differences`] |
//! | take less memory | [`Hymba::store_as`], [`Hymba::load_as`] and [`Storage`]: bf16, f16, 8 or 4 bits, for inference |
//! | train | [`Predictor`] and [`train::Trainer`]; or by hand [`Hymba::forward_train`], [`Hymba::backward`], [`train::AdamW`] |
//! | fine-tune few numbers of a large model | [`Hymba::add_lora`], [`Predictor::add_lora`] and [`LoraOptions`], over weights of any [`Storage`] |
//! | read series from files | [`series::SeriesSet`]: `.ts`, and with the feature `csv` tables |
//! | run NVIDIA's language model | `hymba::lm` (feature `lm`; with text, feature `tokenizer`) |
//! | look inside | [`Hymba::summary`], [`Hymba::inspect`], [`Hymba::visit`], [`Hymba::visit_parameters`] |
//!
//! # Letters
//!
//! The same in code, documentation, messages and tests.
//!
//! | letter | size | letter | size |
//! |---|---|---|---|
//! | `b` | batch | `r` | rank of the time step, ⌈h/16⌉ |
//! | `l` | length, in frames | `k` | meta tokens |
//! | `h` | hidden_size | `w` | window_size |
//! | `d` | inner width of the Mamba branch, 2h | `a` | attention heads |
//! | `n` | state_size | `p` | width of a head, h/a |
//!
//! Arrays are row-major `f32`; weights are `[out, in]`, as PyTorch and safetensors files have them.
//!
//! # What to rely on
//!
//! * Everything is causal: position t of the output depends on the frames up to t.
//! * Folding [`step`](Hymba::step) over frames equals [`forward`](Hymba::forward) on them, past the window, too: within 1e-5 for
//!   outputs of order 1, and in proportion for larger ones.
//! * Results are the same, bit for bit, for any number of threads, and for a sequence alone or in any batch. Between
//!   instruction sets they may differ in the last bits.
//! * Any array, number or file, damaged and hostile ones included, gives a result or an [`Error`], not a panic. The one call
//!   that panics, [`StoredMatrix::row`], says so.
//!
//! # Threads, instruction sets, versions
//!
//! | feature | default | |
//! |---|---|---|
//! | `lm` | no | the language model, `lm::HymbaLm`, on token ids |
//! | `tokenizer` | no | `lm` with text: `Tokenizer`, chat templates, `Chat` |
//! | `csv` | no | tables of comma-separated values in [`series`] |
//! | `rayon` | yes | runs on several threads: the sequences of a batch, and the parts of large products, scans and attention |
//! | `profile` | no | times the parts of the arithmetic, for people who work on its speed |
//!
//! Work runs on the current rayon pool: the global one (`RAYON_NUM_THREADS` sets its size), or yours, inside
//! `ThreadPool::install`. A step of a few streams runs on the calling thread alone. Without the feature everything runs there.
//!
//! A child of `fork` has none of its parent's threads. If the parent has used the global pool by calls of this crate, the child
//! does everything on the calling thread, with the same results; a pool that the child makes itself gives it threads again,
//! inside `ThreadPool::install`. Where the parent's global pool was started by other code alone, this crate cannot know: call
//! it inside a pool of the child's own, or fork before. Do not fork inside a callback.
//!
//! The instruction set (AVX-512, AVX2, NEON or plain code) is chosen at run time: [`simd_level`]. Up to 256 MB of work memory are kept
//! for the next call.
//!
//! On 32-bit targets and `wasm32-unknown-unknown` (`default-features = false`) everything builds; for the feature `tokenizer`
//! on the latter, the random numbers of a dependency need a source: `--cfg getrandom_backend="unsupported"` in `RUSTFLAGS`
//! (no random number is drawn), or `"wasm_js"` with `getrandom`'s feature of that name in the browser. WebAssembly compiled with
//! `-C target-feature=+simd128` uses its vectors, and [`simd_level`] is `"simd128"`. `examples/web` is a page and an npm package.
//!
//! Rust 1.89 or newer. Arguments such as `&ArrayRef3<f32>` (new in ndarray 0.17, which is [re-exported](ndarray)) take
//! `&array`, `&view` and `&slice` alike.
//!
//! # Files
//!
//! Models are safetensors files. [`Hymba::visit`] gives the names; with `d = 2h` and per block `blocks.{i}.`:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `input_proj.weight`, `.bias` | `[h, embed_dim]`, `[h]` | only where embed_dim ≠ h |
//! | `meta_tokens` | `[k, h]` | only where k > 0 |
//! | `norm.*`, `ffn_norm.*`, and at the end `final_norm.*` | `[h]` | `weight`, `bias`; ε = 1e-5 |
//! | `mamba.in_proj.weight` | `[2d, h]` | rows xi, then z |
//! | `mamba.conv.weight`, `.bias` | `[d, 4]`, `[d]` | the last tap is for the current frame; PyTorch has `[d, 1, 4]` |
//! | `mamba.x_proj.weight` | `[r + 2n, d]` | rows δ, B, C |
//! | `mamba.dt_proj.weight`, `.bias` | `[d, r]`, `[d]` | |
//! | `mamba.a_log`, `mamba.d` | `[d, n]`, `[d]` | A = −exp(a_log) |
//! | `mamba.out_proj.weight` | `[h, d]` | |
//! | `attention.{q,k,v,out}_proj.weight`, `.bias` | `[h, h]`, `[h]` | heads are p columns each |
//! | `gate.weight`, `.bias` | `[h, h]`, `[h]` | |
//! | `ffn.up.weight`, `.bias` | `[4h, h]`, `[4h]` | then gelu, in its exact form with erf |
//! | `ffn.down.weight`, `.bias` | `[h, 4h]`, `[h]` | |
//!
//! With another [`Pattern`] a block has the tensors of its parts, and no gate. With [`Pattern::SharedAttention`] blocks have no
//! `ffn`; `shared_block.` (once, in front of the blocks) and the blocks it feeds have:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `shared_block.norm.*` | `[2h]` | |
//! | `shared_block.attention.{q,k,v}_proj.weight`, `.bias` | `[2h, 2h]`, `[2h]` | |
//! | `shared_block.attention.out_proj.weight`, `.bias` | `[h, 2h]`, `[h]` | |
//! | `shared_block.ffn_norm.*`, `shared_block.ffn.{up,down}.*` | as in a block | |
//! | `blocks.{i}.shared_proj.weight` | `[h, h]` | only where (i + 1) mod `attention_every` = 0 |
//!
//! From Python, for [`Hymba::load_with`], or for [`Hymba::load`] with the options inside, of which only `embed_dim` is required:
//!
//! ```python
//! import json
//! from safetensors.torch import save_file
//!
//! save_file(tensors, "model.safetensors")
//!
//! options = {"embed_dim": 12, "hidden_size": 64, "num_layers": 2}
//! save_file(tensors, "model.safetensors", metadata={"hymba": json.dumps({"version": 1, "options": options})})
//! ```

#![warn(missing_docs)]
#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("weights of 16, 8 and 4 bits, and the files, are read in the order of little-endian CPUs");

mod encoder;
mod error;
mod files;
#[cfg_attr(not(feature = "lm"), allow(dead_code))] // some are there for the language model
mod kernels;
#[cfg_attr(not(feature = "lm"), allow(dead_code))]
mod layers;
#[cfg(feature = "lm")]
pub mod lm;
mod lora;
mod parameters;
mod predictor;
#[cfg(feature = "profile")]
pub mod profile;
pub mod series;
mod states;
pub mod train;

pub use encoder::{
    Block, BlockInspection, FedBlock, Hymba, HymbaBlock, HymbaOptions, HymbaState, Inspection, Pattern, SerialBlock,
    SharedBlock, TrainCache, Variant,
};
pub use error::{Error, Result};
pub use kernels::matmul::Storage;
pub use layers::{MambaBranch, MetaTokenAttention, Pooling, Stem};
#[cfg(feature = "lm")]
pub use lm::{GenerateOptions, Generation, HymbaLm, LmState};
pub use lora::{LoraCoverage, LoraOptions};
pub use ndarray;
pub use parameters::{Parameter, StoredMatrix};
pub use predictor::{
    Differences, Ensemble, KernelFeatures, KernelPredictor, Normalization, Predictor, PredictorCache, PredictorOptions,
    PredictorState, Task, argmax, softmax,
};

/// The instruction set the kernels use on this machine: `"avx512"`, `"avx2"`, `"neon"`, `"simd128"` (in WebAssembly compiled for it)
/// or `"scalar"` (which is what the compiler makes of plain code for the target).
///
/// The environment variable `HYMBA_SIMD`, read once, chooses one by name; a name the CPU lacks is ignored. `avx2-vnni` is `avx2` with
/// AVX-VNNI for matrices of 8 bits, which is also what a CPU without AVX-512 uses if it has that. (Language models can use more
/// than these for matrices in bf16: see `lm::Arithmetic`.)
///
/// ```
/// assert!(["avx512", "avx2", "neon", "simd128", "scalar"].contains(&hymba::simd_level()));
/// ```
pub fn simd_level() -> &'static str {
    kernels::simd::Isa::current().name()
}

/// The examples of the README compile.
#[cfg(all(doctest, feature = "tokenizer"))]
#[doc = include_str!("../README.md")]
struct Readme;
