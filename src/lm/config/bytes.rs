//! Small models whose tokens are the bytes of a text.

use super::{HymbaLmConfig, RopeType, TorchDtype};

impl HymbaLmConfig {
    /// A small model over bytes, of any width and depth, for training on rows of `length` bytes: 256 tokens, 8 meta
    /// tokens, heads 32 wide, half as many heads of keys and values where that divides them, an MLP 2.75 times as wide
    /// as the model. The first and the last layer see everything; those between them see a window of 48 and share keys
    /// and values two by two. A text begins with a line feed and ends with a zero.
    ///
    /// It is not checked here: [`validate`](Self::validate) refuses a `hidden_size` that its heads do not divide.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::HymbaLmConfig;
    ///
    /// let lm = HymbaLm::build(HymbaLmConfig::bytes(64, 2, 128), 0)?;
    /// assert_eq!(lm.config().num_attention_heads, 2);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn bytes(hidden_size: usize, layers: usize, length: usize) -> Self {
        let pairs = (1..layers.saturating_sub(2)).step_by(2).map(|first| vec![first, first + 1]).collect::<Vec<_>>();
        let heads = (hidden_size / 32).max(1);
        let half = (heads / 2).max(1);
        HymbaLmConfig {
            hidden_size,
            num_hidden_layers: layers,
            vocab_size: 256,
            num_attention_heads: heads,
            num_key_value_heads: if heads.is_multiple_of(half) { half } else { heads },
            intermediate_size: hidden_size.saturating_mul(11) / 4,
            mamba_dt_rank: Some(hidden_size.div_ceil(16)),
            num_memory_tokens: 8,
            sliding_window: Some(48),
            global_attn_idx: Some(if layers > 1 { vec![0, layers - 1] } else { vec![0] }),
            kv_reuse_group: Some(pairs).filter(|pairs| !pairs.is_empty()),
            max_position_embeddings: length.max(256),
            rope_type: RopeType::Default,
            bos_token_id: Some(10),
            eos_token_id: vec![0],
            pad_token_id: Some(0),
            torch_dtype: Some(TorchDtype::F32),
            ..HymbaLmConfig::hymba_1_5b()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HymbaLm;

    #[test]
    fn models_of_many_widths_are_built() {
        for width in (32..=704).step_by(32) {
            let config = HymbaLmConfig::bytes(width, 1, 16);
            if width.is_multiple_of(64) {
                assert_eq!(config.num_key_value_heads, width / 64);
            }
            let lm = HymbaLm::build(config, 0).unwrap_or_else(|error| panic!("{width}: {error}"));
            assert!(lm.forward_train(&[[1, 2, 3]], None).unwrap().0.mean().is_finite(), "{width}");
        }
    }
}
