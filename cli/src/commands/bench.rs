//! `hymba bench [DIR | --random]`: tokens per second, of a prompt and of decoding, beside the memory bandwidth.

mod lookahead;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use hymba::HymbaLm;
use hymba::lm::{GenerateOptions, HymbaLmConfig, Sampler};
use hymba::ndarray::arr1;
use serde_json::{Value, json};

use crate::bandwidth::{self, Memory};
use crate::load::LoadArgs;
use crate::output::{self, out, size};

/// Decoding reads every weight once per token, so its limit is the memory bandwidth. That is measured, too, in turns with the tokens,
/// because it changes from one second to the next.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model.
    #[arg(required_unless_present = "random")]
    dir: Option<PathBuf>,
    /// Random weights of the sizes of Hymba-1.5B, instead of a folder.
    #[arg(long, conflicts_with = "dir")]
    random: bool,
    /// Layers of the random model.
    #[arg(long, value_name = "N", requires = "random")]
    layers: Option<usize>,
    /// Width of the random model, a multiple of 50 from 100 on.
    #[arg(long, value_name = "N", requires = "random")]
    hidden: Option<usize>,
    /// Width of the random model's MLP.
    #[arg(long, value_name = "N", requires = "random")]
    intermediate: Option<usize>,
    /// Write the random model to a folder instead of measuring.
    #[arg(long, value_name = "DIR", requires = "random")]
    save: Option<PathBuf>,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    prompt_tokens: usize,
    /// Tokens decoded.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    tokens: usize,
    /// Measure decoding with and without guessing this many tokens, on a text that repeats itself and on one that does not.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "10", conflicts_with = "save")]
    lookahead: Option<usize>,
    /// Seed of the random weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..) => Ok(number),
        _ => Err("it must be a whole number, at least 1".into()),
    }
}

pub fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let lm = match &args.dir {
        Some(dir) => args.load.read(dir)?,
        None => {
            args.load.start()?;
            HymbaLm::random(config(&args), args.seed, &args.load.options())?
        }
    };
    let ready = start.elapsed().as_secs_f64();
    if let Some(folder) = &args.save {
        lm.save_dir(folder)?;
        return Ok(());
    }

    if let Some(count) = args.lookahead {
        return lookahead::run(&lm, count, args.prompt_tokens, args.tokens, args.json);
    }

    let vocabulary = lm.config().vocab_size as u64;
    let ids: Vec<u32> = (0..args.prompt_tokens as u64).map(|i| (i * 7919 % vocabulary) as u32).collect();
    let mut state = lm.new_state(1); // the meta tokens pass through here, once per model
    let mut sampler = Sampler::new(&GenerateOptions::default())?;
    let start = Instant::now();
    let mut logits = lm.prefill_ragged(&[&ids], &mut state)?;
    let first = start.elapsed().as_secs_f64();
    let memory = Memory::new();
    let (mut tokens, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..args.tokens {
        reads.push(memory.read());
        let start = Instant::now();
        let id = sampler.pick(logits.row(0).as_slice().unwrap_or_default())?.id;
        logits = lm.step(&arr1(&[id]), &mut state)?;
        tokens.push(start.elapsed().as_secs_f64());
    }
    let (token, read) = (Spread::of(tokens), Spread::of(reads));
    let limit = bandwidth::BYTES as f64 / read.median / lm.num_bytes() as f64;
    if args.json {
        return output::json(&json!({
            "parameters": lm.num_parameters(),
            "weight_bytes": lm.num_bytes(),
            "state_bytes": state.num_bytes(),
            "peak_bytes": bandwidth::peak_memory(),
            "threads": rayon::current_num_threads(),
            "instruction_set": args.load.simd_level(),
            "ready_s": ready,
            "prompt": {"tokens": ids.len(), "tokens_per_s": ids.len() as f64 / first, "first_token_s": first},
            "decoding": token.json(1.0, "tokens_per_s"),
            "memory": read.json(bandwidth::BYTES as f64, "bytes_per_s"),
            "limit_tokens_per_s": limit,
        }));
    }
    let level = args.load.simd_level();
    out(format!(
        "weights   {:.0} M parameters, {}; ready after {ready:.1} s\n\
         threads   {} ({level})\n\
         prompt    {} tokens, {:.1} tokens/s; first token after {first:.2} s\n\
         memory    {} of state\n",
        lm.num_parameters() as f64 / 1e6,
        size(lm.num_bytes()),
        rayon::current_num_threads(),
        ids.len(),
        ids.len() as f64 / first,
        size(state.num_bytes()),
    ))?;
    if let Some(peak) = bandwidth::peak_memory() {
        out(format!("          {} at most, with {} for reading\n", size(peak), size(bandwidth::BYTES)))?;
    }
    out(format!(
        "decoding  {}\nreading   {}\nlimit     {limit:.2} tokens/s at that rate, of which {:.0} % were reached\n",
        token.rates(1.0, "tokens/s"),
        read.rates(bandwidth::BYTES as f64 / 1e9, "GB/s"),
        100.0 / token.median / limit
    ))
}

fn config(args: &Args) -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    if let Some(layers) = args.layers {
        config.num_hidden_layers = layers;
        config.global_attn_idx = Some(vec![0]);
        config.kv_reuse_group = None;
    }
    if let Some(hidden) = args.hidden {
        config.hidden_size = hidden;
        config.mamba_dt_rank = None;
    }
    config.intermediate_size = args.intermediate.unwrap_or(config.intermediate_size);
    config
}

/// Seconds of many calls.
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        let at = |i: usize| seconds.get(i).copied().unwrap_or(f64::NAN);
        Spread { least: at(0), median: at(seconds.len() / 2), most: at(seconds.len().saturating_sub(1)) }
    }

    /// Amounts per second, for `amount` in each call: the median, the least and the most.
    fn per_second(&self, amount: f64) -> [f64; 3] {
        [self.median, self.most, self.least].map(|seconds| amount / seconds)
    }

    fn rates(&self, amount: f64, unit: &str) -> String {
        let [median, worst, best] = self.per_second(amount);
        format!("{median:.2} {unit} (median; {worst:.2} to {best:.2})")
    }

    fn json(&self, amount: f64, unit: &str) -> Value {
        let [median, worst, best] = self.per_second(amount);
        json!({unit: {"median": median, "worst": worst, "best": best}})
    }
}
