//! Generation and scoring.

use std::ops::ControlFlow;

use super::model::HymbaLm;
use super::sample::{Choice, GenerateOptions, Sampler, log_softmax_at};
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
    /// The row reached the model's `max_position_embeddings`, and
    /// [`stop_at_max_positions`](GenerateOptions::stop_at_max_positions) is set.
    MaxPositions,
    /// The callback ended it, or the one for the progress of the prompt ([`GenerateOptions::on_prompt`]).
    Cancelled,
}

/// The tokens generated for one row.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// The new tokens, without the prompt and the stop token.
    pub ids: Vec<u32>,
    /// ln P of each of them under the model's own distribution; empty unless [`GenerateOptions::log_probs`] asked for them.
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Passes through the model after the prompt: one per token, or usually fewer with [`GenerateOptions::lookahead`].
    pub passes: usize,
}

/// The options of a batch: the same for all rows, or one for each. Calls take `&options`, `&[options, …]` and `&vec` in
/// its place.
///
/// ```
/// use std::ops::ControlFlow;
/// use hymba::{GenerateOptions, HymbaLm};
/// use hymba::lm::{HymbaLmConfig, LoadOptions};
///
/// # let mut config = HymbaLmConfig::hymba_1_5b();
/// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
/// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
/// let go = |_, _| ControlFlow::Continue(());
/// let options = GenerateOptions::default().max_tokens(5).temperature(1.0).seed(7);
///
/// // four samples of one prompt, and the third of them alone
/// let samples = lm.generate_batch(&[[1, 2, 3]; 4], &options, go)?;
/// let third = lm.generate(&[1, 2, 3], &options.clone().stream(2), |_| ControlFlow::Continue(()))?;
/// assert_eq!(samples[2], third);
///
/// // one row greedy, the other drawn
/// let each = [GenerateOptions::default().max_tokens(2), options];
/// let rows = lm.generate_batch(&[[1, 2, 3], [4, 5, 6]], &each, go)?;
/// assert_eq!(rows[0].ids.len(), 2);
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum RowOptions<'a> {
    /// The same for all rows, except that row i draws from stream `stream + i` of the seed, so that equal prompts give
    /// different samples.
    Shared(&'a GenerateOptions),
    /// Those of each row, as they are.
    Each(&'a [GenerateOptions]),
}

impl<'a> From<&'a GenerateOptions> for RowOptions<'a> {
    fn from(options: &'a GenerateOptions) -> Self {
        RowOptions::Shared(options)
    }
}

impl<'a> From<&'a [GenerateOptions]> for RowOptions<'a> {
    fn from(options: &'a [GenerateOptions]) -> Self {
        RowOptions::Each(options)
    }
}

impl<'a, const N: usize> From<&'a [GenerateOptions; N]> for RowOptions<'a> {
    fn from(options: &'a [GenerateOptions; N]) -> Self {
        RowOptions::Each(options)
    }
}

impl<'a> From<&'a Vec<GenerateOptions>> for RowOptions<'a> {
    fn from(options: &'a Vec<GenerateOptions>) -> Self {
        RowOptions::Each(options)
    }
}

impl RowOptions<'_> {
    /// One for each row.
    fn of(self, rows: usize) -> Result<Vec<GenerateOptions>> {
        match self {
            RowOptions::Shared(options) => {
                let row = |row| options.clone().stream(options.stream.wrapping_add(row as u64));
                Ok((0..rows).map(row).collect())
            }
            RowOptions::Each(options) if options.len() == rows => Ok(options.to_vec()),
            RowOptions::Each(options) => Err(Error::Option {
                option: "options",
                given: format!("a list of {}", options.len()),
                allowed: format!("there are {rows} prompts; give one for each, or a single one for all"),
            }),
        }
    }
}

impl Generation {
    /// The generation for a prompt that was not read to its end.
    pub(super) fn nothing() -> Self {
        Generation { ids: Vec::new(), log_probs: Vec::new(), finish: FinishReason::Cancelled, passes: 0 }
    }
}

