//! Checks this crate against numbers computed elsewhere, for people who bring weights from Python or Elixir.
//!
//! ```sh
//! cargo run --release --example verify -- tests/data/{hymba,hybrids,edifice}/*    # or your own folders
//! cargo run --release --example verify -- --tolerance 1e-4 DIR…
//! cargo run --release --features lm --example verify -- tests/data/*/*               # language models as well
//! ```
//!
//! Each folder holds `config.json` (the options), `model.safetensors` (the weights) and `expected.safetensors`: an
//! `input [b, l, embed_dim]`, where rows are ragged their `lengths [b]`, and what the other program makes of them under
//! any of the names below. The names of the weights tell whether the model is a `hymba` or an `edifice`
//! (`Edifice.SSM.Hymba`, for which `intermediates.safetensors`, `model.nx` and `model_data.nx` are checked as well).
//! The input is also given to `step` frame by frame.
//!
//! | tensor | compared with |
//! |---|---|
//! | `output`, `output_f64` `[b, h]` | `forward` or `forward_ragged`, `forward_train`, and the last `step` |
//! | `sequence_output` `[b, l, h]` | `forward_sequence`, and every `step` |
//! | `block_<i>.mamba`, `.attention`, `.gate`, `.output`, `.shared_output` `[b, k + l, h]` | `inspect`, meta tokens first |
//! | Edifice: `hymba_block_<i>_…`, `final_norm`, `last_timestep` | `inspect`, `forward_sequence`, `forward` |
//!
//! Where there is a `grads.safetensors` beside them, it holds the gradients of `sum(output · cotangent)` under `input` and the
//! names of the weights, and `expected.safetensors` the `cotangent [b, h]`. They are compared with `backward`: a gradient may
//! differ by 3e-4 of the largest entry of its tensor, or of a thousandth of the largest of all if that is more. What is given
//! by `--tolerance` is for outputs, not for gradients, whose size depends on the cotangent.
//!
//! # Language models
//!
//! With `--features lm`, a folder may hold a language model as the Hugging Face Hub has it, told by `"model_type": "hymba"` in
//! `config.json` or by weights called `model.layers.…`. Its `expected.safetensors` holds `input_ids [b, n]`, where rows are
//! padded also `attention_mask [b, n]` (ones at the real tokens, padding on either side) or `lengths [b]` (padding behind), and
//! what the published code makes of them. Only real tokens are compared; rows are fed together and each alone.
//!
//! | tensor | compared with |
//! |---|---|
//! | `logits`, `logits_f64` `[b, n, V]` | `forward`, `step` token by token, and at the last token `prefill` or `prefill_ragged` |
//! | `uncached_step_logits` `[b, s, V]` (also `…_f64`) | the prompt, and then `greedy_ids [b, s]` fed to `step` one by one |
//! | `step_logits` `[b, s, V]` | the same, while the prompt and what follows fit into `sliding_window` |
//! | `greedy_ids` `[b, s]` | `generate_batch`, equally far; no tolerance here |
//! | `hidden_states.<i>` `[b, M + n, H]` | `inspect`, meta tokens first |
//! | `cache_prefill.<i>.conv`, `.ssm`, `.k`, `.v` | `LmState::layer` after the prompt |
//! | `cache_final.<i>.…` | the same after all `greedy_ids` but the last, which nobody feeds |
//!
//! The published code decodes with a window that is one token shorter than that of its prompts. Where that makes a difference,
//! `step_logits`, `greedy_ids` and the caches behind the first windowed layer say nothing about this crate and are left out. Of
//! a cache, the rows that both programs keep are compared. `logits_bf16_compute` and `step_logits_f64` are for information.
//!
//! A folder of a language model may hold `train.safetensors` in place of `expected.safetensors`: `ids [b, n]`, `lengths [b]` and
//! perhaps `loss_mask [b, n]`, the mean cross-entropy `loss` of the next tokens and their `logits [b, n, V]`; beside it
//! `grads.safetensors`, the gradients of the loss by every parameter, with the tolerance said above, and `adamw.safetensors`, `losses
//! [4]` and the weights `final.NAME` of three steps of AdamW at a rate of 0.001, betas 0.9 and 0.95 and a decay of 0.1. The loss is
//! compared with `forward_train`, gradients with `backward`. Losses may differ by 1e-5, and so may weights in the mean.
//!
//! One with low-rank adapters holds the model in `base`, what the PEFT library wrote in `adapter`, and in `expected.safetensors` the
//! same as above with the adapter, `base_logits` without it, and `grad.NAME` by its tensors; `logits` merged and apart may differ by
//! 1e-5 of the largest.
//!
//! # Exit status
//!
//! The exit status is 0 if all agree, 1 if any does not or a folder cannot be read, 2 if the arguments make no sense.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[path = "support/compare.rs"]
mod compare;
#[path = "support/verify_encoder.rs"]
mod encoder;
#[cfg(feature = "lm")]
#[path = "support/verify_lm.rs"]
mod language_model;
#[cfg(feature = "lm")]
#[path = "support/verify_lora.rs"]
mod lora;
#[cfg(feature = "lm")]
#[path = "support/published.rs"]
mod published;
#[path = "support/tensors.rs"]
mod tensors;
#[cfg(feature = "lm")]
#[path = "support/verify_training.rs"]
mod training;

