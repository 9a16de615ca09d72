//! A prompt while it is read, and a sequence while it is generated.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use hymba::HymbaLm;
use hymba::lm::{FinishReason, GenerateOptions, LmState, Sampler, StopStream, Tokenizer, log_probs};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use super::{Event, Failure, Job, Score};
use crate::serve::metrics::{End, Metrics};
use crate::serve::prefix::PrefixCache;
use crate::serve::prompt::Prompt;

/// What all sequences of a job have in common.
struct Common {
    events: UnboundedSender<(usize, Event)>,
    log_probs: Option<usize>,
    deadline: Instant,
    since: Instant,
    _permit: Option<OwnedSemaphorePermit>,
}

pub struct Reading {
    common: Arc<Common>,
    prompt: Prompt,
    choices: Vec<GenerateOptions>,
    first_choice: usize,
    scores_prompt: bool,
    /// Pieces that are done.
    pieces: usize,
    cached: usize,
    scores: Vec<Score>,
    /// The logits after the prompt.
    last: Vec<f32>,
    state: Option<LmState>,
}

impl Reading {
    pub fn new(job: Job, since: Instant, pieces: usize, state: LmState) -> Self {
        let Job { prompt, choices, first_choice, log_probs, score_prompt, events, deadline, permit } = job;
        let common = Arc::new(Common { events, log_probs, deadline, since, _permit: permit });
        let cached = pieces.checked_sub(1).map_or(0, |last| prompt.cuts[last]);
        Reading {
            common,
            prompt,
            choices,
            first_choice,
            scores_prompt: score_prompt,
            pieces,
            cached,
            scores: Vec::new(),
            last: Vec::new(),
            state: Some(state),
        }
    }

    pub fn rows(&self) -> usize {
        self.choices.len()
    }

    pub fn cached(&self) -> usize {
        self.cached
    }

    pub fn events(&self) -> &UnboundedSender<(usize, Event)> {
        &self.common.events
    }

    pub fn deadline(&self) -> Instant {
        self.common.deadline
    }

    fn start(&self) -> usize {
        self.pieces.checked_sub(1).map_or(0, |last| self.prompt.cuts[last])
    }

    /// Tokens that are still to be read.
    pub fn left(&self) -> usize {
        self.prompt.ids.len() - self.start()
    }

    /// What is read next.
    pub fn piece(&self) -> &[u32] {
        &self.prompt.ids[self.start()..self.prompt.cuts[self.pieces]]
    }

    /// The first of its tokens after which logits are wanted.
    pub fn first(&self) -> usize {
        let length = self.piece().len();
        match (self.scores_prompt, self.pieces + 1 == self.prompt.cuts.len()) {
            (true, _) => 0,
            (false, true) => length - 1,
            (false, false) => length,
        }
    }

    pub fn take_state(&mut self) -> Option<LmState> {
        self.state.take()
    }

    /// Takes the logits after a token of the piece.
    pub fn hear(&mut self, i: usize, logits: &[f32]) {
        let at = self.start() + i + 1;
        if self.scores_prompt
            && let Some(&id) = self.prompt.ids.get(at)
        {
            self.scores.push(score(logits, id, self.common.log_probs));
        }
        if at == self.prompt.ids.len() {
            self.last = logits.to_vec();
        }
    }

    /// The piece is done.
    pub fn read(&mut self, state: Option<LmState>) {
        self.state = state;
        self.pieces += 1;
    }

    pub fn offer(&self, cache: &mut PrefixCache) {
        if let Some(state) = &self.state {
            cache.offer(&self.prompt, self.pieces, state);
        }
    }

    pub fn is_done(&self) -> bool {
        self.pieces == self.prompt.cuts.len()
    }

    pub fn fail(&mut self, metrics: &Metrics, end: End, failure: &Failure) {
        for choice in 0..self.choices.len() {
            metrics.end(end);
            let _ = self.common.events.send((self.first_choice + choice, Event::Failed(failure.clone())));
        }
    }

    /// The sequences that go on from here, each with its first token.
    pub fn finish(mut self, tokenizer: &Tokenizer, lm: &HymbaLm, metrics: &Metrics) -> Vec<Writing> {
        let scores = std::mem::take(&mut self.scores);
        let _ = self.common.events.send((self.first_choice, Event::Prompt { cached: self.cached, scores }));
        let Some(state) = self.state.take() else { return Vec::new() };
        let (mut state, last, mut all) = (Some(state), self.choices.len().saturating_sub(1), Vec::new());
        for (i, options) in self.choices.into_iter().enumerate() {
            let (index, common) = (self.first_choice + i, self.common.clone());
            let begun = catch_unwind(AssertUnwindSafe(|| {
                Writing::new(common, index, options, &self.prompt.ids, tokenizer, lm)
            }));
            match begun {
                Ok(Ok(mut writing)) => {
                    writing.choose(&self.last, metrics);
                    if !writing.is_over() {
                        // many bytes: the last needs no copy
                        writing.state = if i == last { state.take() } else { state.clone() };
                        all.push(writing);
                    }
                }
                failed => {
                    let reason = match failed {
                        Ok(Err(error)) => Failure::Refused(error.to_string()),
                        _ => Failure::Internal("it cannot begin".into()),
                    };
                    metrics.end(End::Failed);
                    let _ = self.common.events.send((index, Event::Failed(reason)));
                }
            }
        }
        all
    }
}

