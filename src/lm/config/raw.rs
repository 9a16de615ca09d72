//! A config as it stands in the file: any value at any key, until it is checked.
//!
//! The parser's own errors say where in the file something is wrong, but not at which key; so values are taken as they
//! are, and refused here, by name. What is read is what the published `configuration_hymba.py` and `modeling_hymba.py` read.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};

use super::check::refused;
use super::rope_parameters::{self, RopeParameters};
use super::value::{Value, list};
use super::words::{ACTIVATIONS, DTYPES, NORMS, ROPES};
use super::{HymbaLmConfig, Quantization, RopeType};
use crate::kernels::matmul::BLOCK;
use crate::{Error, Result};

const MAX_LAYERS: usize = HymbaLmConfig::MAX_LAYERS;

/// The keys that are read; null is as good as absent, with four exceptions. What another key holds is skipped.
#[derive(Deserialize, Default)]
#[serde(rename = "HymbaLmConfig", expecting = "a config: an object of values by name", default)]
pub(super) struct Raw {
    model_type: Value,
    hidden_size: Value,
    num_hidden_layers: Value,
    vocab_size: Value,
    num_attention_heads: Value,
    // of this one and the three tokens, and of no other key, null means something else than absence
    #[serde(default = "int::<8>")]
    num_key_value_heads: Value,
    intermediate_size: Value,
    mlp_hidden_act: Value,
    hidden_act: Value,
    mamba_expand: Value,
    mamba_d_state: Value,
    mamba_d_conv: Value,
    mamba_dt_rank: Value,
    mamba_conv_bias: Value,
    mamba_proj_bias: Value,
    mamba_inner_layernorms: Value,
    num_memory_tokens: Value,
    sliding_window: Value,
    global_attn_idx: Option<List<i64, MAX_LAYERS>>,
    kv_reuse_group: Option<List<List<i64, MAX_LAYERS>, MAX_LAYERS>>,
    kv_reuse_every_i_layer: Value,
    kq_norm: Value,
    rope: Value,
    rope_type: Value,
    rope_theta: Value,
    /// What transformers 5 writes for `rope_theta` and `rope_scaling`.
    rope_parameters: RopeParameters,
    rope_scaling: RopeParameters,
    partial_rotary_factor: Value,
    max_position_embeddings: Value,
    orig_max_position_embeddings: Value,
    rms_norm_eps: Value,
    tie_word_embeddings: Value,
    #[serde(default = "int::<1>")]
    bos_token_id: Value,
    #[serde(default = "int::<2>")]
    eos_token_id: Value,
    #[serde(default = "int::<0>")]
    pad_token_id: Value,
    torch_dtype: Value,
    /// What newer versions of transformers write for `torch_dtype`.
    dtype: Value,
    memory_tokens_interspersed_every: Value,
    attn_hidden_size: Value,
    kq_head_dim: Value,
    quantization_config: Option<RawQuantization>,
}

/// What every tool that quantises writes, in its own way.
#[derive(Deserialize, Default)]
#[serde(expecting = "a quantization_config: an object of values by name", default)]
struct RawQuantization {
    quant_method: Value,
    bits: Value,
    group_size: Value,
}

fn int<const VALUE: i128>() -> Value {
    Value::Int(VALUE)
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
            return refused("kv_reuse_group", "[]", "a group needs at least one layer");
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

impl RawQuantization {
    fn read(self) -> Result<Quantization> {
        const METHOD: &str =
            "\"hymba\": what was quantised by other tools is not read; read the original with LoadOptions::quantize";
        let text = |given: &Value| matches!(given, Value::Text(text) if text == "hymba").then_some(());
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
        let dtype = if matches!(raw.torch_dtype, Value::Null) { raw.dtype } else { raw.torch_dtype };
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
                Value::Text(text) if text == "auto" => None,
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
                Value::Null => None,
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