use compare::{Comparison, Tolerance};

const WEIGHTS: &str = "model.safetensors";
const EXPECTED: &str = "expected.safetensors";
const GRADIENTS: &str = "grads.safetensors";
/// A gradient may differ by this share of the largest entry of its tensor, or of a thousandth of the largest of all.
const GRADIENT_TOLERANCE: f64 = 3e-4;
/// How the names of a language model's weights start.
const LM_WEIGHTS: &str = "model.layers.";
const USAGE: &str = "usage: verify [--tolerance X] DIR…
Each DIR holds config.json, model.safetensors and expected.safetensors of a hymba or edifice encoder, or of a Hymba language
model (hymba_lm, in builds with --features lm).";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match parse(arguments) {
        Ok((tolerance, folders)) => verify_all(tolerance, &folders),
        Err(error) => {
            eprintln!("verify: {error}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn parse(arguments: Vec<String>) -> Result<(Option<Tolerance>, Vec<PathBuf>), String> {
    let mut tolerance = None;
    let mut folders = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        if argument == "--tolerance" {
            let value = arguments.next().unwrap_or_default();
            match value.parse::<f64>() {
                Ok(absolute) if absolute >= 0.0 && absolute.is_finite() => {
                    tolerance = Some(Tolerance { absolute, relative: 0.0 });
                }
                _ => return Err(format!("--tolerance needs a number such as 1e-5, found `{value}`")),
            }
        } else if argument.starts_with('-') {
            return Err(format!("unknown option {argument}"));
        } else {
            folders.push(PathBuf::from(argument));
        }
    }
    if folders.is_empty() {
        return Err("no folder given".into());
    }
    Ok((tolerance, folders))
}

fn verify_all(tolerance: Option<Tolerance>, paths: &[PathBuf]) -> ExitCode {
    let mut comparisons = Vec::new();
    let mut unchecked = 0;
    for path in paths {
        if path.is_file() {
            println!("{}: not a folder, passed over\n", path.display());
            continue;
        }
        println!("{}", path.display());
        match verify(path, tolerance) {
            Ok(of_this_folder) => comparisons.extend(of_this_folder.into_iter().map(|comparison| (path, comparison))),
            Err(error) => {
                println!("  FAILED  {error}");
                unchecked += 1;
            }
        }
        println!();
    }

    let failed = comparisons.iter().filter(|(_, comparison)| !comparison.holds()).count();
    println!("{} comparisons, {failed} failed; {unchecked} folders could not be checked", comparisons.len());
    if let Some((folder, worst)) = comparisons.iter().rev().max_by(|(_, a), (_, b)| a.strain.total_cmp(&b.strain)) {
        let title = if worst.holds() { "closest to its tolerance" } else { "worst" };
        println!("{title}, in {}:\n  {worst}", folder.display());
    }
    if failed == 0 && unchecked == 0 && !comparisons.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Checks one folder and prints a line per comparison.
fn verify(folder: &Path, tolerance: Option<Tolerance>) -> Result<Vec<Comparison>, Box<dyn Error>> {
    #[cfg(feature = "lm")]
    if folder.join(training::TRAINING).exists() {
        return training::verify(folder, tolerance);
    }
    #[cfg(feature = "lm")]
    if folder.join(lora::ADAPTER).is_dir() {
        return lora::verify(folder, tolerance);
    }
    if says_language_model(folder) {
        return language_model::verify(folder, tolerance);
    }
    let weights = tensors::names(&folder.join(WEIGHTS))?;
    if weights.iter().any(|name| name.starts_with(LM_WEIGHTS)) {
        return language_model::verify(folder, tolerance);
    }
    encoder::verify(folder, tolerance, &weights)
}

/// Whether `config.json` says so; one that cannot be read says nothing, and whoever needs it will complain.
fn says_language_model(folder: &Path) -> bool {
    let config = std::fs::read(folder.join("config.json")).unwrap_or_default();
    let config = serde_json::from_slice::<serde_json::Value>(&config).unwrap_or_default();
    config["model_type"] == "hymba"
}

#[cfg(not(feature = "lm"))]
mod language_model {
    pub fn verify(
        _: &super::Path,
        _: Option<super::Tolerance>,
    ) -> Result<Vec<super::Comparison>, Box<dyn super::Error>> {
        Err("it is a language model, which this build does not know; build with --features lm".into())
    }
}
