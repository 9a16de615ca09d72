//! The model: what users build and run. Everything a user hands over is checked here and nowhere below.

mod encode;
mod walk;

use std::fmt;
use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayRef3};
use rand::SeedableRng;

use super::block::{BlockInspection, rows, sequences};
use super::blocks::{Block, Blocks};
use super::options::HymbaOptions;
use super::shared::SharedBlock;
use super::size::{Keeps, fits, model_bytes};
#[cfg(doc)]
use crate::Error;
use crate::Result;
use crate::kernels::matmul::Storage;
use crate::kernels::team::{Team, with_team, work};
use crate::layers::{Batch, Buffer, LayerNorm, Lazy, Linear, Rng, SequenceState, init_meta_tokens};
use crate::lora::Adapters;
use crate::parameters::next_id;

/// A Hymba encoder: sequences of frames in, one vector (or one per frame) out. Its blocks are Hymba's, or those of another
/// [`Pattern`](crate::Pattern).
///
/// The meta tokens `m [k, h]` stand in front of every sequence and travel through the blocks like frames do:
///
/// ```text
/// s = [m ; input·Wᵀ + bias]      [k + l, h]     the input itself where embed_dim = hidden_size
/// s = block(s)                   [k + l, h]     for every block
/// y = LayerNorm(frames of s)     [l, h]         forward returns the last row
/// ```
///
/// Everything is causal, so what the meta tokens become does not depend on the input. It is computed once, at the first
/// call, and kept until the parameters change.
///
/// A model is `Send` and `Sync`: one model serves any number of threads and streams. Results are the same, bit for bit,
/// for any number of threads, and a sequence's result does not depend on the batch it is in.
///
/// ```
/// use hymba::{Hymba, HymbaOptions};
/// use hymba::ndarray::Array3;
///
/// let model = Hymba::build(HymbaOptions::new(12).hidden_size(64).num_layers(2))?;
/// let x = Array3::<f32>::ones((3, 20, 12)); // batch 3, 20 frames of width 12
/// let y = model.forward(&x)?;
/// assert_eq!(y.dim(), (3, 64));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct Hymba {
    pub(super) options: HymbaOptions,
    /// Only where `embed_dim` and `hidden_size` differ.
    pub(super) input_proj: Option<Linear>,
    /// The travelling meta tokens `[k, h]`, if there are any.
    pub(super) meta_tokens: Option<Array2<f32>>,
    pub(super) blocks: Blocks,
    pub(super) final_norm: LayerNorm,
    /// Of the large matrices, if they are not to be trained.
    pub(super) storage: Option<Storage>,
    pub(super) cached: Cached,
    /// Identifies what happens to frames before they come here: states belong to it, too.
    pub(super) salt: u64,
    pub(super) adapters: Adapters<Cached>,
}

/// Results that depend on the weights alone, and numbers that identify these. The default is for new weights.
#[derive(Clone)]
pub(crate) struct Cached {
    /// The state of a sequence before its first frame: the one that the meta tokens leave.
    initial: Lazy<Arc<SequenceState>>,
    /// Identifies this set of weights anywhere.
    pub(super) fingerprint: Lazy<u64>,
    /// Identifies this set of weights within the process; clones share it.
    pub(super) id: u64,
}

impl Default for Cached {
    fn default() -> Self {
        Cached { initial: Lazy::new(), fingerprint: Lazy::new(), id: next_id() }
    }
}

/// The result of [`Hymba::inspect`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspection {
    /// The meta tokens' pass through the blocks, as a batch of one sequence of length k; one entry per block. Empty without
    /// meta tokens and in the Edifice variant.
    pub meta: Vec<BlockInspection>,
    /// The frames' pass through the blocks, one entry per block.
    pub blocks: Vec<BlockInspection>,
}

impl Hymba {
    /// Builds a model with new random weights, drawn from the seed in the options by a generator that gives the same numbers on
    /// every machine.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range, see [`HymbaOptions`], or if the model does not fit into memory.
    pub fn build(options: HymbaOptions) -> Result<Self> {
        options.validate()?;
        let fit = |options: &HymbaOptions| fits(model_bytes(options, None));
        if !fit(&options) {
            return Err(options.too_large("this many do not fit into memory", fit));
        }
        let mut rng = Rng::seed_from_u64(options.seed);
        let mut model = Self::zeros(options, None);
        if let Some(input_proj) = &mut model.input_proj {
            input_proj.init(&mut rng);
        }
        if let Some(tokens) = &mut model.meta_tokens {
            init_meta_tokens(tokens, &mut rng);
        }
        model.blocks.init(&mut rng);
        model.final_norm.init();
        Ok(model)
    }

