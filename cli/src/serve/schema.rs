//! Answers that are JSON, of any form or of a given schema: of all tokens only those remain with which the text can still become it.

use std::sync::{Arc, Mutex};

use hymba::lm::{GenerateOptions, LogitsProcessor};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};
use super::request::ResponseFormat;
use super::tools;
use super::vocabulary::Vocabulary;

/// What schemas are compiled with, for the vocabulary of a model.
pub struct Schemas {
    factory: ParserFactory,
    eos: u32,
}

impl Schemas {
    pub fn new(vocabulary: &Vocabulary, eos: u32) -> anyhow::Result<Self> {
        let words: Vec<Vec<u8>> = (0..vocabulary.len() as u32)
            .map(|id| match vocabulary.is_special(id) {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], vocabulary.bytes(id)].concat(),
                false => vocabulary.bytes(id).to_vec(),
            })
            .collect();
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment)?;
        factory.quiet();
        Ok(Schemas { factory, eos })
    }

    /// Options of an answer of this format.
    pub fn apply(&self, format: &ResponseFormat, options: GenerateOptions) -> ApiResult<GenerateOptions> {
        let schema = match format {
            ResponseFormat::Text => return Ok(options),
            ResponseFormat::JsonObject => json!({"type": "object"}),
            ResponseFormat::JsonSchema { json_schema } => json_schema.schema.clone(),
        };
        self.held_to(TopLevelGrammar::from_json_schema(formed(schema)), "response_format", options)
    }

    /// Options of an answer that calls one of these functions.
    pub fn call(&self, functions: &[Value], options: GenerateOptions) -> ApiResult<GenerateOptions> {
        let call = |function: &Value| {
            let any = json!({"type": "object"});
            let arguments = function.get("parameters").filter(|schema| schema.is_object()).unwrap_or(&any);
            json!({
                "type": "object", "required": ["name", "arguments"], "additionalProperties": false,
                "properties": {"name": {"const": function["name"]}, "arguments": arguments},
            })
        };
        let calls = formed(json!({"anyOf": functions.iter().map(call).collect::<Vec<_>>()}));
        let grammar = format!("start: \"{} \" call \" {}\"\ncall: %json {calls}\n", tools::BEGIN, tools::END);
        self.held_to(TopLevelGrammar::from_lark(grammar), "tools", options)
    }

    fn held_to(
        &self,
        grammar: TopLevelGrammar,
        field: &'static str,
        options: GenerateOptions,
    ) -> ApiResult<GenerateOptions> {
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(ApiError::field(field, format!("the schema cannot be used: {error}")));
        }
        // it ends where the grammar lets it, by one token
        Ok(options.stop_tokens(vec![self.eos]).processor(SchemaProcessor(Mutex::new(matcher))))
    }
}

/// With one space at most, and none where a model might go on with them for ever; these are regular expressions, ours alone.
fn formed(mut schema: Value) -> Value {
    if let Some(schema) = schema.as_object_mut() {
        let form = json!({"whitespace_flexible": false, "key_separator": ": ?", "item_separator": ", ?"});
        schema.insert("x-guidance".into(), form);
    }
    schema
}

struct SchemaProcessor(Mutex<Matcher>);

impl SchemaProcessor {
    fn matcher(&mut self) -> &mut Matcher {
        self.0.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A row's own, from the beginning.
impl Clone for SchemaProcessor {
    fn clone(&self) -> Self {
        let matcher = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        SchemaProcessor(Mutex::new(matcher.deep_clone()))
    }
}

impl LogitsProcessor for SchemaProcessor {
    fn observe(&mut self, id: u32) {
        // a token that does not fit was not among those left; what went wrong is told by the next call
        let _ = self.matcher().consume_token(id);
    }

    fn process(&mut self, logits: &mut [f32]) -> hymba::Result<()> {
        let mask = self.matcher().compute_mask_or_eos().map_err(|error| hymba::Error::Logits(error.to_string()))?;
        for (id, logit) in logits.iter_mut().enumerate() {
            if id >= mask.len() || !mask.get(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
}
