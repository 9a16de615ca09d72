//! `tokenizer.json`: what is read of it, and what is refused before the `tokenizers` crate sees it.
//!
//! That crate reads many more kinds of tokenizer, and of some of them a damaged or hostile file makes it panic, run without
//! end or take any amount of memory. Here is what a Llama tokenizer consists of, each part with its limits.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

use super::stream::{TokenText, TokenTexts};
use crate::files::tensors::quoted;

/// Most pieces, merges and added tokens; the largest published vocabularies have a quarter of this.
const MAX_PIECES: usize = 1 << 20;
/// Longest piece in bytes.
const MAX_PIECE: usize = 1 << 10;
/// Most steps before and after the model, and longest text that one puts in.
const MAX_STEPS: usize = 8;
const MAX_INSERT: usize = 16;
/// How many times longer the steps before the model may make a text, all together.
const MAX_GROWTH: usize = 16;

#[derive(Deserialize)]
pub(super) struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Normalizer>,
    pre_tokenizer: Option<PreTokenizer>,
    decoder: Decoder,
    model: Model,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Normalizer {
    Prepend { prepend: String },
    Replace { pattern: Pattern, content: String },
    Sequence { normalizers: Vec<NormalizerStep> },
}

/// A step of a sequence, which is not itself a sequence.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum NormalizerStep {
    Prepend { prepend: String },
    Replace { pattern: Pattern, content: String },
}

/// A pattern can be a regular expression, too; those of a stranger can take any time.
#[derive(Deserialize)]
enum Pattern {
    String(String),
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    Metaspace {
        replacement: char,
        #[serde(default = "always")]
        prepend_scheme: PrependScheme,
        #[serde(default = "yes")]
        split: bool,
    },
}

fn always() -> PrependScheme {
    PrependScheme::Always
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum Decoder {
    Sequence { decoders: Vec<DecoderStep> },
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum DecoderStep {
    Replace { pattern: Pattern, content: String },
    ByteFallback,
    Fuse,
    Strip { content: char, start: usize, stop: usize },
}

// not an enum tagged by `type`: those keep a second copy of the vocabulary while they are read
#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    _kind: Option<Kind>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(deserialize_with = "vocabulary")]
    vocab: HashMap<String, u32>,
    #[serde(deserialize_with = "merges")]
    merges: Vec<(String, String)>,
}

#[derive(Deserialize)]
enum Kind {
    #[serde(rename = "BPE")]
    Bpe,
}

/// The pieces with their ids: none twice, and no id twice or beyond [`MAX_PIECES`].
fn vocabulary<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HashMap<String, u32>, D::Error> {
    struct Pieces;
    impl<'de> Visitor<'de> for Pieces {
        type Value = HashMap<String, u32>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("an object of ids by piece")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut pieces = HashMap::new();
            let mut ids = BTreeSet::new();
            while let Some((piece, id)) = entries.next_entry::<String, u32>()? {
                let name = quoted(&piece);
                if piece.is_empty() || piece.len() > MAX_PIECE {
                    return Err(A::Error::custom(format!("a piece has 1 to {MAX_PIECE} bytes, not {name}")));
                }
                if id as usize >= MAX_PIECES || !ids.insert(id) {
                    return Err(A::Error::custom(format!(
                        "the piece {name} has id {id}: ids are below {MAX_PIECES}, and no two pieces have the same"
                    )));
                }
                if pieces.insert(piece, id).is_some() {
                    return Err(A::Error::custom(format!("the piece {name} appears twice")));
                }
            }
            Ok(pieces)
        }
    }
    deserializer.deserialize_map(Pieces)
}

/// Pairs of pieces, the first merged first; older files have them as text with a space between.
fn merges<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, String)>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Text(String),
        Pair(String, String),
    }
    struct Merges;
    impl<'de> Visitor<'de> for Merges {
        type Value = Vec<(String, String)>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a list of merges")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut merges = Vec::new();
            while let Some(merge) = items.next_element::<Merge>()? {
                if merges.len() == MAX_PIECES {
                    return Err(A::Error::custom(format!("there are more than {MAX_PIECES} merges")));
                }
                merges.push(match merge {
                    Merge::Pair(left, right) => (left, right),
                    Merge::Text(text) => match text.split_once(' ') {
                        Some((left, right)) if !right.contains(' ') => (left.to_owned(), right.to_owned()),
                        _ => {
                            let text = quoted(&text);
                            return Err(A::Error::custom(format!("a merge is two pieces and a space, not {text}")));
                        }
                    },
                });
            }
            Ok(merges)
        }
    }
    deserializer.deserialize_seq(Merges)
}

