//! The perplexity of a text under a model, and what quantisation costs.
//!
//! ```sh
//! cargo run --release --features tokenizer --example perplexity -- --model Hymba-1.5B-Base --text wiki.txt --quantize 4
//! # without a tokenizer, for models whose tokens are bytes
//! cargo run --release --features lm --example perplexity -- --model DIR --text wiki.txt --bytes --quantize 8 --against none
//! ```
//!
//! The text is cut into windows, each of which begins with the beginning-of-text token, if the model has one, and is scored
//! alone. With `--against` a second copy of the model, in other bits or without `--arithmetic bf16`, scores the same windows, and
//! the two are compared token by token.

use std::error::Error;
use std::path::PathBuf;

use hymba::HymbaLm;
use hymba::lm::{Arithmetic, LoadOptions, Quantization};
use hymba::ndarray::{ArrayView1, Axis, aview1};

#[path = "support/arguments.rs"]
mod arguments;
#[path = "support/load.rs"]
mod load;

use arguments::Arguments;

const USAGE: &str = "\
usage: perplexity --model DIR --text FILE

  --against none|8|4      compares with the same model in these bits and in f32 arithmetic
  --window N              tokens scored together, 512
  --tokens N              at most so many tokens of the text, all
  --bytes                 tokens are the bytes of the text";

struct Settings {
    model: PathBuf,
    text: PathBuf,
    load: LoadOptions,
    against: Option<Quantization>,
    window: usize,
    tokens: usize,
    bytes: bool,
}

fn settings() -> Result<Option<Settings>, String> {
    let mut arguments = Arguments::new();
    let (mut model, mut text) = (None, None);
    let (mut load, mut against) = (LoadOptions::default(), None);
    let (mut window, mut tokens, mut bytes) = (512, usize::MAX, false);
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--model" => model = Some(arguments.value(&name)?),
            "--text" => text = Some(arguments.value(&name)?),
            "--against" => against = Some(load::bits(&name, &mut arguments)?),
            "--window" => window = arguments.value(&name)?,
            "--tokens" => tokens = arguments.value(&name)?,
            "--bytes" => bytes = true,
            other if load::set(&mut load, other, &mut arguments)? => {}
            other => return Err(format!("there is no argument {other:?}")),
        }
    }
    let (Some(model), Some(text)) = (model, text) else { return Err("--model and --text are needed".into()) };
    if window < 2 {
        return Err("--window must be at least 2".into());
    }
    Ok(Some(Settings { model, text, load, against, window, tokens, bytes }))
}

fn main() -> Result<(), Box<dyn Error>> {
    let settings = match settings() {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            println!("{USAGE}\n{}", load::USAGE);
            return Ok(());
        }
        Err(error) => {
            eprintln!("perplexity: {error}\n{USAGE}\n{}", load::USAGE);
            std::process::exit(2);
        }
    };
    let load = |options: &LoadOptions| HymbaLm::from_dir_with(&settings.model, options, |_| {});
    let lm = load(&settings.load)?;
    println!("{:.1} M parameters, {:.1} MB", lm.num_parameters() as f64 / 1e6, lm.num_bytes() as f64 / 1e6);
    let other = settings
        .against
        .map(|bits| load(&settings.load.clone().arithmetic(Arithmetic::F32).quantize(bits)))
        .transpose()?;

    let mut ids = tokens(&settings)?;
    ids.truncate(settings.tokens);
    let first = lm.config().bos_token_id;
    let (mut total, mut scored) = (0.0, 0);
    let mut comparison = Comparison::default();
    for window in ids.chunks(settings.window) {
        let (prompt, rest) = match first {
            Some(first) => ([first], window),
            None => ([window[0]], &window[1..]),
        };
        if rest.is_empty() {
            continue;
        }
        total -= lm.log_likelihood(&prompt, rest)?.total;
        scored += rest.len();
        if let Some(other) = &other {
            comparison.add(&lm, other, &[&prompt, rest].concat())?;
        }
    }
    if scored == 0 {
        return Err("the text is too short".into());
    }
    let mean = total / scored as f64;
    println!(
        "{scored} tokens: {mean:.5} nats a token, {:.5} bits; perplexity {:.4}",
        mean / std::f64::consts::LN_2,
        mean.exp()
    );
    if other.is_some() {
        comparison.report();
    }
    Ok(())
}

#[cfg(feature = "tokenizer")]
fn tokenized(settings: &Settings, text: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    Ok(hymba::lm::Tokenizer::from_dir(&settings.model)?.encode(text)?)
}

#[cfg(not(feature = "tokenizer"))]
fn tokenized(_settings: &Settings, _text: &str) -> Result<Vec<u32>, Box<dyn Error>> {
    Err("built without the feature tokenizer: only --bytes works".into())
}

fn tokens(settings: &Settings) -> Result<Vec<u32>, Box<dyn Error>> {
    if settings.bytes {
        Ok(std::fs::read(&settings.text)?.into_iter().map(u32::from).collect())
    } else {
        tokenized(settings, &std::fs::read_to_string(&settings.text)?)
    }
}

/// How far two models' logits are apart.
#[derive(Default)]
struct Comparison {
    tokens: usize,
    same_choice: usize,
    logits: usize,
    largest: f64,
    squares: f64,
    /// Kullback–Leibler divergence, from the second model to the first.
    divergence: f64,
}

impl Comparison {
    fn add(&mut self, lm: &HymbaLm, other: &HymbaLm, ids: &[u32]) -> hymba::Result<()> {
        let ids = aview1(ids).insert_axis(Axis(0)).to_owned();
        let (a, b) = (lm.forward(&ids)?, other.forward(&ids)?);
        for (a, b) in a.index_axis(Axis(0), 0).rows().into_iter().zip(b.index_axis(Axis(0), 0).rows()) {
            self.tokens += 1;
            self.same_choice += usize::from(greedy(a) == greedy(b));
            self.logits += a.len();
            let (log_a, log_b) = (log_sum(a), log_sum(b));
            for (&a, &b) in a.iter().zip(b) {
                let (a, b) = (f64::from(a), f64::from(b));
                self.largest = self.largest.max((a - b).abs());
                self.squares += (a - b) * (a - b);
                self.divergence += (b - log_b).exp() * ((b - log_b) - (a - log_a));
            }
        }
        Ok(())
    }

    fn report(&self) {
        let tokens = self.tokens as f64;
        println!(
            "against the other: {:.2} % of the greedy choices are the same; logits differ by {:.4} (root of the mean square), at \
             most {:.3}; divergence {:.6} nats a token",
            100.0 * self.same_choice as f64 / tokens,
            (self.squares / self.logits as f64).sqrt(),
            self.largest,
            self.divergence / tokens
        );
    }
}

fn greedy(logits: ArrayView1<f32>) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

fn log_sum(logits: ArrayView1<f32>) -> f64 {
    let largest = logits.fold(f32::NEG_INFINITY, |largest, x| largest.max(*x));
    f64::from(largest) + logits.iter().map(|x| f64::from(x - largest).exp()).sum::<f64>().ln()
}
