//! The ranges of a config: one place where a value is refused, and the reason why.

use super::{HymbaLmConfig, RopeType};
use crate::{Error, Result};

/// Largest width. A matrix of that width would be beyond [`HymbaLmConfig::MAX_PARAMETERS`]; sums of a few widths do not
/// overflow, nor does f64 round them.
const MAX_WIDTH: usize = 1 << 24;
/// Largest number of positions, windows and tokens: what f64 and the `u32` of a token can hold.
const MAX_COUNT: usize = 1 << 30;

/// An option that is not usable.
pub(super) fn refused<T>(option: &'static str, given: impl ToString, allowed: impl Into<String>) -> Result<T> {
    Err(Error::Option { option, given: given.to_string(), allowed: allowed.into() })
}

impl HymbaLmConfig {
    /// Checks every value.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first key outside its range (see the table [above](Self)), the value given, and what is
    /// allowed.
    pub fn validate(&self) -> Result<()> {
        self.check_values()?;
        match self.count() {
            Some(count) if count <= Self::MAX_PARAMETERS => Ok(()),
            count => {
                let count = count.map_or("more parameters than can be counted".into(), |n| format!("{n} parameters"));
                let (option, given) = self.largest();
                let most = Self::MAX_PARAMETERS;
                refused(option, given, format!("with it the model has {count}, and at most {most} are allowed"))
            }
        }
    }

    /// Everything [`validate`](Self::validate) checks but the number of parameters, which can be counted afterwards.
    pub(super) fn check_values(&self) -> Result<()> {
        self.check_sizes()?;
        self.check_heads()?;
        self.check_switches()?;
        self.check_windows()?;
        self.check_sharing()
    }

    fn check_sizes(&self) -> Result<()> {
        let sizes = [
            ("num_hidden_layers", self.num_hidden_layers, 1, Self::MAX_LAYERS),
            ("hidden_size", self.hidden_size, 1, MAX_WIDTH),
            ("vocab_size", self.vocab_size, 1, MAX_COUNT),
            ("num_attention_heads", self.num_attention_heads, 1, MAX_WIDTH),
            ("num_key_value_heads", self.num_key_value_heads, 1, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, 0, MAX_WIDTH),
            ("mamba_d_state", self.mamba_d_state, 1, MAX_WIDTH),
            ("mamba_d_conv", self.mamba_d_conv, 1, 4),
            ("mamba_dt_rank", self.dt_rank(), 1, MAX_WIDTH),
            ("num_memory_tokens", self.num_memory_tokens, 0, Self::MAX_META_TOKENS),
            ("sliding_window", self.sliding_window.unwrap_or(1), 1, MAX_COUNT),
            ("max_position_embeddings", self.max_position_embeddings, 1, MAX_COUNT),
            ("orig_max_position_embeddings", self.orig_max_position_embeddings.unwrap_or(1), 1, MAX_COUNT),
            ("kv_reuse_every_i_layer", self.kv_reuse_every_i_layer.unwrap_or(1), 1, MAX_COUNT),
        ];
        for (option, given, least, most) in sizes {
            if !(least..=most).contains(&given) {
                return refused(option, given, format!("it must be {least} to {most}"));
            }
        }
        // written so that NaN fails
        let inner = self.mamba_expand * self.hidden_size as f64;
        if !(inner >= 1.0 && inner <= MAX_WIDTH as f64) {
            return refused(
                "mamba_expand",
                self.mamba_expand,
                format!("times hidden_size = {} it must be 1 to {MAX_WIDTH}; 2 is usual", self.hidden_size),
            );
        }
        if !(self.rms_norm_eps as f32 > 0.0 && self.rms_norm_eps <= 1.0) {
            return refused("rms_norm_eps", self.rms_norm_eps, "it must be above 0 and at most 1; 1e-6 is usual");
        }
        Ok(())
    }

    fn check_heads(&self) -> Result<()> {
        let heads = self.num_attention_heads;
        if !self.hidden_size.is_multiple_of(heads) {
            let allowed = format!("it must be a multiple of num_attention_heads = {heads}; change either");
            return refused("hidden_size", self.hidden_size, allowed);
        }
        if !heads.is_multiple_of(self.num_key_value_heads) {
            let allowed = format!("it must divide num_attention_heads = {heads}; change either (if absent it is 8)");
            return refused("num_key_value_heads", self.num_key_value_heads, allowed);
        }
        if !self.inner_size().is_multiple_of(heads) {
            let allowed = format!(
                "times hidden_size = {} it gives an inner width of {}, which must be a multiple of num_attention_heads = \
                 {heads}; change one of them",
                self.hidden_size,
                self.inner_size()
            );
            return refused("mamba_expand", self.mamba_expand, allowed);
        }
        self.check_rope()
    }

