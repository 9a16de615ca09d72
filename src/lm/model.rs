//! The language model: embedding, layers, head.

use std::fmt;

use ndarray::{Array2, Array3, ArrayRef, ArrayRef2, Dimension, s};

use super::block::{Block, RmsNorm};
use super::cache::KvStorage;
use super::config::HymbaLmConfig;
use super::files::{Arithmetic, LoadOptions};
use super::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};
use super::pass::{Pass, row_blocks};
use super::rope::Rotary;
use super::state::{LmState, RowState};
use crate::kernels::matmul::{Out, Rows};
use crate::kernels::matrix::{Matrix, Storage};
use crate::kernels::team::{Team, with_team};
use crate::layers::{Buffer, Derived, flat, flat_mut};
use crate::model::next_id;
use crate::{Error, Result};

/// Tokens that pass through the layers together, at most. Their activations take about 60 MB in the 1.5B model.
const MOST_TOKENS: usize = 512;

/// NVIDIA's Hymba language model (`HymbaForCausalLM`), of any size, on the CPU.
///
/// Token ids in, logits of the next token out. In front of every row stand the model's meta tokens, which it adds itself. Big
/// matrices stay in memory in the type they have in the file (bf16 in NVIDIA's), or in 8 or 4 bits
/// ([`LoadOptions::quantize`](super::LoadOptions::quantize)), and are widened inside the products; all arithmetic is f32 but
/// for the products with 8 and 4 bits, and those with bf16 if
/// [`LoadOptions::arithmetic`](super::LoadOptions::arithmetic) says so.
///
/// ```no_run
/// # fn main() -> hymba::Result<()> {
/// use std::ops::ControlFlow;
/// use hymba::{GenerateOptions, HymbaLm};
///
/// let lm = HymbaLm::from_dir("Hymba-1.5B-Base")?;
/// let prompt = [1, 450, 7483, 310, 3444, 338]; // "The capital of France is"
/// let generated = lm.generate(&prompt, &GenerateOptions::default().max_tokens(8), |token| {
///     println!("{token}");
///     ControlFlow::Continue(())
/// })?;
/// assert!(generated.ids.len() <= 8);
/// # Ok(())
/// # }
/// ```
///
/// Where the published code contradicts itself, this one follows what the weights were trained with: a token in a windowed layer
/// sees the meta tokens, itself and `sliding_window` tokens before it, in prompts and in decoding alike. So decoding token by
/// token, feeding a prompt in pieces of any size and one pass over everything agree, and rows of a batch are each what they would
/// be alone, bit for bit, for any number of threads.
pub struct HymbaLm {
    config: HymbaLmConfig,
    /// `[V, H]`
    embedding: Matrix,
    /// `[M, H]`
    meta_tokens: Array2<f32>,
    blocks: Vec<Block>,
    final_norm: RmsNorm,
    /// `[V, H]`; without it the embedding serves.
    head: Option<Matrix>,
    rotary: Option<Rotary>,
    kv_storage: KvStorage,
    /// A row that has seen the meta tokens.
    prefix: Derived<RowState>,
    /// Tells models with other weights apart.
    pub(super) id: u64,
}

/// Takes the logits after a token: its row, its place in the row, and the logits.
pub(super) type Sink<'a> = dyn FnMut(usize, usize, &mut [f32]) -> Result<()> + Send + 'a;

/// What goes into a pass for one row.
#[derive(Clone, Copy)]
enum Input<'a> {
    Ids(&'a [u32]),
    MetaTokens,
}

/// The residual stream of one row of tokens: see [`HymbaLm::inspect`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LmInspection {
    /// The input of each layer, and at the end the output of the final norm, each `[M + l, H]` with the meta tokens in front.
    pub hidden_states: Vec<Array2<f32>>,
}

