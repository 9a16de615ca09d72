//! One block: Mamba alone, fed by the shared attention block at some depths.

use ndarray::Array2;

use super::block::{BlockInspection, sequences};
use super::options::HymbaOptions;
use super::shared::{SharedBlock, SharedCache};
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{
    Batch, Buffer, Dropout, Ends, LayerNorm, LayerState, Linear, MambaBranch, MambaCache, Rng, Spans, StateGradient,
    add_array, needed,
};
use crate::parameters::{Visitor, VisitorMut, debug_shapes, join};

/// A block of [`Pattern::SharedAttention`](crate::Pattern::SharedAttention), as in Zamba (arXiv 2405.16712): a Mamba branch, without
/// a feed-forward network. With x₀, which is x in front of the first block, and the [`SharedBlock`] T:
///
/// ```text
/// y = T(x, x₀) · Wᵀ    where the shared block is used, else 0           [l, h]
/// x = x + Mamba(LayerNorm(x + y))                                       [l, h]
/// ```
///
/// y changes what the branch reads, and not the residual stream. In training, dropout acts on the branch.
#[derive(Clone)]
pub struct FedBlock {
    /// W, where the shared block is used.
    shared_proj: Option<Linear>,
    norm: LayerNorm,
    mamba: MambaBranch,
}

/// Place of dropout in a block.
const MAMBA: u64 = 0;

/// The shared block, and the residual stream in front of the first block, `[rows, h]`.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    pub block: &'a SharedBlock,
    pub x0: &'a Array2<f32>,
}

/// What [`FedBlock::backward`] reads.
pub(crate) struct FedCache {
    dropout: Dropout,
    only: Option<Ends>,
    /// T and its cache, where it is used.
    shared: Option<(Buffer, SharedCache)>,
    /// Input of the norm, and its output, `[rows, h]`.
    fed: Buffer,
    u: Buffer,
    mamba_cache: MambaCache,
}

debug_shapes!(FedBlock);

impl FedBlock {
    /// The Mamba branch.
    pub fn mamba(&self) -> &MambaBranch {
        &self.mamba
    }

    /// Whether the shared block feeds this one.
    pub fn is_fed(&self) -> bool {
        self.shared_proj.is_some()
    }

    pub(crate) fn zeros(options: &HymbaOptions, by_shared: bool, storage: Option<Storage>) -> Self {
        let h = options.hidden_size;
        FedBlock {
            shared_proj: by_shared.then(|| Linear::zeros_as(h, h, false, storage)),
            norm: options.new_norm(h),
            mamba: options.new_mamba(storage),
        }
    }

