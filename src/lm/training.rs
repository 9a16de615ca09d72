//! The forward and the backward pass of a training step.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::block::{BackwardPass, Block, BlockCache, PassGradient};
use super::loss::{HeadGradient, LmLoss};
use super::model::HymbaLm;
use crate::kernels::team::{Team, with_team, work};
use crate::layers::{Angles, Batch, Buffer, KvStorage, SequenceState, SharedKv, Spans, row_seeds, seed_at};
use crate::lora::Host;
#[cfg(doc)]
use crate::lora::LoraOptions;
use crate::{Error, Result};

mod checks;

/// The values of a forward pass that [`HymbaLm::backward`] reads.
pub struct LmTrainCache {
    model: u64,
    /// Tokens that go into the model, row by row, and how many each row has.
    ids: Vec<u32>,
    lengths: Vec<usize>,
    /// What is predicted: the token whose output does it, and the id.
    targets: Vec<(usize, u32)>,
    /// What the meta tokens left in front of the tokens.
    initial: SequenceState,
    meta: Option<Layers>,
    tokens: Layers,
    /// Output of the last layer, `[tokens, H]`.
    last: Buffer,
    /// Of the tokens, if adapters drop numbers.
    row_seeds: Option<Arc<[u64]>>,
}

/// What a pass through all layers left.
struct Layers {
    spans: Spans,
    angles: Vec<Angles>,
    blocks: Vec<Kept>,
    shared: BTreeMap<usize, SharedKv>,
}

/// What the backward pass of a layer reads: all of it, or what it is computed from once more.
enum Kept {
    Cache(Box<BlockCache>),
    /// `[tokens, H]`
    Input(Buffer),
}

impl fmt::Debug for LmTrainCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LmTrainCache").field("lengths", &self.lengths).field("targets", &self.targets.len()).finish()
    }
}

impl HymbaLm {
    /// The loss of predicting every token of each row but its first, for training, with what [`backward`](Self::backward) reads. The
    /// meta tokens stand in front of every row.
    ///
    /// `masks` has a mark for every token of every row: only tokens that are marked are predicted, such as those of
    /// answers in instruction tuning. Nothing predicts the first token of a row, and its mark is ignored. A batch in
    /// which nothing is predicted has a loss of no tokens.
    ///
    /// Keys and values are not rounded here, whatever [`LoadOptions::kv_storage`](super::LoadOptions::kv_storage) says.
    /// Rows of one token add nothing to the loss. There is no dropout: see
    /// [`forward_train_seeded`](Self::forward_train_seeded). At most 32 MB of logits are in memory at a time, or those
    /// of 24 tokens if these take more.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if there is no row, a row is empty or longer than `max_position_embeddings`, an id is not in the
    /// vocabulary, masks are not as long as their rows, or the batch does not fit into memory.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let folder = tempfile::tempdir()?;
    /// # HymbaLm::random(config, 0, &LoadOptions::default())?.save_dir(folder.path())?;
    /// let lm = HymbaLm::from_dir_with(folder.path(), &LoadOptions::default().trainable(true), |_| {})?;
    /// let rows = [vec![1, 2, 3, 4], vec![5, 6]];
    /// let (loss, cache) = lm.forward_train(&rows, None)?;
    /// assert_eq!(loss.tokens, 4);
    /// let mut gradient = lm.zeros_like();
    /// lm.backward(&cache, &mut gradient)?; // of loss.mean()
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn forward_train(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
    ) -> Result<(LmLoss, LmTrainCache)> {
        self.forward_by(rows, masks, None)
    }

    /// As [`forward_train`](Self::forward_train), which drops nothing, with the [dropout](LoraOptions::dropout) of the active adapter.
    /// The dropout mask depends on `seed`, the row and the token: give every pass another seed.
    ///
    /// # Errors
    ///
    /// As [`forward_train`](Self::forward_train).
    ///
    /// ```
    /// # use hymba::HymbaLm;
    /// # use hymba::lm::{HymbaLmConfig, LoadOptions, LoraOptions};
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let mut lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// lm.add_lora(&LoraOptions::default().dropout(0.1), 0)?;
    /// let (loss, cache) = lm.forward_train_seeded(&[[1, 2, 3, 4]], None, 7)?;
    /// lm.backward(&cache, &mut lm.zeros_like())?;
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward_train_seeded(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
        seed: u64,
    ) -> Result<(LmLoss, LmTrainCache)> {
        self.forward_by(rows, masks, Some(&seeds_of(rows, seed)))
    }

