//! Tools, as the instruct model knows them: descriptions in the system prompt, calls as `<toolcall> {json} </toolcall>` in an
//! answer, results in a turn of their own.

use serde_json::{Deserializer, Map, Value, json};

use super::error::{ApiError, ApiResult};

pub const BEGIN: &str = "<toolcall>";
pub const END: &str = "</toolcall>";

/// A tool of OpenAI's as the template writes it.
pub fn described(tool: &Value) -> ApiResult<Value> {
    match tool.get("type").and_then(Value::as_str) {
        Some("function") | None => {}
        Some(_) => return Err(ApiError::field("tools", "only functions can be called")),
    }
    let function = tool.get("function").unwrap_or(tool);
    match function.get("name").and_then(Value::as_str) {
        Some(name) if !name.is_empty() => Ok(function.clone()),
        _ => Err(ApiError::field("tools", "each function needs a name")),
    }
}

/// Calls that the model made in an earlier turn, as it wrote them.
pub fn written(calls: &[Value]) -> ApiResult<String> {
    let one = |call: &Value| {
        let function = call.get("function")?;
        let name = function.get("name")?.as_str()?;
        let arguments = match function.get("arguments") {
            Some(Value::String(text)) => serde_json::from_str(text).unwrap_or_else(|_| Value::from(text.as_str())),
            Some(other) => other.clone(),
            None => json!({}),
        };
        Some(format!("{BEGIN} {} {END}", json!({"name": name, "arguments": arguments})))
    };
    let calls: Option<Vec<String>> = calls.iter().map(one).collect();
    calls
        .map(|calls| calls.join("\n"))
        .ok_or_else(|| ApiError::field("messages", "each of tool_calls needs a function with a name and arguments"))
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    Text(String),
    /// A call as OpenAI has it, and which one it is.
    Call {
        index: usize,
        call: Value,
    },
}

/// Separates calls from text while an answer comes in pieces. What may be the beginning of a call is held back until it
/// is known, and so is the white space in front of it, as nothing but a call ends an answer that has one. What is no
/// call stays text.
pub struct Parts {
    /// Of the answer, for the names of its calls.
    id: String,
    /// Text that may be a call, or the beginning of one.
    held: String,
    space: String,
    calls: usize,
}

impl Parts {
    pub fn new(id: String) -> Self {
        Parts { id, held: String::new(), space: String::new(), calls: 0 }
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes the next piece and gives what is now certain.
    pub fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held.push_str(piece);
        self.certain(false)
    }

    /// The end of the answer: gives what was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = self.certain(true);
        let space = std::mem::take(&mut self.space);
        if self.calls == 0 && !space.is_empty() {
            parts.push(Part::Text(space));
        }
        parts
    }

    fn certain(&mut self, ended: bool) -> Vec<Part> {
        let mut parts = Vec::new();
        while let Some(begin) = self.held.find(BEGIN) {
            self.release(begin, &mut parts);
            match inside(&self.held[BEGIN.len()..], ended) {
                Inside::Calls(functions, bytes) => {
                    parts.extend(functions.into_iter().map(|function| self.call(function)));
                    self.held.drain(..BEGIN.len() + bytes);
                }
                Inside::Beginning => return parts,
                Inside::Text => self.release(BEGIN.len(), &mut parts),
            }
        }
        let beginning = (1..BEGIN.len()).rev().find(|&count| self.held.ends_with(&BEGIN[..count]) && !ended);
        self.release(self.held.len() - beginning.unwrap_or(0), &mut parts);
        parts
    }

    fn call(&mut self, (name, arguments): (String, String)) -> Part {
        let index = self.calls;
        self.calls += 1;
        let (id, function) = (format!("call_{}_{index}", self.id), json!({"name": name, "arguments": arguments}));
        Part::Call { index, call: json!({"id": id, "type": "function", "function": function}) }
    }

    /// Gives out the first bytes of what is held as text, but for white space at its end.
    fn release(&mut self, bytes: usize, parts: &mut Vec<Part>) {
        self.space.extend(self.held.drain(..bytes));
        let text = self.space.trim_end().len();
        if text > 0 {
            let space = self.space.split_off(text);
            parts.push(Part::Text(std::mem::replace(&mut self.space, space)));
        }
    }
}

/// An answer's text without its calls, and the calls.
pub fn calls(answer: &str, id: &str) -> (String, Vec<Value>) {
    let mut stream = Parts::new(id.to_owned());
    let mut parts = stream.push(answer);
    parts.extend(stream.finish());
    let (mut text, mut calls) = (String::new(), Vec::new());
    for part in parts {
        match part {
            Part::Text(piece) => text += &piece,
            Part::Call { call, .. } => calls.push(call),
        }
    }
    (text, calls)
}

/// What stands behind [`BEGIN`].
enum Inside {
    /// Names and arguments, and how many bytes they take with their end.
    Calls(Vec<(String, String)>, usize),
    /// What may become a call.
    Beginning,
    Text,
}

