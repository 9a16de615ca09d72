//! The attention branch: grouped queries over a window and the meta tokens, keys and values shared across layers.

use ndarray::{Array2, ArrayViewMut2, Axis};

use super::cache::{KvCache, KvShape, KvStorage, Past};
use super::config::{HymbaLmConfig, KeyQueryNorm};
use super::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};
use super::pass::{Pass, by_pieces, row_blocks};
use super::rope::rotate;
use crate::kernels::attention::{PackedHead, Sequence, attend_tile, tiles};
use crate::kernels::matmul::Rows;
use crate::kernels::norm::rms_norm_in_place;
use crate::layers::{flat, join};

/// ε of the norms of queries and keys, whatever the configuration says of the others.
const QUERY_EPSILON: f32 = 1e-6;

/// The attention of one layer, without projections: those are one with the Mamba branch's.
pub(super) struct Attention {
    query_heads: usize,
    shape: KvShape,
    /// The layer whose keys and values it uses, maybe itself.
    source: usize,
    layer: usize,
    /// Whether a later layer uses the keys and values, too.
    last_use: bool,
    /// Norms of queries and keys `[heads, p]`, or `[1, p]` for all heads.
    norms: Option<[Array2<f32>; 2]>,
}

/// Keys and values of a piece of several tokens: what they see of those before, and their own.
pub(super) struct View {
    rows: Past,
    /// Tokens before the first of the piece, meta tokens not counted.
    before: usize,
    window: Option<usize>,
    /// One entry a head.
    packed: Vec<Option<PackedHead>>,
}

impl Attention {
    pub(super) fn new(config: &HymbaLmConfig, layer: usize) -> Self {
        let shape = kv_shape(config, layer);
        let source = config.kv_source(layer);
        let heads = |heads: usize| match config.kq_norm {
            KeyQueryNorm::PerHeadRms => heads,
            _ => 1,
        };
        let norm = |count: usize| Array2::zeros((heads(count), shape.key_width));
        Attention {
            query_heads: config.num_attention_heads,
            shape,
            source,
            layer,
            last_use: (layer + 1..config.num_hidden_layers).all(|later| config.kv_source(later) != source),
            norms: (config.kq_norm != KeyQueryNorm::None)
                .then(|| [norm(config.num_attention_heads), norm(config.num_key_value_heads)]),
        }
    }

    /// The cache of keys and values of this layer, if it has its own.
    pub(super) fn new_cache(&self, storage: KvStorage) -> Option<KvCache> {
        self.owns().then(|| KvCache::new(self.shape, storage))
    }

    fn owns(&self) -> bool {
        self.source == self.layer
    }

    /// `projected` `[tokens, width]` begins with queries and, where the layer has its own, keys and values; queries and keys
    /// are turned in place → out `[tokens, E]`.
    pub(super) fn forward(&self, pass: &mut Pass, projected: &mut [f32], width: usize, out: &mut [f32]) {
        self.turn(pass, projected, width);
        let projected = &*projected;
        if self.owns() {
            self.keep(pass, projected, width);
        }
        let KvShape { heads: key_heads, key_width, value_width, .. } = self.shape;
        let group = self.query_heads / key_heads;
        let row_width = self.query_heads * value_width;
        let mut steps = Vec::new();
        let mut tiled = Vec::new();
        let parts = by_pieces(&pass.pieces, out, row_width);
        let views = &pass.views[&self.source];
        for (((piece, state), view), here) in pass.pieces.iter().zip(&pass.states).zip(views).zip(parts) {
            let queries = Rows { data: piece.of(projected, width), stride: width };
            match (view, &state.layers[self.source].kv) {
                (Some(view), _) => {
                    let sequence = self.sequence(view, queries, piece.len());
                    let mut right = ArrayViewMut2::from_shape((piece.len(), row_width), here).expect("whole rows");
                    for head in 0..self.query_heads {
                        let (left, rest) = right.split_at(Axis(1), value_width);
                        right = rest;
                        let sequence = sequence.grouped_head(head, head / group);
                        let packed = view.packed[head / group].as_ref();
                        tiled.extend(tiles(left, None).into_iter().map(|tile| (sequence, packed, tile)));
                    }
                }
                (None, Some(cache)) => {
                    let queries = queries.row(0, self.query_heads * key_width).chunks_exact(group * key_width);
                    let heads = queries.zip(here.chunks_exact_mut(group * value_width)).enumerate();
                    steps.extend(heads.map(|(head, (query, out))| (cache, head, query, out)));
                }
                (None, None) => unreachable!("the layer whose keys and values are used has them"),
            }
        }
        pass.team.for_each(steps, |(cache, head, query, out)| cache.attend(head, group, query, out));
        pass.team.for_each(tiled, |(sequence, packed, tile)| attend_tile(sequence, packed, tile));
        if self.last_use {
            pass.views.remove(&self.source);
        }
    }

