//! Trains a small language model from scratch, byte by byte, on any text files.
//!
//! ```sh
//! cargo run --release --features lm --example train_lm -- --text book.txt --out my-model --epochs 3
//! cargo run --release --features lm --example perplexity -- --model my-model --text other.txt --bytes
//! ```
//!
//! The last twentieth of the text is held out. Killed, it goes on from the last epoch when it is run again with the same
//! `--checkpoint`. The folder at the end is laid out as on the Hugging Face Hub. Success looks like bits per byte that fall, far below
//! 8, and samples that look more and more like the text.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use hymba::lm::{HymbaLmConfig, RopeType, TorchDtype};
use hymba::train::{LmProgress, LmTrainer, LmTrainerOptions, TokenRows};
use hymba::{GenerateOptions, HymbaLm};
use indicatif::{ProgressBar, ProgressStyle};

#[path = "support/arguments.rs"]
mod arguments;

use arguments::Arguments;

const USAGE: &str = "\
usage: train_lm --text FILE [--text FILE]… --out DIR

  --hidden N         width of the model, 128
  --layers N         4
  --window N         bytes of a row, 256
  --batch N          rows of a step, 16
  --epochs N         passes over the text, 1
  --rate X           peak of the learning rate, 0.002
  --seed N           0
  --checkpoint DIR   writes every epoch into it, and goes on from it if it is there";

struct Settings {
    texts: Vec<PathBuf>,
    out: PathBuf,
    hidden: usize,
    layers: usize,
    window: usize,
    options: LmTrainerOptions,
}

fn settings() -> Result<Option<Settings>, String> {
    let mut arguments = Arguments::new();
    let (mut texts, mut out, mut hidden, mut layers, mut window) = (Vec::new(), None, 128, 4, 256);
    let mut options = LmTrainerOptions::default().learning_rate(2e-3);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--text" => texts.push(arguments.value(&name)?),
            "--out" => out = Some(arguments.value(&name)?),
            "--hidden" => hidden = arguments.value(&name)?,
            "--layers" => layers = arguments.value(&name)?,
            "--window" => window = arguments.value(&name)?,
            "--batch" => options.batch_size = arguments.value(&name)?,
            "--epochs" => options.epochs = arguments.value(&name)?,
            "--rate" => options.learning_rate = arguments.value(&name)?,
            "--seed" => options.seed = arguments.value(&name)?,
            "--checkpoint" => options.checkpoint = Some(arguments.value(&name)?),
            other => return Err(format!("there is no argument {other:?}")),
        }
    }
    match out {
        Some(out) if !texts.is_empty() => Ok(Some(Settings { texts, out, hidden, layers, window, options })),
        _ => Err("--text and --out are needed".into()),
    }
}

/// The small model of `tests/data/byte_lm` in other sizes: the first and the last layer see everything, those between them a
/// window, two by two with the same keys and values.
fn config(settings: &Settings) -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    let (h, layers) = (settings.hidden, settings.layers);
    (config.hidden_size, config.num_hidden_layers, config.vocab_size) = (h, layers, 256);
    (config.num_attention_heads, config.num_key_value_heads) = ((h / 32).max(1), (h / 64).max(1));
    (config.intermediate_size, config.mamba_dt_rank) = (11 * h / 4, Some(h.div_ceil(16)));
    (config.num_memory_tokens, config.sliding_window) = (8, Some(48));
    config.global_attn_idx = Some(if layers > 1 { vec![0, layers - 1] } else { vec![0] });
    let pairs = (1..layers.saturating_sub(2)).step_by(2).map(|first| vec![first, first + 1]).collect::<Vec<_>>();
    config.kv_reuse_group = Some(pairs).filter(|pairs| !pairs.is_empty());
    (config.max_position_embeddings, config.rope_type) = (settings.window.max(256), RopeType::Default);
    (config.bos_token_id, config.eos_token_id, config.pad_token_id) = (Some(10), vec![0], Some(0));
    config.torch_dtype = Some(TorchDtype::F32);
    config
}

fn main() -> Result<(), Box<dyn Error>> {
    let settings = match settings() {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            println!("{USAGE}");
            return Ok(());
        }
        Err(error) => {
            eprintln!("train_lm: {error}\n{USAGE}");
            std::process::exit(2);
        }
    };
    let mut stream = Vec::new();
    for path in &settings.texts {
        let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        stream.extend(bytes.into_iter().map(u32::from));
    }
    let (text, held_out) = stream.split_at(stream.len() - stream.len() / 20);
    let train = TokenRows::packed(text, settings.window)?;
    let validation = TokenRows::packed(held_out, settings.window)?.bytes(held_out.len() - 1);

    let lm = HymbaLm::build(config(&settings), settings.options.seed)?;
    println!(
        "{:.2} M parameters; {} bytes to learn, {} held out",
        lm.num_parameters() as f64 / 1e6,
        train.predicted(),
        validation.predicted()
    );
    let trainer = match &settings.options.checkpoint {
        Some(folder) if folder.join("training.json").exists() => LmTrainer::resume(lm, folder)?,
        _ => LmTrainer::new(lm, settings.options.clone())?,
    };
    let mut display = Display::new();
    let trained = trainer.fit(&train, Some(&validation), |progress| display.show(progress))?;
    display.bar.finish_and_clear();
    trained.lm.save_dir(&settings.out)?;
    let best = trained.best_epoch.checked_sub(1).and_then(|i| trained.history[i].bits_per_byte);
    println!(
        "{:.4} bits per byte of the text held out, after epoch {}; the model is in {}",
        best.unwrap_or(f64::NAN),
        trained.best_epoch,
        settings.out.display()
    );
    Ok(())
}

struct Display {
    bar: ProgressBar,
    begin: Instant,
    tokens: usize,
}

impl Display {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, {eta} left; {msg}");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Display { bar, begin: Instant::now(), tokens: 0 }
    }

    fn show(&mut self, progress: &LmProgress) -> ControlFlow<()> {
        let Some(finished) = progress.finished else {
            self.tokens += progress.loss.tokens;
            self.bar.set_length(progress.steps);
            self.bar.set_position(progress.step);
            let rate = self.tokens as f64 / self.begin.elapsed().as_secs_f64();
            self.bar.set_message(format!("{rate:.0} tokens/s, loss {:.3}", progress.loss.mean()));
            return ControlFlow::Continue(());
        };
        let validation = finished.validation.unwrap_or_default();
        let line = format!(
            "epoch {}: training loss {:.4}, perplexity of the text held out {:.4}, {:.4} bits per byte\n    {}",
            progress.epoch,
            finished.train.mean(),
            validation.perplexity(),
            finished.bits_per_byte.unwrap_or(f64::NAN),
            sample(progress.lm).unwrap_or_else(|error| error.to_string()),
        );
        self.bar.suspend(|| println!("{line}"));
        ControlFlow::Continue(())
    }
}

/// Some text that the model makes up.
fn sample(lm: &HymbaLm) -> hymba::Result<String> {
    let options = GenerateOptions::default().max_tokens(80).temperature(0.8).top_p(0.95).seed(1);
    let generated = lm.generate(&[10], &options, |_| ControlFlow::Continue(()))?;
    let bytes: Vec<u8> = generated.ids.iter().map(|&id| id as u8).collect();
    Ok(format!("{:?}", String::from_utf8_lossy(&bytes)))
}
