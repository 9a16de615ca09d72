//! `hymba train-lm FILE…`: a small language model from scratch, byte by byte.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use hymba::lm::HymbaLmConfig;
use hymba::train::{LmProgress, LmTrainer, LmTrainerOptions, Stopped, TokenRows};
use hymba::{GenerateOptions, HymbaLm};

use super::train::checkpoint_of;
use crate::interrupt::{self, Interrupted};
use crate::load::ThreadArgs;
use crate::output;

/// The last twentieth of the text is held out. A training that was interrupted goes on when the same is called again. The folder at
/// the end is laid out as on the Hugging Face Hub, without a tokenizer: the tokens are the bytes of the text.
#[derive(clap::Args)]
pub struct Args {
    /// Texts.
    #[arg(required = true, value_name = "FILE")]
    texts: Vec<PathBuf>,
    /// Folder of the model to write.
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,
    /// Width of the model.
    #[arg(long, value_name = "N", default_value_t = 128)]
    hidden: usize,
    #[arg(long, value_name = "N", default_value_t = 4)]
    layers: usize,
    /// Bytes of a row.
    #[arg(long, value_name = "N", default_value_t = 256)]
    window: usize,
    /// Rows of a step.
    #[arg(long, value_name = "N", default_value_t = LmTrainerOptions::default().batch_size)]
    batch: usize,
    /// Passes over the text.
    #[arg(long, value_name = "N", default_value_t = 1)]
    epochs: usize,
    /// Peak of the learning rate.
    #[arg(long, value_name = "X", default_value_t = 2e-3)]
    learning_rate: f32,
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Begins anew although there is a training to go on with.
    #[arg(long)]
    restart: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

pub fn run(args: Args) -> Result<()> {
    args.threads.start()?;
    if args.out.join("config.json").exists() {
        bail!("{}: there is a model already; give another folder, or remove it", args.out.display());
    }
    let mut stream = Vec::new();
    for path in &args.texts {
        stream.extend(fs::read(path).with_context(|| path.display().to_string())?.into_iter().map(u32::from));
    }
    let (text, held_out) = stream.split_at(stream.len() - stream.len() / 20);
    if held_out.len() < 2 {
        bail!("the text is too short: a twentieth of it is held out, which needs 2 bytes at least");
    }
    let train = TokenRows::packed(text, args.window)?;
    let validation = TokenRows::packed(held_out, args.window)?.bytes(held_out.len() - 1);

    let checkpoint = checkpoint_of(&args.out);
    let options = LmTrainerOptions::default()
        .learning_rate(args.learning_rate)
        .batch_size(args.batch)
        .epochs(args.epochs)
        .seed(args.seed)
        .checkpoint(&checkpoint);
    let lm = HymbaLm::build(HymbaLmConfig::bytes(args.hidden, args.layers, args.window), args.seed)?;
    eprintln!(
        "{:.2} M parameters; {} bytes to learn, {} held out",
        lm.num_parameters() as f64 / 1e6,
        train.predicted(),
        validation.predicted()
    );
    let trained = fit(lm, options, args.restart, &train, &validation, |progress| {
        let finished = progress.finished?;
        let bits = finished.bits_per_byte.unwrap_or(f64::NAN);
        let sample = sample(progress.lm).unwrap_or_else(|error| error.to_string());
        Some(format!(
            "training loss {:.4}, {bits:.4} bits per byte of the text held out\n    {sample}",
            finished.train.mean()
        ))
    })?;
    trained.save_dir(&args.out)?;
    remove(&checkpoint)?;
    eprintln!("the model of the best epoch is in {}", args.out.display());
    Ok(())
}

/// Some text that the model makes up.
fn sample(lm: &HymbaLm) -> hymba::Result<String> {
    let options = GenerateOptions::default().max_tokens(80).temperature(0.8).top_p(0.95).seed(1);
    let generated = lm.generate(&[10], &options, |_| ControlFlow::Continue(()))?;
    let bytes: Vec<u8> = generated.ids.iter().map(|&id| id as u8).collect();
    Ok(format!("{:?}", String::from_utf8_lossy(&bytes)))
}

/// Trains, or goes on with what the checkpoint of the options holds → the model of the best epoch. `tell` says what came of an epoch.
pub fn fit(
    lm: HymbaLm,
    options: LmTrainerOptions,
    restart: bool,
    train: &TokenRows,
    validation: &TokenRows,
    tell: impl Fn(&LmProgress) -> Option<String>,
) -> Result<HymbaLm> {
    let checkpoint = options.checkpoint.clone().context("a checkpoint is kept")?;
    if restart {
        remove(&checkpoint)?;
    }
    let trainer = if checkpoint.join("training.json").exists() {
        let trainer = LmTrainer::resume(lm, &checkpoint)?;
        if *trainer.options() != options {
            bail!(
                "{}: a training with other options was interrupted; give the same, or --restart",
                checkpoint.display()
            );
        }
        eprintln!("goes on with the training in {}", checkpoint.display());
        trainer
    } else {
        LmTrainer::new(lm, options)?
    };
    interrupt::listen()?;
    let bar = output::progress_bar(0, "{bar:30} {pos}/{len} steps, {eta} left; {msg}");
    let trained = trainer.fit(train, Some(validation), |progress| {
        bar.set_length(progress.steps);
        bar.set_position(progress.step);
        bar.set_message(format!("loss {:.3}", progress.loss.mean()));
        if let Some(told) = tell(progress) {
            bar.suspend(|| eprintln!("epoch {}: {told}", progress.epoch));
        }
        interrupt::flow()
    })?;
    bar.finish_and_clear();
    match trained.stopped {
        Stopped::Callback => Err(Interrupted::TRAINING.into()),
        _ => Ok(trained.lm),
    }
}

/// What was kept to go on, where all is done.
pub fn remove(checkpoint: &PathBuf) -> Result<()> {
    match checkpoint.exists() {
        true => fs::remove_dir_all(checkpoint).with_context(|| checkpoint.display().to_string()),
        false => Ok(()),
    }
}
