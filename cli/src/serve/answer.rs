//! From the engine's events to the answers that OpenAI's clients read: whole, or piece by piece.

mod streaming;

use std::sync::Arc;

use hymba::lm::FinishReason;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::engine::{Event, Score};
use super::error::{ApiError, ApiResult};
use super::tools;
use super::vocabulary::Vocabulary;

pub type Events = UnboundedReceiver<(usize, Event)>;

/// The fields that all parts of an answer share, and how the answer is written.
pub struct Answer {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub kind: Kind,
    /// Continuations.
    pub choices: usize,
    /// Continuations of each prompt.
    pub per_prompt: usize,
    pub prompt_tokens: usize,
    pub log_probs: bool,
    pub include_usage: bool,
    pub vocabulary: Arc<Vocabulary>,
}

pub enum Kind {
    Chat {
        /// Whether calls of tools are looked for.
        tools: bool,
    },
    /// The prompts, if the answer begins with them.
    Completion { echo: Option<Vec<Echo>> },
}

/// A prompt that an answer begins with.
pub struct Echo {
    pub text: String,
    pub ids: Vec<u32>,
    /// Whether special tokens are spelled out in the text: as they are where ids were given.
    pub spells_special: bool,
}

/// One continuation, as far as it is known.
#[derive(Default, Clone)]
struct Written {
    text: String,
    scores: Vec<Score>,
    tokens: usize,
    /// Characters told of, in a list of tokens that comes piece by piece.
    offset: usize,
    finish: Option<&'static str>,
}

fn reason(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::MaxTokens | FinishReason::MaxPositions => "length",
        _ => "stop",
    }
}

impl Answer {
    /// Waits for all of it.
    pub async fn whole(self, mut events: Events) -> ApiResult<Value> {
        let mut written = vec![Written::default(); self.choices];
        let mut of_prompts = vec![Vec::new(); self.choices.div_ceil(self.per_prompt)];
        let (mut left, mut cached) = (self.choices, 0);
        while left > 0 {
            let (index, event) = events.recv().await.ok_or_else(|| ApiError::internal("a sequence was lost"))?;
            let choice = &mut written[index];
            match event {
                Event::Prompt { cached: known, scores } => {
                    cached += known;
                    of_prompts[index / self.per_prompt] = scores;
                }
                Event::Token { text, score } => {
                    choice.text += &text;
                    if self.log_probs {
                        choice.scores.push(score);
                    }
                    choice.tokens += 1;
                }
                Event::End { text, finish, stop } => {
                    choice.text += &text;
                    choice.scores.extend(stop);
                    choice.finish = Some(reason(finish));
                    left -= 1;
                }
                Event::Failed(failure) => return Err(failure.into()),
            }
        }
        let tokens = written.iter().map(|choice| choice.tokens).sum();
        let choices: Vec<Value> =
            written.into_iter().enumerate().map(|(i, choice)| self.choice(i, choice, &of_prompts)).collect();
        let mut answer = self.head(false);
        answer["choices"] = Value::from(choices);
        answer["usage"] = self.usage(tokens, cached);
        Ok(answer)
    }

    fn choice(&self, index: usize, written: Written, of_prompts: &[Vec<Score>]) -> Value {
        match &self.kind {
            Kind::Chat { tools } => {
                let (text, calls) = match tools {
                    true => tools::calls(&written.text, &self.choice_id(index)),
                    false => (written.text, Vec::new()),
                };
                let mut message = json!({"role": "assistant", "content": &text, "refusal": null});
                let mut finish = written.finish;
                if !calls.is_empty() {
                    if text.is_empty() {
                        message["content"] = Value::Null;
                    }
                    message["tool_calls"] = Value::from(calls);
                    finish = Some("tool_calls");
                }
                let log_probs = self.chat_log_probs(&written.scores);
                json!({"index": index, "message": message, "logprobs": log_probs, "finish_reason": finish})
            }
            Kind::Completion { echo } => {
                let prompt = index / self.per_prompt;
                let echo = echo.as_ref().map(|echo| &echo[prompt]);
                let log_probs = self.log_probs.then(|| {
                    let mut list = TokenList::new(&self.vocabulary, 0);
                    if let Some(echo) = echo {
                        list.push_prompt(echo, &of_prompts[prompt]);
                    }
                    written.scores.iter().for_each(|score| list.push(score));
                    list.value()
                });
                let text = echo.map_or(String::new(), |echo| echo.text.clone()) + &written.text;
                json!({"index": index, "text": text, "logprobs": log_probs, "finish_reason": written.finish})
            }
        }
    }

