//! Tools, as the instruct model knows them: descriptions in the system prompt, calls as `<toolcall> {json} </toolcall>` in an
//! answer, results in a turn of their own.

use serde_json::{Value, json};

use super::error::{ApiError, ApiResult};

const BEGIN: &str = "<toolcall>";
const END: &str = "</toolcall>";

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

/// An answer's text without its calls, and the calls as OpenAI has them. What is no call stays text.
pub fn calls(answer: &str, id: &str) -> (String, Vec<Value>) {
    let (mut text, mut calls, mut rest) = (String::new(), Vec::new(), answer);
    while let Some(begin) = rest.find(BEGIN) {
        let inside = &rest[begin + BEGIN.len()..];
        let end = inside.find(END).unwrap_or(inside.len());
        let Some(found) = functions(&inside[..end]) else { break };
        text.push_str(&rest[..begin]);
        for (name, arguments) in found {
            let id = format!("call_{id}_{}", calls.len());
            let function = json!({"name": name, "arguments": arguments.to_string()});
            calls.push(json!({"id": id, "type": "function", "function": function}));
        }
        rest = inside[end..].strip_prefix(END).unwrap_or_default();
    }
    text.push_str(rest);
    if !calls.is_empty() {
        text.truncate(text.trim_end().len());
    }
    (text, calls)
}

/// The name and arguments of one call, or of several in a list.
fn functions(written: &str) -> Option<Vec<(String, Value)>> {
    let value: Value = serde_json::from_str(written.trim()).ok()?;
    let all = match value {
        Value::Array(all) if !all.is_empty() => all,
        Value::Array(_) => return None,
        one => vec![one],
    };
    let one = |call: &Value| {
        let name = call.get("name")?.as_str()?.to_owned();
        let arguments = call.get("arguments").or_else(|| call.get("parameters")).cloned();
        Some((name, arguments.unwrap_or_else(|| json!({}))))
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
        assert!(written(&[json!({"id": 1})]).is_err());
    }
}
