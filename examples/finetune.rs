//! Fine-tunes a language model by low-rank adapters (LoRA) over frozen weights of any type.
//!
//! ```sh
//! cargo run --release --features tokenizer --example finetune -- --model Hymba-1.5B-Instruct --data chats.jsonl --out my-adapter --quantize 4
//! # without a tokenizer, for models whose tokens are bytes
//! cargo run --release --features tokenizer --example finetune -- --model DIR --data texts.jsonl --out my-adapter --bytes
//! ```
//!
//! A line of the data is `{"text": "…"}`, or `{"messages": [{"role": "user", "content": "…"}, …]}`, to which the chat template of the
//! model is applied and of which only the answers are learned. The last tenth of the lines is held out. Success looks like a
//! perplexity of these that is lower after than before; the adapter is written as the PEFT library reads it.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;

use hymba::HymbaLm;
use hymba::lm::{ChatOptions, LmLoss, LoadOptions, LoraOptions, Message, Role, Tokenizer};
use hymba::train::{LmTrainer, LmTrainerOptions, TokenRows};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

#[path = "support/arguments.rs"]
mod arguments;
#[path = "support/load.rs"]
mod load;

use arguments::Arguments;

const USAGE: &str = "\
usage: finetune --model DIR --data FILE.jsonl --out DIR

  --maps A,B,…      names of the maps that get an adapter, * stands for any text; *_proj*
  --rank N          8
  --alpha X         16
  --rslora          scale by alpha/√rank
  --epochs N        1
  --batch N         rows of a step, 8
  --rate X          peak of the learning rate, 0.0002
  --length N        tokens of a row at most, 512; the rest is cut off
  --recompute       takes less memory, and longer
  --bytes           tokens are the bytes of the text";

struct Settings {
    model: PathBuf,
    data: PathBuf,
    out: PathBuf,
    load: LoadOptions,
    lora: LoraOptions,
    options: LmTrainerOptions,
    length: usize,
    recompute: bool,
    bytes: bool,
}

fn settings() -> Result<Option<Settings>, String> {
    let mut arguments = Arguments::new();
    let (mut model, mut data, mut out) = (None, None, None);
    let (mut load, mut lora) = (LoadOptions::default(), LoraOptions::default());
    let mut options = LmTrainerOptions::default().learning_rate(2e-4).batch_size(8).pass_size(1).weight_decay(0.0);
    let (mut length, mut recompute, mut bytes) = (512, false, false);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--model" => model = Some(arguments.value(&name)?),
            "--data" => data = Some(arguments.value(&name)?),
            "--out" => out = Some(arguments.value(&name)?),
            "--maps" => lora = lora.maps(arguments.value::<String>(&name)?.split(',')),
            "--rank" => lora.rank = arguments.value(&name)?,
            "--alpha" => lora.alpha = arguments.value(&name)?,
            "--rslora" => lora.rslora = true,
            "--epochs" => options.epochs = arguments.value(&name)?,
            "--batch" => options.batch_size = arguments.value(&name)?,
            "--rate" => options.learning_rate = arguments.value(&name)?,
            "--length" => length = arguments.value(&name)?,
            "--recompute" => recompute = true,
            "--bytes" => bytes = true,
            other if load::set(&mut load, other, &mut arguments)? => {}
            other => return Err(format!("there is no argument {other:?}")),
        }
    }
    let (Some(model), Some(data), Some(out)) = (model, data, out) else {
        return Err("--model, --data and --out are needed".into());
    };
    Ok(Some(Settings { model, data, out, load, lora, options, length, recompute, bytes }))
}

