//! The model: what users build, run and stream. Everything a user hands over is checked here and nowhere below.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, ArrayViewD, ArrayViewMutD, s};
use rand::SeedableRng;

use crate::block::{BlockCache, BlockInspection, BlockState, HymbaBlock, Prefix, sequences};
use crate::kernels::parallel;
use crate::layers::{Buffer, Derived, LayerNorm, Linear, Rng, dropout, init_meta_tokens};
use crate::{Error, HymbaOptions, Result};

/// A Hymba encoder: sequences of frames in, one vector (or one a frame) out.
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
    options: HymbaOptions,
    /// Only where `embed_dim` and `hidden_size` differ.
    input_proj: Option<Linear>,
    /// The travelling meta tokens `[k, h]`, if there are any.
    meta_tokens: Option<Array2<f32>>,
    blocks: Vec<HymbaBlock>,
    final_norm: LayerNorm,
    /// What the meta tokens leave in front of the frames, block by block.
    prefixes: Derived<Vec<Prefix>>,
    /// Tells models with other weights apart. Clones, having the same, share it.
    id: u64,
}

/// What a model remembers of a batch of streams between two calls of [`Hymba::step`].
///
/// A state belongs to the model that made it, and to its clones, as long as their parameters do not change. Cloning a
/// state forks the streams. Its size is constant from the frame on that fills the window; only in the Edifice preset,
/// whose attention has no window, it grows with every frame.
#[derive(Clone)]
pub struct HymbaState {
    model: u64,
    batch: usize,
    frames: u64,
    blocks: Vec<BlockState>,
}

/// What [`Hymba::backward`] reads of a forward pass: about 25·h numbers for each block and frame.
pub struct TrainCache {
    model: u64,
    seed: u64,
    l: usize,
    lengths: Vec<usize>,
    /// `[b·l, embed_dim]`
    input: Buffer,
    prefixes: Vec<Prefix>,
    /// The meta tokens' way, if there are any.
    meta: Vec<BlockCache>,
    blocks: Vec<BlockCache>,
    /// Input of the final norm, `[b, h]` or `[b·l, h]`.
    last: Buffer,
}

impl TrainCache {
    /// Where the last valid frame of a sequence is among `[b·l, h]`.
    fn last_row(&self, row: usize) -> usize {
        row * self.l + self.lengths[row] - 1
    }
}

impl fmt::Debug for TrainCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrainCache").field("lengths", &self.lengths).field("blocks", &self.blocks.len()).finish()
    }
}

impl HymbaState {
    /// The number of streams.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Frames seen so far by each stream.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Bytes of what is remembered.
    pub fn num_bytes(&self) -> usize {
        self.blocks.iter().map(BlockState::num_numbers).sum::<usize>() * size_of::<f32>()
    }
}

impl fmt::Debug for HymbaState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("HymbaState");
        f.field("batch", &self.batch).field("frames", &self.frames).field("bytes", &self.num_bytes()).finish()
    }
}

/// What every block did to an input: see [`Hymba::inspect`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspection {
    /// The meta tokens' way through the blocks, as a batch of one sequence of length k; one entry a block. Empty without
    /// meta tokens and in the Edifice preset.
    pub meta: Vec<BlockInspection>,
    /// The frames' way through the blocks, one entry a block.
    pub blocks: Vec<BlockInspection>,
}

impl Hymba {
    /// Builds a model with new random weights, the same for the same options on every machine.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if an option is outside its range; see [`HymbaOptions`].
    pub fn build(options: HymbaOptions) -> Result<Self> {
        options.validate()?;
        let mut rng = Rng::seed_from_u64(options.seed);
        let mut model = Self::zeros(options);
        if let Some(input_proj) = &mut model.input_proj {
            input_proj.init(&mut rng);
        }
        if let Some(tokens) = &mut model.meta_tokens {
            init_meta_tokens(tokens, &mut rng);
        }
        for block in &mut model.blocks {
            block.init(&mut rng);
        }
        model.final_norm.init();
        Ok(model)
    }

    /// A model of validated options whose parameters are all zero.
    pub(crate) fn zeros(options: HymbaOptions) -> Self {
        let (e, h, k) = (options.embed_dim, options.hidden_size, options.num_meta_tokens);
        let rules = options.preset.rules();
        Hymba {
            input_proj: (e != h).then(|| Linear::zeros(e, h, true)),
            meta_tokens: (k > 0 && !rules.own_meta_rows).then(|| Array2::zeros((k, h))),
            blocks: (0..options.num_layers).map(|_| HymbaBlock::zeros(&options)).collect(),
            final_norm: LayerNorm::zeros(h, rules.small_variance),
            options,
            prefixes: Derived::new(),
            id: next_id(),
        }
    }