    /// Norms and rotary embedding of queries and keys, and rounding of keys and values to what is kept.
    fn turn(&self, pass: &Pass, projected: &mut [f32], width: usize) {
        let KvShape { heads, key_width, value_width, .. } = self.shape;
        let queries = self.query_heads * key_width;
        let (keys, values) = if self.owns() { (heads * key_width, heads * value_width) } else { (0, 0) };
        let cache = pass.states.first().and_then(|state| state.layers[self.layer].kv.as_ref());
        pass.team.for_each(row_blocks(projected, width), |(first, rows)| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                let (turned, rest) = row.split_at_mut(queries + keys);
                if let Some(norms) = &self.norms {
                    let (queries, keys) = turned.split_at_mut(queries);
                    for (heads, norm) in [queries, keys].into_iter().zip(norms) {
                        let weights = norm.rows().into_iter().cycle();
                        for (head, weight) in heads.chunks_exact_mut(key_width).zip(weights) {
                            rms_norm_in_place(head, flat(&weight), QUERY_EPSILON);
                        }
                    }
                }
                if let Some(turn) = pass.turns.get(first + i) {
                    rotate(turned, turn);
                }
                if let Some(cache) = cache {
                    cache.round(&mut turned[queries..]);
                    cache.round(&mut rest[..values]);
                }
            }
        });
    }

    /// Puts the new keys and values into the caches, and those that a piece of several tokens needs into a view.
    fn keep(&self, pass: &mut Pass, projected: &[f32], width: usize) {
        let KvShape { heads, key_width, value_width, meta, window } = self.shape;
        let (key, value) = (heads * key_width, heads * value_width);
        let mut views = Vec::new();
        for (piece, state) in pass.pieces.iter().zip(&mut pass.states) {
            let keys =
                Rows { data: piece.of(projected, width), stride: width }.skip_columns(self.query_heads * key_width);
            let values = keys.skip_columns(key);
            let position = state.position;
            let Some(cache) = &mut state.layers[self.layer].kv else {
                unreachable!("a layer with its own keys and values has a cache");
            };
            views.push((piece.len() > 1).then(|| {
                let mut rows = cache.past();
                let before = rows.keys.len() / key - rows.meta;
                for i in 0..piece.len() {
                    rows.keys.extend_from_slice(keys.row(i, key));
                    rows.values.extend_from_slice(values.row(i, value));
                }
                // the meta tokens themselves see all that precede them
                let window = if position < meta { None } else { window };
                View { rows, before, window, packed: (0..heads).map(|_| None).collect() }
            }));
            cache.push(keys, values, piece.len());
        }
        for view in views.iter_mut().flatten() {
            let mut packed = std::mem::take(&mut view.packed);
            let nothing = Rows { data: &[], stride: 0 };
            let sequence = self.sequence(view, nothing, view.rows.keys.len() / key - view.rows.meta - view.before);
            pass.team.for_each(packed.iter_mut().enumerate(), |(head, packed)| {
                *packed = PackedHead::new(&sequence.grouped_head(0, head))
            });
            view.packed = packed;
        }
        pass.views.insert(self.layer, views);
    }

    /// A piece of `count` tokens with these queries.
    fn sequence<'a>(&self, view: &'a View, queries: Rows<'a>, count: usize) -> Sequence<'a> {
        let KvShape { heads, key_width, value_width, .. } = self.shape;
        let (key, value) = (heads * key_width, heads * value_width);
        let (meta_keys, keys) = view.rows.keys.split_at(view.rows.meta * key);
        let (meta_values, values) = view.rows.values.split_at(view.rows.meta * value);
        Sequence {
            queries,
            keys: Rows { data: keys, stride: key },
            values: Rows { data: values, stride: value },
            meta_keys: Rows { data: meta_keys, stride: key },
            meta_values: Rows { data: meta_values, stride: value },
            frames: view.before + count,
            before: view.before,
            meta: view.rows.meta,
            key_width,
            value_width,
            window: view.window,
        }
    }

    pub(super) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some([queries, keys]) = &self.norms {
            f(&join(name, "q_norm.weight"), Parameter::Numbers(queries.view().into_dyn()));
            f(&join(name, "k_norm.weight"), Parameter::Numbers(keys.view().into_dyn()));
        }
    }

    pub(super) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        if let Some([queries, keys]) = &mut self.norms {
            f(&join(name, "q_norm.weight"), ParameterMut::Numbers(queries.view_mut().into_dyn()));
            f(&join(name, "k_norm.weight"), ParameterMut::Numbers(keys.view_mut().into_dyn()));
        }
    }
}

/// The keys and values of a layer.
fn kv_shape(config: &HymbaLmConfig, layer: usize) -> KvShape {
    KvShape {
        heads: config.num_key_value_heads,
        key_width: config.key_width(),
        value_width: config.value_width(),
        meta: config.num_memory_tokens,
        // itself and sliding_window others
        window: config.window(layer).map(|window| window + 1),
    }
}