fn main() -> Result<(), Box<dyn Error>> {
    let settings = match settings() {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            println!("{USAGE}\n{}", load::USAGE);
            return Ok(());
        }
        Err(error) => {
            eprintln!("finetune: {error}\n{USAGE}\n{}", load::USAGE);
            std::process::exit(2);
        }
    };
    let mut lm = HymbaLm::from_dir_with(&settings.model, &settings.load, |_| {})?;
    let (rows, masks) = read(&settings)?;
    let held_out = (rows.len() / 10).max(1).min(rows.len() - 1);
    let learned = rows.len() - held_out;
    let part = |from: usize, to: usize| TokenRows::new(rows[from..to].to_vec(), Some(masks[from..to].to_vec()));
    let (train, validation) = (part(0, learned)?, part(learned, rows.len())?);
    println!("{learned} rows to learn, {} tokens of them; {held_out} held out", train.predicted());

    let covered = lm.add_lora(&settings.lora, settings.options.seed)?;
    println!(
        "adapters of {} maps, {} parameters: {:.2} % of the {:.1} M of the model",
        covered.maps.len(),
        covered.parameters,
        100.0 * covered.parameters as f64 / lm.num_parameters() as f64,
        lm.num_parameters() as f64 / 1e6
    );
    lm.recompute_activations(settings.recompute);
    let mut before = LmLoss::default();
    for (row, mask) in rows[learned..].iter().zip(&masks[learned..]) {
        before += lm.forward_train(&[row], Some(std::slice::from_ref(mask)))?.0;
    }
    println!("before: perplexity {:.4}", before.perplexity());

    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} steps, {eta} left; {msg}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let trained = LmTrainer::new(lm, settings.options)?.fit(&train, Some(&validation), |progress| {
        bar.set_length(progress.steps);
        bar.set_position(progress.step);
        bar.set_message(format!("loss {:.3}", progress.loss.mean()));
        if let Some(loss) = progress.finished.and_then(|epoch| epoch.validation) {
            bar.suspend(|| println!("after epoch {}: perplexity {:.4}", progress.epoch, loss.perplexity()));
        }
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    trained.lm.save_lora(&settings.out)?;
    println!("the adapter of epoch {} is in {}", trained.best_epoch, settings.out.display());
    Ok(())
}

type Rows = (Vec<Vec<u32>>, Vec<Vec<bool>>);

/// The tokens of every line, and which of them are learned.
fn read(settings: &Settings) -> Result<Rows, Box<dyn Error>> {
    let text = std::fs::read_to_string(&settings.data)?;
    let tokenizer = if settings.bytes { None } else { Some(Tokenizer::from_dir(&settings.model)?) };
    let (mut rows, mut masks) = (Vec::new(), Vec::new());
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fault = |reason: String| format!("{}, line {}: {reason}", settings.data.display(), i + 1);
        let value: Value = serde_json::from_str(line).map_err(|error| fault(error.to_string()))?;
        let (mut row, mut mask) = tokens(&value, tokenizer.as_ref()).map_err(fault)?;
        row.truncate(settings.length);
        mask.truncate(settings.length);
        if row.len() > 1 {
            rows.push(row);
            masks.push(mask);
        }
    }
    if rows.len() < 2 {
        return Err(format!("{}: fewer than two lines with tokens to learn", settings.data.display()).into());
    }
    Ok((rows, masks))
}

fn tokens(line: &Value, tokenizer: Option<&Tokenizer>) -> Result<(Vec<u32>, Vec<bool>), String> {
    if let Some(text) = line["text"].as_str() {
        let row: Vec<u32> = match tokenizer {
            Some(tokenizer) => tokenizer.encode(text).map_err(|error| error.to_string())?,
            None => text.bytes().map(u32::from).collect(),
        };
        let mask = vec![true; row.len()];
        return Ok((row, mask));
    }
    let (true, Some(tokenizer)) = (line["messages"].is_array(), tokenizer) else {
        return Err("it has neither a text nor messages (which need a tokenizer)".into());
    };
    let messages: Vec<Message> = serde_json::from_value(line["messages"].clone()).map_err(|error| error.to_string())?;
    let encode = |messages: &[Message], answer: bool| {
        let options = ChatOptions::new().add_generation_prompt(answer);
        tokenizer.encode_chat(messages, &options).map_err(|error| error.to_string())
    };
    let row = encode(&messages, false)?;
    let mut mask = vec![false; row.len()];
    for i in (0..messages.len()).filter(|&i| messages[i].role == Role::Assistant) {
        let (before, with) = (encode(&messages[..i], true)?, encode(&messages[..=i], false)?);
        if !with.starts_with(&before) || !row.starts_with(&with) {
            return Err(format!("the chat template does not end message {} where the next begins", i + 1));
        }
        mask[before.len()..with.len()].fill(true);
    }
    Ok((row, mask))
}
