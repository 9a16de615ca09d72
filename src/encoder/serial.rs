//! One block: a single branch, Mamba or attention, then a feed-forward network.

use super::block::{BlockInspection, sequences};
use super::feed_forward::{FeedForward, FeedForwardCache};
use super::options::HymbaOptions;
use super::pattern::BlockKind;
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{
    AttentionCache, Batch, Buffer, Depth, Dropout, Ends, KvStorage, LayerNorm, LayerState, Linear, MambaBranch,
    MambaCache, MetaTokenAttention, Rng, Spans, StateGradient, add_array,
};
use crate::parameters::{Visitor, VisitorMut, debug_shapes, join};

/// A block with one branch, as Jamba (arXiv 2403.19887) alternates them:
///
/// ```text
/// x = x + Mamba(LayerNorm(x))    or    x + Attention(LayerNorm(x))     [l, h]
/// x = x + FFN(LayerNorm(x))                                            [l, h]
/// ```
///
/// The branches, the feed-forward network and the norms are those of [`HymbaBlock`](crate::HymbaBlock); Jamba's own have RMS norms,
/// no biases, a gated network and a mixture of experts. In training, dropout acts on the branch and on FFN's result.
#[derive(Clone)]
pub struct SerialBlock {
    norm: LayerNorm,
    branch: Branch,
    ffn: FeedForward,
}

#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // one per block
enum Branch {
    Mamba(MambaBranch),
    Attention(MetaTokenAttention),
}

enum BranchCache {
    Mamba(MambaCache),
    Attention(AttentionCache),
}

/// Places of dropout in a block.
const BRANCH: u64 = 0;
const FFN: u64 = 2;

/// What [`SerialBlock::backward`] reads.
pub(crate) struct SerialCache {
    dropout: Dropout,
    only: Option<Ends>,
    /// Input of the first norm, and its output, `[rows, h]`.
    x: Buffer,
    u: Buffer,
    branch: BranchCache,
    ffn: FeedForwardCache,
}

debug_shapes!(SerialBlock);

impl SerialBlock {
    /// The Mamba branch, if the block has that one.
    pub fn mamba(&self) -> Option<&MambaBranch> {
        match &self.branch {
            Branch::Mamba(mamba) => Some(mamba),
            Branch::Attention(_) => None,
        }
    }

    /// The attention branch, if the block has that one.
    pub fn attention(&self) -> Option<&MetaTokenAttention> {
        match &self.branch {
            Branch::Mamba(_) => None,
            Branch::Attention(attention) => Some(attention),
        }
    }

    /// With this branch.
    pub(crate) fn zeros(options: &HymbaOptions, kind: BlockKind, storage: Option<Storage>) -> Self {
        SerialBlock {
            norm: options.new_norm(options.hidden_size),
            branch: match kind {
                BlockKind::Attention => Branch::Attention(options.new_attention(storage)),
                _ => Branch::Mamba(options.new_mamba(storage)),
            },
            ffn: FeedForward::zeros(options, storage),
        }
    }

