//! Between text and tokens: a tokenizer, or the bytes of the text themselves.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use hymba::HymbaLm;
use hymba::lm::{GenerateOptions, Generation, StopMatcher, Tokenizer};

/// How a model's tokens are text.
pub enum Text {
    Tokens(Box<Tokenizer>),
    /// The tokens are the bytes of the text: a model of 256 tokens without a tokenizer, as `hymba train-lm` makes.
    Bytes {
        first: Option<u32>,
    },
}

impl Text {
    pub fn of(folder: &Path, lm: &HymbaLm) -> Result<Text> {
        if lm.config().vocab_size == 256 && !folder.join("tokenizer.json").exists() {
            return Ok(Text::Bytes { first: lm.config().bos_token_id });
        }
        Ok(Text::Tokens(Box::new(Tokenizer::from_dir(folder)?)))
    }

    /// The tokens of a text from its beginning.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(match self {
            Text::Tokens(tokenizer) => tokenizer.encode(text)?,
            Text::Bytes { first } => first.iter().copied().chain(text.bytes().map(u32::from)).collect(),
        })
    }

    /// Continues a prompt → the new text, and its tokens.
    pub fn generate(
        &self,
        lm: &HymbaLm,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<(String, Generation)> {
        let Text::Tokens(tokenizer) = self else {
            return bytes(lm, prompt, options, &mut on_text);
        };
        let written = lm.generate_text_with(&mut lm.new_state(1), tokenizer, prompt, options, on_text)?;
        Ok((written.text, written.generation))
    }
}

fn bytes(
    lm: &HymbaLm,
    prompt: &[u32],
    options: &GenerateOptions,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<(String, Generation)> {
    let mut stops = StopMatcher::new(options.stop_strings.iter().cloned())?;
    let options = options.clone().stop_strings(Vec::<String>::new());
    let (mut text, mut pending) = (String::new(), Vec::new());
    let mut emit = |piece: &str| {
        text.push_str(piece);
        if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) }
    };
    let mut generation = lm.generate(prompt, &options, |id| {
        pending.push(id as u8);
        let flow = emit(stops.push(&whole_characters(&mut pending)));
        if stops.stopped().is_some() { ControlFlow::Break(()) } else { flow }
    })?;
    if stops.stopped().is_some() {
        generation.finish = hymba::lm::FinishReason::StopString;
    } else {
        let _ = emit(stops.push(&String::from_utf8_lossy(&pending)));
        let _ = emit(stops.finish());
    }
    Ok((text, generation))
}

/// Takes out all bytes but those of a character that may still become whole.
fn whole_characters(pending: &mut Vec<u8>) -> String {
    let chunks = pending.utf8_chunks().last();
    let half = chunks.map_or(0, |chunk| {
        let invalid = chunk.invalid();
        let may_become = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if may_become { invalid.len() } else { 0 }
    });
    let rest = pending.split_off(pending.len() - half);
    String::from_utf8_lossy(&std::mem::replace(pending, rest)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_wait_for_their_last_byte() {
        let mut pending = "aä".as_bytes()[..2].to_vec();
        assert_eq!(whole_characters(&mut pending), "a");
        pending.push("ä".as_bytes()[1]);
        assert_eq!(whole_characters(&mut pending), "ä");
        assert_eq!(whole_characters(&mut vec![0xff, b'b']), "\u{fffd}b");
    }
}