impl HymbaLm {
    /// A model of a validated configuration with all parameters zero.
    pub(super) fn zeros(config: HymbaLmConfig, options: &LoadOptions, storage: &dyn Fn(&str) -> Storage) -> Self {
        let (v, h) = (config.vocab_size, config.hidden_size);
        let mut lm = HymbaLm {
            embedding: Matrix::zeros(v, h, storage(EMBEDDING)),
            meta_tokens: Array2::zeros((config.num_memory_tokens, h)),
            blocks: (0..config.num_hidden_layers).map(|layer| Block::zeros(&config, layer, storage)).collect(),
            final_norm: RmsNorm::zeros(h, &config),
            head: (!config.tie_word_embeddings).then(|| Matrix::zeros(v, h, storage(HEAD))),
            rotary: config.rope_base().map(|base| Rotary::new(config.key_width(), base)),
            kv_storage: options.kv_storage,
            prefix: Derived::new(),
            id: next_id(),
            config,
        };
        lm.visit_mut(&mut |_, parameter| {
            if let ParameterMut::Matrix(matrix) = parameter {
                matrix.set_rounds_inputs(options.arithmetic == Arithmetic::Bf16);
            }
        });
        lm
    }

    /// What the checkpoint says of itself.
    pub fn config(&self) -> &HymbaLmConfig {
        &self.config
    }

    /// The number of parameters.
    pub fn num_parameters(&self) -> usize {
        let mut count = 0;
        self.visit(&mut |_, parameter| count += parameter.len());
        count
    }

    /// Bytes of memory that the parameters take.
    pub fn num_bytes(&self) -> usize {
        let mut bytes = 0;
        self.visit(&mut |_, parameter| {
            bytes += match parameter {
                Parameter::Matrix(matrix) => matrix.num_bytes(),
                Parameter::Numbers(numbers) => numbers.len() * size_of::<f32>(),
            }
        });
        bytes
    }

    /// A state for `batch` rows that have seen nothing but the meta tokens. What those leave behind is computed at the first
    /// call and kept.
    ///
    /// So many rows that they do not fit into memory give a state without rows, which is refused wherever it is used.
    pub fn new_state(&self, batch: usize) -> LmState {
        let prefix = self.prefix();
        let bytes = batch.checked_mul(prefix.num_bytes() + size_of_val(prefix));
        let fits = bytes.is_some_and(|bytes| Vec::<u8>::new().try_reserve_exact(bytes).is_ok());
        LmState { model: self.id, rows: vec![prefix.clone(); if fits { batch } else { 0 }] }
    }

    /// The logits after every token: ids `[b, l]` → `[b, l, vocab_size]`.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if b or l is 0, an id is not in the vocabulary, or the logits do not fit into memory
    /// ([`prefill`](Self::prefill) returns only the last ones).
    pub fn forward(&self, ids: &ArrayRef2<u32>) -> Result<Array3<f32>> {
        let rows = self.rows_of(ids)?;
        let (batch, l) = ids.dim();
        let mut logits = array3((batch, l, self.config.vocab_size))?;
        let mut state = self.new_state(batch);
        self.advance(&rows, &mut state, &vec![0; batch], &mut |row, i, new| {
            logits.slice_mut(s![row, i, ..]).assign(&ndarray::ArrayView1::from(&*new));
            Ok(())
        })?;
        Ok(logits)
    }