    /// A model of validated options whose parameters are all zero, with the large matrices in this type of storage.
    pub(crate) fn zeros(options: HymbaOptions, storage: Option<Storage>) -> Self {
        let (e, h, k) = (options.embed_dim, options.hidden_size, options.num_meta_tokens);
        let own_meta = options.variant.differences().own_meta;
        Hymba {
            input_proj: (e != h).then(|| Linear::zeros(e, h, true)),
            meta_tokens: (k > 0 && !own_meta).then(|| Array2::zeros((k, h))),
            blocks: Blocks::zeros(&options, storage),
            final_norm: options.new_norm(h),
            options,
            storage,
            cached: Cached::default(),
            salt: 0,
            adapters: Adapters::default(),
        }
    }

    /// Encodes sequences of equal length: x `[b, l, embed_dim]` → the last frame of each after the final norm,
    /// `[b, hidden_size]`.
    ///
    /// x may be an array, a view or a slice of one, in any memory order. A sequence may be longer than `window_size`; the
    /// cost then grows linearly. Rows that hold NaN give NaN and touch no other row.
    ///
    /// # Memory
    ///
    /// About `4·(20h + a·⌈p/32⌉·32 + 2n + r + embed_dim)` bytes per frame (6 kB at h = 64, 22 kB at the default h = 256), of the
    /// frames being computed: each thread has at most 256 frames of short sequences, or all together 8,192 frames of a long one,
    /// which is read in pieces; beyond that only the keys and values of its window are kept, `8h` bytes per frame and block with
    /// attention, and about as much again in one block. [`forward_sequence`](Self::forward_sequence) keeps `8h` bytes of every
    /// frame besides, and training, all in all, `4·(25h + n·h/8)` bytes per frame and block. With a shared attention block, 24h stands
    /// for 20h, and 2p for p; training keeps of a frame 18h in a Mamba block, 12h in an attention block, 12h in a fed block and 19h
    /// more per use of the shared one, in place of 25h, and `n·h/8` where there is Mamba.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if b or l is 0, the width is not `embed_dim`, or the call does not fit into memory.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::{Array3, s};
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let x = Array3::<f32>::zeros((2, 30, 8));
    /// assert_eq!(model.forward(&x.slice(s![.., ..;-1, 1..6]))?.dim(), (2, 16));
    /// assert!(model.forward(&x).is_err()); // frames of width 8, not 5
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward(&self, x: &ArrayRef3<f32>) -> Result<Array2<f32>> {
        let (batch, l) = self.check_batch(x, None, Keeps::Last, 0)?;
        Ok(self.encode_last(x, &vec![l; batch]))
    }