    /// Encodes sequences of equal length: x `[b, l, embed_dim]` → the last frame of each after the final norm,
    /// `[b, hidden_size]`.
    ///
    /// x may be an array, a view or a slice of one, in any memory order. A sequence may be longer than `window_size`; the
    /// cost then grows linearly. Rows that hold NaN give NaN and touch no other row.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if b or l is 0 or the width is not `embed_dim`.
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
        let (batch, l) = self.check_input(x)?;
        Ok(self.encode(x, &vec![l; batch]))
    }

    /// Encodes sequences of different lengths, filled up at the end: row i of x `[b, l, embed_dim]` is a sequence of
    /// `lengths[i]` frames, and what follows them is not looked at. Returns the last frame of each after the final norm,
    /// `[b, hidden_size]`.
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
        let (batch, l) = self.check_input(x)?;
        check_lengths(lengths, batch, l)?;
        Ok(self.encode(x, lengths))
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
        let (batch, l) = self.check_input(x)?;
        let (rows, lengths) = (Vec::from_iter(0..batch), vec![l; batch]);
        let groups = self.groups(&rows, &lengths);
        let encoded = parallel::enter_if(self.work(batch * l), || {
            parallel::map(groups, |group| {
                let frames = self.run(x, group, &lengths);
                sequences(self.final_norm.forward(frames.view()).into_array(), group.rows.len())
            })
        });
        let mut y = Array3::zeros((batch, l, self.options.hidden_size));
        let mut first = 0;
        for encoded in encoded {
            y.slice_mut(s![first..first + encoded.dim().0, .., ..]).assign(&encoded);
            first += encoded.dim().0;
        }
        Ok(y)
    }

    /// As [`forward_ragged`](Self::forward_ragged), for training: drops numbers between the blocks at the rate of the option
    /// `dropout`, and returns also what [`backward`](Self::backward) reads. `lengths` of `None` are full ones. Which numbers are
    /// dropped follows from `seed`; give every batch another one. Without dropout the outputs are those of
    /// [`forward`](Self::forward), to the bit.
    ///
    /// # Errors
    ///
    /// As [`forward_ragged`](Self::forward_ragged).
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::Array3;
    ///
    /// let model = Hymba::build(HymbaOptions::recommended(5).hidden_size(16).num_heads(2).num_layers(2))?;
    /// let x = Array3::<f32>::ones((2, 30, 5));
    /// let (y, cache) = model.forward_train(&x, Some(&[30, 7]), 1)?;
    /// let mut grads = model.zeros_like();
    /// let dx = model.backward(&cache, &y, &mut grads)?; // of Σ y²/2
    /// assert_eq!(dx.dim(), x.dim());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn forward_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array2<f32>, TrainCache)> {
        let (frames, mut cache) = self.run_train(x, lengths, seed)?;
        let mut last = Array2::zeros((cache.lengths.len(), self.options.hidden_size));
        for (row, mut last) in last.rows_mut().into_iter().enumerate() {
            last.assign(&frames.row(cache.last_row(row)));
        }
        let y = self.final_norm.forward(last.view());
        cache.last = last.into();
        Ok((y.into_array(), cache))
    }

    /// As [`forward_sequence`](Self::forward_sequence), for training: the counterpart of
    /// [`forward_train`](Self::forward_train) that returns every position, `[b, l, hidden_size]`. What stands in positions past
    /// a sequence's length means nothing; give it a gradient of zero.
    ///
    /// # Errors
    ///
    /// As [`forward_ragged`](Self::forward_ragged).
    pub fn forward_sequence_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
    ) -> Result<(Array3<f32>, TrainCache)> {
        let (frames, mut cache) = self.run_train(x, lengths, seed)?;
        let y = self.final_norm.forward(frames.view());
        cache.last = frames;
        Ok((sequences(y.into_array(), cache.lengths.len()), cache))
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[b, hidden_size]`, the gradient of a loss by the outputs →
    /// that by the inputs, `[b, l, embed_dim]`. **Adds** the gradients by the parameters to `grads`, which
    /// [`zeros_like`](Self::zeros_like) makes. Frames past a sequence's length get gradients of exactly zero.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if dy has not the shape of the outputs; [`Error::State`] if `cache` is of another model, or of this one
    /// before its parameters changed, or of [`forward_sequence_train`](Self::forward_sequence_train), or if `grads` is of a
    /// model with other options. Nothing is added then.
    pub fn backward(&self, cache: &TrainCache, dy: &ArrayRef2<f32>, grads: &mut Hymba) -> Result<Array3<f32>> {
        self.check_backward(cache, &[cache.lengths.len()], dy.shape(), grads)?;
        let dy = dy.as_standard_layout();
        let dlast = self.final_norm.backward(cache.last.view(), dy.view(), &mut grads.final_norm);
        let mut dframes = Buffer::zeros((cache.lengths.len() * cache.l, self.options.hidden_size));
        for (row, dlast) in dlast.rows().into_iter().enumerate() {
            dframes.row_mut(cache.last_row(row)).assign(&dlast);
        }
        Ok(self.run_backward(cache, dframes, grads))
    }

    /// The gradient of [`forward_sequence_train`](Self::forward_sequence_train): dy `[b, l, hidden_size]` → `[b, l, embed_dim]`;
    /// otherwise as [`backward`](Self::backward). Positions past a sequence's length are taken for zero.
    ///
    /// # Errors
    ///
    /// As [`backward`](Self::backward).
    pub fn backward_sequence(&self, cache: &TrainCache, dy: &ArrayRef3<f32>, grads: &mut Hymba) -> Result<Array3<f32>> {
        let batch = cache.lengths.len();
        self.check_backward(cache, &[batch, cache.l], dy.shape(), grads)?;
        let group = Group { rows: &Vec::from_iter(0..batch), l: cache.l };
        let dy = gather(dy, group, &cache.lengths);
        let dframes = self.final_norm.backward(cache.last.view(), dy.view(), &mut grads.final_norm);
        Ok(self.run_backward(cache, dframes, grads))
    }

    /// A model with the same options whose parameters are all zero: where gradients are gathered.
    pub fn zeros_like(&self) -> Hymba {
        Hymba::zeros(self.options.clone())
    }

    /// All blocks of a training step, up to the final norm. The whole batch goes through a layer together, so that the
    /// gradient of a matrix is one product and one sum over all frames.
    fn run_train(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>, seed: u64) -> Result<(Buffer, TrainCache)> {
        let (batch, l) = self.check_input(x)?;
        let lengths = match lengths {
            Some(lengths) => {
                check_lengths(lengths, batch, l)?;
                lengths.to_vec()
            }
            None => vec![l; batch],
        };
        Ok(parallel::enter_if(self.work(batch * l), || {
            let input = gather(x, Group { rows: &Vec::from_iter(0..batch), l }, &lengths);
            let mut x = self.project(Buffer::copy_of(&input));
            let (prefixes, meta) = self.pass_meta_tokens();
            let mut blocks = Vec::with_capacity(self.blocks.len());
            for (i, (block, prefix)) in self.blocks.iter().zip(&prefixes).enumerate() {
                if i > 0 {
                    dropout(&mut x, self.options.dropout, seed, i);
                }
                let (y, cache, _) = block.forward_train(x, batch, prefix);
                blocks.push(cache);
                x = y;
            }
            let last = Buffer::any((0, 0));
            let cache = TrainCache { model: self.id, seed, l, lengths, input, prefixes, meta, blocks, last };
            (x, cache)
        }))
    }

    /// The way back of [`run_train`](Self::run_train).
    fn run_backward(&self, cache: &TrainCache, mut dx: Buffer, grads: &mut Hymba) -> Array3<f32> {
        let batch = cache.lengths.len();
        grads.prefixes.forget();
        grads.id = next_id();
        parallel::enter_if(self.work(batch * cache.l), || {
            let none = Prefix::none(&self.options);
            // of the meta tokens, behind the block at hand
            let mut dtokens = self.meta_tokens.as_ref().map(|tokens| Buffer::zeros(tokens.dim()));
            for (i, block) in self.blocks.iter().enumerate().rev() {
                let (prefix, grad) = (&cache.prefixes[i], &mut grads.blocks[i]);
                let mut dprefix = prefix.zeros_like();
                dx = block.backward(&cache.blocks[i], prefix, dx, None, grad, &mut dprefix);
                if i > 0 {
                    dropout(&mut dx, self.options.dropout, cache.seed, i);
                }
                dtokens = dtokens
                    .map(|dy| block.backward(&cache.meta[i], &none, dy, Some(&dprefix), grad, &mut none.zeros_like()));
                grad.add_own_prefix(&dprefix);
            }
            if let (Some(grad), Some(dtokens)) = (&mut grads.meta_tokens, dtokens) {
                *grad += &*dtokens;
            }
            let dinput = match (&self.input_proj, &mut grads.input_proj) {
                (Some(input_proj), Some(grad)) => input_proj.backward(cache.input.view(), dx.view(), grad),
                _ => dx,
            };
            sequences(dinput.into_array(), batch)
        })
    }

    fn check_backward(&self, cache: &TrainCache, outer: &[usize], given: &[usize], grads: &Hymba) -> Result<()> {
        let expected = [outer, &[self.options.hidden_size]].concat();
        if given != expected {
            return Err(Error::Shape {
                argument: "dy",
                expected: format!("{expected:?}, the shape of the outputs"),
                given: given.to_vec(),
            });
        }
        if cache.model != self.id {
            let advice = "another model made it, or the parameters have changed since; run the forward pass again";
            return Err(Error::State(advice.into()));
        }
        let outputs = outer.iter().product::<usize>();
        if cache.last.nrows() != outputs {
            let advice = "backward goes with forward_train, backward_sequence with forward_sequence_train";
            return Err(Error::State(advice.into()));
        }
        let same = |options: &HymbaOptions| HymbaOptions { dropout: 0.0, seed: 0, ..options.clone() };
        if same(&grads.options) != same(&self.options) {
            return Err(Error::State("grads is of a model with other options; make it with zeros_like".into()));
        }
        Ok(())
    }

    /// A state for `batch` streams that have seen no frame yet.
    ///
    /// A batch whose state does not fit into memory gives a state that [`step`](Self::step) refuses.
    pub fn new_state(&self, batch: usize) -> HymbaState {
        let prefixes = self.prefixes();
        let one: usize = prefixes.iter().map(|prefix| BlockState::new(1, prefix).num_numbers()).sum();
        let window_rows = self.options.window().unwrap_or(0).min(64);
        let numbers = one + self.blocks.len() * 2 * window_rows * self.options.hidden_size;
        let fits =
            numbers.checked_mul(batch).is_some_and(|numbers| Vec::<f32>::new().try_reserve_exact(numbers).is_ok());
        let blocks =
            if fits { prefixes.iter().map(|prefix| BlockState::new(batch, prefix)).collect() } else { Vec::new() };
        HymbaState { model: self.id, batch, frames: 0, blocks }
    }

    /// The next frame of each stream: frame `[b, embed_dim]` → `[b, hidden_size]`, which equals [`forward`](Self::forward)
    /// on all frames given so far. The cost does not depend on how many they were (except in the Edifice preset, whose
    /// attention has no window).
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the width is not `embed_dim` or b is 0; [`Error::State`] if the state is of another batch
    /// size, was made by another model, or before the parameters changed. The state is then untouched.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::Array2;
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let mut state = model.new_state(1);
    /// for _ in 0..100 {
    ///     let y = model.step(&Array2::<f32>::ones((1, 5)), &mut state)?;
    ///     assert_eq!(y.dim(), (1, 16));
    /// }
    /// assert_eq!(state.frames(), 100);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn step(&self, frame: &ArrayRef2<f32>, state: &mut HymbaState) -> Result<Array2<f32>> {
        let (batch, width) = frame.dim();
        if batch == 0 || width != self.options.embed_dim {
            return Err(Error::Shape {
                argument: "frame",
                expected: format!("[b, embed_dim] with b ≥ 1 and embed_dim = {}", self.options.embed_dim),
                given: frame.shape().to_vec(),
            });
        }
        if state.model != self.id {
            return Err(Error::State(
                "another model made it, or the parameters have changed since; make one with new_state".into(),
            ));
        }
        if state.batch != batch {
            return Err(Error::State(format!(
                "it holds {} streams, and the frame has {batch} rows; make one with new_state({batch})",
                state.batch
            )));
        }
        if state.blocks.len() != self.blocks.len() {
            return Err(Error::State(format!("{batch} streams do not fit into memory; stream fewer at a time")));
        }
        let mut x = self.project(frame.as_standard_layout().into_owned().into());
        for ((block, prefix), state) in self.blocks.iter().zip(self.prefixes()).zip(&mut state.blocks) {
            x = block.step(x, prefix, state);
        }
        state.frames += 1;
        Ok(self.final_norm.forward(x.view()).into_array())
    }

    /// What every block does to x `[b, l, embed_dim]`: the two branches, the gate that mixes them, and the attention
    /// weights. For looking at, not for speed: it holds l·(k + l) weights for each head, block and row.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] as [`forward`](Self::forward).
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
        let (batch, l) = self.check_input(x)?;
        let mut meta = Vec::new();
        if let Some(tokens) = &self.meta_tokens {
            let (none, mut x) = (Prefix::none(&self.options), Buffer::copy_of(tokens));
            for block in &self.blocks {
                let seen = block.inspect(x, 1, &none);
                x = rows(&seen.output);
                meta.push(seen);
            }
        }
        let group = Group { rows: &Vec::from_iter(0..batch), l };
        let mut x = self.project(gather(x, group, &vec![l; batch]));
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, prefix) in self.blocks.iter().zip(self.prefixes()) {
            let seen = block.inspect(x, batch, prefix);
            x = rows(&seen.output);
            blocks.push(seen);
        }
        Ok(Inspection { meta, blocks })
    }

    /// The options the model was built with.
    pub fn options(&self) -> &HymbaOptions {
        &self.options
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[HymbaBlock] {
        &self.blocks
    }

    /// The number of parameters.
    pub fn num_parameters(&self) -> usize {
        let mut count = 0;
        self.visit(&mut |_, parameter| count += parameter.len());
        count
    }

    /// Calls `f` with the name and the values of every parameter, in a fixed order. The names are those in files.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let mut shapes = Vec::new();
    /// model.visit(&mut |name, array| shapes.push((name.to_string(), array.shape().to_vec())));
    /// assert_eq!(shapes[0], ("input_proj.weight".to_string(), vec![16, 5]));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        if let Some(input_proj) = &self.input_proj {
            input_proj.visit("input_proj", f);
        }
        if let Some(tokens) = &self.meta_tokens {
            f("meta_tokens", tokens.view().into_dyn());
        }
        for (i, block) in self.blocks.iter().enumerate() {
            block.visit(&format!("blocks.{i}"), f);
        }
        self.final_norm.visit("final_norm", f);
    }

    /// As [`visit`](Self::visit), for changing the parameters. States made before can no longer be used.
    pub fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.prefixes.forget();
        self.id = next_id();
        if let Some(input_proj) = &mut self.input_proj {
            input_proj.visit_mut("input_proj", f);
        }
        if let Some(tokens) = &mut self.meta_tokens {
            f("meta_tokens", tokens.view_mut().into_dyn());
        }
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit_mut(&format!("blocks.{i}"), f);
        }
        self.final_norm.visit_mut("final_norm", f);
    }

    /// b and l of x `[b, l, embed_dim]`.
    fn check_input(&self, x: &ArrayRef3<f32>) -> Result<(usize, usize)> {
        let (batch, l, width) = x.dim();
        if batch == 0 || l == 0 || width != self.options.embed_dim {
            return Err(Error::Shape {
                argument: "x",
                expected: format!("[b, l, embed_dim] with b ≥ 1, l ≥ 1 and embed_dim = {}", self.options.embed_dim),
                given: x.shape().to_vec(),
            });
        }
        Ok((batch, l))
    }

    /// The last valid frame of each sequence after the final norm, `[b, h]`.
    fn encode(&self, x: &ArrayRef3<f32>, lengths: &[usize]) -> Array2<f32> {
        // sequences of like length go together, so that little padding is computed
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&row| lengths[row]);
        let groups = self.groups(&order, lengths);
        let h = self.options.hidden_size;
        let encoded = parallel::enter_if(self.work(lengths.iter().sum()), || {
            parallel::map(groups.iter().collect(), |group: &Group| {
                let frames = self.run(x, *group, lengths);
                let mut last = Array2::zeros((group.rows.len(), h));
                for (i, &row) in group.rows.iter().enumerate() {
                    last.row_mut(i).assign(&frames.row(i * group.l + lengths[row] - 1));
                }
                self.final_norm.forward(last.view())
            })
        });
        let mut y = Array2::zeros((lengths.len(), h));
        for (group, encoded) in groups.iter().zip(encoded) {
            for (&row, encoded) in group.rows.iter().zip(encoded.rows()) {
                y.row_mut(row).assign(&encoded);
            }
        }
        y
    }

    /// Cuts a batch into groups that one thread takes through all blocks: few enough rows to stay in the cache, enough to
    /// be worth handing over. Depends on sizes only, not on the number of threads.
    fn groups<'a>(&self, order: &'a [usize], lengths: &[usize]) -> Vec<Group<'a>> {
        /// Frames of a group: 128 rows of width 4h are half a megabyte at h = 256.
        const FRAMES: usize = 128;
        let frames = FRAMES.max(2 * parallel::MIN_WORK / self.work(1).max(1));
        let mut groups = Vec::new();
        let mut range: Range<usize> = 0..0;
        for i in 0..order.len() {
            // lengths ascend, so the one at hand is the longest so far
            if !range.is_empty() && (range.len() + 1) * lengths[order[i]] > frames {
                groups.push(Group { rows: &order[range.clone()], l: lengths[order[i - 1]] });
                range.start = i;
            }
            range.end = i + 1;
        }
        if let Some(&last) = order.last() {
            groups.push(Group { rows: &order[range], l: lengths[last] });
        }
        groups
    }

    /// Multiplications that `frames` frames take, about.
    fn work(&self, frames: usize) -> usize {
        frames.saturating_mul(24 * self.options.hidden_size * self.options.hidden_size * self.blocks.len())
    }

    /// The sequences of a group through all blocks: `[rows·l, h]`, before the final norm.
    fn run(&self, x: &ArrayRef3<f32>, group: Group, lengths: &[usize]) -> Buffer {
        let mut x = self.project(gather(x, group, lengths));
        for (block, prefix) in self.blocks.iter().zip(self.prefixes()) {
            x = block.forward(x, group.rows.len(), prefix);
        }
        x
    }

    /// `[rows, embed_dim]` → `[rows, h]`
    fn project(&self, frames: Buffer) -> Buffer {
        match &self.input_proj {
            Some(input_proj) => input_proj.forward(frames.view()),
            None => frames,
        }
    }

    /// What stands in front of the frames in each block.
    fn prefixes(&self) -> &[Prefix] {
        self.prefixes.get(|| self.pass_meta_tokens().0)
    }

    /// Takes the meta tokens through the blocks, as a batch of one sequence in which everything is seen. Returns what they
    /// leave in front of the frames in each block, and what the way back reads; of the latter nothing where there are no
    /// tokens.
    fn pass_meta_tokens(&self) -> (Vec<Prefix>, Vec<BlockCache>) {
        let none = Prefix::none(&self.options);
        let mut tokens = self.meta_tokens.as_ref().map(Buffer::copy_of);
        let (mut prefixes, mut caches) = (Vec::new(), Vec::new());
        for block in &self.blocks {
            let Some(x) = tokens.take() else {
                prefixes.push(block.prefix(None, &self.options));
                continue;
            };
            let (y, cache, state) = block.forward_train(x, 1, &none);
            prefixes.push(block.prefix(Some((&cache, state)), &self.options));
            caches.push(cache);
            tokens = Some(y);
        }
        (prefixes, caches)
    }
}

impl fmt::Debug for Hymba {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Hymba");
        f.field("options", &self.options).field("parameters", &self.num_parameters()).finish()
    }
}

/// Rows of a batch that one thread takes through the model, the longest of which has `l` frames.
#[derive(Clone, Copy)]
struct Group<'a> {
    rows: &'a [usize],
    l: usize,
}

/// The sequences of a group, one after the other, zero from their end on: what fills up a row has no influence at all.
fn gather(x: &ArrayRef3<f32>, group: Group, lengths: &[usize]) -> Buffer {
    let mut frames = Buffer::zeros((group.rows.len() * group.l, x.dim().2));
    for (i, &row) in group.rows.iter().enumerate() {
        let first = i * group.l;
        frames.slice_mut(s![first..first + lengths[row], ..]).assign(&x.slice(s![row, ..lengths[row], ..]));
    }
    frames
}

/// `[b, l, h]` → `[b·l, h]`
fn rows(x: &Array3<f32>) -> Buffer {
    let (batch, l, h) = x.dim();
    x.to_shape((batch * l, h)).expect("the same numbers").into_owned().into()
}

/// One length for each row, from 1 to l.
fn check_lengths(lengths: &[usize], batch: usize, l: usize) -> Result<()> {
    if lengths.len() != batch {
        let advice = format!("{} lengths for a batch of {batch}; give one for each row", lengths.len());
        return Err(Error::Lengths(advice));
    }
    if let Some(row) = lengths.iter().position(|length| !(1..=l).contains(length)) {
        let length = lengths[row];
        return Err(Error::Lengths(format!(
            "lengths[{row}] = {length}, but it must be from 1 to {l}, the padded length"
        )));
    }
    Ok(())
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
