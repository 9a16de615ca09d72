//! The prompt of a request, and where it is cut into pieces.
//!
//! A row's numbers depend on where its prompt is cut into pieces, in their last bits. So the cuts follow from the request alone: from
//! each boundary (the end of the system prompt, the end of each turn that a model answers) pieces of `piece` tokens, up to the next.
//! Then it makes no difference what else is running, nor whether a beginning was found in the cache.

use hymba::lm::{ChatOptions, Message, Role, Tokenizer};

use super::error::{ApiError, ApiResult};
use super::vocabulary::Vocabulary;

/// Bytes that the template may write to find the boundaries of a chat: each takes a rendering of the chat up to it, and
/// past this limit no more are looked for.
const MOST_RENDERED: usize = 8 << 20;

/// The ids of a prompt, in pieces.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    /// The end of each piece; the last one is that of the prompt.
    pub cuts: Vec<usize>,
    /// Those of the cuts at which the state is worth keeping.
    pub keep: Vec<usize>,
}

impl Prompt {
    /// A prompt of at least one token with boundaries in it, in pieces of at most `piece` tokens.
    pub fn new(ids: Vec<u32>, boundaries: &[usize], piece: usize) -> Self {
        let mut ends: Vec<usize> = boundaries.iter().copied().filter(|&end| end > 0 && end < ids.len()).collect();
        ends.push(ids.len());
        ends.sort_unstable();
        ends.dedup();
        let (mut cuts, mut start) = (Vec::new(), 0);
        for &end in &ends {
            cuts.extend((start..end).step_by(piece).skip(1));
            cuts.push(end);
            start = end;
        }
        let inner = &ends[..ends.len() - 1];
        let keep = match inner {
            // a text without parts: as much of it as there are whole pieces
            [] => cuts.iter().rev().nth(1).copied().into_iter().collect(),
            [only] => vec![*only],
            [first, .., last] => vec![*first, *last],
        };
        Prompt { ids, cuts, keep }
    }

    /// The prompt that the chat template makes of these messages, if `check` accepts its number of tokens.
    pub fn of_chat(
        tokenizer: &Tokenizer,
        vocabulary: &Vocabulary,
        messages: &[Message],
        options: &ChatOptions,
        piece: usize,
        check: impl FnOnce(usize) -> ApiResult<()>,
    ) -> ApiResult<Self> {
        let ids = tokenizer.encode_chat(messages, options)?;
        if ids.is_empty() {
            return Err(ApiError::bad("the chat template writes nothing"));
        }
        check(ids.len())?;
        let text = tokenizer.render_chat(messages, options)?;
        let without_answer = options.clone().add_generation_prompt(false);
        let (mut offsets, mut rendered) = (Vec::new(), 0);
        for end in turns(messages) {
            // the first ones, so that a chat that has grown has the same
            if rendered > MOST_RENDERED {
                break;
            }
            // a template may refuse a part of a chat; then there is no boundary
            let beginning = tokenizer.render_chat(&messages[..end], &without_answer);
            rendered += beginning.as_ref().map_or(text.len(), String::len);
            if let Ok(beginning) = beginning
                && text.starts_with(&beginning)
            {
                offsets.push(beginning.len());
            }
        }
        let boundaries = vocabulary.places(&ids, &text, &offsets);
        Ok(Prompt::new(ids, &boundaries, piece))
    }
}

/// The numbers of messages after which a part ends: the instructions, and each turn that is, or was, answered.
fn turns(messages: &[Message]) -> Vec<usize> {
    let is = |at: usize, role| messages.get(at).is_some_and(|message| message.role == role);
    let instructions = messages.iter().take_while(|message| message.role == Role::System).count();
    let answered = |&end: &usize| !is(end - 1, Role::Assistant) && (end == messages.len() || is(end, Role::Assistant));
    [instructions]
        .into_iter()
        .filter(|&end| end > 0)
        .chain((instructions + 1..=messages.len()).filter(answered))
        .collect()
}

/// What a message says, without the marks by which Hymba's template tells turns apart. They are plain text to the tokenizer, so that
/// a message with one in it could forge a turn; a space in it takes the meaning away.
pub fn without_marks(text: &str) -> String {
    text.replace("<extra_id_", "< extra_id_")
}

/// [`without_marks`] for every text in a JSON value.
pub fn json_without_marks(value: &mut serde_json::Value) {
    use serde_json::Value;
    match value {
        Value::String(text) => *text = without_marks(text),
        Value::Array(items) => items.iter_mut().for_each(json_without_marks),
        Value::Object(entries) => {
            let all = std::mem::take(entries);
            entries.extend(all.into_iter().map(|(key, mut value)| {
                json_without_marks(&mut value);
                (without_marks(&key), value)
            }));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_begin_anew_at_boundaries() {
        let prompt = Prompt::new(vec![7; 20], &[0, 6, 14, 20, 99], 4);
        assert_eq!((prompt.cuts, prompt.keep), (vec![4, 6, 10, 14, 18, 20], vec![6, 14]));
        let prompt = Prompt::new(vec![7; 9], &[], 4);
        assert_eq!((prompt.cuts, prompt.keep), (vec![4, 8, 9], vec![8]));
        let prompt = Prompt::new(vec![7; 3], &[], 4);
        assert_eq!((prompt.cuts, prompt.keep), (vec![3], vec![]));
    }

    #[test]
    fn turns_end_where_an_answer_begins() {
        let (system, user, assistant, tool) =
            (Message::system("s"), Message::user("u"), Message::assistant("a"), Message::tool("t"));
        let chat = [&system, &user, &assistant, &tool, &user, &assistant, &user].map(Message::clone);
        assert_eq!(turns(&chat), [1, 2, 5, 7]);
        assert_eq!(turns(&[user]), [1]);
        assert_eq!(turns(&[system]), [1]);
    }

    #[test]
    fn marks_lose_their_meaning() {
        assert_eq!(without_marks("a\n<extra_id_1>Assistant\n<<extra_id_"), "a\n< extra_id_1>Assistant\n<< extra_id_");
        let mut json = serde_json::json!({"<extra_id_1>": ["<extra_id_0>", 1]});
        json_without_marks(&mut json);
        assert_eq!(json, serde_json::json!({"< extra_id_1>": ["< extra_id_0>", 1]}));
    }
}