    /// Encodes right-padded sequences: row i of x `[b, l, embed_dim]` holds `lengths[i]` valid frames; padding is ignored.
    /// Returns the last valid frame of each after the final norm, `[b, hidden_size]`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] as [`forward`](Self::forward); [`Error::Lengths`] unless there are b lengths, each from 1 to l.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::{Array3, s};
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let x = Array3::<f32>::ones((2, 30, 5));
    /// let y = model.forward_ragged(&x, &[30, 7])?;
    /// assert_eq!(y.row(1), model.forward(&x.slice(s![1.., ..7, ..]))?.row(0));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward_ragged(&self, x: &ArrayRef3<f32>, lengths: &[usize]) -> Result<Array2<f32>> {
        self.check_batch(x, Some(lengths), Keeps::Last, 0)?;
        Ok(self.encode_last(x, lengths))
    }

    /// Encodes every position: x `[b, l, embed_dim]` → `[b, l, hidden_size]` after the final norm. Position t depends on
    /// the frames up to t only; the last position is what [`forward`](Self::forward) returns.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] as [`forward`](Self::forward).
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::{Array3, s};
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let x = Array3::<f32>::ones((2, 30, 5));
    /// let y = model.forward_sequence(&x)?;
    /// assert_eq!(y.dim(), (2, 30, 16));
    /// assert_eq!(y.slice(s![.., 29, ..]), model.forward(&x)?);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward_sequence(&self, x: &ArrayRef3<f32>) -> Result<Array3<f32>> {
        let (batch, l) = self.check_batch(x, None, Keeps::Outputs, 0)?;
        Ok(sequences(self.encode_frames(x, &vec![l; batch]), batch))
    }

    /// Runs x `[b, l, embed_dim]` and returns the results of every block: those of its branches, the gate that mixes them, and the
    /// attention weights. Meant for inspection, not for speed: it holds l·(k + l) weights per head, block and row.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] as [`forward`](Self::forward), and where so many weights do not fit into memory.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::Array3;
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(3))?;
    /// let seen = model.inspect(&Array3::<f32>::ones((1, 30, 5)))?;
    /// for block in &seen.blocks {
    ///     let mamba_share = block.gate.mean().unwrap();
    ///     assert!((0.0..=1.0).contains(&mamba_share));
    ///     assert_eq!(block.attention_weights.dim(), (1, 2, 30, 4 + 30));
    /// }
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn inspect(&self, x: &ArrayRef3<f32>) -> Result<Inspection> {
        let (batch, l) = self.check_batch(x, None, Keeps::Inspection, 0)?;
        with_team(self.work(batch * l), |team| {
            let mut meta = Vec::new();
            if let Some(tokens) = &self.meta_tokens {
                let mut state = self.empty_state();
                let mut batch = Batch::new(team, [(&mut state, tokens.nrows())], true, None);
                meta = self.blocks.inspect(&mut batch, Buffer::copy_of(tokens));
            }
            let mut states = vec![SequenceState::clone(self.initial()); batch];
            let mut batch = Batch::new(team, states.iter_mut().map(|state| (state, l)), false, None);
            let blocks = self.blocks.inspect(&mut batch, self.project(team, rows(x)));
            Ok(Inspection { meta, blocks })
        })
    }

    /// The options the model was built with.
    pub fn options(&self) -> &HymbaOptions {
        &self.options
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[Block] {
        self.blocks.as_slice()
    }

    /// The attention block that several depths share, in the pattern [`SharedAttention`](crate::Pattern::SharedAttention).
    pub fn shared_block(&self) -> Option<&SharedBlock> {
        self.blocks.shared()
    }

    /// The number of parameters, without those of adapters.
    pub fn num_parameters(&self) -> usize {
        self.options.parameters().expect("the options of a model are valid")
    }

    /// Makes states of those who do something else to frames first unusable here.
    pub(crate) fn set_salt(&mut self, salt: u64) {
        self.salt = salt;
        self.changed();
        self.adapters.forget();
    }

    /// To be called wherever parameters change.
    pub(super) fn changed(&mut self) {
        self.cached = Cached::default();
    }

    /// Multiplications that `frames` frames take, about.
    pub(super) fn work(&self, frames: usize) -> usize {
        let h = self.options.hidden_size;
        work([frames, 24, h, h, self.blocks.len()])
    }

    /// Frames `[rows, embed_dim]` through all blocks and the final norm: `[rows, h]`, or `only` some rows of that.
    pub(super) fn run(&self, batch: &mut Batch, frames: Buffer, only: Option<&[usize]>) -> Buffer {
        let x = self.project(batch.team, frames);
        let x = self.blocks.forward(batch, x, only);
        self.final_norm.forward(batch.team, x.view())
    }

    /// `[rows, embed_dim]` → `[rows, h]`
    pub(super) fn project(&self, team: &Team, frames: Buffer) -> Buffer {
        match &self.input_proj {
            Some(input_proj) => input_proj.forward(team, frames.view()),
            None => frames,
        }
    }

    /// The state of a sequence before its first frame.
    pub(super) fn initial(&self) -> &Arc<SequenceState> {
        self.cached.initial.get(|| {
            let mut state = self.empty_state();
            if let Some(tokens) = &self.meta_tokens {
                with_team(self.work(tokens.nrows()), |team| {
                    let mut batch = Batch::new(team, [(&mut state, tokens.nrows())], true, None);
                    self.blocks.forward(&mut batch, Buffer::copy_of(tokens), Some(&[]));
                    batch.finish();
                });
            }
            Arc::new(state)
        })
    }

    /// A state that has seen no meta tokens but those that blocks have themselves.
    pub(super) fn empty_state(&self) -> SequenceState {
        SequenceState { position: 0, layers: self.blocks.new_states() }
    }
}

impl fmt::Debug for Hymba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Hymba");
        f.field("options", &self.options).field("parameters", &self.num_parameters()).finish()
    }
}
