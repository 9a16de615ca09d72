//! The tokenizer of a checkpoint.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::file;
use super::guard::{self, Guard};
use super::stream::{TextStream, TokenText, TokenTexts};
use super::template::{ChatOptions, ChatTemplate, Message, shown};
use crate::files::tensors::Source;
use crate::lm::python_json::{python_json, without_bom};
use crate::{Error, Result};

/// Longest `tokenizer.json` and `tokenizer_config.json` that are read.
const MAX_TOKENIZER: u64 = 64 << 20;
const MAX_CONFIG: u64 = 4 << 20;

/// Hymba's template marks turns in plain text. A model that goes on to write the next turn itself has ended its own.
const TURN: &str = "<extra_id_";

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
    token_texts: Arc<TokenTexts>,
    chat: Chat,
    bos: Option<u32>,
    add_bos: bool,
    eos: Option<u32>,
    eos_token: String,
    guard: Guard,
}

/// The chat template of a folder, or why there is none.
#[derive(Clone)]
enum Chat {
    Template(ChatTemplate),
    Refused { path: PathBuf, reason: String },
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
    /// template) and `chat_template.jinja`, which takes precedence over its template. Without a template, that of the
    /// published Hymba models is used. A template that cannot be used is no error here: texts can be encoded all the
    /// same, and [`render_chat`](Self::render_chat) says what is wrong with it.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where a file cannot be read; [`Error::Format`] where `tokenizer.json` (up to 64 MiB) or
    /// `tokenizer_config.json` (up to 4 MiB) is too long or damaged, or not of a Llama tokenizer, and where the folder
    /// has a tokenizer in another form, such as SentencePiece's `tokenizer.model`: the message says how to convert it.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("tokenizer.json");
        let bytes = read(&path, MAX_TOKENIZER).map_err(|error| missing(folder, error))?;
        let file = serde_json::from_slice(without_bom(&bytes))
            .map_err(|error| Error::format(&path, shown(error.to_string())))?;
        drop(bytes);
        let (tokenizer, texts) = file::build(file).map_err(|reason| Error::format(&path, reason))?;

        let path = folder.join("tokenizer_config.json");
        let mut config = Config::default();
        if path.exists() {
            let bytes = read(&path, MAX_CONFIG)?;
            let json = python_json(&bytes);
            // first as anything: an untagged enum says only that nothing fits
            serde_json::from_slice::<IgnoredAny>(&json)
                .map_err(|error| Error::format(&path, shown(error.to_string())))?;
            config = serde_json::from_slice(&json).map_err(|error| Error::format(&path, shown(error.to_string())))?;
        }
        let named = |token: Option<SpecialToken>, usual: &str| token.map_or(usual.to_owned(), SpecialToken::into_text);
        let bos = named(config.bos_token, "<s>");
        let eos = named(config.eos_token, "</s>");
        let unk = named(config.unk_token, "<unk>");
        let pad = named(config.pad_token, "[PAD]");

