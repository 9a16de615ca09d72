//! The blocks of a model, one for each depth, and the one that several depths share.

use std::fmt;

use super::block::{BlockCache, BlockInspection, HymbaBlock, rows};
use super::fed::{FedBlock, FedCache, Shared};
use super::options::HymbaOptions;
use super::pattern::BlockKind;
use super::serial::{SerialBlock, SerialCache};
use super::shared::SharedBlock;
use crate::kernels::matmul::Storage;
use crate::kernels::team::Team;
use crate::layers::{
    Batch, Buffer, Dropout, Ends, LayerState, Linear, MambaBranch, MetaTokenAttention, Rng, Spans, StateGradient,
};
use crate::parameters::{Visitor, VisitorMut, join};

/// One block of a model. The [`Pattern`](crate::Pattern) says which kind is at which depth.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)] // one per depth
#[non_exhaustive]
pub enum Block {
    /// Mamba and attention side by side.
    Parallel(HymbaBlock),
    /// One of the two.
    Serial(SerialBlock),
    /// Mamba alone, maybe fed by the shared attention block.
    Fed(FedBlock),
}

impl Block {
    /// The Mamba branch, if it has one.
    pub fn mamba(&self) -> Option<&MambaBranch> {
        match self {
            Block::Parallel(block) => Some(block.mamba()),
            Block::Serial(block) => block.mamba(),
            Block::Fed(block) => Some(block.mamba()),
        }
    }

    /// The attention branch, if it has one of its own.
    pub fn attention(&self) -> Option<&MetaTokenAttention> {
        match self {
            Block::Parallel(block) => Some(block.attention()),
            Block::Serial(block) => block.attention(),
            Block::Fed(_) => None,
        }
    }

    fn large_maps_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Block::Parallel(block) => block.large_maps_mut(),
            Block::Serial(block) => block.large_maps_mut(),
            Block::Fed(block) => block.large_maps_mut(),
        }
    }

    fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        match self {
            Block::Parallel(block) => block.visit_maps(name, f),
            Block::Serial(block) => block.visit_maps(name, f),
            Block::Fed(block) => block.visit_maps(name, f),
        }
    }

    fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        match self {
            Block::Parallel(block) => block.visit(name, f),
            Block::Serial(block) => block.visit(name, f),
            Block::Fed(block) => block.visit(name, f),
        }
    }

    fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        match self {
            Block::Parallel(block) => block.visit_mut(name, f),
            Block::Serial(block) => block.visit_mut(name, f),
            Block::Fed(block) => block.visit_mut(name, f),
        }
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Block::Parallel(block) => block.fmt(f),
            Block::Serial(block) => block.fmt(f),
            Block::Fed(block) => block.fmt(f),
        }
    }
}

/// What the backward pass of one depth reads.
pub(crate) enum DepthCache {
    Parallel(BlockCache),
    Serial(SerialCache),
    Fed(FedCache),
}

/// Where numbers are dropped around a block.
pub(crate) struct BlockDropout {
    /// Of the block's input.
    pub before: Dropout,
    /// Of what the block adds to the residual stream.
    pub inside: Dropout,
}

impl BlockDropout {
    pub(crate) const NONE: BlockDropout = BlockDropout { before: Dropout::NONE, inside: Dropout::NONE };
}

/// The gradient of the residual stream x after some block, and the sum so far of that of x₀, in front of the first block.
pub(crate) struct StreamGradient {
    dx: Buffer,
    /// Where there is a shared block.
    dx0: Option<Buffer>,
}

impl StreamGradient {
    /// The gradient of what dropout made of x.
    pub(crate) fn drop(&mut self, dropout: Dropout, team: &Team, spans: &Spans) {
        dropout.apply(team, spans, &mut self.dx);
    }

    /// The gradient in front of the first block, when all have been passed.
    pub(crate) fn finish(mut self) -> Buffer {
        if let Some(dx0) = self.dx0 {
            *self.dx += &*dx0;
        }
        self.dx
    }
}

/// Weights, and gradients, are there once for each block and once for the shared one; states, caches and dropout are each depth's.
#[derive(Clone)]
pub(crate) struct Blocks {
    shared: Option<SharedBlock>,
    blocks: Vec<Block>,
}

