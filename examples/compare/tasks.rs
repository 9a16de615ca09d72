//! Tasks that are generated: what can a model remember, and find again?
//!
//! | task | a sequence | answers |
//! |---|---|---|
//! | `mqar-P-L-V` | P pairs of a key and a value, then each key once more, alone, among random tokens that are none of the keys; L tokens of V in all (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927) | the value, where its key comes again |
//! | `copying-N-L` | N of 16 tokens scattered among L − 2N of noise, then N marks (selective copying, Gu and Dao 2023, arXiv 2312.00752) | at each mark the next of the N tokens |
//! | `induction-L` | random tokens, a special one somewhere, and again at the end (induction heads, there) | at the end: the token that followed it the first time |
//!
//! Keys come again after gaps of a power law with exponent a − 1, a = 0.01: mostly soon.

use hymba::ndarray::Array3;
use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;

/// The exponent of the gaps in `mqar`.
const GAPS: f64 = 0.01;
/// Tokens that are to be copied or looked up.
const SYMBOLS: usize = 16;
/// Numbers of a frame that tell its position: sine and cosine of each of the periods 2, 4, … 256, scaled so that together they are as long
/// as the one-hot token: longer ones drown it, and what is to be recalled is the token.
pub const POSITION: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generated {
    Mqar { pairs: usize, length: usize, vocabulary: usize },
    Copying { copies: usize, length: usize },
    Induction { length: usize },
}

/// A sequence, and what is to be answered at some of its frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    pub tokens: Vec<usize>,
    pub answers: Vec<Option<usize>>,
}

impl Generated {
    /// By its name, as in the table above.
    pub fn parse(name: &str) -> Result<Self, String> {
        let (kind, sizes) = name.split_once('-').unwrap_or((name, ""));
        let sizes: Vec<usize> = sizes.split('-').filter_map(|size| size.parse().ok()).collect();
        let task = match (kind, &sizes[..]) {
            ("mqar", &[pairs, length, vocabulary]) => Generated::Mqar { pairs, length, vocabulary },
            ("mqar", &[pairs, length]) => Generated::Mqar { pairs, length, vocabulary: 128 },
            ("copying", &[copies, length]) => Generated::Copying { copies, length },
            ("induction", &[length]) => Generated::Induction { length },
            _ => {
                return Err(format!(
                    "unknown task {name}; there are mqar-PAIRS-LENGTH[-VOCABULARY], copying-N-LENGTH, induction-LENGTH"
                ));
            }
        };
        let possible = match task {
            Generated::Mqar { pairs, length, vocabulary } => {
                pairs > 0
                    && length <= 1 << 20
                    && 4 * pairs <= length
                    && 2 * pairs <= vocabulary
                    && vocabulary <= 1 << 14
            }
            Generated::Copying { copies, length } => copies > 0 && length <= 1 << 20 && 3 * copies <= length,
            Generated::Induction { length } => (8..=1 << 20).contains(&length),
        };
        if possible { Ok(task) } else { Err(format!("{name} has no room for its pairs or tokens")) }
    }

    pub fn length(&self) -> usize {
        match *self {
            Generated::Mqar { length, .. } | Generated::Copying { length, .. } | Generated::Induction { length } => {
                length
            }
        }
    }

    /// The same task with longer sequences.
    pub fn of_length(self, length: usize) -> Self {
        match self {
            Generated::Mqar { pairs, vocabulary, .. } => Generated::Mqar { pairs, length, vocabulary },
            Generated::Copying { copies, .. } => Generated::Copying { copies, length },
            Generated::Induction { .. } => Generated::Induction { length },
        }
    }

    /// Lengths that a model is tested at; the first is what it is trained at.
    pub fn test_lengths(&self) -> Vec<usize> {
        match *self {
            Generated::Induction { length } => (0..5).map(|power| length << power).collect(),
            _ => vec![self.length()],
        }
    }

    /// Different tokens.
    pub fn tokens(&self) -> usize {
        match *self {
            Generated::Mqar { vocabulary, .. } => vocabulary,
            Generated::Copying { .. } => SYMBOLS + 2,
            Generated::Induction { .. } => SYMBOLS + 1,
        }
    }

    /// Different answers, of which a guess is right in one of so many cases.
    pub fn classes(&self) -> usize {
        match *self {
            Generated::Mqar { vocabulary, .. } => vocabulary / 2,
            Generated::Copying { .. } | Generated::Induction { .. } => SYMBOLS,
        }
    }

    pub fn example(&self, rng: &mut ChaCha8Rng) -> Example {
        match *self {
            Generated::Mqar { pairs, length, vocabulary } => mqar(pairs, length, vocabulary, rng),
            Generated::Copying { copies, length } => copying(copies, length, rng),
            Generated::Induction { length } => induction(length, rng),
        }
    }