/// A tokenizer, and the text of each of its tokens. The error is the reason why it cannot be.
pub(super) fn build(file: File) -> Result<(tokenizers::Tokenizer, TokenTexts), String> {
    let mut tokenizer = tokenizers::Tokenizer::new(model(file.model)?);
    let normalizer = normalizer(file.normalizer)?;
    tokenizer.with_normalizer(Some(normalizer)).map_err(reason)?;
    if let Some(PreTokenizer::Metaspace { replacement, prepend_scheme, split }) = file.pre_tokenizer {
        tokenizer.with_pre_tokenizer(Some(Metaspace::new(replacement, prepend_scheme, split)));
    }
    add(&mut tokenizer, &file.added_tokens)?;
    let texts = token_texts(&tokenizer, file.decoder, &file.added_tokens)?;
    Ok((tokenizer, texts))
}

fn reason(error: tokenizers::Error) -> String {
    error.to_string()
}

fn model(model: Model) -> Result<BPE, String> {
    let empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
    if !empty(&model.continuing_subword_prefix) || !empty(&model.end_of_word_suffix) {
        return Err("continuing_subword_prefix and end_of_word_suffix are not supported: they must be null".into());
    }
    if let Some(rate) = model.dropout.filter(|&rate| rate != 0.0) {
        return Err(format!("dropout is {rate}: it must be null, or a text would have other tokens each time"));
    }
    // the crate copies both halves to a buffer as long as the longest piece, and looks for what is there
    let mut joined = String::new();
    for (left, right) in &model.merges {
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if let Some(piece) = [left, right, &joined].into_iter().find(|&piece| !model.vocab.contains_key(piece)) {
            let (left, right, piece) = (quoted(left), quoted(right), quoted(piece));
            return Err(format!("the merge of {left} and {right} needs the piece {piece}, which is not there"));
        }
    }
    if let Some(unknown) = model.unk_token.as_ref().filter(|&unknown| !model.vocab.contains_key(unknown)) {
        return Err(format!("unk_token is {}, which is not a piece", quoted(unknown)));
    }
    let vocab: HashMap<String, u32, _> = model.vocab.into_iter().collect();
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, model.merges)
        .fuse_unk(model.fuse_unk)
        .byte_fallback(model.byte_fallback)
        .ignore_merges(model.ignore_merges)
        // it would keep texts, not words, for as long as the thread lives
        .cache_capacity(0);
    if let Some(unknown) = model.unk_token {
        builder = builder.unk_token(unknown);
    }
    builder.build().map_err(reason)
}

fn normalizer(normalizer: Option<Normalizer>) -> Result<Sequence, String> {
    let steps = match normalizer {
        None => Vec::new(),
        Some(Normalizer::Prepend { prepend }) => vec![NormalizerStep::Prepend { prepend }],
        Some(Normalizer::Replace { pattern, content }) => vec![NormalizerStep::Replace { pattern, content }],
        Some(Normalizer::Sequence { normalizers }) => normalizers,
    };
    count("normalizer", steps.len())?;
    let mut growth = 1usize;
    let mut wrapped = Vec::new();
    for step in steps {
        wrapped.push(match step {
            NormalizerStep::Prepend { prepend } => {
                insert("prepend", &prepend)?;
                NormalizerWrapper::Prepend(Prepend::new(prepend))
            }
            NormalizerStep::Replace { pattern: Pattern::String(pattern), content } => {
                replacement(&pattern, &content)?;
                growth = growth.saturating_mul(content.len().div_ceil(pattern.len()).max(1));
                NormalizerWrapper::Replace(Replace::new(pattern, content).map_err(reason)?)
            }
        });
    }
    if growth > MAX_GROWTH {
        return Err(format!("its normalizer makes a text {growth} times longer, and at most {MAX_GROWTH} is allowed"));
    }
    Ok(Sequence::new(wrapped))
}

fn count(what: &str, steps: usize) -> Result<(), String> {
    if steps <= MAX_STEPS {
        Ok(())
    } else {
        Err(format!("its {what} has {steps} steps, and at most {MAX_STEPS} are read"))
    }
}

