//! Attention of queries to keys and values that are prepared: those of the cache, and those of the batch itself.

use std::ops::Range;

use ndarray::{Array2, Array3, ArrayViewMut2, Axis, s};

use super::{AttentionConfig, Depth, MetaTokenAttention};
use crate::kernels::attention::{
    AttentionGradient, AttentionOutput, Head, PackedHead, Tile, attend_backward, attend_tile, tiles,
};
use crate::kernels::rows::Rows;
use crate::kernels::team::Team;
use crate::layers::batch::{Batch, Spans};
use crate::layers::kv_cache::{KvCache, KvShape, KvView};
use crate::layers::shared_kv::SharedKv;
use crate::layers::state::StateGradient;
use crate::layers::{Buffer, all_rows, flat_mut};

impl MetaTokenAttention {
    /// Attention of queries q `[rows, ·]` over the past of each sequence and the new keys and values, which a layer that uses
    /// another's does not have → `[rows, a · value_width]`. New keys and values go into the caches.
    pub(crate) fn attend(
        &self,
        batch: &mut Batch,
        depth: Depth,
        q: Rows,
        k: Rows,
        v: Rows,
        log_sums: Option<&mut Array2<f32>>,
    ) -> Buffer {
        #[cfg(feature = "lm")]
        if batch.one_by_one {
            return self.attend_one_by_one(batch, depth, q, k, v);
        }
        self.attend_at(batch, depth, q, k, v, log_sums, None)
    }

