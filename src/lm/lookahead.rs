//! Speculative decoding by look-up: what followed the last tokens where they stood before is a guess of what follows now. Several
//! guessed tokens pass through the model together, and are kept as far as the model chooses the same.
//!
//! The pass computes each token as if it came alone ([`HymbaLm::step_through`]), and the sampler is asked token by token, so that
//! nothing differs from decoding without a guess. A state cannot be cut back: a copy from before the pass takes its place where
//! a guess was wrong, and the tokens that were right pass once more, together with the next guess.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use super::generate::{FinishReason, Row};
use super::model::HymbaLm;
use super::state::LmState;
use crate::Result;
use crate::layers::SequenceState;

/// Tokens that must have occurred before for a guess: as many as possible.
const FEWEST: usize = 2;
const MOST: usize = 4;

/// A pass with a guess in it.
struct GuessedPass {
    /// The state before it.
    before: SequenceState,
    /// Its tokens that are part of the text.
    right: Vec<u32>,
    /// Guessed tokens that the model has not been asked about yet, with the logits after each.
    guessed: VecDeque<(u32, Vec<f32>)>,
}

impl HymbaLm {
    /// Generates a row whose prompt is in the only row of `state`, with these `logits` after it; `seen` is the text so far. Returns the
    /// number of passes.
    pub(super) fn look_ahead(
        &self,
        state: &mut LmState,
        seen: Vec<u32>,
        row: &mut Row,
        logits: Vec<f32>,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<usize> {
        let mut pass = None;
        let mut passes = self.guess_and_check(state, seen, row, logits, &mut pass, on_token);
        // whatever has ended it, the state has seen the text and no guess
        if let Some(GuessedPass { before, right, guessed }) = pass
            && !guessed.is_empty()
        {
            state.rows[0] = before;
            self.step_through(&right, state, right.len());
            passes = passes.map(|passes| passes + 1);
        }
        passes
    }

    fn guess_and_check(
        &self,
        state: &mut LmState,
        mut seen: Vec<u32>,
        row: &mut Row,
        mut logits: Vec<f32>,
        pass: &mut Option<GuessedPass>,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<usize> {
        let (position, mut passes) = (state.rows[0].position, 0);
        loop {
            row.finish = row.finish.or_else(|| self.limit(row, position + row.ids.len()));
            if row.finish.is_some() {
                return Ok(passes);
            }
            let choice = row.sampler.pick(&logits)?;
            if !row.accept(choice, &self.config().eos_token_id) {
                return Ok(passes);
            }
            seen.push(choice.id);
            if on_token(choice.id).is_break() {
                row.finish = Some(FinishReason::Cancelled);
            }
            let mut tokens = Vec::new();
            if let Some(mut last) = pass.take() {
                match last.guessed.pop_front() {
                    Some((guess, after)) if guess == choice.id => {
                        logits = after;
                        last.right.push(guess);
                        *pass = Some(last);
                        continue;
                    }
                    Some(_) => {
                        state.rows[0] = last.before;
                        tokens = last.right;
                    }
                    None => {}
                }
            }
            tokens.push(choice.id);
            let left = row.sampler.options().max_tokens - row.ids.len();
            let most = if row.finish.is_some() { 0 } else { left.min(row.sampler.options().lookahead) };
            let guess = guess(&seen, most).to_vec();
            let right = tokens.clone();
            tokens.extend(&guess);
            let before = (!guess.is_empty()).then(|| state.rows[0].clone());
            let all = self.step_through(&tokens, state, right.len() - 1);
            passes += 1;
            let mut all = all.rows().into_iter().map(|row| row.to_vec());
            logits = all.next().unwrap_or_default();
            *pass = before.map(|before| GuessedPass { before, right, guessed: guess.into_iter().zip(all).collect() });
        }
    }
}

/// At most `most` tokens that followed the last tokens of `seen` where these occurred before: the longest match, at its
/// latest occurrence.
fn guess(seen: &[u32], most: usize) -> &[u32] {
    if most == 0 {
        return &[];
    }
    for length in (FEWEST..=MOST).rev() {
        let Some(rest) = seen.len().checked_sub(length) else { continue };
        let last = &seen[rest..];
        if let Some(start) = (0..rest).rev().find(|&start| seen[start..start + length] == *last) {
            let from = start + length;
            return &seen[from..seen.len().min(from + most)];
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lm::{GenerateOptions, HymbaLmConfig, LoadOptions, LogitsProcessor, Sampler};

    #[test]
    fn a_guess_is_what_followed_the_longest_run_the_last_time() {
        assert_eq!(guess(&[1, 2, 3, 4, 9, 2, 3, 5, 7, 2, 3], 3), [5, 7, 2]);
        assert_eq!(guess(&[1, 2, 3, 4, 9, 2, 3, 5, 7, 1, 2, 3], 2), [4, 9]);
        assert_eq!(guess(&[8, 8, 8], 5), [8]);
        assert!(guess(&[1, 2, 3, 1], 5).is_empty() && guess(&[1, 2, 1, 2], 0).is_empty() && guess(&[], 5).is_empty());
    }

    /// Tokens 0 to 4 in turn, whatever the model says.
    #[derive(Clone)]
    struct InTurn {
        next: usize,
    }

    impl LogitsProcessor for InTurn {
        fn observe(&mut self, id: u32) {
            self.next = (id as usize + 1) % 5;
        }

        fn process(&mut self, logits: &mut [f32]) -> Result<()> {
            logits[self.next] = 1e6;
            Ok(())
        }
    }

    #[test]
    fn text_that_repeats_itself_takes_fewer_passes() {
        let mut config = HymbaLmConfig::hymba_1_5b();
        (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
        let lm = HymbaLm::random(config, 0, &LoadOptions::default()).unwrap();
        let passes = |lookahead| {
            let options = GenerateOptions::default().max_tokens(100).stop_tokens(vec![]).lookahead(lookahead);
            let sampler = Sampler::new(&options.processor(InTurn { next: 4 })).unwrap();
            let mut row = Row { sampler, ids: Vec::new(), log_probs: Vec::new(), passes: 0, finish: None };
            let mut state = lm.new_state(1);
            let logits = lm.prefill_ragged(&[[1, 2, 3]], &mut state).unwrap().row(0).to_vec();
            let go = &mut |_| ControlFlow::Continue(());
            let passes = lm.look_ahead(&mut state, vec![1, 2, 3], &mut row, logits, go).unwrap();
            assert_eq!((row.ids.len(), state.lengths()), (100, vec![103]));
            (passes, row.ids)
        };
        let ((plain, text), (ahead, same)) = (passes(0), passes(8));
        assert_eq!((plain, &text[..7]), (100, &[4, 0, 1, 2, 3, 4, 0][..]));
        assert_eq!(text, same);
        // until the text repeats itself, one token a pass; then five guessed ones and the next
        assert!(ahead <= 25, "{ahead} passes");
    }
}