/// A row while it is generated.
pub(super) struct Row {
    pub sampler: Sampler,
    pub ids: Vec<u32>,
    pub log_probs: Vec<f32>,
    pub passes: usize,
    /// `None` as long as it goes on.
    pub finish: Option<FinishReason>,
}

impl Row {
    fn ended(self) -> Option<Generation> {
        Some(Generation { finish: self.finish?, ids: self.ids, log_probs: self.log_probs, passes: self.passes })
    }

    /// Adds a choice to the text, or ends the row at a stop token. Returns whether the choice is part of the text.
    pub(super) fn accept(&mut self, choice: Choice, end: &[u32]) -> bool {
        if self.sampler.options().stop_tokens.as_deref().unwrap_or(end).contains(&choice.id) {
            self.finish = Some(FinishReason::StopToken);
            return false;
        }
        self.sampler.observe(choice.id);
        self.ids.push(choice.id);
        self.log_probs.extend(choice.log_prob);
        true
    }
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
    /// Continues a prompt, token by token: `on_token` gets each id as soon as it is chosen, and ends the generation with
    /// [`ControlFlow::Break`].
    ///
    /// Texts longer than the model's `max_position_embeddings` are not refused: see
    /// [`stop_at_max_positions`](GenerateOptions::stop_at_max_positions).
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range, or there are stop strings, which need
    /// a tokenizer (`generate_text`, feature `tokenizer`); [`Error::Tokens`] if the prompt is
    /// empty or has an id that is not in the vocabulary; [`Error::Logits`] if the model gives NaN; and those of the
    /// [`processors`](GenerateOptions::processors).
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

    /// As [`generate`](Self::generate), continuing a state of one row, as in a conversation. Afterwards the state has
    /// seen the prompt and all ids that were returned.
    ///
    /// # Errors
    ///
    /// Those of [`generate`](Self::generate), and [`Error::State`] if the state does not have exactly one row or is of
    /// another model.
    ///
    /// After [`Error::Logits`], or an error of a processor, the state has seen the prompt and exactly the ids that the
    /// callback got: clone it before, if you want to go back. After any other error it is untouched.
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

