//! The arguments of generation.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use hymba::GenerateOptions;
use hymba::lm::FinishReason;

use crate::interrupt;

#[derive(Args, Clone)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Generate at most this many tokens.
    #[arg(long, value_name = "N", default_value_t = GenerateOptions::DEFAULT_MAX_TOKENS)]
    max_tokens: usize,
    /// 0 takes the most probable token, 0.7 is usual. Default of this option and the next four: what the model's folder recommends.
    #[arg(long, value_name = "X")]
    temperature: Option<f32>,
    /// Draw from this many of the most probable tokens; 0 for all.
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draw from the fewest most probable tokens that have this probability together.
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Draw from the tokens with at least this share of the largest probability.
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Above 1, tokens of the prompt and of the text so far become less probable.
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = GenerateOptions::DEFAULT_SEED)]
    seed: u64,
    /// Stop at this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Guess this many tokens where the last ones have occurred before, and check them in one pass: the text is the same, and comes
    /// faster where it repeats parts of the prompt.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "10", default_value_t = 0)]
    lookahead: usize,
}

impl SamplingArgs {
    /// The options that the folder recommends, overridden by those given; Ctrl-C ends the reading of a long prompt.
    pub fn options(&self, folder: &Path) -> Result<GenerateOptions> {
        let mut options =
            GenerateOptions::from_dir(folder)?.max_tokens(self.max_tokens).seed(self.seed).lookahead(self.lookahead);
        options.temperature = self.temperature.unwrap_or(options.temperature);
        options.top_k = self.top_k.unwrap_or(options.top_k);
        options.top_p = self.top_p.unwrap_or(options.top_p);
        options.min_p = self.min_p.unwrap_or(options.min_p);
        options.repetition_penalty = self.repetition_penalty.unwrap_or(options.repetition_penalty);
        options.stop_strings.extend(self.stop.iter().cloned());
        options.validate()?;
        Ok(options.on_prompt(|_, _| interrupt::flow()))
    }
}

/// A word for scripts.
pub fn finish(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::StopToken => "stop-token",
        FinishReason::StopString => "stop-string",
        FinishReason::MaxTokens => "max-tokens",
        FinishReason::MaxPositions => "max-positions",
        _ => "cancelled",
    }
}

/// When the first token came, and how fast the others.
pub struct Clock {
    start: Instant,
    first: Option<Duration>,
}

impl Clock {
    pub fn start() -> Self {
        Clock { start: Instant::now(), first: None }
    }

    pub fn tick(&mut self) {
        self.first.get_or_insert(self.start.elapsed());
    }

    pub fn first(&self) -> Option<f64> {
        self.first.map(|first| first.as_secs_f64())
    }

    /// Decoded tokens per second, the first not counted: it comes with the prompt.
    pub fn rate(&self, tokens: usize) -> Option<f64> {
        let decoding = self.start.elapsed() - self.first?;
        (tokens > 1).then(|| (tokens - 1) as f64 / decoding.as_secs_f64())
    }

    /// All in one line.
    pub fn line(&self, prompt: usize, tokens: usize, reason: FinishReason) -> String {
        let first = self.first().map_or(String::new(), |first| format!(", the first after {first:.2} s"));
        let rate = self.rate(tokens).map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
        let end = match reason {
            FinishReason::StopToken | FinishReason::StopString => "",
            FinishReason::MaxTokens => "; ended at --max-tokens",
            FinishReason::MaxPositions => "; ended at the model's last position",
            _ => "; ended early",
        };
        format!("{prompt} tokens read, {tokens} written{first}{rate}{end}")
    }
}
