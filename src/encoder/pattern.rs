//! Which block runs at which depth.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::{Error, Result};

/// Which kind of block runs at which depth, blocks counted from 0.
///
/// | pattern | block i | known as |
/// |---|---|---|
/// | `Parallel` | [`HymbaBlock`](crate::HymbaBlock): both branches, a gate, a feed-forward network | Hymba |
/// | `Mamba` | [`SerialBlock`](crate::SerialBlock) of Mamba and a feed-forward network | |
/// | `Attention` | [`SerialBlock`](crate::SerialBlock) of attention and a feed-forward network | |
/// | `Alternating` | as `Attention` where (i + 1) mod `attention_every` = 0, as `Mamba` elsewhere | Jamba |
/// | `SharedAttention` | [`FedBlock`](crate::FedBlock): Mamba alone; where (i + 1) mod `attention_every` = 0, the one [`SharedBlock`](crate::SharedBlock) feeds it | Zamba |
///
/// So 6 blocks and `attention_every` 3 give M M A M M A, and two uses of the shared block, at i = 2 and 5. A shared block's weights
/// exist once, in files, gradients and counts; what a stream remembers exists once per use.
///
/// In JSON: `{"kind": "alternating", "attention_every": 3}`; the other kinds are `parallel`, `mamba`, `attention` and
/// `shared_attention`.
///
/// ```
/// use hymba::{Hymba, HymbaOptions, Pattern};
///
/// let options = HymbaOptions::new(12).hidden_size(64).num_layers(4).pattern(Pattern::Alternating { attention_every: 2 });
/// assert_eq!(Hymba::build(options)?.blocks().iter().filter(|block| block.attention().is_some()).count(), 2);
///
/// let none = HymbaOptions::new(12).num_layers(4).pattern(Pattern::SharedAttention { attention_every: 5 });
/// assert!(none.validate().unwrap_err().to_string().contains("attention_every = 5"));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pattern {
    /// Mamba and attention side by side in every block.
    #[default]
    Parallel,
    /// Mamba in every block.
    Mamba,
    /// Attention in every block.
    Attention,
    /// Mamba; attention in its place in every `attention_every`-th block.
    Alternating {
        /// From 2 to `num_layers`.
        attention_every: usize,
    },
    /// Mamba; one shared attention block feeds every `attention_every`-th block.
    SharedAttention {
        /// From 1 to `num_layers`.
        attention_every: usize,
    },
}

/// The kind of block at one depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockKind {
    Parallel,
    Mamba,
    Attention,
    /// Mamba alone, maybe fed by the shared block.
    Fed {
        by_shared: bool,
    },
}

impl Pattern {
    /// The kind of block at this depth.
    pub(crate) fn at(self, depth: usize) -> BlockKind {
        let attends = |every: usize| (depth + 1).is_multiple_of(every);
        match self {
            Pattern::Parallel => BlockKind::Parallel,
            Pattern::Mamba => BlockKind::Mamba,
            Pattern::Attention => BlockKind::Attention,
            Pattern::Alternating { attention_every } if attends(attention_every) => BlockKind::Attention,
            Pattern::Alternating { .. } => BlockKind::Mamba,
            Pattern::SharedAttention { attention_every } => BlockKind::Fed { by_shared: attends(attention_every) },
        }
    }

    /// The kinds of block there are, and how many of each.
    pub(crate) fn kinds(self, num_layers: usize) -> impl Iterator<Item = (BlockKind, usize)> {
        let attending = match self {
            Pattern::Parallel | Pattern::Attention => num_layers,
            Pattern::Mamba => 0,
            Pattern::Alternating { attention_every } | Pattern::SharedAttention { attention_every } => {
                num_layers / attention_every
            }
        };
        let (with, without) = match self {
            Pattern::Parallel => (BlockKind::Parallel, BlockKind::Parallel),
            Pattern::SharedAttention { .. } => {
                (BlockKind::Fed { by_shared: true }, BlockKind::Fed { by_shared: false })
            }
            _ => (BlockKind::Attention, BlockKind::Mamba),
        };
        [(with, attending), (without, num_layers - attending)].into_iter().filter(|(_, count)| *count > 0)
    }

    /// Whether there is a block whose weights several depths share.
    pub(crate) fn shares(self) -> bool {
        matches!(self, Pattern::SharedAttention { .. })
    }

    /// The distance of two uses of attention, where it is not in all blocks or in none.
    pub(crate) fn attention_every(self) -> Option<usize> {
        match self {
            Pattern::Alternating { attention_every } | Pattern::SharedAttention { attention_every } => {
                Some(attention_every)
            }
            _ => None,
        }
    }

