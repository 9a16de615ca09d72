//! Constrained decoding: answers that are a JSON object, or JSON of a given schema. Tokens after which the text could
//! no longer become one are ruled out.

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
        let words = (0..vocabulary.len() as u32).map(|id| match vocabulary.is_special(id) {
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], vocabulary.bytes(id)].concat(),
            false => vocabulary.bytes(id).to_vec(),
        });
        Schemas::of(words.collect(), eos)
    }

    fn of(words: Vec<Vec<u8>>, eos: u32) -> anyhow::Result<Self> {
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
        self.held_to(calls(functions), "tools", options)
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

/// One call of one of these functions. Parameters are a schema of their own, so that references in them are to their own parts.
fn calls(functions: &[Value]) -> TopLevelGrammar {
    let names: Vec<String> = (0..functions.len()).map(|i| format!("c{i}")).collect();
    let (begin, end) = (tools::BEGIN, tools::END);
    let mut grammar = format!("start: \"{begin} \" call \"}} {end}\"\ncall: {}\n", names.join(" | "));
    for (i, function) in functions.iter().enumerate() {
        let begin = format!("{{\"name\": {}, \"arguments\": ", function["name"]);
        let begin = Value::from(begin); // as a string in quotes
        let arguments = formed(arguments(function.get("parameters")));
        grammar += &format!("c{i}: {begin} a{i}\na{i}: %json {arguments}\n");
    }
    TopLevelGrammar::from_lark(grammar)
}

/// The schema of arguments: that of an object, unless it says otherwise.
fn arguments(parameters: Option<&Value>) -> Value {
    let mut schema = parameters.and_then(Value::as_object).cloned().unwrap_or_default();
    if !["type", "anyOf", "oneOf", "allOf", "$ref"].iter().any(|key| schema.contains_key(*key)) {
        schema.insert("type".into(), "object".into());
    }
    schema.into()
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

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: u32 = 128;

    /// Whether an answer may be this, told byte by byte.
    fn may_be(functions: &[Value], answer: &str) -> bool {
        let mut words: Vec<Vec<u8>> = (0..EOS as u8).map(|byte| vec![byte]).collect();
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], &b"</s>"[..]].concat());
        let schemas = Schemas::of(words, EOS).unwrap();
        let mut matcher = Matcher::new(schemas.factory.create_parser(calls(functions)));
        assert_eq!(matcher.get_error(), None, "{functions:?}");
        let ids: Vec<u32> = answer.bytes().map(u32::from).chain([EOS]).collect();
        matcher.validate_tokens(&ids).unwrap() == ids.len()
    }

    fn call(name: &str, arguments: &str) -> String {
        format!("{} {{\"name\": {}, \"arguments\": {arguments}}} {}", tools::BEGIN, Value::from(name), tools::END)
    }

    #[test]
    fn references_are_to_the_parameters() {
        let place = json!({"name": "place", "parameters": {
            "type": "object", "properties": {"at": {"$ref": "#/$defs/point"}}, "required": ["at"],
            "additionalProperties": false, "$defs": {"point": {"enum": [1, 2]}},
        }});
        let tree = json!({"name": "a \"tree\"", "parameters": {
            "type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#"}}, "required": ["v"],
            "additionalProperties": false,
        }});
        let functions = [place, tree];
        for (name, arguments, fits) in [
            ("place", r#"{"at": 2}"#, true),
            ("place", r#"{"at": 3}"#, false),
            ("place", r#"{"v": 1}"#, false),
            ("a \"tree\"", r#"{"v": 1, "next": {"v": 2, "next": {"v":3}}}"#, true),
            ("a \"tree\"", r#"{"v": 1, "next": {"name": "a \"tree\"", "arguments": {"v": 2}}}"#, false),
            ("a \"tree\"", r#"{"at": 2}"#, false),
            ("other", r#"{"at": 2}"#, false),
        ] {
            assert_eq!(may_be(&functions, &call(name, arguments)), fits, "{name} {arguments}");
        }
        assert!(!may_be(&functions, "Hello") && !may_be(&functions, ""));
    }

    #[test]
    fn arguments_are_an_object() {
        let any = json!({"name": "f"});
        let empty = json!({"name": "f", "parameters": {}});
        let untyped = json!({"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}});
        for function in [any, empty, untyped] {
            for (arguments, fits) in
                [("{}", true), (r#"{"x": 1}"#, true), ("1", false), ("[]", false), (r#""x""#, false)]
            {
                assert_eq!(
                    may_be(std::slice::from_ref(&function), &call("f", arguments)),
                    fits,
                    "{function} {arguments}"
                );
            }
        }
    }
}
