//! Special tokens that a message spells out stay text.
//!
//! A template makes one text of its own words and of what is said, and the tokenizer finds special tokens in all of it.
//! So where a message spells one out, a mark is put after its first character: a character that occurs nowhere in the
//! chat. The template carries it along, whatever it does to the message; the tokenizer does not find the special token;
//! and before words are looked up, the mark is removed.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::tokenizer::{Model, OffsetType, PreTokenizedString, PreTokenizer};

use super::stream::{TokenText, TokenTexts};
use super::template::{ChatOptions, Message};

/// How the special tokens are spelled.
#[derive(Clone)]
pub(super) struct Guard {
    /// In order.
    texts: Arc<[Box<str>]>,
}

/// A chat with marks in it.
pub(super) struct Guarded {
    pub(super) messages: Vec<Message>,
    pub(super) options: ChatOptions,
    pub(super) mark: char,
}

impl Guard {
    /// Those that the file marks as special, and those that the config names.
    pub(super) fn new<'a>(
        texts: &TokenTexts,
        tokenizer: &tokenizers::Tokenizer,
        named: impl IntoIterator<Item = &'a String>,
    ) -> Self {
        let mut all: BTreeSet<String> = named.into_iter().cloned().collect();
        let special = texts.special.iter().zip(0..).filter(|(special, _)| **special);
        for (_, id) in special {
            // as it is searched for in the text, and in the text that is made ready
            all.extend(tokenizer.get_added_tokens_decoder().get(&id).map(|token| token.content.clone()));
            all.extend(tokenizer.id_to_token(id));
            if let Some(TokenText::Text(text)) = texts.texts.get(id as usize) {
                all.insert(text.to_string());
            }
        }
        all.remove("");
        Guard { texts: all.into_iter().map(String::into_boxed_str).collect() }
    }

    /// `None` where nothing that is said has a part of a special token in it.
    pub(super) fn guarded(&self, messages: &[Message], options: &ChatOptions) -> Option<Guarded> {
        let mut said: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        said.extend(options.contexts.iter().map(String::as_str));
        options.tools.iter().for_each(|tool| texts(tool, &mut said));
        if !said.iter().any(|text| self.places(text).next().is_some()) {
            return None;
        }
        let used: BTreeSet<char> = said.iter().flat_map(|text| text.chars()).filter(|&c| c >= FIRST_MARK).collect();
        let mark = (FIRST_MARK..=char::MAX).find(|mark| !used.contains(mark))?;
        let mut guarded = Guarded { messages: messages.to_vec(), options: options.clone(), mark };
        for message in &mut guarded.messages {
            self.guard(&mut message.content, mark);
        }
        for context in &mut guarded.options.contexts {
            self.guard(context, mark);
        }
        for tool in &mut guarded.options.tools {
            self.guard_json(tool, mark);
        }
        Some(guarded)
    }

    /// A text alone, with marks, and the mark; `None` as above.
    pub(super) fn guarded_text(&self, text: &str) -> Option<(String, char)> {
        self.places(text).next()?;
        let used: BTreeSet<char> = text.chars().filter(|&c| c >= FIRST_MARK).collect();
        let mark = (FIRST_MARK..=char::MAX).find(|mark| !used.contains(mark))?;
        let mut guarded = text.to_owned();
        self.guard(&mut guarded, mark);
        Some((guarded, mark))
    }

    fn guard(&self, text: &mut String, mark: char) {
        let places: Vec<usize> = self.places(text).collect();
        if places.is_empty() {
            return;
        }
        let mut guarded = String::with_capacity(text.len() + places.len() * mark.len_utf8());
        let mut copied = 0;
        for place in places {
            guarded.push_str(&text[copied..place]);
            guarded.push(mark);
            copied = place;
        }
        guarded.push_str(&text[copied..]);
        *text = guarded;
    }

    fn guard_json(&self, value: &mut Value, mark: char) {
        match value {
            Value::String(text) => self.guard(text, mark),
            Value::Array(items) => items.iter_mut().for_each(|item| self.guard_json(item, mark)),
            Value::Object(entries) => {
                let all = std::mem::take(entries);
                entries.extend(all.into_iter().map(|(mut key, mut value)| {
                    self.guard(&mut key, mark);
                    self.guard_json(&mut value, mark);
                    (key, value)
                }));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Behind the first character of each special token, also of one that only begins where the text ends: what the template
    /// writes after it could complete it.
    fn places(&self, text: &str) -> impl Iterator<Item = usize> {
        let begins =
            |(at, character): (usize, char)| self.begins(&text.as_bytes()[at..]).then_some(at + character.len_utf8());
        text.char_indices().filter_map(begins)
    }

    /// Whether a special token begins the text, or the text begins one.
    fn begins(&self, text: &[u8]) -> bool {
        let mut candidates = &self.texts[..];
        for (length, &byte) in text.iter().enumerate() {
            // those that have this byte there stand together, and a shorter one first
            let at = |text: &str| text.as_bytes()[length];
            let start = candidates.partition_point(|text| at(text) < byte);
            let end = candidates.partition_point(|text| at(text) <= byte);
            candidates = &candidates[start..end];
            match candidates.first() {
                None => return false,
                Some(first) if first.len() == length + 1 => return true,
                Some(_) => {}
            }
        }
        !text.is_empty()
    }
}

/// Noncharacters begin here, which text does not have.
const FIRST_MARK: char = '\u{fdd0}';

/// All texts in a JSON value.
fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => found.push(text),
        Value::Array(items) => items.iter().for_each(|item| texts(item, found)),
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            found.push(key);
            texts(value, found);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The ids of a text with marks: as `encode_fast`, but the marks are there while special tokens are looked for, and gone after.
pub(super) fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, mark: char) -> tokenizers::Result<Vec<u32>> {
    let mut pieces: PreTokenizedString =
        tokenizer.get_added_vocabulary().extract_and_normalize(tokenizer.get_normalizer(), text);
    pieces.normalize(|piece| {
        piece.filter(|character| character != mark);
        Ok(())
    })?;
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut pieces)?;
    }
    pieces.tokenize(|piece| tokenizer.get_model().tokenize(piece.get()))?;
    Ok(pieces.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
}
