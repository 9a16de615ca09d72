//! The model: what users build, run and stream. Everything a user hands over is checked here and nowhere below.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::{Array2, Array3, ArrayRef3, ArrayViewD, ArrayViewMutD, s};
use rand::SeedableRng;

use crate::block::{BlockCache, BlockInspection, HymbaBlock, Prefix, sequences};
use crate::kernels::parallel;
use crate::layers::{Buffer, Derived, LayerNorm, Linear, Rng, init_meta_tokens};
use crate::{Error, HymbaOptions, Result};

mod streaming;
mod training;

pub use streaming::HymbaState;
pub use training::TrainCache;

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
    /// Builds a model with new random weights, drawn from the seed in the options by a generator that gives the same numbers on
    /// every machine.
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
                let frames = self.run(x, group, &lengths, None);
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

    /// What every block does to x `[b, l, embed_dim]`: the two branches, the gate that mixes them, and the attention
    /// weights. For looking at, not for speed: it holds l·(k + l) weights for each head, block and row.
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
        let (batch, l) = self.check_input(x)?;
        let HymbaOptions { num_layers, num_heads, num_meta_tokens, .. } = self.options;
        let factors = [num_layers, batch, num_heads, l, num_meta_tokens.saturating_add(l)];
        let weights = factors.into_iter().try_fold(1, usize::checked_mul);
        if weights.is_none_or(|weights| Vec::<f32>::new().try_reserve_exact(weights).is_err()) {
            return Err(Error::Shape {
                argument: "x",
                expected: "a shorter or smaller batch: its attention weights do not fit into memory".into(),
                given: x.shape().to_vec(),
            });
        }
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
                let last: Vec<usize> =
                    group.rows.iter().enumerate().map(|(i, &row)| i * group.l + lengths[row] - 1).collect();
                let frames = self.run(x, *group, lengths, Some(&last));
                self.final_norm.forward(frames.view())
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

    /// The sequences of a group through all blocks: `[rows·l, h]`, before the final norm, or `only` some rows of that.
    fn run(&self, x: &ArrayRef3<f32>, group: Group, lengths: &[usize], only: Option<&[usize]>) -> Buffer {
        let mut x = self.project(gather(x, group, lengths));
        let (batch, last) = (group.rows.len(), self.blocks.len() - 1);
        for (i, (block, prefix)) in self.blocks.iter().zip(self.prefixes()).enumerate() {
            x = match only {
                Some(rows) if i == last => block.forward_rows(&x, batch, prefix, rows),
                _ => block.forward(x, batch, prefix),
            };
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
pub(crate) fn check_lengths(lengths: &[usize], batch: usize, l: usize) -> Result<()> {
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

pub(crate) fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
