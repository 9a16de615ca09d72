//! Continuous batching: one thread owns the model and takes steps; sequences join and leave between them.
//!
//! In each step every sequence being generated takes its token, and one of the prompts being read takes a piece, in
//! turns, or several, if they are short: so a sequence never waits for another's prompt for longer than a piece takes.
//! Rows of a batch are what they would be alone, and the pieces of a prompt follow from the request ([`Prompt`]), so
//! that a sequence is bit for bit the same, whatever else is running.

mod sequence;
#[cfg(test)]
pub mod tests;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use hymba::HymbaLm;
use hymba::lm::{FinishReason, GenerateOptions, Tokenizer};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use super::error::Failure;
use super::metrics::{End, Metrics};
use super::prefix::PrefixCache;
use super::prompt::Prompt;
use sequence::{Reading, Writing};

/// One prompt, and what is to follow it.
pub struct Job {
    pub prompt: Prompt,
    /// One for each continuation.
    pub choices: Vec<GenerateOptions>,
    /// The number of the first one among those that share the channel.
    pub first_choice: usize,
    /// Alternatives reported beside a token's log-probability; `None` reports neither.
    pub log_probs: Option<usize>,
    /// Whether the prompt's tokens get log-probabilities, too.
    pub score_prompt: bool,
    pub events: UnboundedSender<(usize, Event)>,
    pub deadline: Instant,
    /// Given back when all is over.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// An event of a continuation. `End` or `Failed` comes last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt was read, `cached` tokens of it from the cache; with the log-probabilities of its tokens from the
    /// second on, if asked for.
    Prompt {
        cached: usize,
        scores: Vec<Score>,
    },
    /// A token, and the text that is certain with it.
    Token {
        text: String,
        score: Score,
    },
    /// The end, the text that was held back, and the stop token, if it was one.
    End {
        text: String,
        finish: FinishReason,
        stop: Option<Score>,
    },
    Failed(Failure),
}

/// A token, ln P of it, and of the most probable ones, where asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Score {
    pub id: u32,
    pub log_prob: Option<f32>,
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Sequences at a time.
    pub rows: usize,
    /// Tokens of prompts in a step, unless a piece alone has more.
    pub piece: usize,
    /// Bytes of cached states.
    pub cache_bytes: usize,
}

