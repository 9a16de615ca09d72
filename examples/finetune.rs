//! Fine-tunes a language model by a low-rank adapter (LoRA) over frozen weights, on the lines of a text file. For conversations and
//! options see the program: `hymba finetune`.
//!
//! ```sh
//! cargo run --release --features tokenizer --example finetune -- Hymba-1.5B-Base lines.txt my-adapter
//! ```
//!
//! The last tenth of the lines is held out. Success looks like a perplexity of these that falls; the adapter is written as the PEFT
//! library reads it. Where there is no tokenizer, the tokens are the bytes of the text.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::HymbaLm;
use hymba::lm::{LoadOptions, LoraOptions, Quantization, Tokenizer};
use hymba::train::{LmTrainer, LmTrainerOptions, TokenRows};

/// Tokens of a row at most.
const LENGTH: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, data, out] = arguments.as_slice() else {
        return Err("usage: finetune DIR FILE DIR".into());
    };
    // the weights stay as they are, so that they can be as small as they get
    let mut lm = HymbaLm::from_dir_with(folder, &LoadOptions::default().quantize(Quantization::Bits8), |_| {})?;
    let tokenizer =
        Path::new(folder).join("tokenizer.json").exists().then(|| Tokenizer::from_dir(folder)).transpose()?;
    let mut rows = Vec::new();
    for line in std::fs::read_to_string(data)?.lines() {
        let mut row = match &tokenizer {
            Some(tokenizer) => tokenizer.encode(line)?,
            None => line.bytes().map(u32::from).collect(),
        };
        row.truncate(LENGTH);
        rows.extend((row.len() > 1).then_some(row));
    }
    let held_out = rows.split_off(rows.len() - rows.len().div_ceil(10));
    let (train, validation) = (TokenRows::new(rows, None)?, TokenRows::new(held_out, None)?);

    let covered = lm.add_lora(&LoraOptions::default(), 0)?;
    println!("adapter: {covered}");
    let options =
        LmTrainerOptions::default().epochs(2).learning_rate(2e-4).batch_size(8).pass_size(1).weight_decay(0.0);
    let trained = LmTrainer::new(lm, options)?.fit(&train, Some(&validation), |progress| {
        if let Some(loss) = progress.finished.and_then(|epoch| epoch.validation) {
            println!("epoch {}: perplexity {:.4} of the lines held out", progress.epoch, loss.perplexity());
        }
        ControlFlow::Continue(())
    })?;
    trained.lm.save_lora(out)?;
    println!("the adapter is in {out}");
    Ok(())
}
