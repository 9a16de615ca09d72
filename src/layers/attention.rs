//! The attention branch: causal multi-head attention with learned meta tokens in front.

use ndarray::{Array2, Array3, Array4, ArrayView2, Axis, s};
use rand_distr::{Distribution, Normal};

use super::{Buffer, Linear, Rng, Visitor, VisitorMut, debug_shapes, flat, join};
use crate::HymbaOptions;
use crate::block::Prefix;
use crate::kernels::attention::{
    Attended, AttentionGradient, Run, Sequence, attend, attend_backward, attend_step, weights,
};
use crate::kernels::matmul::Rows;
use crate::kernels::parallel;

/// The branch that recalls: every frame looks at the meta tokens and at the last `window_size` frames.
///
/// Queries, keys, values and output are linear maps with bias; scores are scaled by 1/√p for heads of width `p = h/a`.
/// There is no position encoding, as the Mamba branch carries order. Frame `i` sees frame `j ≤ i` if `i − j < w`, and
/// always all meta tokens, whose keys and values come from the tokens as they travel through the blocks (in the Edifice
/// preset: from two parameters of the block).
#[derive(Clone)]
pub struct MetaTokenAttention {
    heads: usize,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    /// Keys and values `[k, h]` of the Edifice preset.
    own_meta: Option<(Array2<f32>, Array2<f32>)>,
}

/// What [`MetaTokenAttention::backward`] reads.
pub(crate) struct AttentionCache {
    batch: usize,
    /// Queries, keys and values `[b·l, h]`.
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// What goes into the last projection, `[b·l, h]`.
    mixed: Buffer,
    /// ln Σ exp(score), `[b·l, a]`.
    log_sums: Array2<f32>,
}

impl AttentionCache {
    /// Keys and values `[b·l, h]`.
    pub(crate) fn keys_and_values(&self) -> (&Array2<f32>, &Array2<f32>) {
        (&self.k, &self.v)
    }
}

/// The keys and values of the frames that each sequence of a batch can still see.
#[derive(Clone)]
pub(crate) struct AttentionState {
    sequences: Vec<(Ring, Ring)>,
}

impl AttentionState {
    /// Nothing seen yet. With a `window` of `None` the state grows with every frame.
    pub(crate) fn new(batch: usize, h: usize, window: Option<usize>) -> Self {
        let ring = || Ring::new(h, window);
        AttentionState { sequences: (0..batch).map(|_| (ring(), ring())).collect() }
    }

    /// Numbers that a new state of one sequence takes room for.
    pub(crate) fn num_reserved(h: usize, window: Option<usize>) -> usize {
        2 * Ring::reserved(window) * h
    }

    pub(crate) fn num_numbers(&self) -> usize {
        self.sequences.iter().map(|(keys, values)| keys.rows.len() + values.rows.len()).sum()
    }
}

/// The last `window` rows pushed, in any order: softmax does not mind.
#[derive(Clone)]
struct Ring {
    h: usize,
    window: Option<usize>,
    rows: Vec<f32>,
    /// Where the oldest row begins, once there are `window` of them.
    oldest: usize,
}

impl Ring {
    /// Rows there is room for from the start.
    const RESERVED: usize = 64;

    fn new(h: usize, window: Option<usize>) -> Self {
        let reserved = Self::reserved(window);
        Ring { h, window, rows: Vec::with_capacity(reserved * h), oldest: 0 }
    }

    fn reserved(window: Option<usize>) -> usize {
        window.unwrap_or(Self::RESERVED).min(Self::RESERVED)
    }

    fn push(&mut self, row: &[f32]) {
        if self.window.is_some_and(|window| self.rows.len() / self.h >= window) {
            self.rows[self.oldest..self.oldest + self.h].copy_from_slice(row);
            self.oldest = (self.oldest + self.h) % self.rows.len();
        } else {
            self.rows.extend_from_slice(row);
        }
    }
}

debug_shapes!(MetaTokenAttention);