    /// Continues several prompts of any lengths together, each of which ends on its own. The callback gets the row and the token.
    ///
    /// The options are the same for all rows, or a list of one for each: see [`RowOptions`]. With a list, each row is
    /// what [`generate`](Self::generate) makes of its prompt and its options. With the same for all, row i draws from
    /// the i-th [stream](GenerateOptions::stream) after that of `options`, so that equal prompts give different
    /// samples: it is what `generate` makes with `options.stream(options.stream + i)`. (Row 0, and every row at
    /// temperature 0, is what it makes with `options` as they are.)
    ///
    /// # Errors
    ///
    /// Those of [`generate`](Self::generate), [`Error::Option`] if a list of options is not as long as that of the
    /// prompts, and [`Error::State`] if the states of so many rows do not fit into memory.
    pub fn generate_batch<'a, T: AsRef<[u32]>>(
        &self,
        prompts: &[T],
        options: impl Into<RowOptions<'a>>,
        on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        self.generate_batch_with(&mut self.new_state(prompts.len()), prompts, options, on_token)
    }

    /// As [`generate_batch`](Self::generate_batch), continuing a state.
    ///
    /// # Errors
    ///
    /// Those of [`generate_batch`](Self::generate_batch) and, with what they leave of the state, of
    /// [`generate_with`](Self::generate_with).
    pub fn generate_batch_with<'a, T: AsRef<[u32]>>(
        &self,
        state: &mut LmState,
        prompts: &[T],
        options: impl Into<RowOptions<'a>>,
        mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        let options = options.into();
        let all = match &options {
            RowOptions::Shared(options) => std::slice::from_ref(*options),
            RowOptions::Each(options) => options,
        };
        if let Some(stop) = all.iter().find_map(|options| options.stop_strings.first()) {
            return Err(Error::Option {
                option: "stop_strings",
                given: format!("{stop:?}"),
                allowed: "strings are found in text: use generate_text with a tokenizer, or stop_tokens".into(),
            });
        }
        self.run(state, prompts, &[], options, &mut on_token)
    }

    /// The loop behind all forms of generation. `before` are tokens the state has seen, which the repetition penalty is
    /// to count.
    pub(super) fn run<'a, T: AsRef<[u32]>>(
        &self,
        state: &mut LmState,
        prompts: &[T],
        before: &[u32],
        options: impl Into<RowOptions<'a>>,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Generation>> {
        let options = options.into();
        let watchers: Vec<_> = match options {
            RowOptions::Shared(options) => options.on_prompt.iter().cloned().collect(),
            RowOptions::Each(options) => options.iter().filter_map(|options| options.on_prompt.clone()).collect(),
        };
        let mut rows = Vec::new();
        for (options, prompt) in options.of(prompts.len())?.iter().zip(prompts) {
            let mut sampler = Sampler::new(options)?;
            [before, prompt.as_ref()].iter().for_each(|ids| sampler.observe_prompt(ids));
            rows.push(Row { sampler, ids: Vec::new(), log_probs: Vec::new(), passes: 0, finish: None });
        }
        let fed = self
            .prefill_with(prompts, state, |done, of| watchers.iter().try_for_each(|watcher| watcher.call(done, of)))?;
        let Some(mut logits) = fed else {
            return Ok(rows.iter().map(|_| Generation::nothing()).collect());
        };
        if let ([row], [prompt]) = (&mut rows[..], prompts)
            && row.sampler.options().lookahead > 0
        {
            let seen = [before, prompt.as_ref()].concat();
            row.passes = self.look_ahead(state, seen, row, logits.row(0).to_vec(), &mut |id| on_token(0, id))?;
            return Ok(rows.into_iter().filter_map(Row::ended).collect());
        }
        loop {
            for (row, state) in rows.iter_mut().zip(&state.rows) {
                row.finish = row.finish.or_else(|| self.limit(row, state.position));
            }
            if rows.iter().all(|row| row.finish.is_some()) {
                break;
            }
            // all choices before the first is told of: after an error the state has seen what the callback heard
            let mut choices = vec![None; rows.len()];
            for (i, row) in rows.iter_mut().enumerate().filter(|(_, row)| row.finish.is_none()) {
                choices[i] = Some(row.sampler.pick(logits.row(i).as_slice().unwrap_or_default())?);
            }
            let mut next: Vec<Vec<u32>> = vec![Vec::new(); rows.len()];
            for (i, (row, choice)) in rows.iter_mut().zip(choices).enumerate() {
                let Some(choice) = choice else { continue };
                if !row.accept(choice, &self.config().eos_token_id) {
                    continue;
                }
                next[i].push(choice.id);
                row.passes += 1;
                if on_token(i, choice.id).is_break() {
                    row.finish = Some(FinishReason::Cancelled);
                }
            }
            let first = vec![0; rows.len()];
            self.advance(&next, state, &first, &mut |row, _, new| {
                logits.row_mut(row).assign(&ndarray::ArrayView1::from(&*new));
                Ok(())
            })?;
        }
        Ok(rows.into_iter().filter_map(Row::ended).collect())
    }

    /// Why a row whose next token would stand at `position` cannot have it.
    pub(super) fn limit(&self, row: &Row, position: usize) -> Option<FinishReason> {
        let options = row.sampler.options();
        if row.ids.len() >= options.max_tokens {
            Some(FinishReason::MaxTokens)
        } else if options.stop_at_max_positions && position >= self.config().max_position_embeddings {
            Some(FinishReason::MaxPositions)
        } else {
            None
        }
    }

    /// How likely a continuation of a prompt is, as evaluation harnesses need it.
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