    /// The maps that may be stored narrow.
    pub(crate) fn large_maps_mut(&mut self) -> Vec<&mut Linear> {
        let mut maps: Vec<&mut Linear> = match &mut self.branch {
            Branch::Mamba(mamba) => mamba.linears_mut().collect(),
            Branch::Attention(attention) => attention.linears_mut().collect(),
        };
        maps.extend(self.ffn.linears_mut());
        maps
    }

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        match &mut self.branch {
            Branch::Mamba(mamba) => mamba.visit_maps(&join(name, "mamba"), f),
            Branch::Attention(attention) => attention.visit_maps(&join(name, "attention"), f),
        }
        self.ffn.visit_maps(&join(name, "ffn"), f);
    }

    /// A gradient of this block, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        SerialBlock {
            norm: self.norm.zeros_like(),
            branch: match &self.branch {
                Branch::Mamba(mamba) => Branch::Mamba(mamba.zeros_like()),
                Branch::Attention(attention) => Branch::Attention(attention.zeros_like()),
            },
            ffn: self.ffn.zeros_like(),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.norm.init();
        match &mut self.branch {
            Branch::Mamba(mamba) => mamba.init(rng),
            Branch::Attention(attention) => attention.init(rng),
        }
        self.ffn.init(rng);
    }

    /// A state of a sequence that has seen nothing.
    pub(crate) fn new_state(&self) -> LayerState {
        match &self.branch {
            Branch::Mamba(mamba) => LayerState::of_mamba(mamba.new_state()),
            Branch::Attention(attention) => LayerState::of_attention(attention.new_cache(KvStorage::F32)),
        }
    }

    /// x `[rows, h]` → `[rows, h]`, or `only` some rows of it. The states of `layer` move on.
    pub(crate) fn forward(&self, batch: &mut Batch, layer: usize, mut x: Buffer, only: Option<&[usize]>) -> Buffer {
        let y = self.run_branch(batch, layer, &x, only);
        if let Some(rows) = only {
            x = x.rows_at(rows);
        }
        add_array(batch.team, &y, &mut x);
        self.ffn.add_to(batch.team, &mut x);
        x
    }

    fn run_branch(&self, batch: &mut Batch, layer: usize, x: &Buffer, only: Option<&[usize]>) -> Buffer {
        let u = self.norm.forward(batch.team, x.view());
        match &self.branch {
            Branch::Mamba(mamba) => mamba.forward(batch, layer, u.view(), only),
            Branch::Attention(attention) => attention.forward(batch, Depth::of(layer), u.view(), only),
        }
    }

    /// As [`forward`](Self::forward), with dropout; returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        layer: usize,
        x: Buffer,
        dropout: Dropout,
        only: Option<Ends>,
    ) -> (Buffer, SerialCache) {
        let team = batch.team;
        let rows = only.as_ref().map(|only| &*only.rows);
        let u = self.norm.forward(team, x.view());
        let (mut mixed, branch) = match &self.branch {
            Branch::Mamba(mamba) => {
                let (y, cache) = mamba.forward_train(batch, layer, u.view(), rows);
                (y, BranchCache::Mamba(cache))
            }
            Branch::Attention(attention) => {
                let (y, cache) = attention.forward_train(batch, Depth::of(layer), u.view(), rows);
                (y, BranchCache::Attention(cache))
            }
        };
        let _seeded = team.seeded_at(rows);
        let ends = only.as_ref().map_or(&batch.spans, |only| &only.spans);
        dropout.at(BRANCH).apply(team, ends, &mut mixed);
        match rows {
            Some(rows) => *mixed += &*x.rows_at(rows),
            None => add_array(team, &x, &mut mixed),
        }
        let (y, ffn) = self.ffn.residual_train(team, ends, mixed, dropout.at(FFN));
        (y, SerialCache { dropout, only, x, u, branch, ffn })
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy of the shape of the output → dx `[rows, h]`; otherwise as
    /// [`HymbaBlock::backward`](crate::HymbaBlock).
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        cache: &SerialCache,
        initial: &LayerState,
        mut dy: Buffer,
        dfinal: Option<&StateGradient>,
        grad: &mut SerialBlock,
        dinitial: &mut StateGradient,
    ) -> Buffer {
        let (dropout, (rows, ends)) = (cache.dropout, Ends::of(&cache.only, spans));
        // y = mixed + FFN(LayerNorm(mixed))
        let seeded = team.seeded_at(rows);
        self.ffn.residual_backward(team, ends, &cache.ffn, dropout.at(FFN), &mut dy, &mut grad.ffn);
        drop(seeded);
        // mixed = x + branch(u)
        let dropped = dropout.at(BRANCH).applied(team, ends, &dy);
        let (u, dbranch) = (cache.u.view(), dropped.as_deref().unwrap_or(&dy).view());
        let du = match (&self.branch, &cache.branch, &mut grad.branch) {
            (Branch::Mamba(mamba), BranchCache::Mamba(cache), Branch::Mamba(grad)) => {
                let (dfinal, dinitial) = (dfinal.map(|dfinal| &dfinal.mamba), &mut dinitial.mamba);
                mamba.backward(team, spans, rows, u, cache, &initial.mamba, dbranch, dfinal, grad, dinitial)
            }
            (Branch::Attention(attention), BranchCache::Attention(cache), Branch::Attention(grad)) => {
                attention.backward(team, spans, rows, u, cache, initial, dbranch, dfinal, grad, dinitial)
            }
            _ => unreachable!("caches and gradients have the branch of their block"),
        };
        // u = LayerNorm(x)
        let mut dy = dy.spread(rows, du.nrows());
        self.norm.backward_add(team, cache.x.view(), du.view(), &mut dy, &mut grad.norm);
        dy
    }

    /// As [`forward`](Self::forward) of sequences of one length, keeping what is worth looking at.
    pub(crate) fn inspect(&self, batch: &mut Batch, layer: usize, mut x: Buffer) -> BlockInspection {
        let count = batch.spans.len();
        let mut seen = BlockInspection::default();
        if let Branch::Attention(attention) = &self.branch {
            let u = self.norm.forward(batch.team, x.view());
            seen.attention_weights = attention.weights(batch, Depth::of(layer), u.view());
        }
        let y = self.run_branch(batch, layer, &x, None);
        *x += &*y;
        self.ffn.add_to(batch.team, &mut x);
        let y = sequences(y.into_array(), count);
        match &self.branch {
            Branch::Mamba(_) => seen.mamba = y,
            Branch::Attention(_) => seen.attention = y,
        }
        seen.output = sequences(x.into_array(), count);
        seen
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.norm.visit(&join(name, "norm"), f);
        match &self.branch {
            Branch::Mamba(mamba) => mamba.visit(&join(name, "mamba"), f),
            Branch::Attention(attention) => attention.visit(&join(name, "attention"), f),
        }
        self.ffn.visit(name, f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.norm.visit_mut(&join(name, "norm"), f);
        match &mut self.branch {
            Branch::Mamba(mamba) => mamba.visit_mut(&join(name, "mamba"), f),
            Branch::Attention(attention) => attention.visit_mut(&join(name, "attention"), f),
        }
        self.ffn.visit_mut(name, f);
    }
}