    /// Numbers of a frame that shows so many tokens.
    pub fn width(&self, shown: usize) -> usize {
        shown * self.tokens() + POSITION
    }

    /// The frames of sequences of one length `[b, l, width]`: the token, one-hot, then those before it until `shown` are, and where it
    /// stands.
    pub fn frames(&self, examples: &[Example], shown: usize) -> Array3<f32> {
        // eight pairs, each of length one
        let scale = (2.0 / POSITION as f32).sqrt();
        let (l, all) = (examples.first().map_or(0, |example| example.tokens.len()), self.tokens());
        let mut x = Array3::zeros((examples.len(), l, self.width(shown)));
        for (example, mut x) in examples.iter().zip(x.outer_iter_mut()) {
            for (t, mut x) in x.outer_iter_mut().enumerate() {
                for (i, token) in example.tokens[..=t].iter().rev().take(shown).enumerate() {
                    x[i * all + token] = 1.0;
                }
                for i in 0..POSITION / 2 {
                    let angle = std::f32::consts::TAU * (t % (2 << i)) as f32 / (2 << i) as f32;
                    x[shown * all + 2 * i] = scale * angle.sin();
                    x[shown * all + 2 * i + 1] = scale * angle.cos();
                }
            }
        }
        x
    }
}

/// Keys are the lower half of the vocabulary, values the upper.
fn mqar(pairs: usize, length: usize, vocabulary: usize, rng: &mut ChaCha8Rng) -> Example {
    let half = vocabulary / 2;
    let keys = some_of(half, pairs, rng, |_| 1.0);
    let values: Vec<usize> = some_of(half, pairs, rng, |_| 1.0);
    let mut tokens = vec![None; length];
    let mut answers = vec![None; length];
    for (i, (key, value)) in keys.iter().zip(&values).enumerate() {
        (tokens[2 * i], tokens[2 * i + 1]) = (Some(*key), Some(half + value));
    }
    // a key stands at the first of two tokens; its value does not follow, which would tell what later answers are not
    let places = (length - 2 * pairs) / 2;
    let mut gaps = some_of(places, pairs, rng, |gap| ((gap + 1) as f64).powf(GAPS - 1.0));
    // the first of them are mostly the shortest: else the place would tell which pair is meant, without a look at the key
    gaps.shuffle(rng);
    for ((key, value), gap) in keys.iter().zip(&values).zip(gaps) {
        let t = 2 * pairs + 2 * gap;
        tokens[t] = Some(*key);
        answers[t] = Some(*value);
    }
    // among them any tokens but these keys: what follows one of those would be another answer
    let noise: Vec<usize> = (0..vocabulary).filter(|token| !keys.contains(token)).collect();
    let tokens = tokens.into_iter().map(|token| token.unwrap_or_else(|| noise[rng.random_range(0..noise.len())]));
    Example { tokens: tokens.collect(), answers }
}

/// Token 16 is noise, 17 the mark.
fn copying(copies: usize, length: usize, rng: &mut ChaCha8Rng) -> Example {
    let mut places = some_of(length - copies, copies, rng, |_| 1.0);
    places.sort_unstable();
    let mut tokens = vec![SYMBOLS; length - copies];
    tokens.resize(length, SYMBOLS + 1);
    let mut answers = vec![None; length - copies];
    for place in places {
        tokens[place] = rng.random_range(0..SYMBOLS);
        answers.push(Some(tokens[place]));
    }
    Example { tokens, answers }
}

/// Token 16 is the special one.
fn induction(length: usize, rng: &mut ChaCha8Rng) -> Example {
    let mut tokens: Vec<usize> = (0..length).map(|_| rng.random_range(0..SYMBOLS)).collect();
    let first = rng.random_range(0..length - 2);
    (tokens[first], tokens[length - 1]) = (SYMBOLS, SYMBOLS);
    let mut answers = vec![None; length];
    answers[length - 1] = Some(tokens[first + 1]);
    Example { tokens, answers }
}

/// `count` different numbers below `below`, drawn one after the other with these weights (Efraimidis and Spirakis 2006).
fn some_of(below: usize, count: usize, rng: &mut ChaCha8Rng, weight: impl Fn(usize) -> f64) -> Vec<usize> {
    let mut drawn: Vec<(f64, usize)> = (0..below).map(|i| (-(1.0 - rng.random::<f64>()).ln() / weight(i), i)).collect();
    drawn.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    drawn.into_iter().take(count).map(|(_, i)| i).collect()
}
