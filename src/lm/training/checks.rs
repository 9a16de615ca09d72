//! Checks before a training step: rows, their memory, and the gradient.

use crate::kernels::conv::TAPS;
use crate::kernels::memory::fits;
use crate::kernels::team::work;
use crate::layers::{Linear, Weight};
use crate::lm::block::Block;
use crate::lm::config::HymbaLmConfig;
use crate::lm::model::HymbaLm;
use crate::parameters::Parameter;
use crate::{Error, Result};

impl HymbaLm {
    pub(super) fn check_rows(&self, rows: &[impl AsRef<[u32]>], masks: Option<&[Vec<bool>]>) -> Result<()> {
        if rows.is_empty() {
            return Err(Error::Tokens("there is no row; give at least one".into()));
        }
        self.check_tokens(rows)?;
        let lengths = || rows.iter().map(|row| row.as_ref().len());
        if let Some(masks) = masks {
            if masks.len() != rows.len() {
                return Err(Error::Tokens(format!("there are {} masks for {} rows", masks.len(), rows.len())));
            }
            if let Some((i, (length, mask))) =
                lengths().zip(masks).enumerate().find(|(_, (length, mask))| *length != mask.len())
            {
                return Err(Error::Tokens(format!("row {i} has {length}, and its mask {} marks", mask.len())));
            }
        }
        let bytes = self.config().train_bytes(lengths().sum(), rows.len(), self.recompute);
        let bytes = bytes.saturating_add(self.bytes_of_copies());
        if !fits(bytes) {
            return Err(Error::Tokens(format!(
                "this batch takes about {} MB of memory, more than there is; give fewer at a time",
                bytes >> 20
            )));
        }
        Ok(())
    }

    /// Bytes that the copies of matrices take which a step will make: those that stay of all, and the largest of the others.
    fn bytes_of_copies(&self) -> usize {
        // products read the embedding only where it is the head
        let head = self.head.as_ref().map_or(self.embedding.weight(), Linear::weight);
        let maps = self.blocks.iter().flat_map(Block::maps).map(Linear::weight);
        let copies = maps.chain([head]).map(Weight::copies_to_make);
        let [stay, most] =
            copies.fold([0usize; 2], |[stay, most], [stays, passes]| [stay.saturating_add(stays), most.max(passes)]);
        stay.saturating_add(most)
    }

    /// Checks the lengths of rows and their ids.
    pub(crate) fn check_tokens(&self, rows: &[impl AsRef<[u32]>]) -> Result<()> {
        let most = self.config().max_position_embeddings;
        for (i, row) in rows.iter().enumerate() {
            match row.as_ref().len() {
                0 => return Err(Error::Tokens(format!("row {i} has none; leave it out"))),
                length if length > most => {
                    let advice = "cut it, or raise max_position_embeddings in the configuration";
                    return Err(Error::Tokens(format!(
                        "row {i} has {length}, and the model is made for at most {most}; {advice}"
                    )));
                }
                _ => {}
            }
        }
        self.check_ids(rows)
    }

    pub(super) fn check_gradient(&self, grads: &HymbaLm) -> Result<()> {
        fn shapes(lm: &HymbaLm) -> Vec<(String, Vec<usize>)> {
            let mut shapes = Vec::new();
            lm.visit(&mut |name, parameter| {
                if let Parameter::Array(array) = parameter {
                    shapes.push((name.to_string(), array.shape().to_vec()));
                }
            });
            shapes
        }
        if shapes(self) == shapes(grads) {
            Ok(())
        } else {
            Err(Error::State("grads is of a model with other parameters; make it with zeros_like".into()))
        }
    }
}

impl HymbaLmConfig {
    /// Bytes that a training step of so many tokens in so many rows takes, at most.
    fn train_bytes(&self, tokens: usize, rows: usize, recompute: bool) -> usize {
        let (h, e, f) = (self.hidden_size, self.inner_size(), self.intermediate_size);
        let (n, heads) = (self.mamba_d_state, self.num_attention_heads);
        let projected = self.in_proj_rows(0);
        let per_layer = 2 * h + projected + 2 * h + 4 * e + 2 * (self.dt_rank() + 2 * n) + e * n / 16 + heads + 2 * f;
        let passing = 4 * h + 2 * projected + 8 * e + 4 * f;
        let kept = if recompute {
            work([self.num_hidden_layers, h]) + per_layer
        } else {
            work([self.num_hidden_layers, per_layer])
        };
        let per_token = kept.saturating_add(passing);
        let kept =
            self.num_memory_tokens.saturating_mul(self.num_key_value_heads * (self.key_width() + self.value_width()));
        let per_row = work([self.num_hidden_layers, e * (n + TAPS) + kept]);
        let tokens = tokens.saturating_add(self.num_memory_tokens);
        let numbers = work([tokens, per_token]).saturating_add(work([rows, per_row]));
        work([numbers, size_of::<f32>()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Host;

    /// What stays of a training is a copy for products, as of inference.
    #[test]
    fn copies_of_matrices_are_counted_until_they_are_made() {
        let mut config = HymbaLmConfig::hymba_1_5b();
        (config.hidden_size, config.intermediate_size, config.vocab_size) = (32, 48, 20);
        (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (3, 4, 2);
        (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), Some(vec![vec![1, 2]]));
        (config.sliding_window, config.num_memory_tokens, config.mamba_dt_rank) = (Some(9), 3, Some(2));
        for tied in [true, false] {
            config.tie_word_embeddings = tied;
            let mut lm = HymbaLm::build(config.clone(), 0).unwrap();
            let mut numbers = 0;
            lm.visit_maps(&mut |_, map| numbers += map.dim().0 * map.dim().1);
            let bytes = size_of::<f32>() * (numbers + if tied { 20 * 32 } else { 0 });
            assert_eq!(lm.bytes_of_copies(), 2 * bytes);
            lm.accumulate(&[[1, 2, 3]], None, &mut lm.zeros_like()).unwrap();
            assert_eq!(lm.bytes_of_copies(), 0);
            lm.visit_mut(&mut |_, _| {}); // a step
            assert_eq!(lm.bytes_of_copies(), 0);
            lm.end_training();
            assert_eq!(lm.bytes_of_copies(), bytes);
        }
    }
}
