//! The names that parameters of a layer have in published files.

use crate::layers::LORA_NAMES;
use crate::parameters::join;

/// What layers call their parameters, and the name in files under `model.layers.{i}`, in the order of the walk.
pub(super) const LAYER: [(&str, &str); 23] = [
    ("norm.weight", "input_layernorm.weight"),
    ("in_proj.weight", "mamba.in_proj.weight"),
    ("in_proj.bias", "mamba.in_proj.bias"),
    ("out_proj.weight", "mamba.out_proj.weight"),
    ("out_proj.bias", "mamba.out_proj.bias"),
    ("attention.q_norm.weight", "mamba.self_attn.q_norm.weight"),
    ("attention.k_norm.weight", "mamba.self_attn.k_norm.weight"),
    ("mamba.conv.weight", "mamba.conv1d.weight"),
    ("mamba.conv.bias", "mamba.conv1d.bias"),
    ("mamba.dt_norm.weight", "mamba.dt_layernorm.weight"),
    ("mamba.b_norm.weight", "mamba.B_layernorm.weight"),
    ("mamba.c_norm.weight", "mamba.C_layernorm.weight"),
    ("mamba.dt_proj.bias", "mamba.dt_proj.0.bias"),
    ("mamba.a_log", "mamba.A_log.0"),
    ("mamba.d", "mamba.D.0"),
    ("mamba.x_proj.weight", "mamba.x_proj.0.weight"),
    ("mamba.dt_proj.weight", "mamba.dt_proj.0.weight"),
    ("attention_norm.weight", "mamba.pre_avg_layernorm1.weight"),
    ("mamba_norm.weight", "mamba.pre_avg_layernorm2.weight"),
    ("mlp_norm.weight", "pre_moe_layernorm.weight"),
    ("mlp.gate.weight", "moe.experts.0.gate_proj.weight"),
    ("mlp.up.weight", "moe.experts.0.up_proj.weight"),
    ("mlp.down.weight", "moe.experts.0.down_proj.weight"),
];

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const META_TOKENS: &str = "model.memory_tokens";
pub(super) const FINAL_NORM: &str = "model.final_layernorm";
pub(super) const HEAD: &str = "lm_head.weight";
/// The head as a map.
pub(super) const HEAD_MAP: &str = "lm_head";

/// The name in files of a parameter of a layer.
pub(super) fn in_files(layer: usize, published: &str) -> String {
    format!("model.layers.{layer}.{published}")
}

/// Calls `f` with the parameters that a layer has, under their published names and in their order.
pub(super) fn visit_published<P>(layer: usize, mut parameters: Vec<(String, P)>, f: &mut dyn FnMut(&str, P)) {
    for (ours, published) in LAYER {
        let mut take = |ours: &str, published: &str| {
            if let Some(i) = parameters.iter().position(|(name, _)| name == ours) {
                f(&in_files(layer, published), parameters.swap_remove(i).1);
            }
        };
        take(ours, published);
        // a low-rank part stands under the name of its map
        if let (Some(ours), Some(published)) = (ours.strip_suffix(".weight"), published.strip_suffix(".weight")) {
            for part in LORA_NAMES {
                take(&join(ours, part), &join(published, part));
            }
        }
    }
    debug_assert!(parameters.is_empty(), "parameters without a name in files");
}