pub struct Writing {
    common: Arc<Common>,
    index: usize,
    sampler: Sampler,
    max_tokens: usize,
    stop_tokens: Vec<u32>,
    text: StopStream,
    count: usize,
    next: u32,
    state: Option<LmState>,
    /// Whether its end has been told.
    over: bool,
}

impl Writing {
    fn new(
        common: Arc<Common>,
        index: usize,
        options: GenerateOptions,
        prompt: &[u32],
        tokenizer: &Tokenizer,
        lm: &HymbaLm,
    ) -> hymba::Result<Self> {
        let mut sampler = Sampler::new(&options)?;
        sampler.observe_prompt(prompt);
        let text = StopStream::new(tokenizer.stream_after(prompt), options.stop_strings.iter().cloned())?;
        let stop_tokens = options.stop_tokens.clone().unwrap_or_else(|| lm.config().eos_token_id.clone());
        let max_tokens = options.max_tokens;
        Ok(Writing {
            common,
            index,
            sampler,
            max_tokens,
            stop_tokens,
            text,
            count: 0,
            next: 0,
            state: None,
            over: false,
        })
    }

    pub fn events(&self) -> &UnboundedSender<(usize, Event)> {
        &self.common.events
    }

    pub fn deadline(&self) -> Instant {
        self.common.deadline
    }

    /// The token that the model takes next.
    pub fn next(&self) -> u32 {
        self.next
    }

    pub fn take_state(&mut self) -> Option<LmState> {
        self.state.take()
    }

    pub fn put_state(&mut self, state: Option<LmState>) {
        self.state = state;
    }

    pub fn is_over(&self) -> bool {
        self.over
    }

    pub fn fail(&mut self, metrics: &Metrics, end: End, failure: Failure) {
        self.end(metrics, end, Event::Failed(failure));
    }

    fn end(&mut self, metrics: &Metrics, end: End, last: Event) {
        self.over = true;
        metrics.end(end);
        self.send(last);
    }

    fn send(&self, event: Event) {
        // nobody listening is noticed before the next step
        let _ = self.common.events.send((self.index, event));
    }

    /// Chooses the next token, or ends.
    pub fn choose(&mut self, logits: &[f32], metrics: &Metrics) {
        match catch_unwind(AssertUnwindSafe(|| self.advance(logits, metrics))) {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(finish))) => {
                let text = self.text.finish();
                let stop = (finish == FinishReason::StopToken).then(|| score(logits, self.next, self.common.log_probs));
                let end = if finish == FinishReason::MaxTokens { End::Length } else { End::Stop };
                self.end(metrics, end, Event::End { text, finish, stop });
                metrics.whole.observe(self.common.since.elapsed());
            }
            Ok(Err(error)) => self.fail(metrics, End::Failed, Failure::Internal(error.to_string())),
            Err(_) => self.fail(metrics, End::Failed, Failure::Internal("choosing a token panicked".into())),
        }
    }

    /// As `HymbaLm::generate` does it, for one token.
    fn advance(&mut self, logits: &[f32], metrics: &Metrics) -> hymba::Result<Option<FinishReason>> {
        if self.count >= self.max_tokens {
            return Ok(Some(FinishReason::MaxTokens));
        }
        let choice = self.sampler.pick(logits)?;
        if self.count == 0 {
            metrics.first_token.observe(self.common.since.elapsed());
        }
        self.next = choice.id;
        if self.stop_tokens.contains(&choice.id) {
            return Ok(Some(FinishReason::StopToken));
        }
        self.sampler.observe(choice.id);
        self.count += 1;
        metrics.generated_tokens.add(1);
        let text = self.text.push(choice.id).to_owned();
        self.send(Event::Token { text, score: score(logits, choice.id, self.common.log_probs) });
        Ok(if self.text.stopped().is_some() {
            Some(FinishReason::StopString)
        } else if self.count >= self.max_tokens {
            Some(FinishReason::MaxTokens)
        } else {
            None
        })
    }
}

/// The log-probability that the model gives to a token, and those of the `alternatives` most probable ones.
fn score(logits: &[f32], id: u32, alternatives: Option<usize>) -> Score {
    let Some(count) = alternatives else { return Score { id, log_prob: None, top: Vec::new() } };
    let log_prob = log_probs(logits);
    let candidates = if count == 0 { 0 } else { logits.len() };
    let mut order: Vec<u32> = (0..candidates as u32).collect();
    let descending = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, descending);
    }
    order.truncate(count);
    order.sort_by(descending);
    let top = order.into_iter().filter_map(|id| Some((id, log_prob(id)?))).collect();
    Score { id, log_prob: log_prob(id), top }
}