    /// Its name in files.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Pattern::Parallel => "parallel",
            Pattern::Mamba => "mamba",
            Pattern::Attention => "attention",
            Pattern::Alternating { .. } => "alternating",
            Pattern::SharedAttention { .. } => "shared_attention",
        }
    }

    pub(crate) fn is_parallel(&self) -> bool {
        *self == Pattern::Parallel
    }

    /// Checks that there is a use of attention and, in alternating blocks, of Mamba.
    pub(crate) fn validate(self, num_layers: usize) -> Result<()> {
        let (least, why) = match self {
            Pattern::Alternating { .. } => (2, "so that there is a block of each kind"),
            _ => (1, "so that the shared block is used"),
        };
        match self.attention_every() {
            Some(every) if !(least..=num_layers).contains(&every) => Err(Error::Option {
                option: "attention_every",
                given: every.to_string(),
                allowed: format!(
                    "in the pattern {} it must be from {least} to num_layers = {num_layers}, {why}",
                    self.kind()
                ),
            }),
            _ => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse(&Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A pattern as a file has it. The upper end of `attention_every` is checked with the other options.
fn parse(given: &Value) -> Result<Pattern> {
    let unusable =
        |allowed: &str| Error::Option { option: "pattern", given: given.to_string(), allowed: allowed.into() };
    const FORM: &str = r#"it must be an object such as {"kind": "alternating", "attention_every": 3}"#;
    let object = given.as_object().ok_or_else(|| unusable(FORM))?;
    if object.keys().any(|key| !["kind", "attention_every"].contains(&key.as_str())) {
        return Err(unusable("its keys are kind and attention_every"));
    }
    let every = object.get("attention_every").filter(|every| !every.is_null());
    let kind = object.get("kind").and_then(Value::as_str).ok_or_else(|| unusable(FORM))?;
    let attention_every = |least: usize| {
        let range = format!("it must be from {least} to num_layers");
        let every = every.ok_or_else(|| unusable(&format!("attention_every is missing: {range}")))?;
        let number = every.as_u64().and_then(|every| usize::try_from(every).ok()).filter(|every| *every > 0);
        number.ok_or_else(|| Error::Option {
            option: "attention_every",
            given: every.to_string(),
            allowed: format!("in the pattern {kind} {range}"),
        })
    };
    let pattern = match kind {
        "parallel" => Pattern::Parallel,
        "mamba" => Pattern::Mamba,
        "attention" => Pattern::Attention,
        "alternating" => Pattern::Alternating { attention_every: attention_every(2)? },
        "shared_attention" => Pattern::SharedAttention { attention_every: attention_every(1)? },
        _ => return Err(unusable("kind is parallel, mamba, attention, alternating or shared_attention")),
    };
    if every.is_some() && pattern.attention_every().is_none() {
        return Err(unusable("attention_every belongs to the kinds alternating and shared_attention"));
    }
    Ok(pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kinds_are_those_of_all_depths() {
        let mut patterns = vec![Pattern::Parallel, Pattern::Mamba, Pattern::Attention];
        for attention_every in 1..=9 {
            patterns.push(Pattern::Alternating { attention_every });
            patterns.push(Pattern::SharedAttention { attention_every });
        }
        for pattern in patterns {
            for layers in 1..=8 {
                let mut left: Vec<_> = (0..layers).map(|depth| pattern.at(depth)).collect();
                for (kind, count) in pattern.kinds(layers) {
                    let before = left.len();
                    left.retain(|one| *one != kind);
                    assert_eq!(before - left.len(), count, "{pattern:?} of {layers}");
                }
                assert!(left.is_empty());
            }
        }
        let letters =
            |pattern: Pattern| (0..6).map(|depth| format!("{:?}", pattern.at(depth)).remove(0)).collect::<String>();
        assert_eq!(letters(Pattern::Alternating { attention_every: 3 }), "MMAMMA");
    }

    #[test]
    fn a_file_says_it_as_options_do() {
        for (text, pattern) in [
            (r#"{"kind":"parallel"}"#, Pattern::Parallel),
            (r#"{"kind":"mamba"}"#, Pattern::Mamba),
            (r#"{"kind":"attention"}"#, Pattern::Attention),
            (r#"{"kind":"alternating","attention_every":3}"#, Pattern::Alternating { attention_every: 3 }),
            (r#"{"kind":"shared_attention","attention_every":1}"#, Pattern::SharedAttention { attention_every: 1 }),
        ] {
            assert_eq!(serde_json::to_string(&pattern).unwrap(), text);
            assert_eq!(serde_json::from_str::<Pattern>(text).unwrap(), pattern);
            assert!(text.contains(pattern.kind()));
        }
    }

    #[test]
    fn what_a_file_cannot_say() {
        for (text, names) in [
            (r#""jamba""#, vec!["pattern", "jamba", "kind"]),
            ("3", vec!["pattern", "3"]),
            ("{}", vec!["pattern", "kind"]),
            (r#"{"kind": "jamba"}"#, vec!["pattern", "jamba", "alternating"]),
            (r#"{"kind": 7}"#, vec!["pattern", "7"]),
            (r#"{"kind": "alternating"}"#, vec!["pattern", "attention_every", "missing"]),
            (r#"{"kind": "shared_attention", "attention_every": null}"#, vec!["pattern", "missing"]),
            (r#"{"kind": "mamba", "attention_every": 3}"#, vec!["pattern", "attention_every"]),
            (r#"{"kind": "mamba", "every": 3}"#, vec!["pattern", "every"]),
            (r#"{"kind": "alternating", "attention_every": -1}"#, vec!["attention_every = -1", "num_layers"]),
            (r#"{"kind": "alternating", "attention_every": 0}"#, vec!["attention_every = 0", "num_layers"]),
            (r#"{"kind": "shared_attention", "attention_every": 2.5}"#, vec!["attention_every = 2.5", "num_layers"]),
            (r#"{"kind": "shared_attention", "attention_every": "2"}"#, vec!["attention_every = \"2\"", "num_layers"]),
            (
                r#"{"kind": "shared_attention", "attention_every": 99999999999999999999}"#,
                vec!["attention_every = 1", "num_layers"],
            ),
        ] {
            let error = serde_json::from_str::<Pattern>(text).unwrap_err().to_string();
            names.iter().for_each(|name| assert!(error.contains(name), "{text}: {error}"));
        }
    }
}