fn insert(what: &str, text: &str) -> Result<(), String> {
    if text.len() <= MAX_INSERT {
        return Ok(());
    }
    Err(format!("{what} is {}, and at most {MAX_INSERT} bytes are allowed", quoted(text)))
}

fn replacement(pattern: &str, content: &str) -> Result<(), String> {
    if pattern.is_empty() {
        return Err("a Replace has an empty pattern".into());
    }
    insert("the content of a Replace", content)
}

fn add(tokenizer: &mut tokenizers::Tokenizer, added: &[Added]) -> Result<(), String> {
    if added.len() > MAX_PIECES {
        return Err(format!("there are {} added tokens, and at most {MAX_PIECES} are read", added.len()));
    }
    let mut ids = BTreeSet::new();
    for token in added {
        let name = quoted(&token.content);
        if token.content.is_empty() || token.content.len() > MAX_PIECE {
            return Err(format!("an added token has 1 to {MAX_PIECE} bytes, not {name}"));
        }
        if token.single_word || token.lstrip || token.rstrip {
            return Err(format!("the added token {name} has single_word, lstrip or rstrip, which are not supported"));
        }
        if token.id as usize >= MAX_PIECES || !ids.insert(token.id) {
            return Err(format!(
                "the added token {name} has id {}: ids are below {MAX_PIECES}, and no two have the same",
                token.id
            ));
        }
    }
    let tokens = added.iter().map(|token| AddedToken {
        content: token.content.clone(),
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: token.normalized,
        special: token.special,
    });
    tokenizer.add_tokens(tokens).map_err(reason)?;
    let mut normalized = BTreeSet::new();
    // the crate numbers them itself, and only warns where the file says otherwise
    for token in added {
        if tokenizer.token_to_id(&token.content) != Some(token.id) {
            let name = quoted(&token.content);
            return Err(format!("the added token {name} cannot have id {}: new ids follow the pieces'", token.id));
        }
        if token.normalized {
            let name = quoted(&token.content);
            match tokenizer.id_to_token(token.id) {
                Some(text) if !text.is_empty() => {
                    if !normalized.insert(text) {
                        return Err(format!("the normalizer makes another added token the same as {name}"));
                    }
                }
                // it would be found everywhere
                _ => return Err(format!("the normalizer leaves nothing of the added token {name}")),
            }
        }
    }
    Ok(())
}

fn token_texts(tokenizer: &tokenizers::Tokenizer, decoder: Decoder, added: &[Added]) -> Result<TokenTexts, String> {
    let Decoder::Sequence { decoders } = decoder;
    count("decoder", decoders.len())?;
    let mut replacements = Vec::new();
    let (mut bytes, mut fused, mut strip) = (false, false, None);
    for step in decoders {
        match step {
            DecoderStep::Replace { pattern: Pattern::String(pattern), content } if !bytes && !fused => {
                replacement(&pattern, &content)?;
                replacements.push((pattern, content));
            }
            DecoderStep::ByteFallback if !bytes && !fused => bytes = true,
            DecoderStep::Fuse if !fused => fused = true,
            DecoderStep::Strip { content, start, stop: 0 } if fused && strip.is_none() => {
                strip = Some((content, start))
            }
            _ => {
                return Err(
                    "its decoder must be the sequence Replace, ByteFallback, Fuse, Strip (at the start of the \
                            text only)"
                        .into(),
                );
            }
        }
    }
    let ids = tokenizer.get_vocab(true);
    let length = ids.values().max().map_or(0, |&largest| largest as usize + 1);
    let mut all = TokenTexts { texts: vec![TokenText::Nothing; length], special: vec![false; length], strip };
    for &id in ids.values() {
        let Some(mut text) = tokenizer.id_to_token(id) else { continue };
        for (pattern, content) in &replacements {
            text = text.replace(pattern, content);
        }
        all.texts[id as usize] = match byte(&text).filter(|_| bytes) {
            Some(byte) => TokenText::Byte(byte),
            None => TokenText::Text(text.into()),
        };
    }
    for token in added.iter().filter(|token| token.special) {
        all.special[token.id as usize] = true;
    }
    Ok(all)
}

/// The byte that a piece such as `<0x0A>` stands for.
fn byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}
