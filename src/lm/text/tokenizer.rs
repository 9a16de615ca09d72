//! The tokenizer of a checkpoint.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::chat::{ChatOptions, ChatTemplate, Message, shown};
use super::file;
use super::stream::{Spelling, Spellings, TextStream};
use crate::weights::tensors::Source;
use crate::{Error, Result};

/// Longest `tokenizer.json` and `tokenizer_config.json` that are read.
const MAX_TOKENIZER: u64 = 64 << 20;
const MAX_CONFIG: u64 = 4 << 20;

/// Text to token ids and back, and chats to prompts.
///
/// Reads the `tokenizer.json` of a Llama tokenizer, which the published Hymba models have: byte pair encoding with byte
/// fallback. Its ids are those of Hugging Face's tokenizer.
///
/// ```
/// use hymba::lm::{ChatOptions, Message, Tokenizer};
///
/// let tokenizer = Tokenizer::from_dir("tests/data/hymba-1.5b-base")?;
/// assert_eq!(tokenizer.encode("Hello world")?, [1, 15043, 3186]); // 1 begins a text
/// assert_eq!(tokenizer.decode(&[1, 15043, 3186])?, "Hello world");
///
/// let chat = [Message::system("Be brief."), Message::user("Name a colour.")];
/// let prompt = tokenizer.encode_chat(&chat, &ChatOptions::new())?;
/// assert!(tokenizer.decode(&prompt)?.ends_with("<extra_id_1>Assistant\n"));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    tokenizer: Arc<tokenizers::Tokenizer>,
    spellings: Arc<Spellings>,
    chat: ChatTemplate,
    bos: Option<u32>,
    add_bos: bool,
    eos: Option<u32>,
}

/// What is read of `tokenizer_config.json`.
#[derive(Deserialize, Default)]
struct Config {
    add_bos_token: Option<bool>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
    unk_token: Option<SpecialToken>,
    pad_token: Option<SpecialToken>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Token { content: String },
}

impl SpecialToken {
    fn into_text(self) -> String {
        match self {
            SpecialToken::Text(text) | SpecialToken::Token { content: text } => text,
        }
    }
}

/// One template, or several by name, of which `default` is for chats.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

