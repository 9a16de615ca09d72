//! Attention of some rows of each sequence, every one as if it came alone: bit for bit what as many passes of one row would give.

use super::{AttentionConfig, Depth, MetaTokenAttention};
use crate::kernels::rows::Rows;
use crate::layers::batch::Batch;
use crate::layers::kv_cache::{KvCache, KvShape};
use crate::layers::shared_kv::SharedKv;
use crate::layers::{Buffer, all_rows, flat_mut};

impl MetaTokenAttention {
    /// As [`attend`](Self::attend), row by row: each goes into the cache and reads it, before the next one does. Layers that use
    /// another's keys and values do the same with a copy of the cache as it was before, because a window forgets.
    pub(super) fn attend_one_by_one(&self, batch: &mut Batch, depth: Depth, q: Rows, k: Rows, v: Rows) -> Buffer {
        let AttentionConfig { query_heads, kv: KvShape { heads, key_width, value_width, .. } } = self.config;
        let (group, owns) = (query_heads / heads, depth.kv_layer == depth.layer);
        let mut shared = match batch.shared.remove(&depth.kv_layer) {
            Some(shared) => Some(shared),
            None if depth.kv_is_used_later => Some(SharedKv {
                keys: super::attend::copy_rows(k, batch.spans.rows(), heads * key_width),
                values: super::attend::copy_rows(v, batch.spans.rows(), heads * value_width),
                packed: Vec::new(),
                before: batch.states.iter().filter_map(|state| state.layers[depth.kv_layer].kv.clone()).collect(),
            }),
            None => None,
        };
        let mut copies: Vec<KvCache> = match &mut shared {
            Some(shared) if !owns && depth.kv_is_used_later => shared.before.clone(),
            Some(shared) if !owns => std::mem::take(&mut shared.before),
            _ => Vec::new(),
        };
        let (k, v) = match &shared {
            Some(shared) if !owns => (all_rows(&shared.keys), all_rows(&shared.values)),
            _ => (k, v),
        };
        let mut mixed = Buffer::uninit((batch.spans.rows(), query_heads * value_width));
        let outs = batch.spans.split(flat_mut(&mut mixed), query_heads * value_width);
        for (i, (span, out)) in batch.spans.iter().zip(outs).enumerate() {
            let cache = match copies.get_mut(i) {
                Some(copy) => copy,
                None => batch.states[i].layers[depth.kv_layer]
                    .kv
                    .as_mut()
                    .expect("the layer whose keys and values are used has them"),
            };
            for (row, out) in span.clone().zip(out.chunks_exact_mut(query_heads * value_width)) {
                cache.push(k.skip_rows(row), v.skip_rows(row), 1);
                let queries = q.row(row, query_heads * key_width).chunks_exact(group * key_width);
                let heads: Vec<_> = queries.zip(out.chunks_exact_mut(group * value_width)).enumerate().collect();
                let cache = &*cache;
                batch.team.for_each(heads, |(head, (query, out))| cache.attend(head, group, query, out));
            }
        }
        if let Some(shared) = shared.filter(|_| depth.kv_is_used_later) {
            batch.shared.insert(depth.kv_layer, shared);
        }
        mixed
    }
}
