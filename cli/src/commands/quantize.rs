//! `hymba quantize DIR OUT --to BITS`: writes a language model again in fewer bits, its tokenizer beside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use hymba::lm::{LoadOptions, Quantization, TorchDtype};
use serde_json::json;

use crate::load::{self, ThreadArgs};
use crate::output::{self, out, size};

#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model.
    dir: PathBuf,
    /// Folder to write; it must not hold a model yet.
    out: PathBuf,
    /// Bits of the large matrices.
    #[arg(long, value_enum, value_name = "BITS")]
    to: To,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArgs,
}

#[derive(ValueEnum, Clone, Copy)]
enum To {
    #[value(name = "8")]
    Eight,
    #[value(name = "4")]
    Four,
    Bf16,
}

/// Files beside the weights, which are the same for any bits.
const BESIDE: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "README.md",
];

pub fn run(args: Args) -> Result<()> {
    args.threads.start()?;
    if args.out.join("config.json").exists() {
        bail!("{}: there is a model already; give another folder, or remove it", args.out.display());
    }
    let options = match args.to {
        To::Eight => LoadOptions::default().quantize(Quantization::Bits8),
        To::Four => LoadOptions::default().quantize(Quantization::Bits4),
        To::Bf16 => LoadOptions::default().dtype(TorchDtype::BF16),
    };
    let lm = load::read(&args.dir, &options)?;
    lm.save_dir(&args.out)?;
    for name in BESIDE {
        let (from, to) = (args.dir.join(name), args.out.join(name));
        if from.is_file() {
            fs::copy(&from, &to)
                .with_context(|| format!("{}: cannot be copied to {}", from.display(), to.display()))?;
        }
    }
    let (before, after) = (weights(&args.dir)?, weights(&args.out)?);
    if args.json {
        return output::json(
            &json!({"out": args.out.display().to_string(), "parameters": lm.num_parameters(), "bytes_before": before,
            "bytes_after": after}),
        );
    }
    let (parameters, out_dir) = (lm.num_parameters() as f64 / 1e6, args.out.display());
    out(format!("{parameters:.1} M parameters: {} became {} in {out_dir}\n", size(before), size(after)))
}

/// Bytes of the weights of a folder.
fn weights(folder: &Path) -> Result<usize> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|extension| extension == "safetensors") {
            // of a link, what it leads to
            bytes += fs::metadata(entry.path())?.len() as usize;
        }
    }
    Ok(bytes)
}
