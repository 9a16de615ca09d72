//! A config as the published code has it in its file.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::words::{ACTIVATIONS, DTYPES, NORMS, ROPES};
use super::{HymbaLmConfig, Quantization, TorchDtype};
use crate::kernels::matmul::BLOCK;

impl Serialize for HymbaLmConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in self.entries() {
            map.serialize_entry(key, &value)?;
        }
        if let Some(quantized) = Quantized::of(self.quantization) {
            map.serialize_entry("quantization_config", &quantized)?;
        }
        map.end()
    }
}

/// The key `quantization_config`.
#[derive(Serialize)]
struct Quantized {
    quant_method: &'static str,
    bits: u8,
    group_size: usize,
}

impl Quantized {
    fn of(quantization: Quantization) -> Option<Self> {
        let bits = match quantization {
            Quantization::None => return None,
            Quantization::Bits8 => 8,
            Quantization::Bits4 => 4,
        };
        Some(Quantized { quant_method: "hymba", bits, group_size: BLOCK })
    }
}

impl HymbaLmConfig {
    /// The keys that are read here, and those that the published code needs besides.
    fn entries(&self) -> Vec<(&'static str, Value)> {
        let layers = 0..self.num_hidden_layers.min(Self::MAX_LAYERS);
        let expand = match self.mamba_expand {
            // as the published file has it
            expand if expand.fract() == 0.0 && expand.abs() < 1e15 => json!(expand as i64),
            expand => json!(expand),
        };
        vec![
            ("architectures", json!(["HymbaForCausalLM"])),
            ("attn_hidden_size", json!(-1)),
            ("attn_implementation", json!("flex")),
            ("attn_implementation_new", json!("flex")),
            (
                "auto_map",
                json!({
                    "AutoConfig": "configuration_hymba.HymbaConfig",
                    "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
                }),
            ),
            ("bos_token_id", json!(self.bos_token_id)),
            ("conv_dim", layers.clone().map(|layer| (layer.to_string(), json!(self.inner_size()))).collect::<Value>()),
            ("eos_token_id", self.ends()),
            ("global_attn_idx", json!(self.global_attn_idx)),
            ("hidden_act", json!(self.hidden_act)),
            ("hidden_size", json!(self.hidden_size)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("kq_head_dim", json!(-1)),
            ("kq_norm", word(self.kq_norm, &NORMS)),
            ("kv_reuse_every_i_layer", self.kv_reuse_every_i_layer.map_or(json!(-1), |every| json!(every))),
            ("kv_reuse_group", json!(self.kv_reuse_group)),
            ("layer_type", json!(layers.map(|_| "h").collect::<Vec<_>>())),
            ("mamba_conv_bias", json!(self.mamba_conv_bias)),
            ("mamba_d_conv", json!(self.mamba_d_conv)),
            ("mamba_d_state", json!(self.mamba_d_state)),
            ("mamba_dt_rank", self.mamba_dt_rank.map_or(json!("auto"), |rank| json!(rank))),
            ("mamba_expand", expand),
            ("mamba_inner_layernorms", json!(self.mamba_inner_layernorms)),
            ("mamba_proj_bias", json!(self.mamba_proj_bias)),
            ("max_position_embeddings", json!(self.max_position_embeddings)),
            ("memory_tokens_interspersed_every", json!(self.memory_tokens_interspersed_every)),
            ("mlp_hidden_act", word(self.mlp_hidden_act, &ACTIVATIONS)),
            ("model_type", json!("hymba")),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_experts", json!(1)),
            ("num_experts_per_tok", json!(1)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("num_mamba", json!(1)),
            ("num_memory_tokens", json!(self.num_memory_tokens)),
            ("orig_max_position_embeddings", json!(self.orig_max_position_embeddings)),
            ("pad_token_id", json!(self.pad_token_id)),
            ("rms_norm_eps", json!(self.rms_norm_eps)),
            ("rope", json!(self.rope)),
            ("rope_theta", json!(self.rope_theta)),
            ("rope_type", word(self.rope_type, &ROPES)),
            ("sliding_window", json!(self.sliding_window)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("torch_dtype", dtype(self.torch_dtype)),
            ("use_mamba_kernels", json!(true)),
            ("vocab_size", json!(self.vocab_size)),
        ]
    }

    fn ends(&self) -> Value {
        match self.eos_token_id[..] {
            [] => Value::Null,
            [end] => json!(end),
            ref ends => json!(ends),
        }
    }

    /// The text of a `config.json` that describes this model, made from that of the checkpoint it was read from: all keys
    /// stay, in their order, and only what reading can change is written anew.
    pub(in crate::lm) fn written_over(&self, text: &str, before: &Self) -> String {
        let mut text = text.to_string();
        if self.tie_word_embeddings != before.tie_word_embeddings {
            set(&mut text, "tie_word_embeddings", &json!(self.tie_word_embeddings));
        }
        if self.torch_dtype != before.torch_dtype {
            let [old, new] = ["torch_dtype", "dtype"].map(|name| value_of(&text, name).is_some());
            if old || !new {
                set(&mut text, "torch_dtype", &dtype(self.torch_dtype));
            }
            if new {
                set(&mut text, "dtype", &dtype(self.torch_dtype));
            }
        }
        if self.eos_token_id != before.eos_token_id {
            set(&mut text, "eos_token_id", &self.ends());
        }
        if self.quantization != before.quantization {
            set(&mut text, "quantization_config", &json!(Quantized::of(self.quantization)));
        }
        text
    }
}

fn dtype(dtype: Option<TorchDtype>) -> Value {
    dtype.map_or(Value::Null, |dtype| word(dtype, &DTYPES))
}

fn word<T: PartialEq>(value: T, words: &[(&str, T)]) -> Value {
    words.iter().find(|(_, meaning)| *meaning == value).map_or(Value::Null, |(word, _)| json!(word))
}

/// Gives a key of an object another value, in its text. The text is JSON that has been parsed, but for words of Python such as
/// `Infinity`.
fn set(text: &mut String, key: &str, value: &Value) {
    match value_of(text, key) {
        Some(place) => text.replace_range(place, &value.to_string()),
        None => {
            let end = text.rfind('}').unwrap_or(text.len());
            let end = text[..end].trim_end().len();
            let comma = if text[..end].ends_with('{') { "" } else { "," };
            text.insert_str(end, &format!("{comma}\n  {}: {value}", json!(key)));
        }
    }
}

/// Where the value of a key of an object stands in its text.
fn value_of(text: &str, key: &str) -> Option<std::ops::Range<usize>> {
    let bytes = text.as_bytes();
    let (mut depth, mut at) = (0, 0);
    // the last string at depth 1, and the value that follows if it is the key
    let (mut string, mut start) = (0..0, None);
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => {
                let from = at;
                at += 1;
                while bytes.get(at).is_some_and(|&byte| byte != b'"') {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                if depth == 1 {
                    string = from..(at + 1).min(bytes.len());
                }
            }
            b'{' | b'[' => depth += 1,
            b':' if depth == 1
                && serde_json::from_str::<String>(text.get(string.clone())?).is_ok_and(|it| it == key) =>
            {
                start = Some(at + 1);
            }
            b',' | b'}' | b']' => {
                if let Some(start) = start.filter(|_| depth == 1) {
                    let value = &text[start..at];
                    let start = start + value.len() - value.trim_start().len();
                    return Some(start..start + value.trim().len());
                }
                if byte != b',' {
                    depth -= 1;
                }
            }
            _ => {}
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_replaced_and_added_in_the_text() {
        let text = r#"{
  "a": [0.0, Infinity], "b\u0022,": {"c": "}", "d": {}},
  "c" : "\\\"," , "e": -1
}
"#;
        for (key, value) in
            [("a", "[0.0, Infinity]"), ("b\",", r#"{"c": "}", "d": {}}"#), ("c", r#""\\\",""#), ("e", "-1")]
        {
            assert_eq!(value_of(text, key).map(|place| &text[place]), Some(value));
            let mut changed = text.to_string();
            set(&mut changed, key, &json!({"x": 1}));
            let place = value_of(&changed, key).unwrap();
            assert_eq!(&changed[place.clone()], r#"{"x":1}"#);
            changed.replace_range(place, value);
            assert_eq!(changed, text);
        }
        assert_eq!(value_of(text, "d"), None);
        let mut more = text.to_string();
        set(&mut more, "d", &json!(true));
        assert_eq!(more, text.replace("\"e\": -1", "\"e\": -1,\n  \"d\": true"));
        let mut empty = "{ }".to_string();
        set(&mut empty, "d", &json!(null));
        assert_eq!(empty, "{\n  \"d\": null }");
        for cut in 0..text.len() {
            value_of(&text[..cut], "absent");
        }
    }
}