impl Templates {
    fn into_chat(self) -> Option<String> {
        match self {
            Templates::One(template) => Some(template),
            Templates::Named(all) => all.into_iter().find(|named| named.name == "default").map(|named| named.template),
        }
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` of the folder and, where they are there, `tokenizer_config.json` (special tokens, chat
    /// template) and `chat_template.jinja`, which goes before it. Without a template, that of the published Hymba models
    /// is used.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where a file cannot be read; [`Error::Format`] where it is too long (64 MiB, the others 4 MiB),
    /// damaged, or not of a Llama tokenizer, and where the chat template is not one that
    /// [`ChatTemplate::new`](ChatTemplate::new) takes.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let bytes = read(&path, MAX_TOKENIZER)?;
        let file = serde_json::from_slice(&bytes).map_err(|error| Error::format(&path, shown(error.to_string())))?;
        drop(bytes);
        let (tokenizer, spellings) = file::build(file).map_err(|reason| Error::format(&path, reason))?;

        let path = folder.join("tokenizer_config.json");
        let mut config = Config::default();
        if path.exists() {
            let bytes = read(&path, MAX_CONFIG)?;
            // first as anything: an untagged enum says only that nothing fits
            serde_json::from_slice::<IgnoredAny>(&bytes)
                .map_err(|error| Error::format(&path, shown(error.to_string())))?;
            config = serde_json::from_slice(&bytes).map_err(|error| Error::format(&path, shown(error.to_string())))?;
        }
        let named = |token: Option<SpecialToken>, usual: &str| token.map_or(usual.to_owned(), SpecialToken::into_text);
        let bos = named(config.bos_token, "<s>");
        let eos = named(config.eos_token, "</s>");
        let unk = named(config.unk_token, "<unk>");
        let pad = named(config.pad_token, "[PAD]");

        let (mut source, mut path) = (config.chat_template.and_then(Templates::into_chat), path);
        let own = folder.join("chat_template.jinja");
        if own.exists() {
            let text = String::from_utf8(read(&own, MAX_CONFIG)?);
            source = Some(text.map_err(|error| Error::format(&own, error.to_string()))?);
            path = own;
        }
        let chat = match source {
            Some(source) => ChatTemplate::new(&source).map_err(|error| Error::format(&path, error.to_string()))?,
            None => ChatTemplate::default(),
        };
        let special = [("bos_token", &bos), ("eos_token", &eos), ("unk_token", &unk), ("pad_token", &pad)];
        Ok(Tokenizer {
            chat: special.into_iter().fold(chat, |chat, (name, text)| chat.with_special_token(name, text)),
            bos: tokenizer.token_to_id(&bos),
            add_bos: config.add_bos_token.unwrap_or(true),
            eos: tokenizer.token_to_id(&eos),
            tokenizer: Arc::new(tokenizer),
            spellings: Arc::new(spellings),
        })
    }

    /// The ids of a text, with the token that begins a text in front, as the model is trained to see it. The token that
    /// ends a text is not added.
    ///
    /// A special token that is spelled out in the text becomes that token, as it does with Hugging Face: `"</s>"` in a
    /// text of strangers ends it for the model.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] for a character that the vocabulary has no way to write, which needs a damaged one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_without_special(text)?;
        Ok(self.bos.filter(|_| self.add_bos).into_iter().chain(ids).collect())
    }

    /// As [`encode`](Self::encode), without the token that begins a text.
    pub fn encode_without_special(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false);
        Ok(encoding.map_err(|error| Error::text("the text", error.to_string()))?.get_ids().to_vec())
    }

    /// The text of the ids, without special tokens.
    ///
    /// As with Hugging Face, except where bytes are no text: there this writes U+FFFD for each byte that belongs to no
    /// character, as SentencePiece does, and keeps the characters around it.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] for an id that is not below [`vocab_size`](Self::vocab_size).
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, TextStream::new(&self.spellings, false))
    }

    /// As [`decode`](Self::decode), with special tokens spelled out.
    pub fn decode_keep_special(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, TextStream::new(&self.spellings, true))
    }

    fn text(&self, ids: &[u32], mut stream: TextStream) -> Result<String> {
        for (at, &id) in ids.iter().enumerate() {
            if id as usize >= self.vocab_size() {
                let size = self.vocab_size();
                return Err(Error::text("token ids", format!("id {id} at {at} is not below the vocabulary's {size}")));
            }
            stream.add(id);
        }
        Ok(stream.into_text())
    }

    /// Text from ids that come one by one, without special tokens.
    pub fn stream(&self) -> TextStream {
        TextStream::new(&self.spellings, false)
    }

    /// The token as the vocabulary spells it, for example `"▁Hello"` or `"<0x0A>"`; `None` where no token has this id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The prompt that the chat template makes of the messages.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`].
    pub fn render_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        self.chat.render(messages, options)
    }

    /// The ids of [`render_chat`](Self::render_chat): nothing is put in front, since a template writes all that is to be
    /// there. That of Hymba writes no token that begins a text.
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`] and [`encode`](Self::encode).
    pub fn encode_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        self.encode_without_special(&self.render_chat(messages, options)?)
    }

    /// The chat template.
    pub fn chat_template(&self) -> &ChatTemplate {
        &self.chat
    }

    /// All ids are below this. A model may have room for more.
    pub fn vocab_size(&self) -> usize {
        self.spellings.spellings.len()
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let tokens = self.spellings.spellings.iter().filter(|spelling| **spelling != Spelling::Nothing).count();
        f.debug_struct("Tokenizer")
            .field("tokens", &tokens)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

/// All bytes of a regular file that is not too long.
fn read(path: &Path, longest: u64) -> Result<Vec<u8>> {
    let mut source = Source::open(path)?;
    let length = source.length();
    if length > longest {
        return Err(source.error(format!("it has {length} bytes, and at most {longest} are read")));
    }
    let mut bytes = vec![0; length as usize];
    source.fill(&mut bytes)?;
    Ok(bytes)
}
