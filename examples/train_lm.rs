//! Trains a small language model from scratch on a text file, byte by byte or on the tokens of a tokenizer that is trained first; the
//! last twentieth is held out. For sizes, several files and checkpoints see the program: `hymba train-lm`.
//!
//! ```sh
//! cargo run --release --features tokenizer --example train_lm -- book.txt my-model
//! cargo run --release --features tokenizer --example perplexity -- my-model other.txt
//! cargo run --release --features tokenizer --example train_lm -- book.txt my-other-model 2000
//! cargo run --release --features tokenizer --example generate -- my-other-model "Once upon"
//! ```
//!
//! Success looks like bits per byte that fall, far below 8, and samples that look ever more like the text. The folder at the end is
//! laid out as on the Hugging Face Hub; `curve.svg` in it shows how the loss went.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::lm::{HymbaLmConfig, RopeType, Tokenizer, TorchDtype};
use hymba::train::{LmTrainer, LmTrainerOptions, TokenRows};
use hymba::{GenerateOptions, HymbaLm};
use picture::{BLUE, Chart, Charts, Corner, ORANGE, Series, Shape};

#[path = "support/picture.rs"]
mod picture;

/// Tokens of a row.
const WINDOW: usize = 256;

/// The byte that begins a text, the end of a line.
const BEGIN: u32 = 10;

/// Two layers, the first of which sees everything and the other a window.
fn config(vocabulary: usize, begin: Option<u32>, end: u32) -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.num_hidden_layers, config.vocab_size) = (64, 2, vocabulary);
    (config.num_attention_heads, config.num_key_value_heads) = (2, 1);
    (config.intermediate_size, config.mamba_dt_rank) = (176, Some(4));
    (config.num_memory_tokens, config.sliding_window) = (8, Some(48));
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), None);
    (config.max_position_embeddings, config.rope_type) = (WINDOW, RopeType::Default);
    (config.bos_token_id, config.eos_token_id, config.pad_token_id) = (begin, vec![end], Some(0));
    config.torch_dtype = Some(TorchDtype::F32);
    config
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [text, out, size @ ..] = arguments.as_slice() else {
        return Err("usage: train_lm FILE DIR [VOCABULARY]".into());
    };
    let text = std::fs::read_to_string(text)?;
    let mut cut = text.len() - text.len() / 20;
    while !text.is_char_boundary(cut) {
        cut -= 1;
    }
    let (text, held_out) = text.split_at(cut);
    let tokenizer =
        size.first().map(|size| Ok::<_, Box<dyn Error>>(Tokenizer::train(text, size.parse()?, out)?)).transpose()?;
    let encode = |text: &str| match &tokenizer {
        Some(tokenizer) => tokenizer.encode_plain(text),
        None => Ok([BEGIN].into_iter().chain(text.bytes().map(u32::from)).collect()),
    };
    let config = match &tokenizer {
        Some(tokenizer) => config(tokenizer.vocab_size(), tokenizer.bos_id(), tokenizer.eos_id().unwrap_or(0)),
        None => config(256, Some(BEGIN), 0),
    };
    let train = TokenRows::packed(&encode(text)?, WINDOW)?;
    let validation = TokenRows::packed(&encode(held_out)?, WINDOW)?.bytes(held_out.len());

    let sample = |lm: &HymbaLm| {
        let options = GenerateOptions::default().max_tokens(60).temperature(0.8);
        let begin: Vec<u32> = lm.config().bos_token_id.into_iter().collect();
        let ids = lm.generate(&begin, &options, |_| ControlFlow::Continue(()))?.ids;
        let bytes = || ids.iter().map(|&id| id as u8).collect::<Vec<_>>();
        match &tokenizer {
            Some(tokenizer) => tokenizer.decode(&ids),
            None => Ok(String::from_utf8_lossy(&bytes()).into_owned()),
        }
    };
    let (mut of_steps, mut of_epochs) = (Vec::new(), Vec::new());
    let options = LmTrainerOptions::default().epochs(20).learning_rate(2e-3);
    let trained = LmTrainer::new(HymbaLm::build(config, 0)?, options)?.fit(&train, Some(&validation), |progress| {
        let step = progress.step as f32;
        let Some(finished) = progress.finished else {
            of_steps.push((step, progress.loss.mean() as f32));
            return ControlFlow::Continue(());
        };
        of_epochs.extend(finished.validation.map(|loss| (step, loss.mean() as f32)));
        let (epoch, loss, bits) = (progress.epoch, finished.train.mean(), finished.bits_per_byte.unwrap_or(f64::NAN));
        println!("epoch {epoch}: training loss {loss:.4}; held out {bits:.4} bits per byte");
        println!("    {:?}", sample(progress.lm).unwrap_or_else(|error| error.to_string()));
        ControlFlow::Continue(())
    })?;
    trained.lm.save_dir(out)?;
    draw(of_steps, of_epochs, &Path::new(out).join("curve.svg"))?;
    println!("the model is in {out}");
    Ok(())
}

/// Losses by step.
fn draw(train: Vec<(f32, f32)>, held_out: Vec<(f32, f32)>, path: &Path) -> Result<(), Box<dyn Error>> {
    let line = |name: &str, points, color, shape| Series { name: name.into(), points, color, shape };
    let chart = Chart {
        title: "Loss, nats per token".into(),
        x_label: "step".into(),
        y_label: String::new(),
        whole_x: true,
        y_range: None,
        legend: Corner::UpperRight,
        series: vec![line("training", train, BLUE, Shape::Thin), line("held out", held_out, ORANGE, Shape::Line)],
    };
    let picture = Charts {
        title: "How the training went".into(),
        subtitle: "Training losses are those of single batches, each before its step".into(),
        panels: vec![chart],
        panel_size: (720, 400),
        side_by_side: false,
    };
    picture::charts(path, &picture)
}
