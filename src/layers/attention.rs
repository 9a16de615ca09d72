//! The attention branch: causal multi-head attention with learned meta tokens in front.

use ndarray::{Array2, Array3, Array4, ArrayView2, ArrayViewMut2, Axis, s};
use rand_distr::{Distribution, Normal};

use super::batch::{Batch, Spans, add, for_rows, for_rows_summed};
use super::kv_cache::{KvCache, KvShape, KvStorage, KvView};
use super::rope::{Angles, apply_rope, apply_rope_backward};
use super::shared_kv::SharedKv;
use super::state::{LayerState, StateGradient};
use super::{Buffer, Linear, Rng, all_rows, flat, flat_mut};
use crate::kernels::attention::{
    AttentionGradient, AttentionOutput, Head, PackedHead, Tile, attend_backward, attend_tile, tiles, weights,
};
use crate::kernels::matmul::Storage;
use crate::kernels::norm::{rms_norm_backward, rms_norm_in_place};
use crate::kernels::rows::Rows;
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, debug_shapes, join};

/// The branch that recalls: every frame looks at the meta tokens and at the last `window_size` frames.
///
/// Queries, keys, values and output are linear maps with bias; scores are scaled by 1/√p for heads of width `p = h/a`.
/// There is no position encoding, as the Mamba branch carries order. Frame `i` sees frame `j ≤ i` if `i − j < w`, and
/// always all meta tokens, whose keys and values come from the tokens as they travel through the blocks (in the Edifice
/// variant: from two parameters of the block).
///
/// In the language model the four maps are one with those of the Mamba branch and so belong to the block; several heads of queries
/// share one of keys and values, values are wider than keys, queries and keys may have norms and a rotary embedding, and some layers
/// use the keys and values of another.
#[derive(Clone)]
pub struct MetaTokenAttention {
    config: AttentionConfig,
    projections: Option<Projections>,
    /// Norms of queries and keys `[heads, p]`, or `[1, p]` for all heads.
    norms: Option<[Array2<f32>; 2]>,
    /// Keys and values `[k, h]` of the meta tokens, where they are parameters of the layer.
    own_meta: Option<[Array2<f32>; 2]>,
}

/// The sizes of a branch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionConfig {
    /// Heads of queries: a multiple of those of keys.
    pub query_heads: usize,
    pub kv: KvShape,
}

#[derive(Clone)]
struct Projections {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    /// What queries are multiplied by before the scores are scaled by 1/√p.
    query_scale: f32,
}

/// Where in a model a branch stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Depth {
    pub layer: usize,
    /// The layer whose keys and values it uses, maybe itself.
    pub kv_layer: usize,
    /// Whether a later layer uses them, too.
    pub kv_is_used_later: bool,
}

impl Depth {
    /// A layer that shares nothing.
    pub(crate) fn of(layer: usize) -> Self {
        Depth { layer, kv_layer: layer, kv_is_used_later: false }
    }
}

/// What [`MetaTokenAttention::backward`] reads.
pub(crate) struct AttentionCache {
    /// Queries, keys and values `[rows, h]`.
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// What goes into the last projection, `[rows, h]`.
    mixed: Buffer,
    /// ln Σ exp(score), `[rows, a]`.
    log_sums: Array2<f32>,
}

/// The norms of queries and keys: whether there are any, and whether each head has its own weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadNorms {
    None,
    Shared,
    PerHead,
}

/// ε of the norms of queries and keys.
const HEAD_EPSILON: f32 = 1e-6;

debug_shapes!(MetaTokenAttention);

impl MetaTokenAttention {
    /// With maps of its own from `[rows, inputs]` to `[rows, outputs]`, each with a bias and in this type of storage, and with meta
    /// keys and values of its own if it `owns_meta`. Scores are scaled by `query_scale`/√p.
    pub(crate) fn zeros(
        config: AttentionConfig,
        [inputs, outputs]: [usize; 2],
        query_scale: f32,
        owns_meta: bool,
        storage: Option<Storage>,
    ) -> Self {
        let KvShape { heads, key_width, value_width, meta, .. } = config.kv;
        let linear = |heads, width| Linear::zeros_as(inputs, heads * width, true, storage);
        let own = |width| Array2::zeros((meta, heads * width));
        MetaTokenAttention {
            config,
            projections: Some(Projections {
                q: linear(config.query_heads, key_width),
                k: linear(heads, key_width),
                v: linear(heads, value_width),
                out: Linear::zeros_as(config.query_heads * value_width, outputs, true, storage),
                query_scale,
            }),
            norms: None,
            own_meta: owns_meta.then(|| [own(key_width), own(value_width)]),
        }
    }

