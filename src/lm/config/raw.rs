//! A config as it stands in the file: any value at any key, until it is looked at.
//!
//! The parser's own errors say where in the file something is wrong, but not at which key; so values are taken as they
//! are, and refused here, by name. What is read is what the published `configuration_hymba.py` and `modeling_hymba.py` read.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::check::refused;
use super::rope_parameters::{self, RopeParameters};
use super::{HymbaLmConfig, KeyQueryNorm, MlpActivation, Quantization, RopeType, TorchDtype};
use crate::files::tensors::quoted;
use crate::kernels::matmul::BLOCK;
use crate::{Error, Result};

const MAX_LAYERS: usize = HymbaLmConfig::MAX_LAYERS;
/// Most tokens that end a text.
const MAX_ENDS: usize = 64;

/// The keys that are read; null is as good as absent, with four exceptions. What another key holds is skipped.
#[derive(Deserialize, Default)]
#[serde(rename = "HymbaLmConfig", expecting = "a config: an object of values by name", default)]
pub(super) struct Raw {
    model_type: Given,
    hidden_size: Given,
    num_hidden_layers: Given,
    vocab_size: Given,
    num_attention_heads: Given,
    // of this one and the three tokens, and of no other key, null means something else than absence
    #[serde(default = "int::<8>")]
    num_key_value_heads: Given,
    intermediate_size: Given,
    mlp_hidden_act: Given,
    hidden_act: Given,
    mamba_expand: Given,
    mamba_d_state: Given,
    mamba_d_conv: Given,
    mamba_dt_rank: Given,
    mamba_conv_bias: Given,
    mamba_proj_bias: Given,
    mamba_inner_layernorms: Given,
    num_memory_tokens: Given,
    sliding_window: Given,
    global_attn_idx: Option<List<i64, MAX_LAYERS>>,
    kv_reuse_group: Option<List<List<i64, MAX_LAYERS>, MAX_LAYERS>>,
    kv_reuse_every_i_layer: Given,
    kq_norm: Given,
    rope: Given,
    rope_type: Given,
    rope_theta: Given,
    /// What transformers 5 writes for `rope_theta` and `rope_scaling`.
    rope_parameters: RopeParameters,
    rope_scaling: RopeParameters,
    partial_rotary_factor: Given,
    max_position_embeddings: Given,
    orig_max_position_embeddings: Given,
    rms_norm_eps: Given,
    tie_word_embeddings: Given,
    #[serde(default = "int::<1>")]
    bos_token_id: Given,
    #[serde(default = "int::<2>")]
    eos_token_id: Given,
    #[serde(default = "int::<0>")]
    pad_token_id: Given,
    torch_dtype: Given,
    /// What newer versions of transformers write for `torch_dtype`.
    dtype: Given,
    memory_tokens_interspersed_every: Given,
    attn_hidden_size: Given,
    kq_head_dim: Given,
    quantization_config: Option<RawQuantization>,
}

/// What every tool that quantises writes, in its own way.
#[derive(Deserialize, Default)]
#[serde(expecting = "a quantization_config: an object of values by name", default)]
struct RawQuantization {
    quant_method: Given,
    bits: Given,
    group_size: Given,
}

fn int<const VALUE: i128>() -> Given {
    Given::Int(VALUE)
}

/// A single value.
#[derive(Default)]
pub(super) enum Given {
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

impl<'de> Deserialize<'de> for Given {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct GivenVisitor;

        impl<'de> Visitor<'de> for GivenVisitor {
            type Value = Given;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a value, or a list of at most {MAX_ENDS} whole numbers")
            }