/// The thread with the model.
pub struct Engine {
    jobs: Mutex<Option<Sender<Job>>>,
    abort: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    pub fn start(
        lm: Arc<HymbaLm>,
        tokenizer: Tokenizer,
        options: EngineOptions,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        let abort = Arc::new(AtomicBool::new(false));
        let flag = abort.clone();
        let work = move || {
            // a panic that a step does not catch loses the current sequences, whose clients get an error, and nothing
            // else
            while catch_unwind(AssertUnwindSafe(|| {
                Loop::new(&lm, &tokenizer, &options, &metrics, &flag).run(&receiver);
            }))
            .is_err()
            {}
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(work)?;
        Ok(Engine { jobs: Mutex::new(Some(sender)), abort, thread: Mutex::new(Some(thread)) })
    }

    /// Hands over a job; gives it back when the engine has been told to stop.
    pub fn submit(&self, job: Job) -> Result<(), Box<Job>> {
        match lock(&self.jobs).as_ref() {
            Some(jobs) => jobs.send(job).map_err(|refused| Box::new(refused.0)),
            None => Err(Box::new(job)),
        }
    }

    /// Takes no more jobs; those that it has are finished.
    pub fn close(&self) {
        lock(&self.jobs).take();
    }

    /// Ends the jobs that are left, too.
    pub fn abort(&self) {
        self.close();
        self.abort.store(true, Ordering::Relaxed);
    }

    /// Waits until everything is over, after [`close`](Self::close) or [`abort`](Self::abort).
    pub fn join(&self) {
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

struct Loop<'a> {
    lm: &'a HymbaLm,
    tokenizer: &'a Tokenizer,
    options: &'a EngineOptions,
    metrics: &'a Metrics,
    abort: &'a AtomicBool,
    cache: PrefixCache,
    waiting: VecDeque<Sequences>,
    reading: VecDeque<Reading>,
    /// Whether the one that waits longest among them was passed in the last step.
    passed: bool,
    writing: Vec<Writing>,
}

/// A job in its place in the queue, counted.
struct Sequences {
    job: Job,
    since: Instant,
}

impl<'a> Loop<'a> {
    fn new(
        lm: &'a HymbaLm,
        tokenizer: &'a Tokenizer,
        options: &'a EngineOptions,
        metrics: &'a Metrics,
        abort: &'a AtomicBool,
    ) -> Self {
        let cache = PrefixCache::new(options.cache_bytes);
        let (waiting, reading, writing) = (VecDeque::new(), VecDeque::new(), Vec::new());
        Loop { lm, tokenizer, options, metrics, abort, cache, waiting, reading, passed: false, writing }
    }

    /// Until nobody can send jobs any more and all have ended.
    fn run(&mut self, jobs: &Receiver<Job>) {
        loop {
            let idle = self.waiting.is_empty() && self.reading.is_empty() && self.writing.is_empty();
            if idle {
                self.report();
                match jobs.recv() {
                    Ok(job) => self.take(job),
                    Err(_) => return,
                }
            }
            while let Ok(job) = jobs.try_recv() {
                self.take(job);
            }
            self.drop_ended();
            self.admit();
            self.report();
            self.step();
        }
    }

    fn take(&mut self, job: Job) {
        self.metrics.accepted.add(job.choices.len());
        self.metrics.prompt_tokens.add(job.prompt.ids.len());
        self.waiting.push_back(Sequences { job, since: Instant::now() });
    }

    /// Drops sequences that no client waits for or that took too long, and all of them on abort.
    fn drop_ended(&mut self) {
        let (now, stop) = (Instant::now(), self.abort.load(Ordering::Relaxed));
        let why = |events: &UnboundedSender<(usize, Event)>, deadline: Instant| {
            if events.is_closed() {
                Some((End::Cancelled, Failure::Stopped))
            } else if stop {
                Some((End::Failed, Failure::Stopped))
            } else if now >= deadline {
                Some((End::Timeout, Failure::Timeout))
            } else {
                None
            }
        };
        let metrics = self.metrics;
        self.waiting.retain(|sequences| {
            let job = &sequences.job;
            let Some((end, failure)) = why(&job.events, job.deadline) else { return true };
            for choice in 0..job.choices.len() {
                metrics.end(end);
                let _ = job.events.send((job.first_choice + choice, Event::Failed(failure.clone())));
            }
            false
        });
        self.reading.retain_mut(|reading| match why(reading.events(), reading.deadline()) {
            Some((end, failure)) => {
                reading.fail(metrics, end, &failure);
                false
            }
            None => true,
        });
        self.writing.retain_mut(|writing| match why(writing.events(), writing.deadline()) {
            Some((end, failure)) => {
                writing.fail(metrics, end, failure);
                false
            }
            None => true,
        });
    }

    /// Admits waiting jobs, in the order in which they came, while there are rows.
    fn admit(&mut self) {
        let mut rows = self.writing.len() + self.reading.iter().map(Reading::rows).sum::<usize>();
        while let Some(next) = self.waiting.front() {
            if rows > 0 && rows + next.job.choices.len() > self.options.rows {
                return;
            }
            let Some(Sequences { job, since }) = self.waiting.pop_front() else { return };
            rows += job.choices.len();
            // log-probabilities of a prompt need all of it
            let known = if job.score_prompt { None } else { self.cache.find(&job.prompt) };
            let (pieces, state) = known.unwrap_or_else(|| (0, self.lm.new_state(1)));
            let fits = state.batch() == 1;
            let mut reading = Reading::new(job, since, pieces, state);
            if !fits {
                rows -= reading.rows();
                let failure = Failure::Internal("there is no memory for another sequence".into());
                reading.fail(self.metrics, End::Failed, &failure);
                continue;
            }
            self.metrics.cached_tokens.add(reading.cached());
            self.reading.push_back(reading);
        }
    }

    fn report(&self) {
        let metrics = self.metrics;
        metrics.waiting.set(self.waiting.iter().map(|sequences| sequences.job.choices.len()).sum());
        metrics.reading.set(self.reading.iter().map(Reading::rows).sum());
        metrics.writing.set(self.writing.len());
        metrics.cache_bytes.set(self.cache.bytes());
        metrics.cache_entries.set(self.cache.len());
    }

    /// One pass through the model.
    fn step(&mut self) {
        let mut reading = self.next_pieces();
        if reading.is_empty() && self.writing.is_empty() {
            return;
        }
        let metrics = self.metrics;
        let failure = match catch_unwind(AssertUnwindSafe(|| self.pass(&mut reading))) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Failure::Internal(error.to_string())),
            Err(_) => Some(Failure::Internal("the model panicked".into())),
        };
        self.writing.retain(|writing| !writing.is_over());
        if let Some(failure) = failure {
            self.writing.drain(..).for_each(|mut writing| writing.fail(metrics, End::Failed, failure.clone()));
            reading.iter_mut().for_each(|reading| reading.fail(metrics, End::Failed, &failure));
            return;
        }
        for reading in reading {
            reading.offer(&mut self.cache);
            if reading.is_done() {
                self.writing.extend(reading.finish(self.tokenizer, self.lm, metrics));
            } else {
                self.reading.push_back(reading);
            }
        }
    }

