//! A small language model with windows, meta tokens, and keys and values that are shared; random weights, seed 7.

#![allow(dead_code)] // every test file uses a part of it

use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, LoadOptions};

pub const TOKENIZER_FOLDER: &str = "tests/data/hymba-1.5b-base";

pub fn config(vocabulary: usize) -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (48, 64, vocabulary);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (3, 6, 2);
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), Some(vec![vec![1, 2]]));
    (config.sliding_window, config.num_memory_tokens, config.mamba_dt_rank) = (Some(16), 4, Some(3));
    config
}

pub fn model(vocabulary: usize) -> HymbaLm {
    HymbaLm::random(config(vocabulary), 7, &LoadOptions::default()).unwrap()
}