impl MetaTokenAttention {
    pub(crate) fn zeros(options: &HymbaOptions) -> Self {
        let h = options.hidden_size;
        let meta = || Array2::zeros((options.num_meta_tokens, h));
        MetaTokenAttention {
            heads: options.num_heads,
            q_proj: Linear::zeros(h, h, true),
            k_proj: Linear::zeros(h, h, true),
            v_proj: Linear::zeros(h, h, true),
            out_proj: Linear::zeros(h, h, true),
            own_meta: options.preset.rules().own_meta_rows.then(|| (meta(), meta())),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        for linear in [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.out_proj] {
            linear.init(rng);
        }
        if let Some((keys, values)) = &mut self.own_meta {
            init_meta_tokens(keys, rng);
            init_meta_tokens(values, rng);
        }
    }

    /// The meta keys and values `[k, h]` that are parameters of this layer, if they are.
    pub(crate) fn own_meta(&self) -> Option<&(Array2<f32>, Array2<f32>)> {
        self.own_meta.as_ref()
    }

    /// u `[b·l, h]`, with `prefix` in front of every sequence → `[b·l, h]`
    pub(crate) fn forward(&self, u: ArrayView2<f32>, batch: usize, prefix: &Prefix) -> Buffer {
        self.out_proj.forward(self.run(u, batch, prefix, None).mixed.view())
    }

    /// These rows of what [`forward`](Self::forward) returns: the last projection is left out for the others.
    pub(crate) fn forward_rows(&self, u: ArrayView2<f32>, batch: usize, prefix: &Prefix, rows: &[usize]) -> Buffer {
        let mixed = self.run(u, batch, prefix, None).mixed;
        self.out_proj.forward(mixed.rows_at(rows).view())
    }

    /// As [`forward`](Self::forward); returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(&self, u: ArrayView2<f32>, batch: usize, prefix: &Prefix) -> (Buffer, AttentionCache) {
        let mut log_sums = Array2::zeros((u.nrows(), self.heads));
        let cache = self.run(u, batch, prefix, Some(&mut log_sums));
        (self.out_proj.forward(cache.mixed.view()), AttentionCache { log_sums, ..cache })
    }

