//! An answer piece by piece, by server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Map, Value, json};

use super::{Answer, Events, Kind, TokenList, Written, reason};
use crate::serve::engine::{Event, Score};
use crate::serve::error::ApiError;
use crate::serve::tools::{Part, Parts};

impl Answer {
    /// Tells of it as it comes, by server-sent events.
    pub fn stream(self, events: Events) -> Response {
        let written = vec![Written::default(); self.choices];
        let left = self.choices;
        let parts = match self.kind {
            Kind::Chat { tools: true } => (0..self.choices).map(|index| Parts::new(self.choice_id(index))).collect(),
            _ => Vec::new(),
        };
        let queue = VecDeque::new();
        let streaming = Streaming { answer: self, events, written, left, cached: 0, parts, queue, over: false };
        let events = stream::unfold(streaming, |mut streaming| async {
            let data = streaming.next().await?;
            Some((Ok::<_, Infallible>(SseEvent::default().data(data)), streaming))
        });
        Sse::new(events).keep_alive(KeepAlive::default()).into_response()
    }
}

struct Streaming {
    answer: Answer,
    events: Events,
    written: Vec<Written>,
    left: usize,
    cached: usize,
    /// Of each continuation, where tools may be called.
    parts: Vec<Parts>,
    queue: VecDeque<String>,
    over: bool,
}

impl Streaming {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.queue.pop_front() {
                return Some(data);
            }
            if self.over {
                return None;
            }
            let failure = match self.events.recv().await {
                Some((_, Event::Failed(failure))) => Some(ApiError::from(failure)),
                Some((index, event)) => {
                    self.hear(index, event);
                    None
                }
                None => Some(ApiError::internal("a sequence was lost")),
            };
            if let Some(failure) = failure {
                self.queue.push_back(failure.body().to_string());
                self.over = true;
            } else if self.left == 0 {
                if self.answer.include_usage {
                    let mut last = self.answer.head(true);
                    let tokens = self.written.iter().map(|written| written.tokens).sum();
                    last["usage"] = self.answer.usage(tokens, self.cached);
                    self.queue.push_back(last.to_string());
                }
                self.queue.push_back("[DONE]".into());
                self.over = true;
            }
        }
    }

    fn hear(&mut self, index: usize, event: Event) {
        match event {
            Event::Prompt { cached, scores } => {
                self.cached += cached;
                for choice in index..index + self.answer.per_prompt {
                    self.begin(choice, &scores);
                }
            }
            Event::Token { text, score } => {
                self.written[index].tokens += 1;
                self.piece(index, text, &[score], None);
            }
            Event::End { text, finish, stop } => {
                self.left -= 1;
                let scores: Vec<Score> = stop.into_iter().collect();
                self.piece(index, text, &scores, Some(reason(finish)));
            }
            Event::Failed(_) => {}
        }
    }

    /// What stands in front of a continuation.
    fn begin(&mut self, index: usize, scores: &[Score]) {
        let choice = match &self.answer.kind {
            Kind::Chat { .. } => {
                json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
            }
            Kind::Completion { echo: None } => return,
            Kind::Completion { echo: Some(echo) } => {
                let echo = &echo[index / self.answer.per_prompt];
                let log_probs = self.answer.log_probs.then(|| {
                    let mut list = TokenList::new(&self.answer.vocabulary, 0);
                    list.push_prompt(echo, scores);
                    self.written[index].offset = list.offset;
                    list.value()
                });
                json!({"index": index, "text": echo.text, "logprobs": log_probs, "finish_reason": null})
            }
        };
        self.send(choice);
    }

    fn piece(&mut self, index: usize, text: String, scores: &[Score], finish: Option<&'static str>) {
        if let Some(parts) = self.parts.get_mut(index) {
            let mut certain = parts.push(&text);
            let mut finish = finish;
            if finish.is_some() {
                certain.extend(parts.finish());
                finish = if parts.calls() > 0 { Some("tool_calls") } else { finish };
            }
            return self.parts_of_chat(index, certain, scores, finish);
        }
        // a token that gives no text yet tells nothing
        if finish.is_none() && !self.answer.log_probs && text.is_empty() {
            return;
        }
        let choice = match &self.answer.kind {
            Kind::Chat { .. } => {
                let mut delta = Map::new();
                if !text.is_empty() {
                    delta.insert("content".into(), text.into());
                }
                let log_probs = if scores.is_empty() { Value::Null } else { self.answer.chat_log_probs(scores) };
                json!({"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish})
            }
            Kind::Completion { .. } => {
                let log_probs = (self.answer.log_probs && !scores.is_empty()).then(|| {
                    let mut list = TokenList::new(&self.answer.vocabulary, self.written[index].offset);
                    scores.iter().for_each(|score| list.push(score));
                    self.written[index].offset = list.offset;
                    list.value()
                });
                json!({"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish})
            }
        };
        self.send(choice);
    }

    /// Text and calls, each in a chunk of its own; log-probabilities come with the next chunk that there is.
    fn parts_of_chat(&mut self, index: usize, parts: Vec<Part>, scores: &[Score], finish: Option<&'static str>) {
        self.written[index].scores.extend_from_slice(scores);
        let deltas = parts.into_iter().map(|part| match part {
            Part::Text(text) => (json!({"content": text}), None),
            Part::Call { index, mut call } => {
                call["index"] = index.into();
                (json!({"tool_calls": [call]}), None)
            }
        });
        for (delta, finish) in deltas.chain(finish.map(|finish| (json!({}), Some(finish)))) {
            let scores = std::mem::take(&mut self.written[index].scores);
            let log_probs = if scores.is_empty() { Value::Null } else { self.answer.chat_log_probs(&scores) };
            self.send(json!({"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": finish}));
        }
    }

    fn send(&mut self, choice: Value) {
        let mut chunk = self.answer.head(true);
        chunk["choices"] = Value::from(vec![choice]);
        self.queue.push_back(chunk.to_string());
    }
}
