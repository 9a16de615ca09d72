//! Where generated text is to end.

use std::ops::Range;

use super::stream::TextStream;
use crate::{Error, Result};

/// Ends a text at the first of several stop strings, while it comes in pieces.
///
/// What may be the beginning of a stop string is held back until it is known; nothing else is. The text ends where a stop
/// string is complete first; of several that are complete at the same place, the longest counts. How the text is cut into
/// pieces makes no difference.
///
/// ```
/// use hymba::lm::StopMatcher;
///
/// let mut stops = StopMatcher::new(["\nUser:", "###"])?;
/// assert_eq!(stops.push("Fine.\nUs"), "Fine.");
/// assert_eq!(stops.push("ually."), "\nUsually.");
/// assert_eq!(stops.push(" Bye#"), " Bye");
/// assert_eq!(stops.push("## and more"), "");
/// assert_eq!(stops.stopped(), Some("###"));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// Where in it are special tokens, which a stop string can name and which are not given out.
    hidden: Vec<Range<usize>>,
    /// The text that the last call gave out.
    out: String,
    stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings; without any, text passes unchanged.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] for an empty stop string.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Result<Self> {
        let stops: Vec<String> = stops.into_iter().map(Into::into).collect();
        if stops.iter().any(String::is_empty) {
            return Err(Error::text("an empty stop string", "it would end every text before it begins; leave it out"));
        }
        Ok(StopMatcher { stops, held: String::new(), hidden: Vec::new(), out: String::new(), stopped: None })
    }

    /// Takes the next piece and gives the text that is now certain not to belong to a stop string. After a match it is
    /// empty.
    pub fn push(&mut self, piece: &str) -> &str {
        self.out.clear();
        if self.stopped.is_some() {
            return &self.out;
        }
        // what was held ends no stop string, so that a match ends in the new piece
        let known = self.held.len();
        self.held.push_str(piece);
        for (start, character) in self.held[known..].char_indices() {
            let text = &self.held[..known + start + character.len_utf8()];
            let complete = self.stops.iter().enumerate().filter(|(_, stop)| text.ends_with(stop.as_str()));
            if let Some((index, stop)) = complete.max_by_key(|(_, stop)| stop.len()) {
                self.release(text.len() - stop.len());
                self.stopped = Some(index);
                self.held.clear();
                self.hidden.clear();
                return &self.out;
            }
        }
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let beginning = |&at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let earliest = self.held.len().saturating_sub(longest);
        let boundaries = (earliest..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let certain = boundaries.into_iter().find(beginning).unwrap_or(self.held.len());
        self.release(certain);
        &self.out
    }

    /// As [`push`](Self::push), for a special token: stop strings that name it find it, and it is never given out. Where none
    /// does, it is as if it were not there.
    pub(crate) fn push_special(&mut self, text: &str) -> &str {
        if self.stopped.is_some() || !self.stops.iter().any(|stop| stop.contains(text)) {
            return self.push("");
        }
        self.hidden.push(self.held.len()..self.held.len() + text.len());
        self.push(text)
    }

    /// The end of the text without a match: gives what was held back.
    pub fn finish(&mut self) -> &str {
        self.out.clear();
        self.release(self.held.len());
        &self.out
    }

    /// The stop string that ended the text, or `None` while there was none.
    pub fn stopped(&self) -> Option<&str> {
        Some(&self.stops[self.stopped?])
    }

    /// Gives out the first `end` bytes of what is held, but for special tokens.
    fn release(&mut self, end: usize) {
        let mut at = 0;
        for hidden in &self.hidden {
            self.out.push_str(&self.held[at..hidden.start.min(end)]);
            at = hidden.end.min(end);
        }
        self.out.push_str(&self.held[at..end]);
        self.held.drain(..end);
        self.hidden.retain_mut(|hidden| {
            *hidden = hidden.start.saturating_sub(end)..hidden.end.saturating_sub(end);
            hidden.start < hidden.end
        });
    }
}

/// Text from generated tokens, one by one, up to a stop string: what [`HymbaLm::generate_text`](crate::HymbaLm::generate_text)
/// gives out, for a loop of your own.
///
/// ```
/// # use hymba::lm::{StopStream, Tokenizer};
/// let tokenizer = Tokenizer::from_dir("tests/data/hymba-1.5b-base")?;
/// let prompt = tokenizer.encode("Hello")?;
/// let mut text = StopStream::new(tokenizer.stream_after(&prompt), ["."])?;
/// assert_eq!(text.push(3186), " world");
/// assert_eq!(text.push(29889), ""); // a full stop
/// assert_eq!(text.stopped(), Some("."));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopStream {
    stream: TextStream,
    stops: StopMatcher,
}

