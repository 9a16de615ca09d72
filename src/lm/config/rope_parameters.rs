//! The keys `rope_parameters`, as transformers 5 writes it, and `rope_scaling`, as earlier versions do.
//!
//! ```text
//! "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}
//! "rope_parameters": {"full_attention": {"rope_theta": …}, "sliding_attention": {"rope_theta": …}}
//! "rope_scaling": {"type": "linear", "factor": 4.0}
//! ```
//!
//! As in transformers, `rope_scaling` comes before `rope_parameters`, and what is inside before the same key outside.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::RopeType;
use super::check::refused;
use super::value::Value;
use super::words::ROPES;
use crate::Result;
use crate::files::tensors::quoted;

/// Most kinds of layers that have parameters of their own.
const MAX_KINDS: usize = 8;

/// The object as it stands in the file.
#[derive(Default)]
pub(super) struct RopeParameters {
    is_object: bool,
    /// Where it is something else than an object or null.
    is_other: bool,
    rope_theta: Value,
    rope_type: Value,
    /// The earlier name of `rope_type`.
    type_: Value,
    partial_rotary_factor: Value,
    factor: Value,
    /// Those of a kind of layers each.
    kinds: Vec<(String, RopeParameters)>,
}

/// What a config has of it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Rope {
    pub rope_theta: Option<f64>,
    /// `None` where it leaves the type as it is outside.
    pub rope_type: Option<RopeType>,
}

impl<'de> Deserialize<'de> for RopeParameters {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ParametersVisitor;

        const OTHER: RopeParameters = RopeParameters {
            is_object: false,
            is_other: true,
            rope_theta: Value::Null,
            rope_type: Value::Null,
            type_: Value::Null,
            partial_rotary_factor: Value::Null,
            factor: Value::Null,
            kinds: Vec::new(),
        };

        impl<'de> Visitor<'de> for ParametersVisitor {
            type Value = RopeParameters;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("parameters of the rotary embedding: an object of values by name")
            }

            fn visit_unit<E>(self) -> Result<RopeParameters, E> {
                Ok(RopeParameters::default())
            }

            fn visit_bool<E>(self, _: bool) -> Result<RopeParameters, E> {
                Ok(OTHER)
            }

            fn visit_i64<E>(self, _: i64) -> Result<RopeParameters, E> {
                Ok(OTHER)
            }

            fn visit_u64<E>(self, _: u64) -> Result<RopeParameters, E> {
                Ok(OTHER)
            }

            fn visit_f64<E>(self, _: f64) -> Result<RopeParameters, E> {
                Ok(OTHER)
            }

            fn visit_str<E>(self, _: &str) -> Result<RopeParameters, E> {
                Ok(OTHER)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<RopeParameters, A::Error> {
                while values.next_element::<IgnoredAny>()?.is_some() {}
                Ok(OTHER)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<RopeParameters, A::Error> {
                let mut read = RopeParameters { is_object: true, ..RopeParameters::default() };
                while let Some(key) = entries.next_key::<String>()? {
                    match key.as_str() {
                        "rope_theta" => read.rope_theta = entries.next_value()?,
                        "rope_type" => read.rope_type = entries.next_value()?,
                        "type" => read.type_ = entries.next_value()?,
                        "partial_rotary_factor" => read.partial_rotary_factor = entries.next_value()?,
                        "factor" => read.factor = entries.next_value()?,
                        _ if read.kinds.len() < MAX_KINDS => {
                            let kind: RopeParameters = entries.next_value()?;
                            if kind.is_object {
                                read.kinds.push((key, kind));
                            }
                        }
                        _ => drop(entries.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(read)
            }
        }

        deserializer.deserialize_any(ParametersVisitor)
    }
}

/// What the two keys say. Where nothing is rotated they are ignored.
pub(super) fn read(scaling: RopeParameters, parameters: RopeParameters, partial: Value, rope: bool) -> Result<Rope> {
    if !rope {
        return Ok(Rope::default());
    }
    whole("partial_rotary_factor", partial)?;
    for (key, given) in [("rope_scaling", &scaling), ("rope_parameters", &parameters)] {
        if given.is_other {
            return refused(key, "…", "it must be null, or an object of values by name");
        }
    }
    if scaling.is_object { scaling.read("rope_scaling") } else { parameters.read("rope_parameters") }
}

impl RopeParameters {
    fn read(self, key: &'static str) -> Result<Rope> {
        whole("partial_rotary_factor", self.partial_rotary_factor)?;
        let rope_theta = match self.rope_theta {
            Value::Null => None,
            given => Some(given.number("rope_theta", 0.0)?),
        };
        let given = if matches!(self.rope_type, Value::Null) { self.type_ } else { self.rope_type };
        if matches!(given, Value::Null) && !matches!(self.factor, Value::Null) {
            return refused(key, format!("{{\"factor\": {}, …}}", self.factor), "it needs a rope_type");
        }
        let rope_type = match &given {
            Value::Null => None,
            Value::Text(text) if text == "default" => None,
            Value::Text(text) => match ROPES.iter().find(|(word, _)| word == text) {
                Some((_, rope_type)) => Some(*rope_type),
                None => {
                    return refused(
                        key,
                        format!("{{\"rope_type\": {}, …}}", quoted(text)),
                        "only \"default\" (positions are not scaled) and \"ntk\" are supported",
                    );
                }
            },
            given => return refused("rope_type", given, "it must be \"default\" or \"ntk\""),
        };
        let mut read = Rope { rope_theta, rope_type };
        for (i, (_, kind)) in self.kinds.into_iter().enumerate() {
            let kind = kind.read(key)?;
            if i > 0 && kind != read {
                return refused(key, "{…}", "it must be the same for all kinds of layers");
            }
            read = kind;
        }
        Ok(read)
    }
}

fn whole(key: &'static str, factor: Value) -> Result<()> {
    factor.read(key, Some(()), "1: queries and keys are rotated over their full width", |given| {
        let is_one = matches!(given, Value::Int(1)) || matches!(given, Value::Float(factor) if *factor == 1.0);
        is_one.then_some(())
    })
}
