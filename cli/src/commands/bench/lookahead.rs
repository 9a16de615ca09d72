//! The gain of looking ahead, which depends on how often the text goes on as it did before.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use hymba::HymbaLm;
use hymba::lm::{GenerateOptions, LogitsProcessor};
use serde_json::json;

use crate::output::{self, out};

/// Makes the model write a given text, whatever its logits: so the text decides how many guesses are right.
#[derive(Clone)]
struct Dictation {
    text: Arc<[u32]>,
    written: usize,
}

impl LogitsProcessor for Dictation {
    fn observe(&mut self, _id: u32) {
        self.written += 1;
    }

    fn process(&mut self, logits: &mut [f32]) -> hymba::Result<()> {
        if let Some(logit) = self.text.get(self.written).and_then(|&id| logits.get_mut(id as usize)) {
            *logit = f32::MAX;
        }
        Ok(())
    }
}

/// Decodes `tokens` after a prompt, plainly and with guesses of `count` tokens.
pub fn run(lm: &HymbaLm, count: usize, prompt: usize, tokens: usize, json: bool) -> Result<()> {
    let vocabulary = lm.config().vocab_size as u64;
    let random = |i: usize| {
        let mixed = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33) % vocabulary
    };
    let length = prompt + tokens;
    let texts = [
        ("repeats the prompt", (0..length).map(|i| random(i % prompt) as u32).collect::<Vec<u32>>()),
        ("never repeats", (0..length).map(|i| random(i) as u32).collect()),
    ];
    if !json {
        out("text                plain, tokens/s   ahead, tokens/s   ratio   tokens per pass\n")?;
    }
    for (name, ids) in texts {
        let (before, text) = ids.split_at(prompt);
        let (plain, _) = rate(lm, before, text, 0)?;
        let (ahead, passes) = rate(lm, before, text, count)?;
        let accepted = text.len() as f64 / passes as f64;
        if json {
            output::json(&json!({
                "text": name, "lookahead": count, "tokens": text.len(), "passes": passes,
                "plain_tokens_per_s": plain, "ahead_tokens_per_s": ahead,
            }))?;
        } else {
            out(format!("{name:18} {plain:16.2} {ahead:17.2} {:7.2} {accepted:17.2}\n", ahead / plain))?;
        }
    }
    Ok(())
}

/// Tokens per second once the prompt is read, and passes.
fn rate(lm: &HymbaLm, prompt: &[u32], text: &[u32], lookahead: usize) -> Result<(f64, usize)> {
    let dictation = Dictation { text: text.into(), written: 0 };
    let options = GenerateOptions::default().max_tokens(text.len()).stop_tokens(vec![]).lookahead(lookahead);
    let mut start = None;
    let written = lm.generate(prompt, &options.processor(dictation), |_| {
        start.get_or_insert_with(Instant::now);
        ControlFlow::Continue(())
    })?;
    let seconds = start.map_or(f64::NAN, |start| start.elapsed().as_secs_f64());
    Ok((text.len() as f64 / seconds, written.passes))
}

#[cfg(test)]
mod tests {
    use hymba::lm::{HymbaLmConfig, LoadOptions};

    use super::*;

    #[test]
    fn what_is_dictated_is_written_and_guessed_where_it_repeats() {
        let mut config = HymbaLmConfig::hymba_1_5b();
        (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
        config.num_hidden_layers = 2;
        let lm = HymbaLm::random(config, 3, &LoadOptions::default()).unwrap();
        let prompt: Vec<u32> = (0..30).map(|i| 1 + i * 17 % 41).collect();
        let (_, plain) = rate(&lm, &prompt, &prompt, 0).unwrap();
        let (_, ahead) = rate(&lm, &prompt, &prompt, 8).unwrap();
        assert_eq!(plain, prompt.len());
        assert!(ahead < plain / 2, "{ahead} passes");
        assert!(run(&lm, 4, 9, 7, true).is_ok());
    }
}
