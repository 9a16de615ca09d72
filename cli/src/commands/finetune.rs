//! `hymba finetune DIR DATA`: a low-rank adapter over frozen weights of any type.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hymba::HymbaLm;
use hymba::lm::{ChatOptions, HymbaLmConfig, LmLoss, LoraOptions, Message, Role};
use hymba::train::{LmTrainerOptions, TokenRows};
use serde_json::Value;

use super::train_lm::fit;
use crate::bandwidth;
use crate::checkpoint;
use crate::load::LoadArgs;
use crate::output::size;
use crate::text::Text;

/// A line of the data is {"text": "…"}, or {"messages": [{"role": "user", "content": "…"}, …]}. To messages the chat template of the
/// model is applied, and only the answers are learned. The last tenth of the lines is held out. The adapter is written as the PEFT
/// library reads it. An interrupted training continues when the same command is run again.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model.
    dir: PathBuf,
    /// Lines of JSON.
    data: PathBuf,
    /// Random weights of the sizes in the folder's config.json, to see what time and memory a training takes; the folder needs a
    /// tokenizer, but no weights.
    #[arg(long)]
    random: bool,
    /// Folder of the adapter to write.
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Names of the linear maps that get an adapter, separated by commas; * stands for any text.
    #[arg(long, value_name = "A,B", value_delimiter = ',', default_value = "*_proj*")]
    maps: Vec<String>,
    /// Rank of the adapter.
    #[arg(long, value_name = "N", default_value_t = LoraOptions::default().rank)]
    rank: usize,
    /// The adapter is scaled by alpha/rank.
    #[arg(long, value_name = "X", default_value_t = LoraOptions::default().alpha)]
    alpha: f64,
    /// Scale by alpha/√rank instead.
    #[arg(long)]
    rslora: bool,
    /// Share of an adapter's inputs that is dropped in training.
    #[arg(long, value_name = "X", default_value_t = LoraOptions::default().dropout)]
    dropout: f64,
    /// Passes over the lines.
    #[arg(long, value_name = "N", default_value_t = 1)]
    epochs: usize,
    /// Rows per step.
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Peak of the learning rate.
    #[arg(long, value_name = "X", default_value_t = 2e-4)]
    learning_rate: f32,
    /// Seed of the adapter, dropout and order.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Tokens per row at most; the rest is cut off.
    #[arg(long, value_name = "N", default_value_t = 512)]
    length: usize,
    /// Compute activations again in the backward pass: less memory, more time.
    #[arg(long)]
    recompute: bool,
    /// Start over even if there is an interrupted training.
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    load: LoadArgs,
}

pub fn run(args: Args) -> Result<()> {
    if args.out.join("adapter_config.json").exists() {
        bail!("{}: there is an adapter already; give another folder, or remove it", args.out.display());
    }
    let mut lm = if args.random {
        args.load.start()?;
        let config = HymbaLmConfig::from_file(args.dir.join("config.json"))?;
        HymbaLm::random(config, args.seed, &args.load.options())?
    } else {
        args.load.read(&args.dir)?
    };
    if lm.has_lora() {
        bail!("--lora: a new adapter is trained, not one on top of another; leave it out");
    }
    let text = Text::of(&args.dir, &lm)?;
    let (rows, masks) = read(&args, &text)?;
    let held_out = (rows.len() / 10).max(1).min(rows.len() - 1);
    let learned = rows.len() - held_out;
    let part = |from: usize, to: usize| TokenRows::new(rows[from..to].to_vec(), Some(masks[from..to].to_vec()));
    let (train, validation) = (part(0, learned)?, part(learned, rows.len())?);
    eprintln!("{learned} rows to learn, {} tokens of them; {held_out} held out", train.predicted());

    let mut lora = LoraOptions::default().maps(args.maps.iter().map(String::as_str));
    (lora.rank, lora.alpha, lora.rslora, lora.dropout) = (args.rank, args.alpha, args.rslora, args.dropout);
    let covered = lm.add_lora(&lora, args.seed)?;
    eprintln!("adapter: {covered}");
    lm.recompute_activations(args.recompute);
    let mut before = LmLoss::default();
    for (row, mask) in rows[learned..].iter().zip(&masks[learned..]) {
        before += lm.forward_train(&[row], Some(std::slice::from_ref(mask)))?.0;
    }
    eprintln!("before: perplexity {:.4}", before.perplexity());

    let checkpoint = checkpoint::of(&args.out);
    let options = LmTrainerOptions::default()
        .learning_rate(args.learning_rate)
        .batch_size(args.batch)
        .pass_size(1)
        .weight_decay(0.0)
        .epochs(args.epochs)
        .seed(args.seed)
        .checkpoint(&checkpoint);
    let weights = lm.num_bytes();
    let (trained, curve) = fit(lm, options, args.restart, &train, &validation, |progress| {
        let finished = progress.finished?;
        let perplexity = finished.validation?.perplexity();
        Some(format!("training loss {:.4}, perplexity {perplexity:.4}", finished.train.mean()))
    })?;
    if let Some(peak) = bandwidth::peak_memory() {
        eprintln!("{} of memory at most, {} of them weights", size(peak), size(weights));
    }
    trained.save_lora(&args.out)?;
    curve.draw(&args.out.join("curve.svg"))?;
    checkpoint::remove(&checkpoint)?;
    eprintln!("the adapter is in {}: --lora {}", args.out.display(), args.out.display());
    Ok(())
}

type Rows = (Vec<Vec<u32>>, Vec<Vec<bool>>);

/// The tokens of every line, and which of them are learned.
fn read(args: &Args, text: &Text) -> Result<Rows> {
    let name = args.data.display();
    let lines = fs::read_to_string(&args.data).with_context(|| name.to_string())?;
    let (mut rows, mut masks) = (Vec::new(), Vec::new());
    for (i, line) in lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (mut row, mut mask) = serde_json::from_str(line)
            .map_err(anyhow::Error::from)
            .and_then(|value| tokens(&value, text))
            .with_context(|| format!("{name}, line {}", i + 1))?;
        row.truncate(args.length);
        mask.truncate(args.length);
        if row.len() > 1 {
            rows.push(row);
            masks.push(mask);
        }
    }
    if rows.len() < 2 {
        bail!("{name}: fewer than two lines with tokens to learn");
    }
    Ok((rows, masks))
}

fn tokens(line: &Value, text: &Text) -> Result<(Vec<u32>, Vec<bool>)> {
    if let Some(said) = line["text"].as_str() {
        let row = text.encode(said)?;
        let mask = vec![true; row.len()];
        return Ok((row, mask));
    }
    let (true, Text::Tokens(tokenizer)) = (line["messages"].is_array(), text) else {
        bail!("it has neither a text nor messages (which need a tokenizer)");
    };
    let messages: Vec<Message> = serde_json::from_value(line["messages"].clone())?;
    let encode = |messages: &[Message], answer: bool| {
        tokenizer.encode_chat(messages, &ChatOptions::new().add_generation_prompt(answer))
    };
    let row = encode(&messages, false)?;
    let mut mask = vec![false; row.len()];
    for i in (0..messages.len()).filter(|&i| messages[i].role == Role::Assistant) {
        let (before, with) = (encode(&messages[..i], true)?, encode(&messages[..=i], false)?);
        if !with.starts_with(&before) || !row.starts_with(&with) {
            bail!("the chat template does not end message {} where the next begins", i + 1);
        }
        mask[before.len()..with.len()].fill(true);
    }
    Ok((row, mask))
}
