//! `hymba perplexity DIR FILE`: how well a model predicts a text, and what quantisation costs.

mod comparison;

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::load::{Bits, LoadArgs};
use crate::output::{self, out};
use crate::text::Text;
use comparison::Comparison;

/// The text is cut into windows. Each begins with the beginning-of-text token, if the model has one, and is scored on its own.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model.
    dir: PathBuf,
    /// The text; - for the standard input.
    file: PathBuf,
    /// Compare, token by token, with the same model in these bits and in f32 arithmetic.
    #[arg(long, value_enum, value_name = "BITS")]
    against: Option<Bits>,
    /// Tokens per window.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = window)]
    window: usize,
    /// Use at most this many tokens of the text.
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    tokens: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
}

fn window(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(window @ 2..) => Ok(window),
        _ => Err("it must be a whole number of at least 2".into()),
    }
}

pub fn run(args: Args) -> Result<()> {
    let given = read(&args.file)?;
    let lm = args.load.read(&args.dir)?;
    let other = args.against.map(|bits| args.load.read_in(&args.dir, bits)).transpose()?;
    let mut ids = match Text::of(&args.dir, &lm)? {
        // a text need not be UTF-8 where its bytes are the tokens
        Text::Bytes { .. } => given.into_iter().map(u32::from).collect(),
        // each window gets the beginning-of-text token below
        Text::Tokens(tokenizer) => {
            let given = String::from_utf8(given).ok().with_context(|| format!("{}: not UTF-8", args.file.display()))?;
            tokenizer.encode_without_special(&given)?
        }
    };
    ids.truncate(args.tokens);

    let bar = output::progress_bar(ids.len() as u64, "scoring {wide_bar} {pos}/{len} tokens, {eta} left");
    let first = lm.config().bos_token_id;
    let (mut total, mut scored) = (0.0, 0);
    let mut comparison = Comparison::default();
    for window in ids.chunks(args.window) {
        let (prompt, rest) = match first {
            Some(first) => ([first], window),
            None => ([window[0]], &window[1..]),
        };
        if !rest.is_empty() {
            total -= lm.log_likelihood(&prompt, rest)?.total;
            scored += rest.len();
            if let Some(other) = &other {
                comparison.add(&lm, other, &[&prompt, rest].concat())?;
            }
        }
        bar.inc(window.len() as u64);
    }
    bar.finish_and_clear();
    if scored == 0 {
        bail!("{}: the text is too short", args.file.display());
    }
    let nats = total / scored as f64;
    let bits = nats / std::f64::consts::LN_2;
    if args.json {
        let mut result =
            json!({"tokens": scored, "nats_per_token": nats, "bits_per_token": bits, "perplexity": nats.exp()});
        if other.is_some() {
            result["against"] = comparison.json();
        }
        return output::json(&result);
    }
    out(format!("{scored} tokens: {nats:.5} nats per token, {bits:.5} bits; perplexity {:.4}\n", nats.exp()))?;
    if other.is_some() { out(comparison.words()) } else { Ok(()) }
}

fn read(file: &Path) -> Result<Vec<u8>> {
    if file == Path::new("-") {
        let mut text = Vec::new();
        io::stdin().read_to_end(&mut text).context("the standard input")?;
        return Ok(text);
    }
    fs::read(file).with_context(|| file.display().to_string())
}
