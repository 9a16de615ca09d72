//! From token ids back to text, all at once or one by one.

use std::sync::Arc;

/// What a token is in text.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum TokenText {
    Text(Box<str>),
    /// One byte of a character that has no token of its own.
    Byte(u8),
    /// No token has this id.
    Nothing,
}

/// The text of every token, by id.
#[derive(Debug)]
pub(super) struct TokenTexts {
    pub(super) texts: Vec<TokenText>,
    pub(super) special: Vec<bool>,
    /// How many of this character are taken from the start of a text: the space that encoding puts there.
    pub(super) strip: Option<(char, usize)>,
}

/// Text from token ids that come one by one; made by [`Tokenizer::stream`](super::Tokenizer::stream) and
/// [`Tokenizer::stream_after`](super::Tokenizer::stream_after).
///
/// Its pieces are whole characters, and together they are what [`Tokenizer::decode`](super::Tokenizer::decode) makes of all
/// the ids, or what it adds for them to the text of the ids before. A token costs the same however long the text is.
///
/// ```
/// # use hymba::lm::Tokenizer;
/// let tokenizer = Tokenizer::from_dir("tests/data/hymba-1.5b-base")?;
/// let mut stream = tokenizer.stream();
/// assert_eq!(stream.push(15043), "Hello");
/// assert_eq!(stream.push(3186), " world");
/// // a character of four tokens
/// assert_eq!([243, 162, 155].map(|id| stream.push(id).to_owned()), ["", "", ""]);
/// assert_eq!(stream.push(131), "😀");
/// assert_eq!(stream.finish(), "");
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct TextStream {
    texts: Arc<TokenTexts>,
    keep_special: bool,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    /// How many characters may still be taken from the start of the text.
    strip: usize,
    /// The text that the last call gave out.
    out: String,
}

impl TextStream {
    pub(super) fn new(texts: &Arc<TokenTexts>, keep_special: bool) -> Self {
        TextStream {
            texts: Arc::clone(texts),
            keep_special,
            pending: Vec::with_capacity(4),
            strip: texts.strip.map_or(0, |(_, count)| count),
            out: String::new(),
        }
    }

    /// The stream of a text that continues `ids`: their own text is not given out.
    pub(crate) fn after(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        for id in ids {
            self.push(id);
        }
        self.out = String::new();
        self
    }

    /// The stream of a text that continues unknown tokens.
    pub(crate) fn within(mut self) -> Self {
        self.strip = 0;
        self
    }

    /// The text that `id` adds where special tokens are spelled out, or `None` where it is not a special token.
    pub(crate) fn special(&self, id: u32) -> Option<&str> {
        match self.texts.texts.get(id as usize)? {
            TokenText::Text(text) if self.texts.special[id as usize] => Some(text),
            _ => None,
        }
    }

    /// Takes the next id and gives the text that is complete with it: nothing where the id is one byte of a character, a
    /// special token, or no token at all.
    pub fn push(&mut self, id: u32) -> &str {
        self.out.clear();
        self.add(id);
        &self.out
    }

    /// The end of the text: gives U+FFFD for each byte of a character that was never completed. A new text can begin.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        self.give_up();
        self.strip = self.texts.strip.map_or(0, |(_, count)| count);
        &self.out
    }

    /// Adds to `out`; `push` without forgetting what is there.
    pub(super) fn add(&mut self, id: u32) {
        let texts = Arc::clone(&self.texts);
        let index = id as usize;
        if !self.keep_special && texts.special.get(index).is_some_and(|&special| special) {
            return;
        }
        match texts.texts.get(index) {
            Some(TokenText::Text(text)) => {
                self.give_up();
                self.emit(text);
            }
            Some(&TokenText::Byte(byte)) => {
                self.pending.push(byte);
                self.settle();
            }
            Some(TokenText::Nothing) | None => {}
        }
    }

    pub(super) fn into_text(mut self) -> String {
        self.give_up();
        self.out
    }

    /// Emits the character that the pending bytes are, or U+FFFD for each that cannot begin one, as SentencePiece does.
    fn settle(&mut self) {
        while !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            match std::str::from_utf8(&pending) {
                Ok(text) => self.emit(text),
                Err(error) if error.error_len().is_none() => {
                    self.pending = pending;
                    return;
                }
                Err(_) => {
                    self.emit("\u{fffd}");
                    self.pending.extend(&pending[1..]);
                }
            }
        }
    }

    fn give_up(&mut self) {
        for _ in 0..std::mem::take(&mut self.pending).len() {
            self.emit("\u{fffd}");
        }
    }

    fn emit(&mut self, mut text: &str) {
        if let Some((stripped, _)) = self.texts.strip {
            while self.strip > 0 && !text.is_empty() {
                match text.strip_prefix(stripped) {
                    Some(rest) => (text, self.strip) = (rest, self.strip - 1),
                    None => self.strip = 0,
                }
            }
        }
        self.out.push_str(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_and(texts: &[&str]) -> Arc<TokenTexts> {
        let bytes = (0..=255).map(TokenText::Byte);
        let texts = texts.iter().map(|&text| TokenText::Text(text.into()));
        let texts: Vec<_> = bytes.chain(texts).collect();
        Arc::new(TokenTexts { special: vec![false; texts.len()], texts, strip: Some((' ', 1)) })
    }

    #[test]
    fn characters_come_whole() {
        let mut stream = TextStream::new(&bytes_and(&[" a"]), false);
        let mut pieces = Vec::new();
        for id in [256].into_iter().chain("é€😀\n".bytes().map(u32::from)).chain([256, 9999]) {
            pieces.push(stream.push(id).to_owned());
        }
        assert_eq!(pieces, ["a", "", "é", "", "", "€", "", "", "", "😀", "\n", " a", ""]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn bytes_that_are_no_character() {
        let mut stream = TextStream::new(&bytes_and(&[" a"]), false);
        // a character that breaks off, one that cannot begin, and one at the end
        let ids = [0xe2, 0x82, 0x41, 0x80, 0xc3, 256, 0xf0, 0x9f];
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).to_owned()).collect();
        assert_eq!(pieces, ["", "", "\u{fffd}\u{fffd}A", "\u{fffd}", "", "\u{fffd} a", "", ""]);
        assert_eq!(stream.finish(), "\u{fffd}\u{fffd}");
        // and the next text begins as a text does
        assert_eq!(stream.push(256), "a");
    }
}