impl StopStream {
    /// The text of a stream, up to one of these stop strings.
    ///
    /// # Errors
    ///
    /// Those of [`StopMatcher::new`].
    pub fn new<S: Into<String>>(stream: TextStream, stops: impl IntoIterator<Item = S>) -> Result<Self> {
        Ok(StopStream { stream, stops: StopMatcher::new(stops)? })
    }

    /// Takes the next token and gives the text that is now certain. A stop string finds special tokens, too, which are no part of
    /// the text.
    pub fn push(&mut self, id: u32) -> &str {
        match self.stream.special(id) {
            Some(text) => self.stops.push_special(text),
            None => self.stops.push(self.stream.push(id)),
        }
    }

    /// The stop string that ended the text, or `None` while there was none.
    pub fn stopped(&self) -> Option<&str> {
        self.stops.stopped()
    }

    /// The end of the tokens: gives what was held back, nothing after a stop string.
    pub fn finish(&mut self) -> String {
        let rest = self.stops.push(self.stream.finish()).to_owned();
        if self.stops.stopped().is_some() { rest } else { rest + self.stops.finish() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text before the stop string that is complete first, and that string.
    fn naive<'a>(text: &'a str, stops: &[&'a str]) -> (&'a str, Option<&'a str>) {
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let mut complete: Vec<_> = stops.iter().filter(|stop| text[..end].ends_with(**stop)).collect();
            complete.sort_by_key(|stop| stop.len());
            if let Some(stop) = complete.last() {
                return (&text[..end - stop.len()], Some(stop));
            }
        }
        (text, None)
    }

    /// SplitMix64.
    fn random(state: &mut u64, below: usize) -> usize {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    }

    #[test]
    fn pieces_make_no_difference() {
        let alphabet = ["a", "b", "é", "€", "\n"];
        let mut state = 1;
        let mut word = |longest: usize| -> String {
            (0..1 + random(&mut state, longest)).map(|_| alphabet[random(&mut state, alphabet.len())]).collect()
        };
        let mut matches = 0;
        let mut state = 2;
        for _ in 0..20_000 {
            let stops: Vec<String> = (0..random(&mut state, 4)).map(|_| word(5)).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let text = word(40);
            let mut matcher = StopMatcher::new(stops.iter().copied()).unwrap();
            let (mut given, mut rest) = (String::new(), text.as_str());
            while !rest.is_empty() {
                let count = random(&mut state, 6);
                let cut = rest.char_indices().nth(count).map_or(rest.len(), |(at, _)| at);
                given.push_str(matcher.push(&rest[..cut]));
                rest = &rest[cut..];
                // never late: what is held is the beginning of a stop string
                assert!(matcher.held.is_empty() || stops.iter().any(|stop| stop.starts_with(&matcher.held)));
            }
            given.push_str(matcher.finish());
            let (expected, stop) = naive(&text, &stops);
            assert_eq!((given.as_str(), matcher.stopped()), (expected, stop), "{text:?} {stops:?}");
            matches += usize::from(stop.is_some());
        }
        assert!((5_000..18_000).contains(&matches), "{matches} texts have a stop string");
    }

    #[test]
    fn special_tokens_are_found_and_not_given_out() {
        // pieces, of which those with a bar are special tokens; what is given out, and the stop string
        for (stops, pieces, given, stopped) in [
            (vec!["</s>"], vec!["a", "|</s>", "b"], "a", Some("</s>")),
            (vec!["b</s>\n"], vec!["ab", "|</s>", "\nc"], "a", Some("b</s>\n")),
            (vec!["b</s>\n"], vec!["ab", "|</s>", "c", "|</s>"], "abc", None),
            (vec!["</s></s>"], vec!["|</s>", "a", "|</s>", "|</s>"], "a", Some("</s></s>")),
            (vec!["ab"], vec!["a", "|<unk>", "b"], "", Some("ab")),
            (vec!["<", "/"], vec!["a", "|</s>", "b"], "ab", None),
            (vec!["</s>"], vec!["a</", "s>b"], "a", Some("</s>")),
            (vec!["</s>", "s>x"], vec!["|<s>", "s>", "y"], "s>y", None),
        ] {
            let mut matcher = StopMatcher::new(stops).unwrap();
            let mut text = String::new();
            for piece in &pieces {
                text.push_str(match piece.strip_prefix('|') {
                    Some(special) => matcher.push_special(special),
                    None => matcher.push(piece),
                });
            }
            text.push_str(matcher.finish());
            assert_eq!((text.as_str(), matcher.stopped()), (given, stopped), "{pieces:?}");
        }
    }

    #[test]
    fn an_empty_stop_string_is_refused() {
        assert!(StopMatcher::new(["a", ""]).is_err());
        let mut none = StopMatcher::new(Vec::<String>::new()).unwrap();
        assert_eq!(none.push("text"), "text");
        assert_eq!(none.finish(), "");
    }
}