            fn visit_unit<E>(self) -> Result<Given, E> {
                Ok(Given::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Given, E> {
                Ok(Given::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Given, E> {
                Ok(Given::Int(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Given, E> {
                Ok(Given::Int(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Given, E> {
                Ok(Given::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Given, E> {
                Ok(Given::Text(value.to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<Given, A::Error> {
                list(values, MAX_ENDS, &self).map(Given::Ints)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Given, A::Error> {
                while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Given::Object)
            }
        }

        deserializer.deserialize_any(GivenVisitor)
    }
}

/// As a message shows it.
impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Given::Null => f.write_str("null"),
            Given::Bool(value) => write!(f, "{value}"),
            Given::Int(value) => write!(f, "{value}"),
            Given::Float(value) => write!(f, "{value:?}"),
            Given::Text(value) => f.write_str(&quoted(value)),
            Given::Ints(values) => write!(f, "{values:?}"),
            Given::Object => f.write_str("{…}"),
        }
    }
}

/// A list of at most `N` values: the text `0,0,0,…` would take four times its length in memory.
struct List<T, const N: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for List<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor<T, const N: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for ListVisitor<T, N> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} layers, or of groups of layers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<Vec<T>, A::Error> {
                list(values, N, &self)
            }
        }

        deserializer.deserialize_seq(ListVisitor::<T, N>(PhantomData)).map(List)
    }
}

fn list<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
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

impl Given {
    /// The value as a `T`, or `default` where there is none.
    pub(super) fn read<T>(
        self,
        key: &'static str,
        default: Option<T>,
        allowed: &str,
        read: impl Fn(&Self) -> Option<T>,
    ) -> Result<T> {
        match (self, default) {
            (Given::Null, Some(default)) => Ok(default),
            (Given::Null, None) => refused(key, "null", format!("it must be there, and be {allowed}")),
            (given, _) => match read(&given) {
                Some(value) => Ok(value),
                None => refused(key, given, format!("it must be {allowed}")),
            },
        }
    }

    /// A whole number ≥ 0. Whether it is a possible size is for [`HymbaLmConfig::validate`] to say.
    fn size(self, key: &'static str, default: Option<usize>) -> Result<usize> {
        self.read(key, default, "a whole number, 0 or more", Given::as_size)
    }

    fn as_size(&self) -> Option<usize> {
        match self {
            Given::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// A whole number where 0 and less stand for "off".
    fn size_or_off(self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, Some(None), "a whole number, or -1 for none", |given| match given {
            Given::Int(value) if *value <= 0 => Some(None),
            given => given.as_size().map(Some),
        })
    }

    fn optional_size(self, key: &'static str) -> Result<Option<usize>> {
        self.read(key, Some(None), "null or a whole number, 0 or more", |given| given.as_size().map(Some))
    }

    pub(super) fn number(self, key: &'static str, default: f64) -> Result<f64> {
        self.read(key, Some(default), "a number", |given| match given {
            Given::Int(value) => Some(*value as f64),
            Given::Float(value) => Some(*value),
            _ => None,
        })
    }

    fn switch(self, key: &'static str, default: bool) -> Result<bool> {
        self.read(key, Some(default), "true or false", |given| match given {
            Given::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A token; a number below 0 stands for none.
    fn token(self, key: &'static str) -> Result<Option<u32>> {
        self.read(key, Some(None), "a token's number, or null", |given| match given {
            Given::Int(value) if *value < 0 => Some(None),
            Given::Int(value) => u32::try_from(*value).ok().map(Some),
            _ => None,
        })
    }

    fn tokens(self, key: &'static str) -> Result<Vec<u32>> {
        self.read(key, Some(Vec::new()), "a token's number, or a list of them, or null", |given| {
            let values = match given {
                Given::Int(value) => &[i64::try_from(*value).ok()?][..],
                Given::Ints(values) => values,
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
            Given::Text(text) => words.iter().find(|(word, _)| word == text).map(|&(_, value)| value),
            _ => None,
        })
    }

    /// Refuses a key that would say otherwise than what the model has anyway: 0 or less, or `usual`.
    fn only(self, key: &'static str, usual: usize) -> Result<()> {
        self.read(key, Some(()), &format!("-1, or {usual}, which is what it would be"), |given| {
            (matches!(given, Given::Int(..=0)) || given.as_size() == Some(usual)).then_some(())
        })
    }
}

/// The numbers of layers; no layer has one below 0.
fn layers(list: &[i64]) -> Vec<usize> {
    list.iter().filter_map(|&layer| usize::try_from(layer).ok()).collect()
}

/// The layers that share keys and values, each in one list, made from lists in which the first user counts, whose first layers
/// may use those of others, and which may name layers that are not there.
fn groups(lists: List<List<i64, MAX_LAYERS>, MAX_LAYERS>, num_layers: usize) -> Result<Vec<Vec<usize>>> {
    let mut makers = vec![None; num_layers];
    for List(list) in &lists.0 {
        let Some((&maker, users)) = list.split_first() else {
            return refused("kv_reuse_group", "[]", "a group must have a layer");
        };
        for user in layers(users) {
            if let Some(place) = makers.get_mut(user) {
                place.get_or_insert((maker, list));
            }
        }
    }
    let mut groups: Vec<Vec<usize>> = (0..num_layers).map(|layer| vec![layer]).collect();
    let mut sources: Vec<usize> = (0..num_layers).collect();
    for (layer, maker) in makers.into_iter().enumerate() {
        let Some((maker, list)) = maker else { continue };
        match usize::try_from(maker).ok().filter(|&maker| maker < layer) {
            Some(maker) => sources[layer] = sources[maker],
            None => {
                let shown = format!("{:?}", &list[..list.len().min(20)]);
                let allowed = format!(
                    "layer {layer} cannot use the keys and values of layer {maker}, which does not come before it"
                );
                return refused("kv_reuse_group", shown, allowed);
            }
        }
        groups[sources[layer]].push(layer);
    }
    groups.retain(|group| group.len() > 1);
    Ok(groups)
}

pub(super) const NORMS: [(&str, KeyQueryNorm); 3] =
    [("none", KeyQueryNorm::None), ("rms", KeyQueryNorm::Rms), ("perhead-rms", KeyQueryNorm::PerHeadRms)];
pub(super) const ACTIVATIONS: [(&str, MlpActivation); 2] =
    [("silu", MlpActivation::Silu), ("relu2", MlpActivation::Relu2)];
pub(super) const ROPES: [(&str, RopeType); 2] = [("default", RopeType::Default), ("ntk", RopeType::Ntk)];
pub(super) const DTYPES: [(&str, TorchDtype); 3] =
    [("float32", TorchDtype::F32), ("float16", TorchDtype::F16), ("bfloat16", TorchDtype::BF16)];

impl RawQuantization {
    fn read(self) -> Result<Quantization> {
        const METHOD: &str =
            "\"hymba\": what other tools quantised is not read; read the original with LoadOptions::quantize";
        let text = |given: &Given| matches!(given, Given::Text(text) if text == "hymba").then_some(());
        self.quant_method.read("quantization_config.quant_method", None, METHOD, text)?;
        self.group_size.read("quantization_config.group_size", None, &BLOCK.to_string(), |given| {
            (given.as_size() == Some(BLOCK)).then_some(())
        })?;
        self.bits.read("quantization_config.bits", None, "8 or 4", |given| match given.as_size() {
            Some(8) => Some(Quantization::Bits8),
            Some(4) => Some(Quantization::Bits4),
            _ => None,
        })
    }
}

impl TryFrom<Raw> for HymbaLmConfig {
    type Error = Error;

    fn try_from(raw: Raw) -> Result<Self> {
        raw.model_type.word("model_type", Some(()), &[("hymba", ())])?;
        let num_hidden_layers = raw.num_hidden_layers.size("num_hidden_layers", None)?;
        let num_attention_heads = raw.num_attention_heads.size("num_attention_heads", None)?;
        let rope = raw.rope.switch("rope", false)?;
        let parameters = rope_parameters::read(raw.rope_scaling, raw.rope_parameters, raw.partial_rotary_factor, rope)?;
        let rope_type = raw.rope_type.word("rope_type", Some(RopeType::Default), &ROPES)?;
        let dtype = if matches!(raw.torch_dtype, Given::Null) { raw.dtype } else { raw.torch_dtype };
        let config = HymbaLmConfig {
            hidden_size: raw.hidden_size.size("hidden_size", None)?,
            num_hidden_layers,
            vocab_size: raw.vocab_size.size("vocab_size", None)?,
            num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads.size("num_key_value_heads", Some(num_attention_heads))?,
            intermediate_size: raw.intermediate_size.size("intermediate_size", None)?,
            mlp_hidden_act: raw.mlp_hidden_act.word("mlp_hidden_act", None, &ACTIVATIONS)?,
            hidden_act: raw.hidden_act.word("hidden_act", Some("silu"), &[("silu", "silu")])?.to_string(),
            mamba_expand: raw.mamba_expand.number("mamba_expand", 2.0)?,
            mamba_d_state: raw.mamba_d_state.size("mamba_d_state", Some(16))?,
            mamba_d_conv: raw.mamba_d_conv.size("mamba_d_conv", Some(4))?,
            mamba_dt_rank: match raw.mamba_dt_rank {
                Given::Text(text) if text == "auto" => None,
                given => {
                    given.read("mamba_dt_rank", Some(None), "a whole number, 0 or more, or \"auto\"", |given| {
                        given.as_size().map(Some)
                    })?
                }
            },
            mamba_conv_bias: raw.mamba_conv_bias.switch("mamba_conv_bias", true)?,
            mamba_proj_bias: raw.mamba_proj_bias.switch("mamba_proj_bias", false)?,
            mamba_inner_layernorms: raw.mamba_inner_layernorms.switch("mamba_inner_layernorms", true)?,
            num_memory_tokens: raw.num_memory_tokens.size("num_memory_tokens", Some(0))?,
            sliding_window: raw.sliding_window.optional_size("sliding_window")?,
            global_attn_idx: raw.global_attn_idx.map(|list| layers(&list.0)),
            kv_reuse_group: raw
                .kv_reuse_group
                .map(|lists| groups(lists, num_hidden_layers.min(MAX_LAYERS)))
                .transpose()?,
            kv_reuse_every_i_layer: raw.kv_reuse_every_i_layer.size_or_off("kv_reuse_every_i_layer")?,
            kq_norm: raw.kq_norm.word("kq_norm", None, &NORMS)?,
            rope,
            rope_type: parameters.rope_type.unwrap_or(rope_type),
            rope_theta: match (raw.rope_theta.number("rope_theta", 10000.0)?, parameters.rope_theta) {
                (outside, None) => outside,
                (_, Some(inside)) => inside,
            },
            max_position_embeddings: raw.max_position_embeddings.size("max_position_embeddings", Some(262_144))?,
            orig_max_position_embeddings: raw
                .orig_max_position_embeddings
                .optional_size("orig_max_position_embeddings")?,
            rms_norm_eps: raw.rms_norm_eps.number("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: raw.tie_word_embeddings.switch("tie_word_embeddings", false)?,
            bos_token_id: raw.bos_token_id.token("bos_token_id")?,
            eos_token_id: raw.eos_token_id.tokens("eos_token_id")?,
            pad_token_id: raw.pad_token_id.token("pad_token_id")?,
            torch_dtype: match dtype {
                Given::Null => None,
                given => Some(given.word("torch_dtype", None, &DTYPES)?),
            },
            memory_tokens_interspersed_every: raw
                .memory_tokens_interspersed_every
                .size_or_off("memory_tokens_interspersed_every")?
                .unwrap_or(0),
            quantization: raw.quantization_config.map_or(Ok(Quantization::None), RawQuantization::read)?,
        };
        config.validate()?;
        raw.attn_hidden_size.only("attn_hidden_size", config.hidden_size)?;
        raw.kq_head_dim.only("kq_head_dim", config.key_width())?;
        Ok(config)
    }
}