    fn forward_by(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
        seeds: Option<&[u64]>,
    ) -> Result<(LmLoss, LmTrainCache)> {
        self.check_rows(rows, masks)?;
        let cache = self.run_train(rows, masks, seeds);
        let sum = with_team(self.train_work(&cache), |team| {
            self.head_loss(team, &cache.last, &cache.targets, cache.row_seeds.as_deref(), None)
        });
        Ok((LmLoss::new(sum, cache.targets.len()), cache))
    }

    /// The gradient of [`forward_train`](Self::forward_train)'s loss, of its mean over the predicted tokens. **Adds** the gradients
    /// by the parameters to `grads`, which [`zeros_like`](Self::zeros_like) makes. Of a tied model the embedding gets that of the
    /// head, too. Matrices that are stored for products only get none.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if `cache` is of another model, or of this one before its parameters changed, or if `grads` is of a model
    /// with other parameters. Nothing is added then.
    pub fn backward(&self, cache: &LmTrainCache, grads: &mut HymbaLm) -> Result<()> {
        self.backward_scaled(cache, 1.0 / cache.targets.len().max(1) as f32, grads)
    }

    /// As [`backward`](Self::backward), of the sum over the predicted tokens in place of the mean: what adds up over the batches of
    /// one step of [`AdamW::step_accumulated`](crate::train::AdamW::step_accumulated), whose weight is the number of tokens.
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward).
    pub fn backward_sum(&self, cache: &LmTrainCache, grads: &mut HymbaLm) -> Result<()> {
        self.backward_scaled(cache, 1.0, grads)
    }

    /// [`forward_train`](Self::forward_train) and [`backward_sum`](Self::backward_sum) in one, which is faster: the logits are
    /// computed once.
    ///
    /// # Errors
    ///
    /// Those of both. Nothing is added then.
    pub fn accumulate(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
        grads: &mut HymbaLm,
    ) -> Result<LmLoss> {
        self.accumulate_by(rows, masks, None, grads)
    }

    /// As [`accumulate`](Self::accumulate), with dropout as in [`forward_train_seeded`](Self::forward_train_seeded).
    ///
    /// # Errors
    ///
    /// As [`accumulate`](Self::accumulate).
    ///
    /// ```
    /// # use hymba::HymbaLm;
    /// # use hymba::lm::{HymbaLmConfig, LoadOptions, LoraOptions};
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let mut lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// lm.add_lora(&LoraOptions::default().dropout(0.1), 0)?;
    /// let mut gradient = lm.zeros_like();
    /// let loss = lm.accumulate_seeded(&[[1, 2, 3, 4]], None, 7, &mut gradient)?;
    /// assert_eq!(loss.tokens, 3);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn accumulate_seeded(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
        seed: u64,
        grads: &mut HymbaLm,
    ) -> Result<LmLoss> {
        self.accumulate_by(rows, masks, Some(&seeds_of(rows, seed)), grads)
    }

    /// With a seed for each row, if anything is to be dropped.
    pub(crate) fn accumulate_by(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
        seeds: Option<&[u64]>,
        grads: &mut HymbaLm,
    ) -> Result<LmLoss> {
        self.check_rows(rows, masks)?;
        self.check_gradient(grads)?;
        let cache = self.run_train(rows, masks, seeds);
        let sum = self.run_backward(&cache, 1.0, grads);
        Ok(LmLoss::new(sum, cache.targets.len()))
    }

    /// Sets whether the backward pass recomputes the activations, layer by layer, in place of keeping them (gradient
    /// checkpointing): training then takes the memory of one layer and of the inputs of all, and about a third longer.
    /// Gradients are the same, bit for bit.
    pub fn recompute_activations(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    fn backward_scaled(&self, cache: &LmTrainCache, scale: f32, grads: &mut HymbaLm) -> Result<()> {
        if cache.model != self.cached.id {
            let advice = "another model made it, or the parameters have changed since; run the forward pass again";
            return Err(Error::State(advice.into()));
        }
        self.check_gradient(grads)?;
        self.run_backward(cache, scale, grads);
        Ok(())
    }

    /// All layers of a training step. The whole batch goes through a layer together, so that the gradient of a matrix is one product
    /// over all tokens. Tokens after the last one of a row that predicts another, and rows without one, are left out.
    fn run_train(
        &self,
        rows: &[impl AsRef<[u32]>],
        masks: Option<&[Vec<bool>]>,
        seeds: Option<&[u64]>,
    ) -> LmTrainCache {
        let (mut ids, mut lengths, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let mut seeds_of_rows = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let row = row.as_ref();
            let predicted = |t: &usize| masks.is_none_or(|masks| masks[i][*t]);
            let first = ids.len();
            targets.extend((1..row.len()).filter(predicted).map(|t| (first + t - 1, row[t])));
            let length = targets.last().map_or(0, |(place, _)| (place + 1).saturating_sub(first));
            if length > 0 {
                ids.extend(&row[..length]);
                lengths.push(length);
                seeds_of_rows.extend(seeds.map(|seeds| seeds[i]));
            }
        }
        with_team(work([self.meta_tokens.nrows() + ids.len(), self.num_parameters()]), |team| {
            let (initial, meta) = self.run_meta_tokens(team);
            let mut states = vec![initial.clone(); lengths.len()];
            let sequences = states.iter_mut().zip(lengths.iter().copied());
            let batch = Batch::new(team, sequences, false, self.rotary.as_ref());
            let drops = seeds.is_some() && self.adapters.drops();
            let row_seeds = drops.then(|| row_seeds(&batch.spans, seeds_of_rows));
            let _seeded = team.seeded(row_seeds.clone());
            let (last, tokens) = self.run_layers(batch, self.embedding.forward(team, &ids), self.recompute);
            LmTrainCache { model: self.cached.id, ids, lengths, targets, initial, meta, tokens, last, row_seeds }
        })
    }

    /// Takes the meta tokens through the layers. Returns what they leave in front of the tokens, and what the backward pass reads.
    fn run_meta_tokens(&self, team: &Team) -> (SequenceState, Option<Layers>) {
        let mut state = self.empty_row(KvStorage::F32);
        if self.meta_tokens.is_empty() {
            return (state, None);
        }
        let batch = Batch::new(team, [(&mut state, self.meta_tokens.nrows())], true, self.rotary.as_ref());
        let (_, layers) = self.run_layers(batch, Buffer::copy_of(&self.meta_tokens), self.recompute);
        (state, Some(layers))
    }

    /// Takes tokens through all layers, of which only the input is kept if they are to `recompute` what the backward pass reads.
    fn run_layers(&self, mut batch: Batch, mut x: Buffer, recompute: bool) -> (Buffer, Layers) {
        let mut blocks = Vec::with_capacity(self.blocks.len());
        if batch.spans.rows() > 0 {
            for block in &self.blocks {
                let input = recompute.then(|| Buffer::copy_of(&x));
                let (y, cache) = block.forward_train(&mut batch, x);
                blocks.push(input.map_or_else(|| Kept::Cache(Box::new(cache)), Kept::Input));
                x = y;
            }
        }
        let (spans, angles) = (batch.spans.clone(), std::mem::take(&mut batch.angles));
        let mut shared = std::mem::take(&mut batch.shared);
        shared.values_mut().for_each(SharedKv::unpack);
        batch.finish();
        (x, Layers { spans, angles, blocks, shared })
    }

    /// The backward pass of [`run_train`](Self::run_train) and of `scale` times the sum of the losses, which is returned.
    fn run_backward(&self, cache: &LmTrainCache, scale: f32, grads: &mut HymbaLm) -> f64 {
        grads.walk_mut(&mut |_, _| {}); // what follows from its numbers is forgotten
        if cache.targets.is_empty() {
            return 0.0;
        }
        with_team(self.train_work(cache), |team| {
            let mut dx = Buffer::zeros(cache.last.dim());
            let head = HeadGradient { scale, grads, dx: &mut dx };
            let row_seeds = &cache.row_seeds;
            let sum = self.head_loss(team, &cache.last, &cache.targets, row_seeds.as_deref(), Some(head));

            let empty = self.empty_row(KvStorage::F32);
            // what the cache holds counts: recompute_activations may have been called since
            let again = cache.tokens.blocks.iter().any(|kept| matches!(kept, Kept::Input(_)));
            let mut states = vec![cache.initial.clone(); if again { cache.lengths.len() } else { 0 }];
            let mut before_meta = [empty.clone()];
            let mut of_tokens = PassGradient::zeros(&cache.initial);
            let mut of_meta = PassGradient::zeros(&empty);
            let mut dmeta = cache.meta.as_ref().map(|_| Buffer::zeros(self.meta_tokens.dim()));
            for (i, block) in self.blocks.iter().enumerate().rev() {
                let grad = &mut grads.blocks[i];
                let seeded = team.seeded(row_seeds.clone());
                let pass = cache.tokens.pass(team, &cache.initial);
                let of_block = cache.tokens.cache_of(block, i, team, &mut states);
                dx = block.backward(pass, &of_block, dx, None, grad, &mut of_tokens);
                drop(seeded);
                if let (Some(meta), Some(dy)) = (&cache.meta, dmeta.take()) {
                    let (pass, dfinal) = (meta.pass(team, &empty), Some(&of_tokens.initial[i]));
                    let of_block = meta.cache_of(block, i, team, &mut before_meta);
                    dmeta = Some(block.backward(pass, &of_block, dy, dfinal, grad, &mut of_meta));
                }
            }
            if let Some(dmeta) = dmeta {
                grads.meta_tokens += &*dmeta;
            }
            self.embedding.backward(cache.ids.iter().copied(), dx.view(), &mut grads.embedding);
            sum
        })
    }

    fn train_work(&self, cache: &LmTrainCache) -> usize {
        work([2, cache.ids.len() + self.meta_tokens.nrows(), self.num_parameters()])
    }

    /// Gives back what only training needs.
    pub(crate) fn end_training(&mut self) {
        self.embedding.end_training();
        self.visit_maps(&mut |_, map| map.end_training());
    }
}