    /// For a block that has the maps.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn without_projections(config: AttentionConfig, norms: HeadNorms) -> Self {
        let norm = |heads: usize| match norms {
            HeadNorms::PerHead => Array2::zeros((heads, config.kv.key_width)),
            _ => Array2::zeros((1, config.kv.key_width)),
        };
        let norms = (norms != HeadNorms::None).then(|| [norm(config.query_heads), norm(config.kv.heads)]);
        MetaTokenAttention { config, projections: None, norms, own_meta: None }
    }

    /// A gradient of this branch, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        let zeros = |arrays: &[Array2<f32>; 2]| arrays.each_ref().map(|array| Array2::zeros(array.dim()));
        MetaTokenAttention {
            config: self.config,
            projections: self.projections.as_ref().map(|Projections { q, k, v, out, query_scale }| Projections {
                q: q.zeros_like(),
                k: k.zeros_like(),
                v: v.zeros_like(),
                out: out.zeros_like(),
                query_scale: *query_scale,
            }),
            norms: self.norms.as_ref().map(zeros),
            own_meta: self.own_meta.as_ref().map(zeros),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.linears_mut().for_each(|linear| linear.init(rng));
        self.own_meta.iter_mut().flatten().for_each(|meta| init_meta_tokens(meta, rng));
        self.norms.iter_mut().flatten().for_each(|norm| norm.fill(1.0));
    }

    /// Parameters of a branch with maps of its own, whose heads are `inner` wide together.
    pub(crate) fn count(inputs: usize, inner: usize, outputs: usize, own_meta: Option<usize>) -> Option<usize> {
        let maps = Linear::count(inputs, inner, true)?.checked_mul(3)?;
        let maps = maps.checked_add(Linear::count(inner, outputs, true)?)?;
        maps.checked_add(own_meta.unwrap_or(0).checked_mul(inner)?.checked_mul(2)?)
    }

    /// The large maps.
    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.projections.iter_mut().flat_map(|Projections { q, k, v, out, .. }| [q, k, v, out])
    }

    /// A cache for a sequence that has seen nothing.
    pub(crate) fn new_cache(&self, storage: KvStorage) -> KvCache {
        KvCache::new(self.config.kv, storage)
    }

    /// Puts meta keys and values that are parameters of the layer into a new cache.
    pub(crate) fn push_own_meta(&self, cache: &mut KvCache) {
        if let Some([keys, values]) = &self.own_meta {
            cache.push(all_rows(keys), all_rows(values), keys.nrows());
        }
    }

    /// u `[rows, h]` → `[rows, h]`, or `only` some rows of it. The states of `depth` move on.
    pub(crate) fn forward(
        &self,
        batch: &mut Batch,
        depth: Depth,
        u: ArrayView2<f32>,
        only: Option<&[usize]>,
    ) -> Buffer {
        let [mut q, mut k, mut v] = self.projected(batch.team, u);
        self.prepare(batch, depth, &mut q, &mut k, &mut v);
        let mixed = self.attend_at(batch, depth, all_rows(&q), all_rows(&k), all_rows(&v), None, only);
        let out = &self.projections().out;
        match only {
            Some(rows) => out.forward(batch.team, mixed.rows_at(rows).view()),
            None => out.forward(batch.team, mixed.view()),
        }
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        depth: Depth,
        u: ArrayView2<f32>,
    ) -> (Buffer, AttentionCache) {
        let [q, k, v] = self.projected(batch.team, u);
        let mut log_sums = Array2::zeros((u.nrows(), self.config.query_heads));
        let mixed = self.attend(batch, depth, all_rows(&q), all_rows(&k), all_rows(&v), Some(&mut log_sums));
        let y = self.projections().out.forward(batch.team, mixed.view());
        (y, AttentionCache { q, k, v, mixed, log_sums })
    }

    /// The gradient of [`forward_train`](Self::forward_train) at u, for sequences that all began with the state `initial`: dy
    /// `[rows, h]` → du `[rows, h]`. `dfinal` are the gradients of the keys and values of a single sequence, where others attended
    /// to them. Adds those of the meta tokens' keys and values in front to `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        u: ArrayView2<f32>,
        cache: &AttentionCache,
        initial: &LayerState,
        dy: ArrayView2<f32>,
        dfinal: Option<&StateGradient>,
        grad: &mut MetaTokenAttention,
        dinitial: &mut StateGradient,
    ) -> Buffer {
        let (Projections { q, k, v, out, query_scale }, Some(grads)) = (self.projections(), &mut grad.projections)
        else {
            unreachable!("a gradient has the maps of its branch");
        };
        let dmixed = out.backward(team, cache.mixed.view(), dy, &mut grads.out);
        let [mut dq, mut dk, mut dv] = [&cache.q, &cache.k, &cache.v].map(|of| Buffer::uninit(of.dim()));
        let kv = initial.kv.as_ref().expect("a layer with maps of its own has keys and values of its own");
        let input = [&cache.q, &cache.k, &cache.v].map(|rows| all_rows(rows));
        let output =
            AttentionOutput { out: all_rows(&cache.mixed), dout: all_rows(&dmixed), log_sums: cache.log_sums.view() };
        let gradient = [dq.view_mut(), dk.view_mut(), dv.view_mut()];
        self.attend_backward(team, spans, kv, input, output, gradient, dinitial);
        if let Some(dfinal) = dfinal {
            *dk += &dfinal.keys;
            *dv += &dfinal.values;
        }
        scale(team, &mut dq, *query_scale);
        let mut du = q.backward(team, u, dq.view(), &mut grads.q);
        *du += &*k.backward(team, u, dk.view(), &mut grads.k);
        *du += &*v.backward(team, u, dv.view(), &mut grads.v);
        du
    }

    /// The gradient of [`attend`](Self::attend), for sequences that all began with the keys and values `kv`: of q `[rows, ·]`, k and
    /// v, prepared, and of its `output`. Overwrites the `gradient` of the three, and adds that of `kv` to `dkv`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend_backward(
        &self,
        team: &Team,
        spans: &Spans,
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
            attend_backward(input, output, gradient);
        });
        dkv.keys += &dpast_keys.sum_axis(Axis(0));
        dkv.values += &dpast_values.sum_axis(Axis(0));
    }

    /// Adds the gradients of the meta keys and values that are parameters of this layer, if they are.
    pub(crate) fn add_own_meta(&mut self, dinitial: &StateGradient) {
        if let Some([keys, values]) = &mut self.own_meta {
            *keys += &dinitial.keys;
            *values += &dinitial.values;
        }
    }

    /// The attention weights of one sequence of a batch in which all have l rows `[a, l, k + l]`: what each frame takes from each
    /// meta token, then from each frame.
    pub(crate) fn weights(&self, batch: &Batch, depth: Depth, u: ArrayView2<f32>) -> Array4<f32> {
        let [q, k, v] = self.projected(batch.team, u);
        let AttentionConfig { query_heads, kv: KvShape { heads, key_width, value_width, .. } } = self.config;
        let cache = |state: &'_ LayerState| state.kv.as_ref().map_or(0, KvCache::rows);
        let past = batch.states.first().map_or(0, |state| cache(&state.layers[depth.layer]));
        let l = batch.spans.iter().next().map_or(0, |span| span.len());
        let mut all = Array4::zeros((batch.spans.len(), query_heads, l, past + l));
        for ((span, state), mut all) in batch.spans.iter().zip(&batch.states).zip(all.outer_iter_mut()) {
            let Some(kv) = &state.layers[depth.layer].kv else { continue };
            for (head, mut all) in all.outer_iter_mut().enumerate() {
                let key_head = head * heads / query_heads;
                let past = kv.past(key_head);
                let input = Head {
                    queries: all_rows(&q).skip_rows(span.start).skip_columns(head * key_width),
                    keys: all_rows(&k).skip_rows(span.start).skip_columns(key_head * key_width),
                    values: all_rows(&v).skip_rows(span.start).skip_columns(key_head * value_width),
                    ..self.head(&past, l, kv.window())
                };
                for (frame, mut all) in all.outer_iter_mut().enumerate() {
                    all.iter_mut().zip(weights(input, frame)).for_each(|(all, weight)| *all = weight);
                }
            }
        }
        all
    }

    /// Queries, keys and values of u `[rows, inputs]`.
    fn projected(&self, team: &Team, u: ArrayView2<f32>) -> [Buffer; 3] {
        let Projections { q, k, v, query_scale, .. } = self.projections();
        let mut projected = [q, k, v].map(|map| map.forward(team, u));
        scale(team, &mut projected[0], *query_scale);
        projected
    }

    /// Norms, rotary embedding and rounding of queries, keys and values that stand in arrays of their own.
    fn prepare(&self, batch: &Batch, depth: Depth, q: &mut Array2<f32>, k: &mut Array2<f32>, v: &mut Array2<f32>) {
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
        self.attend_at(batch, depth, q, k, v, log_sums, None)
    }

    /// As [`attend`](Self::attend); if it is for `only` some rows, others may be left out: they hold any numbers.
    #[allow(clippy::too_many_arguments)]
    fn attend_at(
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
            Some(SharedKv { keys, values, packed }) => (Some((keys, values)), packed),
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
            batch.shared.insert(depth.kv_layer, SharedKv { keys, values, packed });
        }
        mixed
    }

    /// One head of some rows that come after `past`, without queries, keys and values.
    fn head<'a>(&self, past: &'a KvView, rows: usize, window: Option<usize>) -> Head<'a> {
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

    fn projections(&self) -> &Projections {
        self.projections.as_ref().expect("a block that has the maps calls `attend`")
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some(Projections { q, k, v, out, .. }) = &self.projections {
            q.visit(&join(name, "q_proj"), f);
            k.visit(&join(name, "k_proj"), f);
            v.visit(&join(name, "v_proj"), f);
            out.visit(&join(name, "out_proj"), f);
        }
        for (arrays, names) in
            [(&self.norms, ["q_norm.weight", "k_norm.weight"]), (&self.own_meta, ["meta_k", "meta_v"])]
        {
            for (array, tensor) in arrays.iter().flatten().zip(names) {
                f(&join(name, tensor), Parameter::Array(array.view().into_dyn()));
            }
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        if let Some(Projections { q, k, v, out, .. }) = &mut self.projections {
            q.visit_mut(&join(name, "q_proj"), f);
            k.visit_mut(&join(name, "k_proj"), f);
            v.visit_mut(&join(name, "v_proj"), f);
            out.visit_mut(&join(name, "out_proj"), f);
        }
        let (norms, own_meta) = (&mut self.norms, &mut self.own_meta);
        for (arrays, names) in [(norms, ["q_norm.weight", "k_norm.weight"]), (own_meta, ["meta_k", "meta_v"])] {
            for (array, tensor) in arrays.iter_mut().flatten().zip(names) {
                f(&join(name, tensor), ParameterMut::Array(array.view_mut().into_dyn()));
            }
        }
    }
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

/// q ← factor · q
fn scale(team: &Team, q: &mut Array2<f32>, factor: f32) {
    if factor != 1.0 {
        let width = q.ncols();
        for_rows(team, flat_mut(q), width, |_, q| q.iter_mut().for_each(|q| *q *= factor));
    }
}

fn copy_rows(from: Rows, rows: usize, width: usize) -> Buffer {
    let mut copy = Buffer::uninit((rows, width));
    copy.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| {
        row.as_slice_mut().expect("a row of an array in standard layout").copy_from_slice(from.row(i, width));
    });
    copy
}

/// Standard deviation of new meta tokens.
const META_DEVIATION: f32 = 0.02;

/// Meta tokens start out normal, with mean 0 and deviation 0.02.
pub(crate) fn init_meta_tokens(tokens: &mut Array2<f32>, rng: &mut Rng) {
    let normal = Normal::new(0.0, META_DEVIATION).expect("the deviation is positive");
    tokens.mapv_inplace(|_| normal.sample(rng));
}
