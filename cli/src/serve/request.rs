//! Requests of OpenAI's API. Unknown fields are ignored, as other servers do.

use std::collections::BTreeMap;

use hymba::lm::{FrequencyPenalty, GenerateOptions, LogitBias, Message, PresencePenalty, Role};
use serde::Deserialize;
use serde_json::Value;

use super::error::{ApiError, ApiResult};
use super::prompt::{json_without_marks, without_marks};
use super::tools;

/// Texts that end an answer, at most, and bytes of one.
const MOST_STOPS: usize = 16;
const LONGEST_STOP: usize = 1024;
/// Alternatives to a token, at most.
const MOST_ALTERNATIVES: usize = 20;
/// Messages of a chat, at most.
const MOST_MESSAGES: usize = 1024;

/// What both ways of generating have in common.
#[derive(Deserialize, Default)]
#[serde(default)]
pub struct Sampling {
    pub model: Option<String>,
    pub n: Option<usize>,
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
}

#[derive(Deserialize)]
pub struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
pub struct CompletionRequest {
    pub prompt: PromptField,
    pub max_tokens: Option<usize>,
    pub echo: Option<bool>,
    logprobs: Option<usize>,
    best_of: Option<usize>,
    suffix: Option<String>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub enum PromptField {
    Text(String),
    Ids(Vec<u32>),
    Texts(Vec<String>),
    ManyIds(Vec<Vec<u32>>),
}

/// One prompt of a request.
pub enum PromptInput {
    Text(String),
    Ids(Vec<u32>),
}

#[derive(Deserialize)]
pub struct ChatRequest {
    pub messages: Vec<MessageField>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    pub response_format: Option<ResponseFormat>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    #[serde(flatten)]
    pub sampling: Sampling,
}

#[derive(Deserialize)]
pub struct MessageField {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    Text,
    JsonObject,
    JsonSchema { json_schema: SchemaField },
}

#[derive(Deserialize)]
pub struct SchemaField {
    pub schema: Value,
}

impl Sampling {
    /// Whether a stream ends with what was used.
    pub fn includes_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or_default()
    }

    /// How many continuations of each prompt.
    pub fn count(&self, most: usize) -> ApiResult<usize> {
        match self.n.unwrap_or(1) {
            0 => Err(ApiError::field("n", "n must be at least 1")),
            n if n > most => Err(ApiError::field("n", format!("n must be at most {most} here"))),
            n => Ok(n),
        }
    }

    /// Where the request says nothing, `defaults` hold. Without a seed each request has `random`.
    pub fn options(&self, defaults: &GenerateOptions, random: u64) -> ApiResult<GenerateOptions> {
        let mut options = defaults.clone().seed(self.seed.map_or(random, |seed| seed as u64));
        options.temperature = self.temperature.unwrap_or(options.temperature);
        options.top_p = self.top_p.unwrap_or(options.top_p);
        // −1 is how others turn it off
        options.top_k = self.top_k.map_or(options.top_k, |k| usize::try_from(k).unwrap_or(0));
        options.min_p = self.min_p.unwrap_or(options.min_p);
        options.repetition_penalty = self.repetition_penalty.unwrap_or(options.repetition_penalty);
        let stops = match &self.stop {
            None => &[][..],
            Some(OneOrMany::One(stop)) => std::slice::from_ref(stop),
            Some(OneOrMany::Many(stops)) => stops,
        };
        if stops.len() > MOST_STOPS || stops.iter().any(|stop| stop.len() > LONGEST_STOP) {
            let message = format!("at most {MOST_STOPS} texts of {LONGEST_STOP} bytes can be given");
            return Err(ApiError::field("stop", message));
        }
        options.stop_strings = stops.to_vec();
        for (name, penalty) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            if penalty.is_some_and(|penalty| !(-2.0..=2.0).contains(&penalty)) {
                return Err(ApiError::field(name, format!("{name} must be between -2 and 2")));
            }
        }
        if let Some(bias) = &self.logit_bias {
            let bias = bias.iter().map(|(id, &bias)| match id.parse() {
                Ok(id) if (-100.0..=100.0).contains(&bias) => Ok((id, bias)),
                _ => Err(ApiError::field("logit_bias", "it takes token ids, and numbers between -100 and 100")),
            });
            options = options.processor(LogitBias::new(bias.collect::<ApiResult<Vec<_>>>()?)?);
        }
        if let Some(penalty) = self.frequency_penalty.filter(|penalty| *penalty != 0.0) {
            options = options.processor(FrequencyPenalty::new(penalty)?);
        }
        if let Some(penalty) = self.presence_penalty.filter(|penalty| *penalty != 0.0) {
            options = options.processor(PresencePenalty::new(penalty)?);
        }
        options.validate()?;
        Ok(options)
    }
}

