//! Trains a small language model from scratch, byte by byte, on a text file; the last twentieth is held out. For sizes, several files
//! and checkpoints see the program: `hymba train-lm`.
//!
//! ```sh
//! cargo run --release --features lm --example train_lm -- book.txt my-model
//! cargo run --release --features lm --example perplexity -- my-model other.txt
//! ```
//!
//! Success looks like bits per byte that fall, far below 8. The folder at the end is laid out as on the Hugging Face Hub.

use std::error::Error;
use std::ops::ControlFlow;

use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, RopeType, TorchDtype};
use hymba::train::{LmTrainer, LmTrainerOptions, TokenRows};

/// Bytes of a row.
const WINDOW: usize = 256;

/// Two layers, the first of which sees everything and the other a window.
fn config() -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.num_hidden_layers, config.vocab_size) = (64, 2, 256);
    (config.num_attention_heads, config.num_key_value_heads) = (2, 1);
    (config.intermediate_size, config.mamba_dt_rank) = (176, Some(4));
    (config.num_memory_tokens, config.sliding_window) = (8, Some(48));
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), None);
    (config.max_position_embeddings, config.rope_type) = (WINDOW, RopeType::Default);
    (config.bos_token_id, config.eos_token_id, config.pad_token_id) = (Some(10), vec![0], Some(0));
    config.torch_dtype = Some(TorchDtype::F32);
    config
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [text, out] = arguments.as_slice() else {
        return Err("usage: train_lm FILE DIR".into());
    };
    let bytes: Vec<u32> = std::fs::read(text)?.into_iter().map(u32::from).collect();
    let (text, held_out) = bytes.split_at(bytes.len() - bytes.len() / 20);
    let train = TokenRows::packed(text, WINDOW)?;
    let validation = TokenRows::packed(held_out, WINDOW)?.bytes(held_out.len().saturating_sub(1));

    let options = LmTrainerOptions::default().epochs(20).learning_rate(2e-3);
    let trainer = LmTrainer::new(HymbaLm::build(config(), 0)?, options)?;
    let trained = trainer.fit(&train, Some(&validation), |progress| {
        if let Some(finished) = progress.finished {
            let bits = finished.bits_per_byte.unwrap_or(f64::NAN);
            println!(
                "epoch {}: training loss {:.4}; held out {bits:.4} bits per byte",
                progress.epoch,
                finished.train.mean()
            );
        } else if progress.step.is_multiple_of(10) {
            println!("step {} of {}: loss {:.4}", progress.step, progress.steps, progress.loss.mean());
        }
        ControlFlow::Continue(())
    })?;
    trained.lm.save_dir(out)?;
    println!("the model is in {out}");
    Ok(())
}
