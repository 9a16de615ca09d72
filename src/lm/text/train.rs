//! New tokenizers.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{AddedToken, Trainer};

use super::tokenizer::Tokenizer;
use crate::files::replace;
use crate::{Error, Result};

/// Special tokens, in the order of their ids: unknown, the beginning of a text, its end.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
/// What a space is to a Llama tokenizer.
const SPACE: char = '▁';

impl Tokenizer {
    /// Trains a byte pair encoding of `size` tokens on a text and writes it to `folder`, as the `tokenizer.json` and
    /// `tokenizer_config.json` of a Llama tokenizer, from which it is read. It has fewer tokens if the text has no more
    /// pairs that occur at least twice.
    ///
    /// No piece crosses the end of a word, a number or a line. Characters that are not in `text` are written by their
    /// bytes. The same text gives the same tokenizer.
    ///
    /// ```
    /// use hymba::lm::Tokenizer;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let tokenizer = Tokenizer::train("the cat and the hat and the bat", 280, folder.path())?;
    /// let ids = tokenizer.encode("the cat and a café")?;
    /// assert!(ids.len() < 18);
    /// assert_eq!(tokenizer.decode(&ids)?, "the cat and a café");
    /// assert_eq!(Tokenizer::from_dir(folder.path())?.vocab_size(), tokenizer.vocab_size());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `size` is above 2²⁰ or too small: it must hold the characters of the text, a space, 256
    /// bytes and three special tokens; [`Error::Io`] where a file cannot be written.
    pub fn train(text: &str, size: usize, folder: impl AsRef<Path>) -> Result<Self> {
        const MOST: usize = 1 << 20;
        let folder = folder.as_ref();
        let special = SPECIAL.map(str::to_owned).into_iter().chain((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        let special: Vec<_> = special.map(|token| AddedToken::from(token, true)).collect();
        let mut characters: Vec<char> = text.chars().filter(|c| *c != ' ').chain([SPACE]).collect();
        characters.sort_unstable();
        characters.dedup();
        let least = special.len() + characters.len();
        if !(least..=MOST).contains(&size) {
            let allowed =
                format!("the characters of this text take {least} tokens; give as many at least, and at most {MOST}");
            return Err(Error::Option { option: "size", given: size.to_string(), allowed });
        }
        let failed = |error: tokenizers::Error| Error::text("the text", error.to_string());
        let mut trainer = BpeTrainer::builder()
            .vocab_size(size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(special)
            // in front of every text, whether or not there is one in this
            .initial_alphabet([SPACE].into())
            .build();
        trainer.feed(text.split_inclusive('\n'), |line| Ok(words(line))).map_err(failed)?;
        let bpe = BPE::builder().unk_token(SPECIAL[0].into()).fuse_unk(true).byte_fallback(true);
        let mut bpe = bpe.build().map_err(failed)?;
        trainer.train(&mut bpe).map_err(failed)?;

        fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let path = folder.join("tokenizer.json");
        let model = serde_json::to_value(&bpe).map_err(|error| Error::format(&path, error.to_string()))?;
        write(&path, &file(model))?;
        write(
            &folder.join("tokenizer_config.json"),
            &json!({
                "tokenizer_class": "PreTrainedTokenizerFast",
                "add_bos_token": true,
                "add_eos_token": false,
                "unk_token": SPECIAL[0],
                "bos_token": SPECIAL[1],
                "eos_token": SPECIAL[2],
                "pad_token": SPECIAL[0],
                "clean_up_tokenization_spaces": false,
            }),
        )?;
        Self::from_dir(folder)
    }
}

/// `tokenizer.json`
fn file(model: Value) -> Value {
    let added = SPECIAL.iter().enumerate().map(|(id, content)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true,
        })
    });
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let space = SPACE.to_string();
    let [bos, text] =
        [json!({"SpecialToken": {"id": SPECIAL[1], "type_id": 0}}), json!({"Sequence": {"id": "A", "type_id": 0}})];
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": space}, replace(" ", &space)]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            replace(&space, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": model,
    })
}

fn write(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::format(path, error.to_string()))?;
    replace(path, |file| file.write_all(text.as_bytes())).map_err(|source| Error::io(path, source))
}

/// The units that no piece crosses: a space and the word, number or marks after it. Nothing follows `<`, so that no
/// piece is spelled as a special one.
fn words(line: &str) -> Vec<String> {
    let kind = |c: char| match c {
        SPACE => 0,
        '\n' => 1,
        _ if c.is_alphabetic() => 2,
        _ if c.is_numeric() => 3,
        _ => 4,
    };
    let mut words: Vec<String> = Vec::new();
    let mut before = '\n';
    for c in line.chars().map(|c| if c == ' ' { SPACE } else { c }) {
        let goes_on = before != '<' && (kind(before) == kind(c) || before == SPACE && c != '\n');
        match words.last_mut().filter(|_| goes_on) {
            Some(word) => word.push(c),
            None => words.push(c.into()),
        }
        before = c;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_with_words_numbers_and_lines() {
        assert_eq!(words("It's 25 °C,  a <b>\n"), ["It", "'", "s", "▁25", "▁°", "C", ",", "▁▁a", "▁<", "b", ">", "\n"]);
    }

    #[test]
    fn any_text_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let text = "A line </s> with <0x41> marks.\n".repeat(50) + "\tund ein paar Wörter – ▁!";
        let tokenizer = Tokenizer::train(&text, 400, folder.path()).unwrap();
        assert!(tokenizer.vocab_size() > 259 + 30 && tokenizer.vocab_size() <= 400);
        for text in [" two  spaces, 日本語 \n\n<0x42", "A line with marks.\n", ""] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(ids[0], 1);
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
        // plain text, spelled as special tokens are
        let ids = tokenizer.encode_plain(&text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('▁', " "));
        assert!(ids[1..].iter().all(|&id| id > 2));

        let again = tempfile::tempdir().unwrap();
        Tokenizer::train(&text, 400, again.path()).unwrap();
        let file = |folder: &Path| fs::read(folder.join("tokenizer.json")).unwrap();
        assert_eq!(file(folder.path()), file(again.path()));
    }

    #[test]
    fn sizes_that_do_not_do_are_told() {
        let folder = tempfile::tempdir().unwrap();
        for size in [0, 262, (1 << 20) + 1] {
            let error = Tokenizer::train("abc", size, folder.path()).unwrap_err().to_string();
            assert!(error.contains("263"), "{error}");
        }
        for (text, size) in [("abc", 263), ("a bc", 263), ("", 260)] {
            assert_eq!(Tokenizer::train(text, 300, folder.path()).unwrap().vocab_size(), size, "{text:?}");
            assert_eq!(Tokenizer::train(text, size, folder.path()).unwrap().vocab_size(), size, "{text:?}");
        }
    }

    #[test]
    fn a_text_without_a_space_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let japanese = "日本語の文章には空白がない。\n".repeat(20);
        for text in ["abc", "", "abcabc\nabc", &japanese] {
            let tokenizer = Tokenizer::train(text, 400, folder.path()).unwrap();
            for text in [text, "another text"] {
                let ids = tokenizer.encode(text).unwrap();
                assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            }
        }
    }
}
