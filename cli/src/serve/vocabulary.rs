//! The tokens of a model as bytes and as people read them.

use hymba::lm::Tokenizer;

/// What each token is in text.
pub struct Vocabulary {
    tokens: Vec<Token>,
}

struct Token {
    bytes: Vec<u8>,
    special: bool,
}

impl Vocabulary {
    /// Of a model that has room for `size` tokens.
    pub fn new(tokenizer: &Tokenizer, size: usize) -> Self {
        let token = |id: u32| {
            let spelled = tokenizer.token(id).unwrap_or_default();
            let byte = spelled.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            let byte = byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
            let bytes = byte.map_or_else(|| spelled.replace('▁', " ").into_bytes(), |byte| vec![byte]);
            // a special token is no text
            let special = tokenizer.decode(&[id]).map_or(true, |text| text.is_empty()) && spelled != "▁";
            Token { bytes, special }
        };
        Vocabulary { tokens: (0..size as u32).map(token).collect() }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The bytes that a token stands for; of a special one its spelling.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.tokens.get(id as usize).map_or(&[], |token| &token.bytes)
    }

    /// Whether a token is no part of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_none_or(|token| token.special)
    }

    /// How many characters of a text begin in a token; a special one has none, unless it is spelled out.
    pub fn characters(&self, id: u32, spells_special: bool) -> usize {
        if self.is_special(id) && !spells_special {
            return 0;
        }
        // the first byte of each character
        self.bytes(id).iter().filter(|byte| **byte & 0xc0 != 0x80).count()
    }

    /// A token as OpenAI writes it: its text, or its bytes where they are a part of a character.
    pub fn shown(&self, id: u32) -> String {
        let bytes = self.bytes(id);
        match str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |shown, byte| format!("{shown}\\x{byte:02x}")),
        }
    }

    /// For places in the text of these ids, how many of the ids lie before each.
    pub fn places(&self, ids: &[u32], text: &str, offsets: &[usize]) -> Vec<usize> {
        // the space that encoding puts in front
        let first = ids.first().map_or(&[][..], |&id| self.bytes(id));
        let added = usize::from(first.starts_with(b" ") && !text.starts_with(' '));
        let (mut at, mut bytes) = (0, 0);
        let mut places = Vec::new();
        for offset in offsets {
            while at < ids.len() && bytes + self.bytes(ids[at]).len() <= offset + added {
                bytes += self.bytes(ids[at]).len();
                at += 1;
            }
            places.push(at);
        }
        places
    }
}
