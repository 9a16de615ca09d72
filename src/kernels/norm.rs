//! Norms of rows.

mod layer;
mod rms;
mod rms_backward;
#[cfg(test)]
mod tests;

use super::simd::{LANES, Simd};

pub(crate) use layer::{layer_norm, layer_norm_backward};
pub(crate) use rms::{rms_norm, rms_norm_in_place};
pub(crate) use rms_backward::rms_norm_backward;

/// What a norm does where the variance is near zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SmallVariance {
    /// 1/√(v + ε), the textbook rule.
    AddEpsilon,
    /// 1/√(v + ε) from v = ε on, 1/√ε below: Axon's rule.
    ClipBelowEpsilon,
}

impl SmallVariance {
    pub(crate) fn reciprocal_deviation(self, variance: f32, epsilon: f32) -> f32 {
        match self.is_clipped(variance, epsilon) {
            true => epsilon.sqrt().recip(),
            false => (variance + epsilon).sqrt().recip(),
        }
    }

    fn is_clipped(self, variance: f32, epsilon: f32) -> bool {
        self == SmallVariance::ClipBelowEpsilon && variance < epsilon
    }
}

/// The factor for a row whose squares overflow: then none do, and numbers that become 0 are negligible beside the rest.
const SHRINK: f32 = 1.0 / (1u128 << 96) as f32;

#[cold]
fn shrink(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x * SHRINK).collect()
}

/// The first numbers of `x`, at most sixteen; the other lanes are `other`.
#[inline(always)]
fn load_or<S: Simd>(s: S, x: &[f32], other: f32) -> S::V {
    match x.first_chunk() {
        Some(full) => s.load(full),
        None => {
            let mut lanes = [other; LANES];
            lanes[..x.len()].copy_from_slice(x);
            s.load(&lanes)
        }
    }
}