impl CompletionRequest {
    /// How many alternatives to a token are reported, if log-probabilities are.
    pub fn alternatives(&self) -> ApiResult<Option<usize>> {
        alternatives("logprobs", self.logprobs)
    }

    pub fn check(&self) -> ApiResult<()> {
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::field("suffix", "the model cannot fill in text in front of a suffix"));
        }
        if self.best_of.is_some_and(|best| best != self.sampling.n.unwrap_or(1)) {
            return Err(ApiError::field("best_of", "best_of must be n"));
        }
        Ok(())
    }
}

impl PromptField {
    pub fn into_inputs(self) -> Vec<PromptInput> {
        match self {
            PromptField::Text(text) => vec![PromptInput::Text(text)],
            PromptField::Ids(ids) => vec![PromptInput::Ids(ids)],
            PromptField::Texts(texts) => texts.into_iter().map(PromptInput::Text).collect(),
            PromptField::ManyIds(rows) => rows.into_iter().map(PromptInput::Ids).collect(),
        }
    }
}

impl ChatRequest {
    pub fn alternatives(&self) -> ApiResult<Option<usize>> {
        let asked = self.logprobs.unwrap_or_default();
        if self.top_logprobs.is_some_and(|count| count > 0) && !asked {
            return Err(ApiError::field("top_logprobs", "it needs logprobs: true"));
        }
        alternatives("top_logprobs", asked.then(|| self.top_logprobs.unwrap_or(0)))
    }

    /// The functions that the model may call, and those of which it must call one, without what could forge turns.
    pub fn tools(&self) -> ApiResult<(Vec<Value>, Option<Vec<Value>>)> {
        let mut tools: Vec<Value> = self.tools.iter().flatten().map(tools::described).collect::<ApiResult<_>>()?;
        tools.iter_mut().for_each(json_without_marks);
        let wrong = |message: &str| Err(ApiError::field("tool_choice", message));
        let must = match &self.tool_choice {
            None | Some(Value::Null) => None,
            Some(Value::String(choice)) => match choice.as_str() {
                "auto" => None,
                "none" => return Ok((Vec::new(), None)),
                "required" => Some(tools.clone()),
                _ => return wrong("it must be auto, none, required or a function"),
            },
            Some(choice) => {
                let name = choice.pointer("/function/name").and_then(Value::as_str).map(without_marks);
                Some(tools.iter().filter(|tool| tool["name"].as_str() == name.as_deref()).cloned().collect())
            }
        };
        match &must {
            Some(functions) if functions.is_empty() => wrong("it names none of the tools"),
            Some(_) if !matches!(self.response_format, None | Some(ResponseFormat::Text)) => {
                wrong("a forced call excludes a response_format")
            }
            _ => Ok((tools, must)),
        }
    }

    /// What was said, without what could forge turns.
    pub fn messages(&self) -> ApiResult<Vec<Message>> {
        if self.messages.is_empty() || self.messages.len() > MOST_MESSAGES {
            return Err(ApiError::field("messages", format!("there must be 1 to {MOST_MESSAGES} messages")));
        }
        self.messages.iter().map(MessageField::message).collect()
    }
}

impl MessageField {
    fn message(&self) -> ApiResult<Message> {
        let role = match self.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" | "function" => Role::Tool,
            other => return Err(ApiError::field("messages", format!("there is no role {other:?}"))),
        };
        let mut content = match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let text = |part: &Part| match (&part.text, part.kind.as_str()) {
                    (Some(text), "text" | "input_text" | "refusal") => Ok(text.clone()),
                    (_, kind) => Err(ApiError::field("messages", format!("the model reads text only, not {kind:?}"))),
                };
                parts.iter().map(text).collect::<ApiResult<Vec<_>>>()?.join("\n")
            }
        };
        if role == Role::Assistant
            && let Some(calls) = self.tool_calls.as_ref().filter(|calls| !calls.is_empty())
        {
            content += &tools::written(calls)?;
        }
        Ok(Message::new(role, without_marks(&content)))
    }
}

fn alternatives(field: &'static str, asked: Option<usize>) -> ApiResult<Option<usize>> {
    match asked {
        Some(count) if count > MOST_ALTERNATIVES => {
            Err(ApiError::field(field, format!("{field} must be at most {MOST_ALTERNATIVES}")))
        }
        asked => Ok(asked),
    }
}