        let own = folder.join("chat_template.jinja");
        let (path, source) = if own.exists() {
            let source = read(&own, MAX_CONFIG).and_then(|bytes| {
                let text =
                    str::from_utf8(without_bom(&bytes)).map_err(|error| Error::format(&own, error.to_string()))?;
                Ok(Some(text.to_owned()))
            });
            (own, source)
        } else {
            (path, Ok(config.chat_template.and_then(Templates::into_chat)))
        };
        let template =
            source.and_then(|source| source.map_or(Ok(ChatTemplate::default()), |source| ChatTemplate::new(&source)));
        let special = [("bos_token", &bos), ("eos_token", &eos), ("unk_token", &unk), ("pad_token", &pad)];
        let chat = match template {
            Ok(chat) => {
                Chat::Template(special.into_iter().fold(chat, |chat, (name, text)| chat.with_special_token(name, text)))
            }
            Err(Error::Text { reason, .. } | Error::Format { reason, .. }) => Chat::Refused { path, reason },
            Err(error) => Chat::Refused { path, reason: error.to_string() },
        };
        Ok(Tokenizer {
            guard: Guard::new(&texts, &tokenizer, special.map(|(_, text)| text)),
            chat,
            bos: tokenizer.token_to_id(&bos),
            add_bos: config.add_bos_token.unwrap_or(true),
            eos: tokenizer.token_to_id(&eos),
            eos_token: eos,
            tokenizer: Arc::new(tokenizer),
            token_texts: Arc::new(texts),
        })
    }

    /// The ids of a text, with the token that begins a text in front, as the model is trained to see it. The token that
    /// ends a text is not added.
    ///
    /// A special token that is spelled out in the text becomes that token, as it does with Hugging Face: `"</s>"` in a
    /// text of strangers ends it for the model. In a chat it does not: see [`encode_chat`](Self::encode_chat).
    ///
    /// # Errors
    ///
    /// [`Error::Text`] for a character that the vocabulary has no way to write, which needs a damaged one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode_without_special(text)?;
        Ok(self.bos.filter(|_| self.add_bos).into_iter().chain(ids).collect())
    }

    /// As [`encode`](Self::encode), without the token that begins a text. Special tokens that are spelled out in the
    /// text still become those tokens.
    pub fn encode_without_special(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false);
        Ok(encoding.map_err(|error| Error::text("the text", error.to_string()))?.get_ids().to_vec())
    }

    /// As [`encode`](Self::encode), for the text of strangers: special tokens that are spelled out in it stay text.
    ///
    /// ```
    /// # use hymba::lm::Tokenizer;
    /// let tokenizer = Tokenizer::from_dir("tests/data/hymba-1.5b-base")?;
    /// assert!(tokenizer.encode("the end</s>")?.contains(&2));
    /// assert!(!tokenizer.encode_plain("the end</s>")?.contains(&2));
    /// assert_eq!(tokenizer.encode_plain("Hello")?, tokenizer.encode("Hello")?);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let Some((guarded, mark)) = self.guard.guarded_text(text) else { return self.encode(text) };
        let ids = guard::encode(&self.tokenizer, &guarded, mark);
        let ids = ids.map_err(|error| Error::text("the text", error.to_string()))?;
        Ok(self.bos.filter(|_| self.add_bos).into_iter().chain(ids).collect())
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
        self.text(ids, TextStream::new(&self.token_texts, false))
    }

    /// As [`decode`](Self::decode), with special tokens spelled out.
    pub fn decode_keep_special(&self, ids: &[u32]) -> Result<String> {
        self.text(ids, TextStream::new(&self.token_texts, true))
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

    /// Text from ids that come one by one, without special tokens. It is the beginning of a text: the space that
    /// [`encode`](Self::encode) puts in front is left out.
    pub fn stream(&self) -> TextStream {
        TextStream::new(&self.token_texts, false)
    }

    /// As [`stream`](Self::stream), for a text that continues the ids of a prompt: the pieces are what
    /// [`decode`](Self::decode) makes of all ids beyond what it makes of these. So the space in front of the first word is
    /// kept, and a character whose first bytes end the prompt comes whole.
    ///
    /// ```
    /// # use hymba::lm::Tokenizer;
    /// let tokenizer = Tokenizer::from_dir("tests/data/hymba-1.5b-base")?;
    /// let prompt = tokenizer.encode("Hello")?;
    /// assert_eq!(tokenizer.stream_after(&prompt).push(3186), " world");
    /// assert_eq!(tokenizer.stream().push(3186), "world");
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn stream_after(&self, ids: &[u32]) -> TextStream {
        self.stream().after(ids.iter().copied())
    }

    /// The token as the vocabulary spells it, for example `"▁Hello"` or `"<0x0A>"`; `None` where no token has this id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The prompt that the chat template makes of the messages, as one text: see [`ChatTemplate::render`].
    ///
    /// # Errors
    ///
    /// Those of [`ChatTemplate::render`]; [`Error::Format`] where the folder's template is not one that [`ChatTemplate::new`]
    /// takes.
    pub fn render_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        self.chat_template()?.render(messages, options)
    }

    /// The ids of [`render_chat`](Self::render_chat). No token that begins a text is added: a template writes one
    /// itself if the model needs it, and that of Hymba does not.
    ///
    /// Special tokens come from the template alone. One that is spelled out in a message, a context or a tool stays
    /// text, whatever the role: `"</s>"` there is four characters. Marks of a template that are plain text for the
    /// tokenizer, such as the `<extra_id_1>` of Hymba's, are the same ids wherever they stand: a message can forge a
    /// turn with them.
    ///
    /// ```
    /// use hymba::lm::{ChatOptions, Message, Tokenizer};
    ///
    /// let tokenizer = Tokenizer::from_dir("tests/data/hymba-1.5b-base")?;
    /// let ids = tokenizer.encode_chat(&[Message::user("What is </s>?")], &ChatOptions::new())?;
    /// assert!(!ids.contains(&2));
    /// assert!(tokenizer.decode(&ids)?.contains("What is </s>?"));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`render_chat`](Self::render_chat) and [`encode`](Self::encode).
    pub fn encode_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        let Some(guarded) = self.guard.guarded(messages, options) else {
            return self.encode_without_special(&self.render_chat(messages, options)?);
        };
        let prompt = self.render_chat(&guarded.messages, &guarded.options)?;
        guard::encode(&self.tokenizer, &prompt, guarded.mark)
            .map_err(|error| Error::text("the chat", error.to_string()))
    }

    /// The chat template.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] where the folder's template is not one that [`ChatTemplate::new`] takes.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        match &self.chat {
            Chat::Template(template) => Ok(template),
            Chat::Refused { path, reason } => {
                Err(Error::format(path, format!("the chat template cannot be used: {reason}")))
            }
        }
    }

    /// All ids are below this. A model may have room for more.
    pub fn vocab_size(&self) -> usize {
        self.token_texts.texts.len()
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// Where the text of an answer in a chat ends, besides stop tokens: the token that ends a text, and the beginning of
    /// a turn in Hymba's template, which is plain text.
    pub fn chat_stop_strings(&self) -> Vec<String> {
        [TURN].into_iter().chain(self.eos.map(|_| self.eos_token.as_str())).map(str::to_owned).collect()
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let tokens = self.token_texts.texts.iter().filter(|text| **text != TokenText::Nothing).count();
        f.debug_struct("Tokenizer")
            .field("tokens", &tokens)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

/// What to do about a folder without `tokenizer.json`.
fn missing(folder: &Path, error: Error) -> Error {
    const CONVERT: &str = "convert it in Python, with transformers: AutoTokenizer.from_pretrained(folder, \
                           use_fast=True).save_pretrained(folder) writes tokenizer.json";
    match error {
        Error::Io { source, path } if source.kind() == io::ErrorKind::NotFound => {
            for (name, what) in [
                ("tokenizer.model", "a SentencePiece model"),
                ("spiece.model", "a SentencePiece model"),
                ("sentencepiece.bpe.model", "a SentencePiece model"),
                ("vocab.json", "the vocabulary of a tokenizer in Python's form"),
                ("vocab.txt", "the vocabulary of a tokenizer in Python's form"),
            ] {
                let other = folder.join(name);
                if other.exists() {
                    return Error::format(&other, format!("{what}, which is not read: {CONVERT}"));
                }
            }
            let hint = if folder.join("adapter_config.json").exists() {
                "this is the folder of an adapter: take the tokenizer of its base model"
            } else {
                "a tokenizer is read from tokenizer.json: copy it from the model's page, or write it in Python, with \
                 transformers: AutoTokenizer.from_pretrained(model, use_fast=True).save_pretrained(folder)"
            };
            Error::io(&path, io::Error::new(source.kind(), format!("{source}; {hint}")))
        }
        error => error,
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
