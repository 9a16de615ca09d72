//! One value of a config, of any type, until it is read as what it must be.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::check::refused;
use crate::Result;
use crate::files::tensors::quoted;

/// Most tokens that end a text.
const MAX_ENDS: usize = 64;

/// A single value.
#[derive(Default)]
pub(super) enum Value {
    #[default]
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    /// Of the lists of a config, only that of `eos_token_id` may be a single value as well.
    Ints(Vec<i64>),
    Object,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValueVisitor;

        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a value, or a list of at most {MAX_ENDS} whole numbers")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(Value::Int(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Int(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(Value::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<Value, A::Error> {
                list(values, MAX_ENDS, &self).map(Value::Ints)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
                while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Object)
            }
        }

        deserializer.deserialize_any(ValueVisitor)
    }
}

/// As a message shows it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::Int(value) => write!(f, "{value}"),
            Value::Float(value) => write!(f, "{value:?}"),
            Value::Text(value) => f.write_str(&quoted(value)),
            Value::Ints(values) => write!(f, "{values:?}"),
            Value::Object => f.write_str("{…}"),
        }
    }
}

impl Value {
    /// The value as a `T`, or `default` where there is none.
    pub(super) fn read<T>(
        self,
        key: &'static str,
        default: Option<T>,
        allowed: &str,
        read: impl Fn(&Self) -> Option<T>,
    ) -> Result<T> {
        match (self, default) {
            (Value::Null, Some(default)) => Ok(default),
            (Value::Null, None) => refused(key, "null", format!("it is required, and must be {allowed}")),
            (given, _) => match read(&given) {
                Some(value) => Ok(value),
                None => refused(key, given, format!("it must be {allowed}")),
            },
        }
    }

    /// A whole number ≥ 0. Whether it is a possible size is for [`HymbaLmConfig::validate`](super::HymbaLmConfig::validate) to say.
    pub(super) fn size(self, key: &'static str, default: Option<usize>) -> Result<usize> {
        self.read(key, default, "a whole number, 0 or more", Value::as_size)
    }

    pub(super) fn as_size(&self) -> Option<usize> {
        match self {
            Value::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A whole number where 0 and less stand for "off".
    pub(super) fn size_or_off(self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, Some(None), "a whole number, or -1 for none", |given| match given {
            Value::Int(value) if *value <= 0 => Some(None),
            given => given.as_size().map(Some),
        })
    }

    pub(super) fn optional_size(self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, Some(None), "null or a whole number, 0 or more", |given| given.as_size().map(Some))
    }

    pub(super) fn number(self, key: &'static str, default: f64) -> Result<f64> {
        self.read(key, Some(default), "a number", |given| match given {
            Value::Int(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            _ => None,
        })
    }

    pub(super) fn switch(self, key: &'static str, default: bool) -> Result<bool> {
        self.read(key, Some(default), "true or false", |given| match given {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A token; a number below 0 stands for none.
    pub(super) fn token(self, key: &'static str) -> Result<Option<u32>> {
        self.read(key, Some(None), "a token's number, or null", |given| match given {
            Value::Int(value) if *value < 0 => Some(None),
            Value::Int(value) => u32::try_from(*value).ok().map(Some),
            _ => None,
        })
    }

    pub(super) fn tokens(self, key: &'static str) -> Result<Vec<u32>> {
        self.read(key, Some(Vec::new()), "a token's number, or a list of them, or null", |given| {
            let values = match given {
                Value::Int(value) => &[i64::try_from(*value).ok()?][..],
                Value::Ints(values) => values,
                _ => return None,
            };
            let tokens = values.iter().filter(|value| **value >= 0);
            tokens.map(|&value| u32::try_from(value).ok()).collect()
        })
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(self, key: &'static str, default: Option<T>, words: &[(&str, T)]) -> Result<T> {
        let quoted: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        self.read(key, default, &quoted.join(" or "), |given| match given {
            Value::Text(text) => words.iter().find(|(word, _)| word == text).map(|&(_, value)| value),
            _ => None,
        })
    }

    /// Refuses a key that would say otherwise than what the model has anyway: 0 or less, or `usual`.
    pub(super) fn only(self, key: &'static str, usual: usize) -> Result<()> {
        self.read(key, Some(()), &format!("-1, or {usual}, which is what it would be"), |given| {
            (matches!(given, Value::Int(..=0)) || given.as_size() == Some(usual)).then_some(())
        })
    }
}

/// At most `most` values.
pub(super) fn list<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut values: A,
    most: usize,
    expected: &dyn serde::de::Expected,
) -> Result<Vec<T>, A::Error> {
    let mut list = Vec::new();
    while let Some(value) = values.next_element()? {
        if list.len() == most {
            return Err(A::Error::invalid_length(most + 1, expected));
        }
        list.push(value);
    }
    Ok(list)
}