    /// The gradient of [`forward_train`](Self::forward_train) at u: dy `[b·l, h]` → du `[b·l, h]`. `dend` are the gradients of the
    /// keys and values of a batch of one, where others attended to them. Adds those of the prefix to `dprefix`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        u: ArrayView2<f32>,
        cache: &AttentionCache,
        prefix: &Prefix,
        dy: ArrayView2<f32>,
        dend: Option<(&Array2<f32>, &Array2<f32>)>,
        grad: &mut MetaTokenAttention,
        dprefix: (&mut Array2<f32>, &mut Array2<f32>),
    ) -> Buffer {
        let (rows, h) = u.dim();
        let (k, batch) = (prefix.keys.nrows(), cache.batch);
        let l = rows / batch;
        let dmixed = self.out_proj.backward(cache.mixed.view(), dy, &mut grad.out_proj);
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Buffer::any((rows, h)));
        let [mut dmeta_keys, mut dmeta_values] = [(); 2].map(|()| Array3::zeros((batch, k, h)));
        let sequences: Vec<_> = (0..batch)
            .zip(dq.axis_chunks_iter_mut(Axis(0), l))
            .zip(dk.axis_chunks_iter_mut(Axis(0), l))
            .zip(dv.axis_chunks_iter_mut(Axis(0), l))
            .zip(dmeta_keys.outer_iter_mut())
            .zip(dmeta_values.outer_iter_mut())
            .map(|(((((i, queries), keys), values), meta_keys), meta_values)| {
                (i, AttentionGradient { queries, keys, values, meta_keys, meta_values })
            })
            .collect();
        let work = 2 * rows * (k + prefix.window.map_or(l, |window| window.min(l))) * h;
        parallel::for_each_if(work, sequences, |(i, gradient)| {
            let rows = s![i * l..(i + 1) * l, ..];
            let sequence = self.sequence(prefix, cache.q.slice(rows), cache.k.slice(rows), cache.v.slice(rows));
            let attended = Attended {
                out: Rows { data: &flat(&cache.mixed)[i * l * h..], stride: h },
                dout: Rows { data: &flat(&dmixed)[i * l * h..], stride: h },
                log_sums: cache.log_sums.slice(rows),
            };
            attend_backward(sequence, attended, gradient);
        });
        *dprefix.0 += &dmeta_keys.sum_axis(Axis(0));
        *dprefix.1 += &dmeta_values.sum_axis(Axis(0));
        if let Some((dkeys, dvalues)) = dend {
            *dk += dkeys;
            *dv += dvalues;
        }
        let mut du = self.q_proj.backward(u, dq.view(), &mut grad.q_proj);
        *du += &*self.k_proj.backward(u, dk.view(), &mut grad.k_proj);
        *du += &*self.v_proj.backward(u, dv.view(), &mut grad.v_proj);
        du
    }

    /// Adds the gradients of the meta keys and values that are parameters of this layer, if they are.
    pub(crate) fn add_own_meta(&mut self, dkeys: &Array2<f32>, dvalues: &Array2<f32>) {
        if let Some((keys, values)) = &mut self.own_meta {
            *keys += dkeys;
            *values += dvalues;
        }
    }

    /// Everything up to the last projection.
    fn run(
        &self,
        u: ArrayView2<f32>,
        batch: usize,
        prefix: &Prefix,
        log_sums: Option<&mut Array2<f32>>,
    ) -> AttentionCache {
        let (q, k, v) = (self.q_proj.forward(u), self.k_proj.forward(u), self.v_proj.forward(u));
        let mut mixed = Buffer::any(q.dim());
        let l = u.nrows() / batch;
        let mut log_sums = log_sums.map(|sums| sums.axis_chunks_iter_mut(Axis(0), l));
        let sequences: Vec<_> = (0..batch)
            .zip(mixed.axis_chunks_iter_mut(Axis(0), l))
            .map(|sequence| (sequence, log_sums.as_mut().and_then(|sums| sums.next())))
            .collect();
        let work = u.len() * (prefix.keys.nrows() + prefix.window.map_or(l, |window| window.min(l)));
        parallel::for_each_if(work, sequences, |((i, mixed), log_sums)| {
            let rows = s![i * l..(i + 1) * l, ..];
            attend(self.sequence(prefix, q.slice(rows), k.slice(rows), v.slice(rows)), mixed, log_sums);
        });
        AttentionCache { batch, q, k, v, mixed, log_sums: Array2::zeros((0, 0)) }
    }

    /// The next frame of each sequence, u `[b, h]` → `[b, h]`; `state` moves on by one frame.
    pub(crate) fn step(&self, u: ArrayView2<f32>, prefix: &Prefix, state: &mut AttentionState) -> Buffer {
        let (q, k, v) = (self.q_proj.forward(u), self.k_proj.forward(u), self.v_proj.forward(u));
        let mut mixed = Buffer::any(q.dim());
        for (i, (keys, values)) in state.sequences.iter_mut().enumerate() {
            keys.push(flat(&k.row(i)));
            values.push(flat(&v.row(i)));
            let h = keys.h;
            let run = |keys, values, rows| Run { keys, values, strides: (h, h), rows };
            let meta = run(flat(&prefix.keys), flat(&prefix.values), prefix.keys.nrows());
            let frames = run(&keys.rows, &values.rows, keys.rows.len() / h);
            let mut mixed = mixed.slice_mut(s![i, ..]);
            let mixed = mixed.as_slice_mut().expect("a row of a new array");
            attend_step(flat(&q.row(i)), &[meta, frames], self.heads, 1, mixed);
        }
        self.out_proj.forward(mixed.view())
    }

    /// The attention weights `[b, a, l, k + l]`: what each frame takes from each meta token, then from each frame.
    pub(crate) fn weights(&self, u: ArrayView2<f32>, batch: usize, prefix: &Prefix) -> Array4<f32> {
        let (q, k, v) = (self.q_proj.forward(u), self.k_proj.forward(u), self.v_proj.forward(u));
        let l = u.nrows() / batch;
        let mut all = Array4::zeros((batch, self.heads, l, prefix.keys.nrows() + l));
        for (i, mut all) in all.outer_iter_mut().enumerate() {
            let rows = s![i * l..(i + 1) * l, ..];
            let sequence = self.sequence(prefix, q.slice(rows), k.slice(rows), v.slice(rows));
            for (head, mut all) in all.outer_iter_mut().enumerate() {
                for (frame, mut all) in all.outer_iter_mut().enumerate() {
                    all.iter_mut().zip(weights(sequence.head(head), frame)).for_each(|(all, weight)| *all = weight);
                }
            }
        }
        all
    }

    fn sequence<'a>(
        &self,
        prefix: &'a Prefix,
        queries: ArrayView2<'a, f32>,
        keys: ArrayView2<'a, f32>,
        values: ArrayView2<'a, f32>,
    ) -> Sequence<'a> {
        let (frames, h) = queries.dim();
        let rows = |array: ArrayView2<'a, f32>| Rows { data: array.to_slice().expect("whole rows"), stride: h };
        Sequence {
            queries: rows(queries),
            keys: rows(keys),
            values: rows(values),
            meta_keys: rows(prefix.keys.view()),
            meta_values: rows(prefix.values.view()),
            frames,
            meta: prefix.keys.nrows(),
            before: 0,
            key_width: h / self.heads,
            value_width: h / self.heads,
            window: prefix.window,
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.q_proj.visit(&join(name, "q_proj"), f);
        self.k_proj.visit(&join(name, "k_proj"), f);
        self.v_proj.visit(&join(name, "v_proj"), f);
        self.out_proj.visit(&join(name, "out_proj"), f);
        if let Some((keys, values)) = &self.own_meta {
            f(&join(name, "meta_k"), keys.view().into_dyn());
            f(&join(name, "meta_v"), values.view().into_dyn());
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.q_proj.visit_mut(&join(name, "q_proj"), f);
        self.k_proj.visit_mut(&join(name, "k_proj"), f);
        self.v_proj.visit_mut(&join(name, "v_proj"), f);
        self.out_proj.visit_mut(&join(name, "out_proj"), f);
        if let Some((keys, values)) = &mut self.own_meta {
            f(&join(name, "meta_k"), keys.view_mut().into_dyn());
            f(&join(name, "meta_v"), values.view_mut().into_dyn());
        }
    }
}

/// Standard deviation of new meta tokens.
const META_DEVIATION: f32 = 0.02;

/// Meta tokens start out normal, with mean 0 and deviation 0.02.
pub(crate) fn init_meta_tokens(tokens: &mut Array2<f32>, rng: &mut Rng) {
    let normal = Normal::new(0.0, META_DEVIATION).expect("the deviation is positive");
    tokens.mapv_inplace(|_| normal.sample(rng));
}