    /// The prompts whose next pieces are read together: at least one, if there is any, and others that fit. The one with the least to
    /// read goes first, and in the next step the one that it has passed, so that a short prompt need not wait for a long one, nor the
    /// long one for many short ones.
    fn next_pieces(&mut self) -> Vec<Reading> {
        let shortest = (0..self.reading.len()).min_by_key(|&i| self.reading[i].left()).filter(|_| !self.passed);
        self.passed = shortest.is_some_and(|i| i > 0);
        let (mut next, mut tokens, mut at) = (Vec::new(), 0, shortest.unwrap_or(0));
        while let Some(reading) = self.reading.get(at) {
            let piece = reading.piece().len();
            if next.is_empty() {
                next.extend(self.reading.remove(at));
                (tokens, at) = (piece, 0);
            } else if tokens + piece <= self.options.piece {
                next.extend(self.reading.remove(at));
                tokens += piece;
            } else {
                at += 1;
            }
        }
        next
    }

    /// Each sequence being generated takes its token and chooses the next; prompts get the logits they want.
    fn pass(&mut self, reading: &mut [Reading]) -> hymba::Result<()> {
        let (metrics, writing) = (self.metrics, &mut self.writing);
        let next = writing.iter().map(|writing| vec![writing.next()]);
        let rows: Vec<Vec<u32>> = next.chain(reading.iter().map(|reading| reading.piece().to_vec())).collect();
        let first: Vec<usize> = writing.iter().map(|_| 0).chain(reading.iter().map(Reading::first)).collect();
        let states = writing.iter_mut().filter_map(Writing::take_state);
        let mut states = states.chain(reading.iter_mut().filter_map(Reading::take_state));
        let Some(mut state) = states.next() else { return Ok(()) };
        states.try_for_each(|other| state.append(other))?;
        metrics.steps.add(1);
        metrics.rows.add(rows.len());
        let count = writing.len();
        // from the logits as they are: they are large
        self.lm.prefill_each(&rows, &mut state, &first, |row, i, logits| match row.checked_sub(count) {
            None => writing[row].choose(logits, metrics),
            Some(row) => reading[row].hear(i, logits),
        })?;
        let mut states = state.into_rows().into_iter();
        writing.iter_mut().for_each(|writing| writing.put_state(states.next()));
        reading.iter_mut().for_each(|reading| reading.read(states.next()));
        Ok(())
    }
}