    /// Feeds tokens, the same number for each row of the state: ids `[b, l]` → the logits after the last `[b, vocab_size]`.
    ///
    /// A prompt may be fed in one call or in several.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if l is 0 or an id is not in the vocabulary, [`Error::State`] if the state is of another batch size or
    /// of another model. The state is then untouched.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    /// use hymba::ndarray::{arr1, arr2};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let mut state = lm.new_state(1);
    /// lm.prefill(&arr2(&[[1, 2, 3]]), &mut state)?;
    /// let logits = lm.step(&arr1(&[4]), &mut state)?;
    /// assert_eq!(logits.dim(), (1, 50));
    /// assert_eq!(state.lengths(), [4]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn prefill(&self, ids: &ArrayRef2<u32>, state: &mut LmState) -> Result<Array2<f32>> {
        self.prefill_ragged(&self.rows_of(ids)?, state)
    }

    /// Feeds rows of different lengths, each of at least one token → the logits after the last token of each
    /// `[b, vocab_size]`. Each row gets what it would get alone.
    ///
    /// # Errors
    ///
    /// Those of [`prefill`](Self::prefill).
    pub fn prefill_ragged<T: AsRef<[u32]>>(&self, rows: &[T], state: &mut LmState) -> Result<Array2<f32>> {
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        if let Some(row) = rows.iter().position(|row| row.is_empty()) {
            return Err(Error::Tokens(format!(
                "row {row} has none; give at least one, such as the beginning-of-text token"
            )));
        }
        let mut logits = Array2::zeros((rows.len(), self.config.vocab_size));
        let last: Vec<_> = rows.iter().map(|row| row.len() - 1).collect();
        self.advance(&rows, state, &last, &mut |row, _, new| {
            logits.row_mut(row).assign(&ndarray::ArrayView1::from(&*new));
            Ok(())
        })?;
        Ok(logits)
    }

    /// Feeds one token for each row: ids `[b]` or `[b, 1]` → the logits after it `[b, vocab_size]`.
    ///
    /// # Errors
    ///
    /// Those of [`prefill`](Self::prefill).
    pub fn step<D: Dimension>(&self, ids: &ArrayRef<u32, D>, state: &mut LmState) -> Result<Array2<f32>> {
        let rows: Vec<[u32; 1]> = ids.iter().map(|&id| [id]).collect();
        self.prefill_ragged(&rows, state)
    }

    /// What one row of tokens looks like between the layers. For people who compare with another implementation.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if there are none or an id is not in the vocabulary.
    pub fn inspect(&self, ids: &[u32]) -> Result<LmInspection> {
        self.check(&[ids], None)?;
        let mut state = self.empty_row(self.kv_storage);
        let team = Team::alone();
        let mut parts = Vec::new();
        for input in [Input::MetaTokens, Input::Ids(ids)] {
            let mut trace = Vec::new();
            let x = self.pass(&team, vec![(&mut state, input)], Some(&mut trace));
            let mut last = Array2::zeros(x.dim());
            self.final_norm.rows(flat(&x), 1.0, flat_mut(&mut last), Out::Set);
            trace.push(last);
            parts.push(trace);
        }
        let join = |(meta, ids): (&Array2<f32>, &Array2<f32>)| {
            ndarray::concatenate(ndarray::Axis(0), &[meta.view(), ids.view()]).expect("rows of one width")
        };
        Ok(LmInspection { hidden_states: parts[0].iter().zip(&parts[1]).map(join).collect() })
    }

    fn rows_of(&self, ids: &ArrayRef2<u32>) -> Result<Vec<Vec<u32>>> {
        let (batch, l) = ids.dim();
        if batch == 0 || l == 0 {
            return Err(Error::Tokens(format!("an array of shape [{batch}, {l}] has none; both must be at least 1")));
        }
        Ok(ids.rows().into_iter().map(|row| row.to_vec()).collect())
    }

    /// All that users can get wrong.
    pub(super) fn check(&self, rows: &[impl AsRef<[u32]>], state: Option<&LmState>) -> Result<()> {
        let vocabulary = self.config.vocab_size;
        for (i, row) in rows.iter().enumerate() {
            if let Some(id) = row.as_ref().iter().find(|id| **id as usize >= vocabulary) {
                return Err(Error::Tokens(format!(
                    "id {id} in row {i} is not in the vocabulary of {vocabulary}; is it another model's tokenizer?"
                )));
            }
        }
        let Some(state) = state else {
            return Ok(());
        };
        if state.model != self.id {
            return Err(Error::State(
                "another model made it; make one with new_state, or read one with load_state".into(),
            ));
        }
        if state.rows.len() != rows.len() {
            return Err(Error::State(format!(
                "it holds {} rows, and there are tokens for {}; make one with new_state({})",
                state.rows.len(),
                rows.len(),
                rows.len()
            )));
        }
        Ok(())
    }

    /// Feeds tokens to each row, perhaps none, and hands out the logits after the tokens from `first` on (one entry a row), those of
    /// a row in order.
    pub(super) fn advance(
        &self,
        rows: &[impl AsRef<[u32]>],
        state: &mut LmState,
        first: &[usize],
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        self.check(rows, Some(state))?;
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        let tokens: usize = rows.iter().map(|row| row.len()).sum();
        with_team(tokens.saturating_mul(self.num_parameters()), |team| {
            let mut done = vec![0; rows.len()];
            loop {
                // Pieces end at multiples of MOST_TOKENS of their own row, whatever the others do: so a row's numbers do not
                // depend on its company.
                let mut pieces = Vec::new();
                let mut total = 0;
                for (row, state) in state.rows.iter_mut().enumerate() {
                    let left = &rows[row][done[row]..];
                    let piece = &left[..left.len().min(MOST_TOKENS)];
                    if !piece.is_empty() && (total == 0 || total + piece.len() <= MOST_TOKENS) {
                        total += piece.len();
                        pieces.push((row, state, piece));
                    }
                }
                if pieces.is_empty() {
                    return Ok(());
                }
                let wanted: Vec<_> = pieces
                    .iter()
                    .scan(0, |start, (row, _, piece)| {
                        let offset = *start;
                        *start += piece.len();
                        let from = first[*row].saturating_sub(done[*row]).min(piece.len());
                        Some((from..piece.len()).map(move |i| (*row, i, offset + i)))
                    })
                    .flatten()
                    .map(|(row, i, at)| (row, done[row] + i, at))
                    .collect();
                pieces.iter().for_each(|(row, _, piece)| done[*row] += piece.len());
                let inputs = pieces.into_iter().map(|(_, state, piece)| (state, Input::Ids(piece))).collect();
                let x = self.pass(team, inputs, None);
                let mut logits = self.logits(team, &x, &wanted);
                for ((row, i, _), mut logits) in wanted.into_iter().zip(logits.rows_mut()) {
                    sink(row, i, logits.as_slice_mut().expect("a row of an array in standard layout"))?;
                }
            }
        })
    }

    /// The logits `[wanted, vocab_size]` after some rows of x.
    fn logits(&self, team: &Team, x: &Buffer, wanted: &[(usize, usize, usize)]) -> Buffer {
        let (count, h) = (wanted.len(), self.config.hidden_size);
        let places: Vec<_> = wanted.iter().map(|(_, _, at)| *at).collect();
        let x = x.rows_at(&places);
        let mut normal = Buffer::any((count, h));
        self.final_norm.rows(flat(&x), 1.0, flat_mut(&mut normal), Out::Set);
        let mut logits = Buffer::any((count, self.config.vocab_size));
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        head.multiply(team, Rows { data: flat(&normal), stride: h }, count, flat_mut(&mut logits), Out::Set);
        logits
    }

    /// Sends tokens through all layers → `[tokens, H]`, before the final norm. `trace` gets the input of each layer.
    fn pass(&self, team: &Team, rows: Vec<(&mut RowState, Input)>, mut trace: Option<&mut Vec<Array2<f32>>>) -> Buffer {
        let h = self.config.hidden_size;
        let count = |input: &Input| match input {
            Input::Ids(ids) => ids.len(),
            Input::MetaTokens => self.meta_tokens.nrows(),
        };
        let mut x = Buffer::any((rows.iter().map(|(_, input)| count(input)).sum(), h));
        let mut sources = Vec::new();
        for (_, input) in &rows {
            match input {
                Input::Ids(ids) => sources.extend(ids.iter().map(|id| Ok(*id as usize))),
                Input::MetaTokens => sources.extend((0..self.meta_tokens.nrows()).map(Err)),
            }
        }
        team.for_each(row_blocks(flat_mut(&mut x), h), |(first, block)| {
            for (source, row) in sources[first..].iter().zip(block.chunks_exact_mut(h)) {
                match *source {
                    Ok(id) => self.embedding.row(id, row),
                    Err(meta) => row.copy_from_slice(flat(&self.meta_tokens.row(meta))),
                }
            }
        });
        let states = rows.into_iter().map(|(state, input)| (state, count(&input))).collect();
        let mut pass = Pass::new(team, states, self.rotary.as_ref());
        for block in &self.blocks {
            if let Some(trace) = &mut trace {
                trace.push(x.to_owned());
            }
            block.forward(&mut pass, flat_mut(&mut x));
        }
        pass.finish();
        x
    }

    pub(super) fn kv_storage(&self) -> KvStorage {
        self.kv_storage
    }

    /// A row that has seen nothing at all.
    pub(super) fn empty_row(&self, storage: KvStorage) -> RowState {
        let layers = self.blocks.iter().map(|block| block.new_state(storage)).collect();
        RowState { position: 0, meta: self.meta_tokens.nrows(), layers }
    }

    /// A row that has seen the meta tokens.
    pub(super) fn prefix(&self) -> &RowState {
        self.prefix.get(|| {
            let mut row = self.empty_row(self.kv_storage);
            let count = self.meta_tokens.nrows();
            if count > 0 {
                with_team(count.saturating_mul(self.num_parameters()), |team| {
                    self.pass(team, vec![(&mut row, Input::MetaTokens)], None);
                });
            }
            row
        })
    }

    pub(super) fn visit<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        f(EMBEDDING, Parameter::Matrix(&self.embedding));
        f("model.memory_tokens", Parameter::Numbers(self.meta_tokens.view().into_dyn()));
        self.blocks.iter().for_each(|block| block.visit(f));
        f("model.final_layernorm.weight", Parameter::Numbers(self.final_norm.weight.view().into_dyn()));
        if let Some(head) = &self.head {
            f(HEAD, Parameter::Matrix(head));
        }
    }

    pub(super) fn visit_mut<'a>(&'a mut self, f: &mut VisitorMut<'_, 'a>) {
        self.prefix.forget();
        f(EMBEDDING, ParameterMut::Matrix(&mut self.embedding));
        f("model.memory_tokens", ParameterMut::Numbers(self.meta_tokens.view_mut().into_dyn()));
        self.blocks.iter_mut().for_each(|block| block.visit_mut(f));
        f("model.final_layernorm.weight", ParameterMut::Numbers(self.final_norm.weight.view_mut().into_dyn()));
        if let Some(head) = &mut self.head {
            f(HEAD, ParameterMut::Matrix(head));
        }
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
/// Of tied checkpoints only where somebody saved it all the same.
pub(super) const HEAD: &str = "lm_head.weight";

/// Zeros, if there is room for them.
fn array3(dim: (usize, usize, usize)) -> Result<Array3<f32>> {
    let count = dim.0.checked_mul(dim.1).and_then(|count| count.checked_mul(dim.2));
    let mut numbers = Vec::new();
    match count.filter(|&count| numbers.try_reserve_exact(count).is_ok()) {
        Some(count) => {
            numbers.resize(count, 0.0);
            Ok(Array3::from_shape_vec(dim, numbers).expect("as many numbers as the shape has"))
        }
        None => {
            Err(Error::Tokens(format!("logits of shape {dim:?} do not fit into memory; prefill returns the last ones")))
        }
    }
}

impl fmt::Debug for HymbaLm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("HymbaLm");
        f.field("parameters", &self.num_parameters()).field("bytes", &self.num_bytes()).field("config", &self.config);
        f.finish()
    }
}