    /// By which calls of tools are named.
    fn choice_id(&self, index: usize) -> String {
        format!("{}_{index}", self.id)
    }

    fn head(&self, chunk: bool) -> Value {
        let object = match (&self.kind, chunk) {
            (Kind::Chat { .. }, false) => "chat.completion",
            (Kind::Chat { .. }, true) => "chat.completion.chunk",
            (Kind::Completion { .. }, _) => "text_completion",
        };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": []})
    }

    fn usage(&self, tokens: usize, cached: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    /// The log-probabilities of a chat's tokens.
    fn chat_log_probs(&self, scores: &[Score]) -> Value {
        if !self.log_probs {
            return Value::Null;
        }
        let token = |id: u32, log_prob: Option<f32>| {
            let (shown, bytes) = (self.vocabulary.shown(id), self.vocabulary.bytes(id));
            json!({"token": shown, "logprob": log_prob, "bytes": bytes})
        };
        let scores = scores.iter().map(|score| {
            let mut value = token(score.id, score.log_prob);
            value["top_logprobs"] = score.top.iter().map(|&(id, log_prob)| token(id, Some(log_prob))).collect();
            value
        });
        json!({"content": scores.collect::<Vec<Value>>()})
    }
}

/// Log-probabilities in the form of OpenAI's older endpoint, completions.
struct TokenList<'a> {
    vocabulary: &'a Vocabulary,
    tokens: Vec<String>,
    log_probs: Vec<Option<f32>>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    offset: usize,
}

impl<'a> TokenList<'a> {
    /// Of tokens in front of which the text has `offset` characters.
    fn new(vocabulary: &'a Vocabulary, offset: usize) -> Self {
        let (tokens, log_probs, top, offsets) = Default::default();
        TokenList { vocabulary, tokens, log_probs, top, offsets, offset }
    }

    /// The tokens of a prompt, of which the first has no log-probability.
    fn push_prompt(&mut self, echo: &Echo, scores: &[Score]) {
        let width = |&id: &u32| self.vocabulary.characters(id, echo.spells_special);
        // the space that encoding puts in front is not in the text
        let mut added = echo.ids.iter().map(width).sum::<usize>().saturating_sub(echo.text.chars().count());
        let first = echo.ids.first().map(|&id| Score { id, log_prob: None, top: Vec::new() });
        for score in first.iter().chain(scores) {
            let width = self.vocabulary.characters(score.id, echo.spells_special);
            let left_out = added.min(width);
            added -= left_out;
            self.add(score, width - left_out);
        }
    }

    fn push(&mut self, score: &Score) {
        self.add(score, self.vocabulary.characters(score.id, false));
    }

    /// A token that has so many characters in the text.
    fn add(&mut self, score: &Score, characters: usize) {
        let shown = self.vocabulary.shown(score.id);
        self.offsets.push(self.offset);
        self.offset += characters;
        self.log_probs.push(score.log_prob);
        let mut top = Map::new();
        let all = score.top.iter().copied().chain(score.log_prob.map(|log_prob| (score.id, log_prob)));
        for (id, log_prob) in all {
            // of several tokens that look the same the most probable
            top.entry(self.vocabulary.shown(id)).or_insert_with(|| Value::from(log_prob));
        }
        self.top.push(if score.log_prob.is_some() { Value::Object(top) } else { Value::Null });
        self.tokens.push(shown);
    }

    fn value(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.log_probs,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        })
    }
}