    /// As [`attend`](Self::attend); if it is for `only` some rows, others may be left out: they hold any numbers.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attend_at(
        &self,
        batch: &mut Batch,
        depth: Depth,
        q: Rows,
        k: Rows,
        v: Rows,
        log_sums: Option<&mut Array2<f32>>,
        only: Option<&[usize]>,
    ) -> Buffer {
        let AttentionConfig { query_heads, kv: KvShape { heads, key_width, value_width, .. } } = self.config;
        let group = query_heads / heads;
        let owns = depth.kv_layer == depth.layer;
        let trains = log_sums.is_some();
        let shared = batch.shared.remove(&depth.kv_layer);
        // a single row reads the cache, in which it stands itself; not one of the meta tokens, whose gradient is wanted
        let reads_cache: Vec<bool> = batch
            .spans
            .iter()
            .zip(&batch.states)
            .map(|(span, state)| {
                let expects_meta = state.layers[depth.kv_layer].kv.as_ref().is_some_and(KvCache::expects_meta);
                batch.keeps_kv && span.len() == 1 && !expects_meta
            })
            .collect();
        let push = |batch: &mut Batch, k: Rows, v: Rows, singles: bool| {
            for (i, (span, state)) in batch.spans.iter().zip(&mut batch.states).enumerate() {
                if batch.keeps_kv
                    && reads_cache[i] == singles
                    && let Some(cache) = &mut state.layers[depth.kv_layer].kv
                {
                    cache.push(k.skip_rows(span.start), v.skip_rows(span.start), span.len());
                }
            }
        };
        if owns {
            push(batch, k, v, true);
        }

        // keys and values: of the past, per sequence and head, and the new ones, which may be another layer's
        let caches: Vec<&KvCache> = batch
            .states
            .iter()
            .map(|state| {
                state.layers[depth.kv_layer].kv.as_ref().expect("the layer whose keys and values are used has them")
            })
            .collect();
        let mut pasts: Vec<Vec<KvView>> = Vec::new();
        for (cache, reads_cache) in caches.iter().zip(&reads_cache) {
            let heads = if *reads_cache { 0 } else { heads };
            pasts.push((0..heads).map(|head| cache.past(head)).collect());
        }
        let (shared_rows, mut packed) = match shared {
            Some(SharedKv { keys, values, packed, .. }) => (Some((keys, values)), packed),
            None => (None, Vec::new()),
        };
        let is_new = packed.is_empty();
        if is_new {
            packed = pasts.iter().map(|heads| heads.iter().map(|_| None).collect()).collect();
        }
        let (k, v) = match &shared_rows {
            Some((keys, values)) => (all_rows(keys), all_rows(values)),
            None => (k, v),
        };

        // what is to be done: steps of single rows, and tiles of the heads that share keys and values
        let mut mixed = Buffer::uninit((batch.spans.rows(), query_heads * value_width));
        let mut sums = log_sums.map(|sums| batch.spans.split(flat_mut(sums), query_heads));
        let (mut steps, mut groups) = (Vec::new(), Vec::new());
        let outs = batch.spans.split(flat_mut(&mut mixed), query_heads * value_width);
        for (((i, span), out), packed) in batch.spans.iter().enumerate().zip(outs).zip(&mut packed) {
            let sums = sums.as_mut().and_then(Iterator::next);
            if reads_cache[i] {
                let queries = q.row(span.start, query_heads * key_width).chunks_exact(group * key_width);
                let heads = queries.zip(out.chunks_exact_mut(group * value_width)).enumerate();
                steps.extend(heads.map(|(head, (query, out))| (caches[i], head, query, out)));
                continue;
            }
            let mut sums = sums.map(|sums| columns(by_rows(sums, span.len()), 1).into_iter());
            let mut outs = columns(by_rows(out, span.len()), value_width).into_iter();
            let is_used = |tile: &Tile| {
                let rows = span.start + tile.rows().start..span.start + tile.rows().end;
                only.is_none_or(|only| only.iter().any(|row| rows.contains(row)))
            };
            for (head, packed) in packed.iter_mut().enumerate() {
                let input = Head {
                    queries: q.skip_rows(span.start).skip_columns(head * group * key_width),
                    keys: k.skip_rows(span.start).skip_columns(head * key_width),
                    values: v.skip_rows(span.start).skip_columns(head * value_width),
                    ..self.head(&pasts[i][head], span.len(), caches[i].window())
                };
                let mut parts = Vec::new();
                for (member, out) in outs.by_ref().take(group).enumerate() {
                    let input = Head { queries: input.queries.skip_columns(member * key_width), ..input };
                    let tiles = tiles(out, sums.as_mut().and_then(Iterator::next));
                    parts.extend(tiles.into_iter().filter(is_used).map(|tile| (input, tile)));
                }
                groups.push((input, packed, parts));
            }
        }
        // it is done, whichever thread does what
        batch.team.for_each(steps, |(cache, head, query, out)| cache.attend(head, group, query, out));
        let pack = |packed: &mut Option<PackedHead>, head: &Head| {
            if is_new {
                *packed = PackedHead::new(head);
            }
        };
        if groups.len() >= 4 * batch.team.threads() {
            // enough for every thread: what one has packed stays in its caches
            batch.team.for_each(groups, |(head, packed, tiles)| {
                pack(packed, &head);
                tiles.into_iter().for_each(|(head, tile)| attend_tile(head, packed.as_ref(), tile));
            });
        } else {
            batch.team.for_each(&mut groups, |(head, packed, _)| pack(packed, head));
            let tiles = groups.into_iter().flat_map(|(_, packed, tiles)| {
                let packed = &*packed;
                tiles.into_iter().map(move |(head, tile)| (head, packed, tile))
            });
            batch
                .team
                .for_each(tiles.collect::<Vec<_>>(), |(head, packed, tile)| attend_tile(head, packed.as_ref(), tile));
        }

        // the new keys and values go into the caches, or to later layers first
        drop(pasts);
        if !depth.kv_is_used_later {
            push(batch, k, v, false);
        }
        // the backward pass of the last layer that uses them reads them, too
        if depth.kv_is_used_later || (trains && shared_rows.is_some()) {
            let rows = batch.spans.rows();
            let (keys, values) = match shared_rows {
                Some(shared) => shared,
                None => (copy_rows(k, rows, heads * key_width), copy_rows(v, rows, heads * value_width)),
            };
            batch.shared.insert(depth.kv_layer, SharedKv { keys, values, packed, before: Vec::new() });
        }
        mixed
    }

    /// The gradient of [`attend`](Self::attend), for sequences that all began with the keys and values `kv`: of q `[rows, ·]`, k and
    /// v, prepared, and of its `output`, of which `only` some rows may have been used. Overwrites the `gradient` of the three, and adds
    /// that of `kv` to `dkv`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend_backward(
        &self,
        team: &Team,
        spans: &Spans,
        only: Option<&[usize]>,
        kv: &KvCache,
        [q, k, v]: [Rows; 3],
        output: AttentionOutput,
        [dq, dk, dv]: [ArrayViewMut2<f32>; 3],
        dkv: &mut StateGradient,
    ) {
        let AttentionConfig { query_heads, kv: KvShape { heads, key_width, value_width, .. } } = self.config;
        let group = query_heads / heads;
        let pasts: Vec<_> = (0..heads).map(|head| kv.past(head)).collect();
        let past = kv.rows();
        let mut dpast_keys = Array3::zeros((spans.len(), past, heads * key_width));
        let mut dpast_values = Array3::zeros((spans.len(), past, heads * value_width));

        let mut items = Vec::new();
        let parts = split_rows(spans, dq).zip(split_rows(spans, dk)).zip(split_rows(spans, dv));
        let pasts_of = dpast_keys.outer_iter_mut().zip(dpast_values.outer_iter_mut());
        for ((span, ((dq, dk), dv)), (dpast_keys, dpast_values)) in spans.iter().zip(parts).zip(pasts_of) {
            let queries = columns(dq, group * key_width).into_iter();
            let mut keys = columns(dk, key_width).into_iter();
            let mut values = columns(dv, value_width).into_iter();
            let mut past_keys = columns(dpast_keys, key_width).into_iter();
            let mut past_values = columns(dpast_values, value_width).into_iter();
            for (head, queries) in queries.enumerate() {
                let next = |of: &mut std::vec::IntoIter<_>| of.next().expect("as many heads as queries have groups");
                let (keys, values) = (next(&mut keys), next(&mut values));
                let (past_keys, past_values) = (next(&mut past_keys), next(&mut past_values));
                items.push((span, head, AttentionGradient { queries, keys, values, past_keys, past_values }));
            }
        }
        team.for_each(items, |(span, head, gradient)| {
            let input = Head {
                queries: q.skip_rows(span.start).skip_columns(head * group * key_width),
                keys: k.skip_rows(span.start).skip_columns(head * key_width),
                values: v.skip_rows(span.start).skip_columns(head * value_width),
                ..self.head(&pasts[head], span.len(), kv.window())
            };
            let output = AttentionOutput {
                out: output.out.skip_rows(span.start).skip_columns(head * group * value_width),
                dout: output.dout.skip_rows(span.start).skip_columns(head * group * value_width),
                log_sums: output.log_sums.slice(s![span.clone(), head * group..(head + 1) * group]),
            };
            attend_backward(input, used_of(span, only), output, gradient);
        });
        dkv.keys += &dpast_keys.sum_axis(Axis(0));
        dkv.values += &dpast_values.sum_axis(Axis(0));
    }

    /// One head of some rows that come after `past`, without queries, keys and values.
    pub(super) fn head<'a>(&self, past: &'a KvView, rows: usize, window: Option<usize>) -> Head<'a> {
        let KvShape { key_width, value_width, .. } = self.config.kv;
        let nothing = Rows { data: &[], stride: 0 };
        Head {
            queries: nothing,
            keys: nothing,
            values: nothing,
            past_keys: Rows { data: &past.keys, stride: key_width },
            past_values: Rows { data: &past.values, stride: value_width },
            past: past.rows,
            meta: past.meta,
            frames: rows,
            key_width,
            value_width,
            window,
        }
    }
}

