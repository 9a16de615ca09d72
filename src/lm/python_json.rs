//! JSON as Python's `json` module writes and reads it, and byte order marks.

use std::borrow::Cow;

/// The bytes without a UTF-8 byte order mark in front, which some editors put there: it is never text.
pub(crate) fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// Strict JSON from what Python reads: `NaN`, `Infinity` and `-Infinity` outside strings become `null`, and a byte order mark
/// is left out. Anything else stays, right or wrong.
///
/// Python writes these words without being asked (`"model_max_length": Infinity`), JSON has no number for them, and serde_json
/// refuses the whole file.
pub(crate) fn python_json(bytes: &[u8]) -> Cow<'_, [u8]> {
    replaced(bytes, |_| "null")
}

/// As [`python_json`], but the words become strings: for those who refuse them at the keys they read.
pub(crate) fn python_json_of_strings(bytes: &[u8]) -> Cow<'_, [u8]> {
    replaced(bytes, |word| match word {
        "NaN" => "\"NaN\"",
        "Infinity" => "\"Infinity\"",
        _ => "\"-Infinity\"",
    })
}

fn replaced(bytes: &[u8], by: impl Fn(&str) -> &'static str) -> Cow<'_, [u8]> {
    let bytes = without_bom(bytes);
    let mut strict = Vec::new();
    // up to here `bytes` is in `strict`
    let mut copied = 0;
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => at = end_of_string(bytes, at),
            b'N' | b'I' | b'-' => {
                let word =
                    ["NaN", "Infinity", "-Infinity"].into_iter().find(|word| bytes[at..].starts_with(word.as_bytes()));
                match word {
                    Some(word) => {
                        strict.extend_from_slice(&bytes[copied..at]);
                        strict.extend_from_slice(by(word).as_bytes());
                        at += word.len();
                        copied = at;
                    }
                    None => at += 1,
                }
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(bytes);
    }
    strict.extend_from_slice(&bytes[copied..]);
    Cow::Owned(strict)
}

/// Just past the quote that ends the string which begins at `start`.
fn end_of_string(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_python_become_null_outside_strings() {
        for (given, strict) in [
            ("", ""),
            ("\u{feff}{}", "{}"),
            (r#"{"a": NaN, "b": [Infinity,-Infinity], "c": -1}"#, r#"{"a": null, "b": [null,null], "c": -1}"#),
            (r#"{"NaN": "Infinity", "\"NaN": "\\", "x": NaN}"#, r#"{"NaN": "Infinity", "\"NaN": "\\", "x": null}"#),
            // not JSON before, and not JSON after
            ("-NaN", "-null"),
            ("1Infinity", "1null"),
            ("\"NaN", "\"NaN"),
            ("\"\\", "\"\\"),
            ("NaN", "null"),
            ("Na", "Na"),
        ] {
            assert_eq!(python_json(given.as_bytes()), strict.as_bytes(), "{given}");
        }
    }

    #[test]
    fn words_of_python_become_strings() {
        let given = br#"{"a": NaN, "b": [Infinity, -Infinity], "NaN": 1}"#;
        assert_eq!(&python_json_of_strings(given)[..], br#"{"a": "NaN", "b": ["Infinity", "-Infinity"], "NaN": 1}"#);
    }

    #[test]
    fn strict_json_is_not_copied() {
        assert!(matches!(python_json(b"\xef\xbb\xbf{\"NaN\": -1}"), Cow::Borrowed(b"{\"NaN\": -1}")));
    }
}
