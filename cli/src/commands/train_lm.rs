//! `hymba train-lm FILE…`: a small language model from scratch.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use hymba::lm::{HymbaLmConfig, Tokenizer};
use hymba::train::{LmProgress, LmTrainer, LmTrainerOptions, Stopped, TokenRows};
use hymba::{GenerateOptions, HymbaLm};

use crate::checkpoint;
use crate::curve::Curve;
use crate::interrupt::{self, Interrupted};
use crate::load::ThreadArgs;
use crate::output;
use crate::text::Text;

/// The last twentieth of the text is held out. An interrupted training continues when the same command is run again. The result is a
/// folder as on the Hugging Face Hub, with a picture of the loss, curve.svg. The tokens are the bytes of the text, or with
/// --vocabulary those of a tokenizer that is trained on it first.
#[derive(clap::Args)]
pub struct Args {
    /// Text files.
    #[arg(required = true, value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Folder of the model to write.
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Width of the model.
    #[arg(long, value_name = "N", default_value_t = 128)]
    hidden: usize,
    /// Layers of the model.
    #[arg(long, value_name = "N", default_value_t = 4)]
    layers: usize,
    /// Train a byte pair encoding of this many tokens on the text, which must then be UTF-8.
    #[arg(long, value_name = "N")]
    vocabulary: Option<usize>,
    /// Tokens per row.
    #[arg(long, value_name = "N", default_value_t = 256)]
    window: usize,
    /// Rows per step.
    #[arg(long, value_name = "N", default_value_t = LmTrainerOptions::default().batch_size)]
    batch: usize,
    /// Passes over the text.
    #[arg(long, value_name = "N", default_value_t = 1)]
    epochs: usize,
    /// Peak of the learning rate.
    #[arg(long, value_name = "X", default_value_t = 2e-3)]
    learning_rate: f32,
    /// Seed of weights and order.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Start over even if there is an interrupted training.
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

/// The model of [`HymbaLmConfig::bytes`], or the same for the tokens of a tokenizer.
fn config(args: &Args, tokenizer: Option<&Tokenizer>) -> HymbaLmConfig {
    let mut config = HymbaLmConfig::bytes(args.hidden, args.layers, args.window);
    if let Some(tokenizer) = tokenizer {
        config.vocab_size = tokenizer.vocab_size();
        (config.bos_token_id, config.eos_token_id) = (tokenizer.bos_id(), tokenizer.eos_id().into_iter().collect());
    }
    config
}

pub fn run(args: Args) -> Result<()> {
    args.threads.start()?;
    if args.out.join("config.json").exists() {
        bail!("{}: there is a model already; give another folder, or remove it", args.out.display());
    }
    let (train, validation, tokenizer) = rows(&args)?;
    let config = config(&args, tokenizer.as_ref());
    let first = config.bos_token_id;
    let text = tokenizer.map_or(Text::Bytes { first }, |tokenizer| Text::Tokens(Box::new(tokenizer)));
    let checkpoint = checkpoint::of(&args.out);
    let options = LmTrainerOptions::default()
        .learning_rate(args.learning_rate)
        .batch_size(args.batch)
        .epochs(args.epochs)
        .seed(args.seed)
        .checkpoint(&checkpoint);
    let lm = HymbaLm::build(config, args.seed)?;
    eprintln!(
        "{:.2} M parameters; {} tokens to learn, {} held out",
        lm.num_parameters() as f64 / 1e6,
        train.predicted(),
        validation.predicted()
    );
    let (trained, curve) = fit(lm, options, args.restart, &train, &validation, |progress| {
        let finished = progress.finished?;
        let bits = finished.bits_per_byte.unwrap_or(f64::NAN);
        let sample = sample(progress.lm, &text, first).unwrap_or_else(|error| error.to_string());
        Some(format!(
            "training loss {:.4}, {bits:.4} bits per byte of the text held out\n    {sample}",
            finished.train.mean()
        ))
    })?;
    trained.save_dir(&args.out)?;
    curve.draw(&args.out.join("curve.svg"))?;
    checkpoint::remove(&checkpoint)?;
    eprintln!("the model of the best epoch is in {}", args.out.display());
    Ok(())
}

/// What is learned and what is held out, and the tokenizer, if it is not the bytes.
fn rows(args: &Args) -> Result<(TokenRows, TokenRows, Option<Tokenizer>)> {
    let mut bytes = Vec::new();
    for path in &args.texts {
        bytes.extend(fs::read(path).with_context(|| path.display().to_string())?);
    }
    let mut cut = bytes.len() - bytes.len() / 20;
    if bytes.len() < 40 {
        bail!("the text is too short: a twentieth of it is held out, which needs 2 bytes at least");
    }
    let Some(size) = args.vocabulary else {
        let ids: Vec<u32> = bytes.into_iter().map(u32::from).collect();
        let (text, held_out) = ids.split_at(cut);
        let validation = TokenRows::packed(held_out, args.window)?.bytes(held_out.len() - 1);
        return Ok((TokenRows::packed(text, args.window)?, validation, None));
    };
    let text = String::from_utf8(bytes).context("--vocabulary needs texts in UTF-8")?;
    while !text.is_char_boundary(cut) {
        cut -= 1;
    }
    let (text, held_out) = text.split_at(cut);
    let tokenizer = Tokenizer::train(text, size, &args.out)?;
    let [train, validation] = [tokenizer.encode_plain(text)?, tokenizer.encode_plain(held_out)?];
    // the token in front stands for no text
    let validation = TokenRows::packed(&validation, args.window)?.bytes(held_out.len());
    Ok((TokenRows::packed(&train, args.window)?, validation, Some(tokenizer)))
}

/// Some text that the model makes up.
fn sample(lm: &HymbaLm, text: &Text, first: Option<u32>) -> Result<String> {
    let options = GenerateOptions::default().max_tokens(80).temperature(0.8).top_p(0.95).seed(1);
    let prompt: Vec<u32> = first.into_iter().collect();
    let (sample, _) = text.generate(lm, &prompt, &options, |_| ControlFlow::Continue(()))?;
    Ok(format!("{sample:?}"))
}

/// Trains, or resumes from the checkpoint of the options → the model of the best epoch, and the loss by step. `tell`
/// describes a finished epoch.
pub fn fit(
    lm: HymbaLm,
    options: LmTrainerOptions,
    restart: bool,
    train: &TokenRows,
    validation: &TokenRows,
    tell: impl Fn(&LmProgress) -> Option<String>,
) -> Result<(HymbaLm, Curve)> {
    let checkpoint = options.checkpoint.clone().context("a checkpoint is kept")?;
    if restart {
        checkpoint::remove(&checkpoint)?;
    }
    let trainer = if checkpoint.join("training.json").exists() {
        let trainer = LmTrainer::resume(lm, &checkpoint)?;
        if *trainer.options() != options {
            bail!(
                "{}: a training with other options was interrupted; give the same, or --restart",
                checkpoint.display()
            );
        }
        eprintln!("continuing the training in {}", checkpoint.display());
        trainer
    } else {
        LmTrainer::new(lm, options)?
    };
    interrupt::listen()?;
    let bar = output::progress_bar(0, "{bar:30} {pos}/{len} steps, {eta} left; {msg}");
    // of steps alone, without the validation
    let (mut tokens, mut seconds, mut since) = (0, 0.0, Instant::now());
    let mut curve = Curve::default();
    let trained = trainer.fit(train, Some(validation), |progress| {
        let step = progress.step as f64;
        match progress.finished {
            None => {
                tokens += progress.loss.tokens;
                seconds += since.elapsed().as_secs_f64();
                curve.train.push((step, progress.loss.mean()));
            }
            Some(finished) => curve.held_out.extend(finished.validation.map(|loss| (step, loss.mean()))),
        }
        let speed = format!("{:.0} tokens/s", tokens as f64 / seconds);
        bar.set_length(progress.steps);
        bar.set_position(progress.step);
        bar.set_message(format!("loss {:.3}, {speed}", progress.loss.mean()));
        if let Some(told) = tell(progress) {
            bar.suspend(|| eprintln!("epoch {}: {speed}, {told}", progress.epoch));
        }
        since = Instant::now();
        interrupt::flow()
    })?;
    bar.finish_and_clear();
    match trained.stopped {
        Stopped::Callback => Err(Interrupted::TRAINING.into()),
        _ => Ok((trained.lm, curve)),
    }
}