    fn check_rope(&self) -> Result<()> {
        let width = self.key_width();
        if !(self.rope_theta > 0.0 && self.rope_theta as f32 > 0.0 && (self.rope_theta as f32).is_finite()) {
            return refused(
                "rope_theta",
                self.rope_theta,
                "it must be above 0, and a number f32 can hold; 10000 is usual",
            );
        }
        if self.rope && !width.is_multiple_of(2) {
            let allowed = format!(
                "with num_attention_heads = {} a head is {width} wide, and rope needs an even width; change either",
                self.num_attention_heads
            );
            return refused("hidden_size", self.hidden_size, allowed);
        }
        if self.rope_type != RopeType::Ntk {
            return Ok(());
        }
        let Some(original) = self.orig_max_position_embeddings else {
            return refused("orig_max_position_embeddings", "null", "rope_type \"ntk\" needs it: 1 or more");
        };
        if self.rope && width == 2 {
            return refused("rope_type", "\"ntk\"", "it needs heads wider than 2; use \"default\"");
        }
        if 2 * self.max_position_embeddings <= original {
            let most = 2 * self.max_position_embeddings - 1;
            let allowed = format!(
                "with rope_type \"ntk\" and max_position_embeddings = {} it must be at most {most}",
                self.max_position_embeddings
            );
            return refused("orig_max_position_embeddings", original, allowed);
        }
        match self.rope_base() {
            Some(base) if !(base as f32 > 0.0 && (base as f32).is_finite()) => {
                let allowed = format!("with rope_type \"ntk\" the base of the rotation would be {base}; lower it");
                refused("rope_theta", self.rope_theta, allowed)
            }
            _ => Ok(()),
        }
    }

    fn check_switches(&self) -> Result<()> {
        if self.hidden_act != "silu" {
            // it may come from a file
            let given = crate::files::tensors::quoted(&self.hidden_act);
            return refused("hidden_act", given, "only \"silu\" is supported");
        }
        if self.memory_tokens_interspersed_every > 0 {
            return refused(
                "memory_tokens_interspersed_every",
                self.memory_tokens_interspersed_every,
                "it must be 0: meta tokens stand in front of a sequence only",
            );
        }
        Ok(())
    }

    fn check_windows(&self) -> Result<()> {
        if self.sliding_window.is_some() && self.global_attn_idx.is_none() {
            let allowed = "with a sliding_window it must be a list of layers; it may be empty";
            return refused("global_attn_idx", "null", allowed);
        }
        Ok(())
    }

    fn check_sharing(&self) -> Result<()> {
        const OPTION: &str = "kv_reuse_group";
        // a valid group is short, another may be anything
        let shown = |group: &[usize]| format!("{:?}", &group[..group.len().min(20)]);
        let mut seen = vec![false; self.num_hidden_layers];
        for group in self.kv_reuse_group.iter().flatten() {
            let Some((&first, others)) = group.split_first() else {
                return refused(OPTION, "[]", "a group needs at least one layer");
            };
            let exists = |layer: &&usize| **layer < self.num_hidden_layers;
            if let Some(layer) = others.iter().filter(exists).find(|layer| **layer <= first) {
                let allowed =
                    format!("layer {layer} cannot use keys and values of layer {first}, which does not come before it");
                return refused(OPTION, shown(group), allowed);
            }
            for &layer in group {
                if seen.get_mut(layer).is_some_and(|seen| std::mem::replace(seen, true)) {
                    return refused(OPTION, shown(group), format!("layer {layer} appears twice"));
                }
            }
        }
        for layer in 0..self.num_hidden_layers {
            let source = self.kv_source(layer);
            if self.is_global(layer) == self.is_global(source) {
                continue;
            }
            let kind = |layer| if self.is_global(layer) { "global" } else { "windowed" };
            let allowed = format!(
                "layer {layer} is {} and would use the keys and values of layer {source}, which is {}: they must be of one \
                 kind; change it or global_attn_idx",
                kind(layer),
                kind(source)
            );
            return match &self.kv_reuse_group {
                Some(groups) => {
                    let group = groups.iter().find(|group| group.contains(&layer));
                    refused(OPTION, group.map_or_else(String::new, |group| shown(group)), allowed)
                }
                None => refused("kv_reuse_every_i_layer", self.kv_reuse_every_i_layer.unwrap_or(0), allowed),
            };
        }
        Ok(())
    }

    /// The option that is to blame for too many parameters: the first that, at the size of the 1.5B, makes them few enough.
    fn largest(&self) -> (&'static str, String) {
        let small = Self::hymba_1_5b();
        let sizes = [
            ("vocab_size", self.vocab_size, Self { vocab_size: small.vocab_size, ..self.clone() }),
            ("intermediate_size", self.intermediate_size, Self { intermediate_size: 5504, ..self.clone() }),
            ("mamba_d_state", self.mamba_d_state, Self { mamba_d_state: 16, ..self.clone() }),
            ("mamba_dt_rank", self.dt_rank(), Self { mamba_dt_rank: Some(100), ..self.clone() }),
            ("num_hidden_layers", self.num_hidden_layers, Self { num_hidden_layers: 32, ..self.clone() }),
        ];
        let fits = |config: &Self| config.count().is_some_and(|count| count <= Self::MAX_PARAMETERS);
        let culprit = sizes.into_iter().find(|(_, _, without)| fits(without));
        culprit.map_or(("hidden_size", self.hidden_size.to_string()), |(option, given, _)| (option, given.to_string()))
    }
}