/// The rows of a sequence that are used, counted from its first, if `only` some of all are: one at most, as those between two would
/// not be there.
fn used_of(span: &Range<usize>, only: Option<&[usize]>) -> Range<usize> {
    let Some(only) = only else { return 0..span.len() };
    let mut used = only.iter().filter(|row| span.contains(row)).map(|row| row - span.start);
    let used_row = used.next();
    debug_assert!(used.next().is_none(), "one row of each sequence at most");
    used_row.map_or(0..0, |row| row..row + 1)
}

fn by_rows(numbers: &mut [f32], rows: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((rows, numbers.len() / rows.max(1)), numbers).expect("whole rows")
}

/// The rows of each sequence.
fn split_rows<'a>(spans: &Spans, mut rest: ArrayViewMut2<'a, f32>) -> std::vec::IntoIter<ArrayViewMut2<'a, f32>> {
    let mut parts = Vec::with_capacity(spans.len());
    for span in spans.iter() {
        let (here, below) = rest.split_at(Axis(0), span.len());
        parts.push(here);
        rest = below;
    }
    parts.into_iter()
}

/// The columns of an array, so many at a time.
fn columns(mut rest: ArrayViewMut2<'_, f32>, width: usize) -> Vec<ArrayViewMut2<'_, f32>> {
    let mut parts = Vec::new();
    while rest.ncols() > width {
        let (left, right) = rest.split_at(Axis(1), width);
        parts.push(left);
        rest = right;
    }
    parts.push(rest);
    parts
}

pub(super) fn copy_rows(from: Rows, rows: usize, width: usize) -> Buffer {
    let mut copy = Buffer::uninit((rows, width));
    copy.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| {
        row.as_slice_mut().expect("a row of an array in standard layout").copy_from_slice(from.row(i, width));
    });
    copy
}
