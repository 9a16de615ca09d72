//! What goes to the standard output, how errors look, and what happens when nobody reads any more.

use std::io::{self, IsTerminal, Write};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Writes to the standard output, at once.
pub fn out(bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes.as_ref())?;
    Ok(stdout.flush()?)
}

/// One line of JSON.
pub fn json(value: &impl Serialize) -> Result<()> {
    out(serde_json::to_string(value)? + "\n")
}

/// Whether the error is that nobody reads what is written, as in `hymba … | head`.
pub fn is_closed(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe))
}

/// An error with those of its causes that it does not tell itself, in one line.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !tells(&text, &cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether an error's text ends with this cause, or has it between a colon and what it says of it.
fn tells(text: &str, cause: &str) -> bool {
    let mut places = text.match_indices(cause).map(|(at, _)| (&text[..at], &text[at + cause.len()..]));
    cause.is_empty()
        || places.any(|(before, after)| {
            (before.is_empty() || before.ends_with(": ")) && (after.is_empty() || after.starts_with([':', ';', ',']))
        })
}

/// A bar on stderr, if that is a terminal; `template` as indicatif has it.
pub fn progress_bar(length: u64, template: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// Bytes for people.
pub fn size(bytes: usize) -> String {
    match bytes {
        0..100_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        100_000..100_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let error = anyhow::Error::msg("no such\nfile");
        assert_eq!(
            one_line(&error.context("m.json: no such\nfile; copy it").context("loading")),
            "loading: m.json: no such file; copy it"
        );
        for (cause, context, line) in [
            ("b", "a", "a: b"),
            ("b", "about a", "about a: b"),
            ("b", "a: b", "a: b"),
            ("no", "a: nothing", "a: nothing: no"),
        ] {
            assert_eq!(one_line(&anyhow::Error::msg(cause).context(context)), line);
        }
    }
}