    /// The maps that may be stored narrow.
    pub(crate) fn large_maps_mut(&mut self) -> Vec<&mut Linear> {
        self.shared_proj.iter_mut().chain(self.mamba.linears_mut()).collect()
    }

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.shared_proj.iter_mut().for_each(|shared_proj| f(join(name, "shared_proj"), shared_proj));
        self.mamba.visit_maps(&join(name, "mamba"), f);
    }

    /// A gradient of this block, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        FedBlock {
            shared_proj: self.shared_proj.as_ref().map(Linear::zeros_like),
            norm: self.norm.zeros_like(),
            mamba: self.mamba.zeros_like(),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.shared_proj.iter_mut().for_each(|shared_proj| shared_proj.init(rng));
        self.norm.init();
        self.mamba.init(rng);
    }

    /// A state of a sequence that has seen nothing: also of the use of the shared block, if there is one here.
    pub(crate) fn new_state(&self, shared: &SharedBlock) -> LayerState {
        let mamba = self.mamba.new_state();
        match self.shared_proj {
            Some(_) => LayerState { mamba, ..shared.new_state() },
            None => LayerState::of_mamba(mamba),
        }
    }

    /// x `[rows, h]` → `[rows, h]`, or `only` some rows of it. The states of `layer` move on.
    pub(crate) fn forward(
        &self,
        batch: &mut Batch,
        layer: usize,
        x: Buffer,
        shared: Shared,
        only: Option<&[usize]>,
    ) -> Buffer {
        let u = match &self.shared_proj {
            Some(shared_proj) => {
                let y = shared.block.forward(batch, layer, &x, shared.x0);
                self.norm.forward(batch.team, fed(batch.team, shared_proj, &x, &y).view())
            }
            None => self.norm.forward(batch.team, x.view()),
        };
        let mut y = self.mamba.forward(batch, layer, u.view(), only);
        *y += &needed(&x, only);
        y
    }

    /// As [`forward`](Self::forward), with dropout; returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        layer: usize,
        x: Buffer,
        shared: Shared,
        dropout: Dropout,
        only: Option<Ends>,
    ) -> (Buffer, FedCache) {
        let team = batch.team;
        let rows = only.as_ref().map(|only| &*only.rows);
        let (fed, shared) = match &self.shared_proj {
            Some(shared_proj) => {
                let (y, cache) = shared.block.forward_train(batch, layer, &x, shared.x0);
                (fed(team, shared_proj, &x, &y), Some((y, cache)))
            }
            None => (Buffer::copy_of(&x), None),
        };
        let u = self.norm.forward(team, fed.view());
        let (mut y, mamba_cache) = self.mamba.forward_train(batch, layer, u.view(), rows);
        let ends = only.as_ref().map_or(&batch.spans, |only| &only.spans);
        dropout.at(MAMBA).apply(team, ends, &mut y);
        *y += &needed(&x, rows);
        (y, FedCache { dropout, only, shared, fed, u, mamba_cache })
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy of the shape of the output → dx `[rows, h]`; adds that of x₀ to dx₀, and
    /// that of the shared block to `grad_shared`. Otherwise as in [`HymbaBlock`](crate::HymbaBlock).
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        cache: &FedCache,
        initial: &LayerState,
        dy: Buffer,
        dfinal: Option<&StateGradient>,
        grad: &mut FedBlock,
        dinitial: &mut StateGradient,
        (shared, grad_shared): (&SharedBlock, &mut SharedBlock),
        dx0: &mut Array2<f32>,
    ) -> Buffer {
        // y = x + Mamba(u)
        let (rows, ends) = Ends::of(&cache.only, spans);
        let dropped = cache.dropout.at(MAMBA).applied(team, ends, &dy);
        let dmamba = dropped.as_deref().unwrap_or(&dy);
        let du = self.mamba.backward(
            team,
            spans,
            rows,
            cache.u.view(),
            &cache.mamba_cache,
            &initial.mamba,
            dmamba.view(),
            dfinal.map(|dfinal| &dfinal.mamba),
            &mut grad.mamba,
            &mut dinitial.mamba,
        );
        // u = LayerNorm(x + T·Wᵀ)
        let dfed = self.norm.backward(team, cache.fed.view(), du.view(), &mut grad.norm);
        let mut dy = dy.spread(rows, du.nrows());
        add_array(team, &dfed, &mut dy);
        if let (Some(shared_proj), Some((y, cache)), Some(grad)) =
            (&self.shared_proj, &cache.shared, &mut grad.shared_proj)
        {
            let dshared = shared_proj.backward(team, y.view(), dfed.view(), grad);
            let into = [&mut *dy, dx0];
            shared.backward(team, spans, cache, initial, dshared, dfinal, grad_shared, dinitial, into);
        }
        dy
    }

    /// As [`forward`](Self::forward) of sequences of one length, keeping what is worth looking at.
    pub(crate) fn inspect(&self, batch: &mut Batch, layer: usize, x: Buffer, shared: Shared) -> BlockInspection {
        let (team, count) = (batch.team, batch.spans.len());
        let sequences = |x: Buffer| sequences(x.into_array(), count);
        let mut seen = BlockInspection::default();
        let u = match &self.shared_proj {
            Some(shared_proj) => {
                seen.attention_weights = shared.block.weights(batch, layer, &x, shared.x0);
                let y = shared.block.forward(batch, layer, &x, shared.x0);
                let u = self.norm.forward(team, fed(team, shared_proj, &x, &y).view());
                seen.shared_output = sequences(y);
                u
            }
            None => self.norm.forward(team, x.view()),
        };
        let y = self.mamba.forward(batch, layer, u.view(), None);
        let mut output = x;
        *output += &*y;
        (seen.mamba, seen.output) = (sequences(y), sequences(output));
        seen
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some(shared_proj) = &self.shared_proj {
            shared_proj.visit(&join(name, "shared_proj"), f);
        }
        self.norm.visit(&join(name, "norm"), f);
        self.mamba.visit(&join(name, "mamba"), f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        if let Some(shared_proj) = &mut self.shared_proj {
            shared_proj.visit_mut(&join(name, "shared_proj"), f);
        }
        self.norm.visit_mut(&join(name, "norm"), f);
        self.mamba.visit_mut(&join(name, "mamba"), f);
    }
}

/// What the branch reads: x + T·Wᵀ
fn fed(team: &Team, shared_proj: &Linear, x: &Array2<f32>, y: &Array2<f32>) -> Buffer {
    let mut fed = Buffer::copy_of(x);
    shared_proj.add_to(team, y.view(), &mut fed);
    fed
}
