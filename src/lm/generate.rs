//! Generation and scoring.

use std::ops::ControlFlow;

use super::model::HymbaLm;
use super::sample::{GenerateOptions, Sampler, log_softmax_at};
use super::state::LmState;
use crate::{Error, Result};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// The model chose a stop token, which is not among the ids.
    StopToken,
    /// The text came to a stop string, which is not part of it.
    StopString,
    /// `max_tokens` were generated.
    MaxTokens,
    /// The callback said so.
    Cancelled,
}

/// What was generated for one row.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// The new tokens, without the prompt and the stop token.
    pub ids: Vec<u32>,
    /// ln P of each of them under the model's own distribution; empty unless [`GenerateOptions::log_probs`] asked for them.
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// How likely a continuation is: see [`HymbaLm::log_likelihood`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LogLikelihood {
    /// ln P(continuation | prompt), the sum over its tokens.
    pub total: f64,
    /// ln P of each token.
    pub tokens: Vec<f32>,
    /// Whether each token is the most likely one.
    pub is_greedy: bool,
}

impl HymbaLm {
    /// Continues a prompt, token by token: `on_token` hears each id as soon as it is chosen, and ends the generation with
    /// [`ControlFlow::Break`].
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range, or there are stop strings, which need
    /// a tokenizer (`generate_text`, feature `tokenizer`); [`Error::Tokens`] if the prompt is
    /// empty or has an id that is not in the vocabulary; [`Error::Logits`] if the model answers with NaN.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use hymba::{GenerateOptions, HymbaLm};
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let options = GenerateOptions::default().max_tokens(5).temperature(0.8).seed(7);
    /// let mut heard = Vec::new();
    /// let generated = lm.generate(&[1, 2, 3], &options, |token| {
    ///     heard.push(token);
    ///     ControlFlow::Continue(())
    /// })?;
    /// assert_eq!(generated.ids, heard);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn generate(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        self.generate_with(&mut self.new_state(1), prompt, options, on_token)
    }

    /// As [`generate`](Self::generate), from what a state of one row remembers: the way to hold a conversation. Afterwards the
    /// state has seen the prompt and all ids that were returned.
    ///
    /// # Errors
    ///
    /// Those of [`generate`](Self::generate), and [`Error::State`] if the state has not one row or is of another model.
    pub fn generate_with(
        &self,
        state: &mut LmState,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_token: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut generated = self.generate_batch_with(state, &[prompt], options, |_, token| on_token(token))?;
        generated.pop().ok_or_else(|| Error::State("it has no rows".into()))
    }

    /// Continues several prompts of any lengths together: each row is what it would be alone, with the same options and seed, and
    /// ends on its own. The callback hears the row and the token.
    ///
    /// # Errors
    ///
    /// Those of [`generate`](Self::generate).
    pub fn generate_batch<T: AsRef<[u32]>>(
        &self,
        prompts: &[T],
        options: &GenerateOptions,
        on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        self.generate_batch_with(&mut self.new_state(prompts.len()), prompts, options, on_token)
    }

    /// As [`generate_batch`](Self::generate_batch), from what a state remembers.
    ///
    /// # Errors
    ///
    /// Those of [`generate_with`](Self::generate_with).
    pub fn generate_batch_with<T: AsRef<[u32]>>(
        &self,
        state: &mut LmState,
        prompts: &[T],
        options: &GenerateOptions,
        mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        if let Some(stop) = options.stop_strings.first() {
            return Err(Error::Option {
                option: "stop_strings",
                given: format!("{stop:?}"),
                allowed: "strings are found in text: use generate_text with a tokenizer, or stop_tokens".into(),
            });
        }
        self.run(state, prompts, &[], options, &mut on_token)
    }

    /// The loop behind all forms of generation. `before` is what the state has seen and the repetition penalty shall know of.
    pub(super) fn run<T: AsRef<[u32]>>(
        &self,
        state: &mut LmState,
        prompts: &[T],
        before: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        let stop_tokens = options.stop_tokens.as_ref().unwrap_or(&self.config().eos_token_id);
        let mut samplers = Vec::new();
        for prompt in prompts {
            let mut sampler = Sampler::new(options)?;
            before.iter().chain(prompt.as_ref()).for_each(|&id| sampler.observe(id));
            samplers.push(sampler);
        }
        let mut rows: Vec<_> = prompts
            .iter()
            .map(|_| Generation { ids: Vec::new(), log_probs: Vec::new(), finish: FinishReason::MaxTokens })
            .collect();
        let mut logits = self.prefill_ragged(prompts, state)?;
        let mut going = vec![options.max_tokens > 0; rows.len()];
        while going.contains(&true) {
            let mut next: Vec<Vec<u32>> = vec![Vec::new(); rows.len()];
            for (i, row) in rows.iter_mut().enumerate() {
                if !going[i] {
                    continue;
                }
                let choice = samplers[i].pick(logits.row(i).as_slice().unwrap_or_default())?;
                if stop_tokens.contains(&choice.id) {
                    (row.finish, going[i]) = (FinishReason::StopToken, false);
                    continue;
                }
                samplers[i].observe(choice.id);
                row.ids.push(choice.id);
                row.log_probs.extend(choice.log_prob);
                next[i].push(choice.id);
                if on_token(i, choice.id).is_break() {
                    (row.finish, going[i]) = (FinishReason::Cancelled, false);
                } else if row.ids.len() >= options.max_tokens {
                    going[i] = false;
                }
            }
            let first = vec![0; rows.len()];
            self.advance(&next, state, &first, &mut |row, _, new| {
                logits.row_mut(row).assign(&ndarray::ArrayView1::from(&*new));
                Ok(())
            })?;
        }
        Ok(rows)
    }

    /// How likely a continuation of a prompt is, as evaluation harnesses ask.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if the prompt is empty (give it the beginning-of-text token) or an id is not in the vocabulary.
    ///
    /// ```
    /// # use hymba::HymbaLm;
    /// # use hymba::lm::{HymbaLmConfig, LoadOptions};
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let score = lm.log_likelihood(&[1, 2, 3], &[4, 5])?;
    /// assert_eq!(score.tokens.len(), 2);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn log_likelihood(&self, prompt: &[u32], continuation: &[u32]) -> Result<LogLikelihood> {
        if prompt.is_empty() {
            return Err(Error::Tokens("the prompt has none; give at least the beginning-of-text token".into()));
        }
        let ids = [prompt, continuation].concat();
        self.check(&[&ids], None)?;
        let first = prompt.len() - 1;
        let mut score = LogLikelihood { total: 0.0, tokens: Vec::new(), is_greedy: true };
        let fed = &ids[..ids.len() - usize::from(!continuation.is_empty())];
        self.advance(&[fed], &mut self.new_state(1), &[first], &mut |_, i, logits| {
            if let Some(&id) = ids.get(i + 1) {
                let log_prob = log_softmax_at(logits, id);
                score.total += f64::from(log_prob);
                score.tokens.push(log_prob);
                score.is_greedy &= logits.iter().all(|other| *other <= logits[id as usize]);
            }
            Ok(())
        })?;
        Ok(score)
    }
}