impl Blocks {
    /// All zero, with the [large maps](Self::large_maps_mut) in this type of storage.
    pub(crate) fn zeros(options: &HymbaOptions, storage: Option<Storage>) -> Self {
        let block = |depth| match options.pattern.at(depth) {
            BlockKind::Parallel => Block::Parallel(HymbaBlock::zeros(options, storage)),
            kind @ (BlockKind::Mamba | BlockKind::Attention) => {
                Block::Serial(SerialBlock::zeros(options, kind, storage))
            }
            BlockKind::Fed { by_shared } => Block::Fed(FedBlock::zeros(options, by_shared, storage)),
        };
        Blocks {
            shared: options.pattern.shares().then(|| SharedBlock::zeros(options, storage)),
            blocks: (0..options.num_layers).map(block).collect(),
        }
    }

    /// A gradient of these blocks, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        let block = |block: &Block| match block {
            Block::Parallel(block) => Block::Parallel(block.zeros_like()),
            Block::Serial(block) => Block::Serial(block.zeros_like()),
            Block::Fed(block) => Block::Fed(block.zeros_like()),
        };
        Blocks {
            shared: self.shared.as_ref().map(SharedBlock::zeros_like),
            blocks: self.blocks.iter().map(block).collect(),
        }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.shared.iter_mut().for_each(|shared| shared.init(rng));
        for block in &mut self.blocks {
            match block {
                Block::Parallel(block) => block.init(rng),
                Block::Serial(block) => block.init(rng),
                Block::Fed(block) => block.init(rng),
            }
        }
    }

    /// The maps that may be stored narrow.
    pub(crate) fn large_maps_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let shared = self.shared.iter_mut().flat_map(SharedBlock::large_maps_mut);
        shared.chain(self.blocks.iter_mut().flat_map(Block::large_maps_mut))
    }

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.shared.iter_mut().for_each(|shared| shared.visit_maps("shared_block", f));
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit_maps(&join("blocks", &i.to_string()), f);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks, first to last.
    pub(crate) fn as_slice(&self) -> &[Block] {
        &self.blocks
    }

    pub(crate) fn shared(&self) -> Option<&SharedBlock> {
        self.shared.as_ref()
    }

    /// States of a sequence in front of which stands nothing but what blocks have themselves, one for each depth.
    pub(crate) fn new_states(&self) -> Vec<LayerState> {
        let state = |block: &Block| match block {
            Block::Parallel(block) => block.new_state(),
            Block::Serial(block) => block.new_state(),
            Block::Fed(block) => block.new_state(self.feeder()),
        };
        self.blocks.iter().map(state).collect()
    }

    /// x `[rows, h]` through all blocks → `[rows, h]`, or `only` some rows of that. The states move on.
    pub(crate) fn forward(&self, batch: &mut Batch, mut x: Buffer, only: Option<&[usize]>) -> Buffer {
        let (x0, last) = (self.start(&x), self.len() - 1);
        for (layer, block) in self.blocks.iter().enumerate() {
            let only = if layer == last { only } else { None };
            x = match block {
                Block::Parallel(block) => block.forward(batch, layer, x, only),
                Block::Serial(block) => block.forward(batch, layer, x, only),
                Block::Fed(block) => block.forward(batch, layer, x, self.feeding(&x0), only),
            };
        }
        x
    }

    /// As [`forward`](Self::forward), with each depth's dropout; returns also what [`backward`](Self::backward) reads of each.
    pub(crate) fn forward_train(
        &self,
        batch: &mut Batch,
        mut x: Buffer,
        mut only: Option<Ends>,
        dropout: impl Fn(usize) -> BlockDropout,
    ) -> (Buffer, Vec<DepthCache>) {
        let (x0, mut caches, last) = (self.start(&x), Vec::with_capacity(self.len()), self.len() - 1);
        for (layer, block) in self.blocks.iter().enumerate() {
            let only = only.take_if(|_| layer == last);
            let BlockDropout { before, inside } = dropout(layer);
            before.apply(batch.team, &batch.spans, &mut x);
            let (y, cache) = match block {
                Block::Parallel(block) => {
                    let (y, cache) = block.forward_train(batch, layer, x, inside, only);
                    (y, DepthCache::Parallel(cache))
                }
                Block::Serial(block) => {
                    let (y, cache) = block.forward_train(batch, layer, x, inside, only);
                    (y, DepthCache::Serial(cache))
                }
                Block::Fed(block) => {
                    let (y, cache) = block.forward_train(batch, layer, x, self.feeding(&x0), inside, only);
                    (y, DepthCache::Fed(cache))
                }
            };
            caches.push(cache);
            x = y;
        }
        (x, caches)
    }

    /// The gradient behind the last block, for [`backward`](Self::backward) of so many rows: dx has the shape of the output.
    pub(crate) fn last_gradient(&self, dx: Buffer, rows: usize) -> StreamGradient {
        StreamGradient { dx0: self.shared.as_ref().map(|_| Buffer::zeros((rows, dx.ncols()))), dx }
    }

    /// The backward pass of the block at one depth, from the last to the first, for sequences that all began with the state
    /// `initial`: the gradient behind it → that in front. `dfinal` is the gradient of what a single sequence left behind, where it is
    /// that of the meta tokens. Adds that of what was in front to `dinitial`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        team: &Team,
        layer: usize,
        spans: &Spans,
        cache: &DepthCache,
        initial: &LayerState,
        gradient: StreamGradient,
        dfinal: Option<&StateGradient>,
        grads: &mut Blocks,
        dinitial: &mut StateGradient,
    ) -> StreamGradient {
        let StreamGradient { dx, mut dx0 } = gradient;
        let dx = match (&self.blocks[layer], cache, &mut grads.blocks[layer]) {
            (Block::Parallel(block), DepthCache::Parallel(cache), Block::Parallel(grad)) => {
                block.backward(team, spans, cache, initial, dx, dfinal, grad, dinitial)
            }
            (Block::Serial(block), DepthCache::Serial(cache), Block::Serial(grad)) => {
                block.backward(team, spans, cache, initial, dx, dfinal, grad, dinitial)
            }
            (Block::Fed(block), DepthCache::Fed(cache), Block::Fed(grad)) => {
                let (Some(grad_shared), Some(dx0)) = (&mut grads.shared, &mut dx0) else {
                    unreachable!("a gradient has the shared block of its model");
                };
                let shared = (self.feeder(), grad_shared);
                block.backward(team, spans, cache, initial, dx, dfinal, grad, dinitial, shared, dx0)
            }
            _ => unreachable!("caches and gradients have the blocks of their model"),
        };
        StreamGradient { dx, dx0 }
    }

    /// Adds the gradient of a state in front that consists of a block's own parameters.
    pub(crate) fn add_own_meta(&mut self, layer: usize, dinitial: &StateGradient) {
        if let Block::Parallel(block) = &mut self.blocks[layer] {
            block.add_own_meta(dinitial);
        }
    }

    /// As [`forward`](Self::forward) of sequences of one length, keeping what is worth looking at.
    pub(crate) fn inspect(&self, batch: &mut Batch, mut x: Buffer) -> Vec<BlockInspection> {
        let (x0, mut all) = (self.start(&x), Vec::with_capacity(self.len()));
        for (layer, block) in self.blocks.iter().enumerate() {
            let seen = match block {
                Block::Parallel(block) => block.inspect(batch, layer, x),
                Block::Serial(block) => block.inspect(batch, layer, x),
                Block::Fed(block) => block.inspect(batch, layer, x, self.feeding(&x0)),
            };
            x = rows(&seen.output);
            all.push(seen);
        }
        all
    }

    pub(crate) fn visit<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        if let Some(shared) = &self.shared {
            shared.visit("shared_block", f);
        }
        for (i, block) in self.blocks.iter().enumerate() {
            block.visit(&join("blocks", &i.to_string()), f);
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, f: &mut VisitorMut<'_, 'a>) {
        if let Some(shared) = &mut self.shared {
            shared.visit_mut("shared_block", f);
        }
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit_mut(&join("blocks", &i.to_string()), f);
        }
    }

    /// x₀, where there is a block that reads it.
    fn start(&self, x: &Buffer) -> Option<Buffer> {
        self.shared.as_ref().map(|_| Buffer::copy_of(x))
    }

    fn feeding<'a>(&'a self, x0: &'a Option<Buffer>) -> Shared<'a> {
        Shared { block: self.feeder(), x0: x0.as_ref().expect("made where there is a shared block") }
    }

    fn feeder(&self) -> &SharedBlock {
        self.shared.as_ref().expect("where blocks are fed there is a shared one")
    }
}