/// Seeds of rows, which follow from that of a pass.
fn seeds_of(rows: &[impl AsRef<[u32]>], seed: u64) -> Vec<u64> {
    (0..rows.len()).map(|i| seed_at(seed, i)).collect()
}

/// A cache that was kept, or computed again.
enum CacheOf<'a> {
    Kept(&'a BlockCache),
    Again(Box<BlockCache>),
}

impl Deref for CacheOf<'_> {
    type Target = BlockCache;

    fn deref(&self) -> &BlockCache {
        match self {
            CacheOf::Kept(cache) => cache,
            CacheOf::Again(cache) => cache,
        }
    }
}

impl Layers {
    /// What the backward pass of layer i reads. `states` are what every row began with, if it is computed again.
    fn cache_of<'a>(&'a self, block: &Block, i: usize, team: &Team, states: &mut [SequenceState]) -> CacheOf<'a> {
        match &self.blocks[i] {
            Kept::Cache(cache) => CacheOf::Kept(cache),
            Kept::Input(x) => {
                let sequences = states.iter_mut().zip(self.spans.iter().map(|span| span.len()));
                let mut batch = Batch::new(team, sequences, false, None);
                batch.angles = self.angles.clone();
                let shared = self.shared.iter().filter(|(layer, _)| **layer < i);
                batch.shared = shared.map(|(layer, kv)| (*layer, kv.copy())).collect();
                CacheOf::Again(Box::new(block.forward_train(&mut batch, Buffer::copy_of(x)).1))
            }
        }
    }

    fn pass<'a>(&'a self, team: &'a Team, initial: &'a SequenceState) -> BackwardPass<'a> {
        BackwardPass { team, spans: &self.spans, angles: &self.angles, initial, shared: &self.shared }
    }
}