/// A call is one JSON value with [`END`] behind it, or nothing more once the answer has ended. In a string of it `END` is text.
fn inside(written: &str, ended: bool) -> Inside {
    let json = written.trim_start();
    if !json.is_empty() && !json.starts_with(['{', '[']) {
        return Inside::Text;
    }
    let mut values = Deserializer::from_str(json).into_iter();
    let value: Value = match values.next() {
        Some(Ok(value)) => value,
        Some(Err(error)) if !error.is_eof() => return Inside::Text,
        _ if ended => return Inside::Text,
        _ => return Inside::Beginning,
    };
    let after = json[values.byte_offset()..].trim_start();
    let rest = match after.strip_prefix(END) {
        Some(rest) => rest,
        None if ended && after.is_empty() => after,
        None if !ended && END.starts_with(after) => return Inside::Beginning,
        None => return Inside::Text,
    };
    functions(value).map_or(Inside::Text, |found| Inside::Calls(found, written.len() - rest.len()))
}

/// The name and arguments of one call, or of several in a list.
fn functions(value: Value) -> Option<Vec<(String, String)>> {
    let all = match value {
        Value::Array(all) if !all.is_empty() => all,
        Value::Array(_) => return None,
        one => vec![one],
    };
    let one = |call: &Value| {
        let name = call.get("name")?.as_str()?.to_owned();
        let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
            None => "{}".to_owned(),
            // an object that was written as a string
            Some(Value::String(text)) if serde_json::from_str::<Map<String, Value>>(text).is_ok() => text.clone(),
            Some(arguments) => arguments.to_string(),
        };
        Some((name, arguments))
    };
    all.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_taken_out_of_an_answer() {
        let answer = " I look.\n<toolcall> {\"name\": \"clock\", \"arguments\": {\"city\": \"Oslo\"}} </toolcall>";
        let (text, found) = calls(answer, "7");
        assert_eq!((text.as_str(), found.len()), (" I look.", 1));
        assert_eq!(found[0]["function"], json!({"name": "clock", "arguments": "{\"city\":\"Oslo\"}"}));
        // and written back
        assert_eq!(
            written(&found).unwrap(),
            "<toolcall> {\"name\":\"clock\",\"arguments\":{\"city\":\"Oslo\"}} </toolcall>"
        );
        let (_, two) = calls("<toolcall>[{\"name\":\"a\"},{\"name\":\"b\",\"parameters\":{}}]", "7");
        assert_eq!(two.len(), 2);
        for text in ["no call", "<toolcall> not JSON </toolcall>", "<toolcall> {\"x\": 1} </toolcall>", "<toolcall>[]"]
        {
            assert_eq!(calls(text, "7"), (text.to_owned(), vec![]));
        }
        let (text, found) = calls("a <toolcall> {} </toolcall> b <toolcall>{\"name\": \"c\"}</toolcall>\n", "7");
        assert_eq!((text.as_str(), found.len()), ("a <toolcall> {} </toolcall> b", 1));
        assert!(written(&[json!({"id": 1})]).is_err());
        // the end of a call, in a string of it
        let (text, found) =
            calls("<toolcall> {\"name\": \"c\", \"arguments\": {\"x\": \"</toolcall>\"}} </toolcall>", "7");
        assert_eq!((text.as_str(), &found[0]["function"]["arguments"]), ("", &json!("{\"x\":\"</toolcall>\"}")));
        // arguments as a string
        for (arguments, want) in [("{\"x\":  1}", "{\"x\":  1}"), ("[1]", "\"[1]\""), ("hi", "\"hi\"")] {
            let (_, found) =
                calls(&format!("<toolcall> {} </toolcall>", json!({"name": "c", "arguments": arguments})), "7");
            assert_eq!(found[0]["function"]["arguments"], want);
        }
    }
    #[test]
    fn pieces_make_no_difference() {
        let call = "<toolcall> {\"name\": \"clock\", \"arguments\": {\"a\": \"<b>\"}} </toolcall>";
        for answer in [
            format!("Wait. \n{call} {call}\n"),
            format!("{call} and so on "),
            format!("a <b <toolcal <toolcall> x {call}"),
            format!("<toolcall> {{\"name\": \"a\", \"arguments\": {{\"x\": \"</toolcall> {{\"}}}} </toolcall> {call}"),
            format!("<toolcall> {{\"name\": \"a\"}} </tool {call}"),
            format!("<toolcall> {{\"name\": \"a </toolcall>\n {call}"),
            "<toolcall> {\"name\": \"cut\"} </tool".into(),
            "<toolcall> {\"name\": \"cut\", \"argum".into(),
            "<toolcall> {\"name\": \"not closed\"}".into(),
            " only text, é€ < \n\n".into(),
        ] {
            let (text, found) = calls(&answer, "7");
            for step in 1..12 {
                let (mut stream, mut together, mut told) = (Parts::new("7".into()), String::new(), Vec::new());
                let characters: Vec<char> = answer.chars().collect();
                let mut parts = Vec::new();
                for piece in characters.chunks(step) {
                    parts.extend(stream.push(&piece.iter().collect::<String>()));
                    // nothing waits that is not the beginning of a call, or white space before one
                    let held = &stream.held;
                    assert!(BEGIN.starts_with(held.as_str()) || held.starts_with(BEGIN), "{held:?}");
                }
                parts.extend(stream.finish());
                for part in parts {
                    match part {
                        Part::Text(piece) => together += &piece,
                        Part::Call { call, .. } => told.push(call),
                    }
                }
                assert_eq!((&together, &told), (&text, &found), "{answer:?} in pieces of {step}");
            }
        }
    }
}
