//! What happens to queries, keys and values between their projections and attention: norms, rotary embedding, rounding.

use ndarray::Array2;

use super::{AttentionConfig, Depth, HEAD_EPSILON, MetaTokenAttention};
use crate::kernels::norm::{rms_norm_backward, rms_norm_in_place};
use crate::kernels::team::Team;
use crate::layers::batch::{Batch, add, for_rows, for_rows_summed};
use crate::layers::kv_cache::{KvShape, KvStorage};
use crate::layers::rope::{Angles, apply_rope, apply_rope_backward};
use crate::layers::{flat, flat_mut};

impl MetaTokenAttention {
    /// Norms, rotary embedding and rounding of queries, keys and values that stand in arrays of their own.
    pub(super) fn prepare(
        &self,
        batch: &Batch,
        depth: Depth,
        q: &mut Array2<f32>,
        k: &mut Array2<f32>,
        v: &mut Array2<f32>,
    ) {
        let AttentionConfig { query_heads, kv } = self.config;
        self.prepare_columns(batch, depth, q, [query_heads, 0, 0]);
        self.prepare_columns(batch, depth, k, [0, kv.heads, 0]);
        self.prepare_columns(batch, depth, v, [0, 0, kv.heads]);
    }

    /// Norms and rotary embedding of queries and keys, and rounding of keys and values to what is kept. Rows begin with so many
    /// `heads` of queries, of keys, and of values.
    pub(crate) fn prepare_columns(&self, batch: &Batch, depth: Depth, rows: &mut Array2<f32>, heads: [usize; 3]) {
        let KvShape { key_width, value_width, .. } = self.config.kv;
        let (queries, keys, values) = (heads[0] * key_width, heads[1] * key_width, heads[2] * value_width);
        let cache = batch.states.first().and_then(|state| state.layers[depth.layer].kv.as_ref());
        let rounding = cache.filter(|cache| cache.storage() == KvStorage::Bf16 && keys + values > 0);
        if self.norms.is_none() && batch.angles.is_empty() && rounding.is_none() {
            return;
        }
        let width = rows.ncols();
        for_rows(batch.team, flat_mut(rows), width, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let (rotated, rest) = row.split_at_mut(queries + keys);
                if let Some(norms) = &self.norms {
                    let (queries, keys) = rotated.split_at_mut(queries);
                    for (heads, norm) in [queries, keys].into_iter().zip(norms) {
                        let weights = norm.rows().into_iter().cycle();
                        for (head, weight) in heads.chunks_exact_mut(key_width).zip(weights) {
                            rms_norm_in_place(head, flat(&weight), HEAD_EPSILON);
                        }
                    }
                }
                if let Some(angles) = batch.angles.get(first + i) {
                    apply_rope(rotated, angles);
                }
                if let Some(cache) = rounding {
                    cache.round(&mut rotated[queries..]);
                    cache.round(&mut rest[..values]);
                }
            }
        });
    }

    /// Whether queries and keys are normalised.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn has_norms(&self) -> bool {
        self.norms.is_some()
    }

    /// The gradient of [`prepare_columns`](Self::prepare_columns), rounding taken for nothing: d `[rows, ·]`, that of the prepared
    /// queries and keys, becomes that of the ones `before`, `[rows, ≥ q + k]`, which only norms read.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn prepare_columns_backward(
        &self,
        team: &Team,
        angles: &[Angles],
        before: Option<&Array2<f32>>,
        d: &mut Array2<f32>,
        heads: [usize; 3],
        grad: &mut MetaTokenAttention,
    ) {
        let KvShape { key_width, .. } = self.config.kv;
        let norms = self.norms.as_ref().zip(before);
        if norms.is_none() && angles.is_empty() {
            return;
        }
        let (queries, width) = (heads[0] * key_width, d.ncols());
        let rotated = queries + heads[1] * key_width;
        let counts = self.norms.as_ref().map_or([0; 2], |norms| norms.each_ref().map(Array2::len));
        let sums = for_rows_summed(team, flat_mut(d), width, counts[0] + counts[1], |first, rows, sums| {
            let (dq_norm, dk_norm) = sums.split_at_mut(counts[0]);
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let row = &mut row[..rotated];
                if let Some(angles) = angles.get(first + i) {
                    apply_rope_backward(row, angles);
                }
                let Some((norms, before)) = norms else { continue };
                let before = &flat(before)[(first + i) * before.ncols()..][..rotated];
                let (dq, dk) = row.split_at_mut(queries);
                let (q, k) = before.split_at(queries);
                for ((d, x), (norm, sums)) in
                    [(dq, q), (dk, k)].into_iter().zip(norms.iter().zip([&mut *dq_norm, &mut *dk_norm]))
                {
                    for (head, (d, x)) in d.chunks_exact_mut(key_width).zip(x.chunks_exact(key_width)).enumerate() {
                        let own = head % norm.nrows();
                        let sum = &mut sums[own * key_width..][..key_width];
                        rms_norm_backward(x, flat(&norm.row(own)), HEAD_EPSILON, 1.0, d, sum);
                    }
                }
            }
        });
        if let Some([q_norm, k_norm]) = &mut grad.norms {
            add(&sums[..counts[0]], flat_mut(q_norm));
            add(&sums[counts[0]..], flat_mut(k_norm));
        }
    }
}
