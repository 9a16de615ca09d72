//! The attention branch: causal multi-head attention with learned meta tokens in front.

mod attend;
#[cfg(feature = "lm")]
mod one_by_one;
mod prepare;

use ndarray::{Array2, Array4, ArrayView2};
use rand_distr::{Distribution, Normal};

use super::batch::{Batch, Spans, for_rows, needed};
use super::kv_cache::{KvCache, KvShape, KvStorage};
use super::state::{LayerState, StateGradient};
use super::{Buffer, Linear, Rng, all_rows, flat_mut};
use crate::kernels::attention::{AttentionOutput, Head, weights};
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, debug_shapes, join};

/// The branch that recalls: every frame looks at the meta tokens and at the last `window_size` frames.
///
/// | step | shape |
/// |---|---|
/// | `q = u·W_qᵀ + b_q`, k and v likewise | `[l, h]`, a heads of width `p = h/a` |
/// | `P_ij = exp(q_i·k_j/√p) / Σ_j exp(q_i·k_j/√p)` over the j that row i sees | `[a, l, k + l]` |
/// | `mixed_i = Σ_j P_ij v_j` | `[l, h]` |
/// | `mixed·W_outᵀ + b_out` | `[l, h]` |
///
/// Frame `i` sees frame `j ≤ i` if `i − j < w`, and always all meta tokens, whose keys and values come from the tokens as they travel
/// through the blocks (in the Edifice variant: from two parameters of the block). There is no position encoding, as the Mamba branch
/// carries order.
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
    /// The factor of the queries, besides the 1/√p of the scores.
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
    /// Keys and values `[rows, h]`; queries, of which only the rows that were asked for are not 0.
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// The input of the last projection, `[rows, h]`; only the rows that were asked for are sure to be there, here and in the log-sums.
    mixed: Buffer,
    /// ln Σ exp(score), `[rows, a]`.
    log_sums: Buffer,
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

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        let names = ["q_proj", "k_proj", "v_proj", "out_proj"];
        self.linears_mut().zip(names).for_each(|(map, tensor)| f(join(name, tensor), map));
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
        let [mut q, mut k, mut v] = self.projected(batch.team, u, only); // [rows, h] each
        self.prepare(batch, depth, &mut q, &mut k, &mut v);
        let mixed = self.attend_at(batch, depth, all_rows(&q), all_rows(&k), all_rows(&v), None, only);
        let out = &self.projections().out;
        out.forward(batch.team, needed(&mixed, only).view())
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        depth: Depth,
        u: ArrayView2<f32>,
        only: Option<&[usize]>,
    ) -> (Buffer, AttentionCache) {
        let [q, k, v] = self.projected(batch.team, u, only);
        let mut log_sums = Buffer::zeros((u.nrows(), self.config.query_heads));
        let sums = Some(&mut *log_sums);
        let mixed = self.attend_at(batch, depth, all_rows(&q), all_rows(&k), all_rows(&v), sums, only);
        let out = &self.projections().out;
        let _seeded = batch.team.seeded_at(only);
        let y = out.forward(batch.team, needed(&mixed, only).view());
        (y, AttentionCache { q, k, v, mixed, log_sums })
    }

    /// The gradient of [`forward_train`](Self::forward_train) at u, for sequences that all began with the state `initial`: dy
    /// of the shape of the output → du `[rows, h]`. `dfinal` are the gradients of the keys and values of a single sequence, where others
    /// attended to them. Adds those of the meta tokens' keys and values in front to `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        only: Option<&[usize]>,
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
        // mixed·W_outᵀ + b_out                               dmixed [rows, h]
        let seeded = team.seeded_at(only);
        let dmixed = out.backward(team, needed(&cache.mixed, only).view(), dy, &mut grads.out);
        drop(seeded);
        let dmixed = dmixed.spread(only, u.nrows());
        // mixed_i = Σ_j P_ij v_j                             dq, dk, dv [rows, h]
        let [mut dq, mut dk, mut dv] = [&cache.q, &cache.k, &cache.v].map(|of| Buffer::uninit(of.dim()));
        let kv = initial.kv.as_ref().expect("a layer with maps of its own has keys and values of its own");
        let input = [&cache.q, &cache.k, &cache.v].map(|rows| all_rows(rows));
        let output =
            AttentionOutput { out: all_rows(&cache.mixed), dout: all_rows(&dmixed), log_sums: cache.log_sums.view() };
        let gradient = [dq.view_mut(), dk.view_mut(), dv.view_mut()];
        self.attend_backward(team, spans, only, kv, input, output, gradient, dinitial);
        if let Some(dfinal) = dfinal {
            *dk += &dfinal.keys;
            *dv += &dfinal.values;
        }
        // q = u·W_qᵀ + b_q, k and v likewise                 du [rows, h], from all three
        scale(team, &mut dq, *query_scale);
        let mut du = k.backward(team, u, dk.view(), &mut grads.k);
        v.backward_add(team, u, dv.view(), &mut du, &mut grads.v);
        match only {
            Some(rows) => {
                let _seeded = team.seeded_at(only);
                let (u, dq) = (needed(&u, only), dq.rows_at(rows));
                du.add_at(rows, &q.backward(team, u.view(), dq.view(), &mut grads.q));
            }
            None => q.backward_add(team, u, dq.view(), &mut du, &mut grads.q),
        }
        du
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
        let [q, k, v] = self.projected(batch.team, u, None);
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

    /// Queries, keys and values of u `[rows, inputs]`. If queries are needed in `only` some rows, those of the others are 0.
    fn projected(&self, team: &Team, u: ArrayView2<f32>, only: Option<&[usize]>) -> [Buffer; 3] {
        let Projections { q, k, v, query_scale, .. } = self.projections();
        let seeded = team.seeded_at(only);
        let mut queries = q.forward(team, needed(&u, only).view());
        drop(seeded);
        scale(team, &mut queries, *query_scale);
        [queries.spread(only, u.nrows()), k.forward(team, u), v.forward(team, u)]
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

/// q ← factor · q
fn scale(team: &Team, q: &mut Array2<f32>, factor: f32) {
    if factor != 1.0 {
        let width = q.ncols();
        for_rows(team, flat_mut(q), width, |_, q| q.iter_mut().for_each(|q| *q *= factor));
    }
}

/// Standard deviation of new meta tokens.
const META_DEVIATION: f32 = 0.02;

/// Meta tokens start out normal, with mean 0 and deviation 0.02.
pub(crate) fn init_meta_tokens(tokens: &mut Array2<f32>, rng: &mut Rng) {
    let normal = Normal::new(0.0, META_DEVIATION).expect("the deviation is positive");
    tokens.mapv_inplace(|_| normal.sample(rng));
}
