//! The language model: embedding, layers, head.

mod pass;
mod walk;

use std::fmt;
use std::ops::ControlFlow;

use ndarray::{Array2, Array3, ArrayRef, ArrayRef2, Dimension, s};

use self::pass::{Input, MOST_TOKENS};
use super::arrays::{dim_of, rows_of, zeros};
use super::block::Block;
use super::config::HymbaLmConfig;
use super::load_options::{Arithmetic, LoadOptions};
use super::names::{EMBEDDING, HEAD};
use super::state::LmState;
use crate::kernels::matmul::Storage;
use crate::kernels::memory::fits;
use crate::kernels::rows::Out;
use crate::kernels::team::{Team, with_team};
use crate::layers::{Embedding, KvStorage, Lazy, Linear, RmsNorm, Rotary, SequenceState, Weight};
use crate::lora::Adapters;
use crate::parameters::{ParameterMut, next_id};
use crate::{Error, Result};

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
    pub(super) embedding: Embedding,
    /// `[M, H]`
    pub(super) meta_tokens: Array2<f32>,
    pub(super) blocks: Vec<Block>,
    pub(super) final_norm: RmsNorm,
    /// `[V, H]`; without it the embedding serves.
    pub(super) head: Option<Linear>,
    pub(super) rotary: Option<Rotary>,
    kv_storage: KvStorage,
    /// Whether training keeps less and computes more.
    pub(super) recompute: bool,
    pub(super) adapters: Adapters<Cached>,
    /// Whether its matrices could be trained before it had adapters, and can again without.
    pub(super) frozen: bool,
    /// The `config.json` it was read with.
    pub(super) source: Option<String>,
    /// Counted once: every step asks for it.
    num_parameters: usize,
    pub(super) cached: Cached,
}

/// Values computed from the weights, and an id for them. The default is for new weights.
pub(crate) struct Cached {
    /// A row that has seen the meta tokens.
    prefix: Lazy<SequenceState>,
    /// Identifies this set of weights.
    pub(super) id: u64,
}

impl Default for Cached {
    fn default() -> Self {
        Cached { prefix: Lazy::new(), id: next_id() }
    }
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
    /// `storage` says how a matrix is stored; one of `None` can be trained.
    pub(super) fn zeros(
        config: HymbaLmConfig,
        options: &LoadOptions,
        storage: &dyn Fn(&str) -> Option<Storage>,
    ) -> Self {
        let (v, h) = (config.vocab_size, config.hidden_size);
        let mut lm = HymbaLm {
            embedding: Embedding::new(Weight::new(v, h, storage(EMBEDDING))),
            meta_tokens: Array2::zeros((config.num_memory_tokens, h)),
            blocks: (0..config.num_hidden_layers).map(|layer| Block::zeros(&config, layer, storage)).collect(),
            final_norm: RmsNorm::zeros(h, config.rms_norm_eps as f32),
            head: (!config.tie_word_embeddings).then(|| Linear::with_weight(Weight::new(v, h, storage(HEAD)), false)),
            rotary: config.rope_base().map(|base| Rotary::new(config.key_width(), base)),
            kv_storage: options.kv_storage,
            recompute: false,
            adapters: Adapters::default(),
            frozen: false,
            source: None,
            num_parameters: 0,
            cached: Cached::default(),
            config,
        };
        let mut num_parameters = 0;
        lm.walk_mut(&mut |_, parameter| {
            num_parameters += parameter.len();
            if let ParameterMut::Stored(matrix) = parameter {
                matrix.set_rounds_inputs(options.arithmetic == Arithmetic::Bf16);
            }
        });
        lm.num_parameters = num_parameters;
        lm
    }

    /// The configuration of the checkpoint, changed where the options or its tensors say otherwise: see
    /// [`quantization`](HymbaLmConfig::quantization), [`torch_dtype`](HymbaLmConfig::torch_dtype) and
    /// [`tie_word_embeddings`](HymbaLmConfig::tie_word_embeddings).
    pub fn config(&self) -> &HymbaLmConfig {
        &self.config
    }

    /// The number of parameters, without those of adapters.
    pub fn num_parameters(&self) -> usize {
        self.num_parameters
    }

    /// Bytes of memory that the parameters take.
    pub fn num_bytes(&self) -> usize {
        let mut bytes = self.adapters.num_bytes();
        self.visit(&mut |_, parameter| {
            bytes += parameter.num_bytes();
        });
        bytes
    }

    /// A state for `batch` rows that have seen nothing but the meta tokens. The state after them is computed at the
    /// first call and kept.
    ///
    /// A row takes, in each layer, 4·E·(N + 3) bytes for the Mamba branch and, in layers with keys and values of their own,
    /// heads · (key + value width) · 4 bytes (2 with [`KvStorage::Bf16`]) per token: for the meta tokens from the start, for
    /// others as they are fed, in windowed layers at most `sliding_window + 1` of them. In the 1.5B model that is 16 MB to begin
    /// with, 65 kB per token up to the window, and 12 kB per token, those of the three global layers, from then on.
    ///
    /// If the rows do not fit into memory the state is empty, and every call that takes it returns an error.
    pub fn new_state(&self, batch: usize) -> LmState {
        let prefix = self.prefix();
        let fits = batch.checked_mul(prefix.footprint()).is_some_and(fits);
        LmState {
            model: self.cached.id,
            meta: self.meta_tokens.nrows(),
            rows: vec![prefix.clone(); if fits { batch } else { 0 }],
        }
    }

    /// The logits after every token: ids `[b, l]` → `[b, l, vocab_size]`.
    ///
    /// Every id counts, padding included: rows of different lengths, on whichever side they were filled up, are for
    /// [`prefill_ragged`](Self::prefill_ragged), or for a call each.
    ///
    /// It takes 4·`vocab_size` bytes per token for the logits, what [`new_state`](Self::new_state) says per row and token, and
    /// besides that no more for long rows than for 512 tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if b or l is 0, an id is not in the vocabulary, or the logits or the state of so many rows do not fit
    /// into memory ([`prefill`](Self::prefill) returns only the last logits).
    pub fn forward(&self, ids: &ArrayRef2<u32>) -> Result<Array3<f32>> {
        let (batch, l) = dim_of(ids)?;
        let vocabulary = self.config.vocab_size;
        let mut logits = zeros((batch, l, vocabulary), "logits")?;
        let mut state = self.new_state(batch);
        if state.batch() < batch {
            return Err(Error::Tokens(format!(
                "the state of {batch} rows does not fit into memory; give fewer at a time"
            )));
        }
        let mut copy = Vec::new();
        let rows = rows_of(ids, &mut copy)?;
        self.advance(&rows, &mut state, &vec![0; batch], &mut |row, i, new| {
            logits.slice_mut(s![row, i, ..]).assign(&ndarray::ArrayView1::from(&*new));
            Ok(())
        })?;
        Ok(logits)
    }

    /// Feeds tokens, the same number for each row of the state: ids `[b, l]` → the logits after the last `[b, vocab_size]`.
    ///
    /// A prompt may be fed in one call or in several. Every id counts, padding included: it goes into the state like any
    /// other. Rows of different lengths are for [`prefill_ragged`](Self::prefill_ragged).
    ///
    /// The state grows as [`new_state`](Self::new_state) says; the call itself takes no more for long prompts than for 512 tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if b or l is 0, an id is not in the vocabulary, or the logits do not fit into memory,
    /// [`Error::State`] if the state is of another batch size or of another model. The state is then untouched.
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
        let (batch, _) = dim_of(ids)?;
        self.check_state(batch, state)?;
        let mut copy = Vec::new();
        self.prefill_ragged(&rows_of(ids, &mut copy)?, state)
    }

    /// Feeds rows of different lengths, each of at least one token and none of them padding → the logits after the last token of
    /// each `[b, vocab_size]`. Each row gets what it would get alone.
    ///
    /// # Errors
    ///
    /// Those of [`prefill`](Self::prefill).
    pub fn prefill_ragged<T: AsRef<[u32]>>(&self, rows: &[T], state: &mut LmState) -> Result<Array2<f32>> {
        let logits = self.prefill_with(rows, state, |_, _| ControlFlow::Continue(()))?;
        Ok(logits.expect("nobody has ended it"))
    }

    /// As [`prefill_ragged`](Self::prefill_ragged), with progress: `on_progress` is called after each piece of at most 512 tokens with
    /// the number done, of all rows, and the total, and ends the call with [`ControlFlow::Break`]. The result is then
    /// `None`, and the state has seen what was done until then: [`LmState::lengths`] says how much of each row. It can go on from
    /// there with the rest of each row; rows that are done have none, and are first taken out by [`LmState::select`]. Clone the
    /// state before, if you want to go back.
    ///
    /// # Errors
    ///
    /// Those of [`prefill`](Self::prefill).
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # config.num_hidden_layers = 2;
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let (prompt, mut state) = (vec![7; 700], lm.new_state(1));
    /// let logits = lm.prefill_with(&[&prompt], &mut state, |done, of| {
    ///     println!("{done} of {of} tokens");
    ///     ControlFlow::Break(()) // somebody has left
    /// })?;
    /// assert!(logits.is_none());
    /// assert_eq!(state.lengths(), [512]);
    ///
    /// let rest = lm.prefill_with(&[&prompt[512..]], &mut state, |_, _| ControlFlow::Continue(()))?;
    /// assert_eq!(rest, Some(lm.prefill_ragged(&[&prompt], &mut lm.new_state(1))?));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn prefill_with<T: AsRef<[u32]>>(
        &self,
        rows: &[T],
        state: &mut LmState,
        mut on_progress: impl FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Option<Array2<f32>>> {
        self.check_state(rows.len(), state)?;
        let rows: Vec<&[u32]> = rows.iter().map(AsRef::as_ref).collect();
        if let Some(row) = rows.iter().position(|row| row.is_empty()) {
            return Err(Error::Tokens(format!(
                "row {row} has none; give at least one, such as the beginning-of-text token"
            )));
        }
        let mut logits = zeros((rows.len(), self.config.vocab_size), "logits")?;
        let last: Vec<_> = rows.iter().map(|row| row.len() - 1).collect();
        let all = rows.iter().map(|row| row.len()).sum();
        let flow = self.advance_with(
            &rows,
            state,
            &last,
            &mut |row, _, new| {
                logits.row_mut(row).assign(&ndarray::ArrayView1::from(&*new));
                Ok(())
            },
            &mut |done| on_progress(done, all),
        )?;
        Ok(flow.is_continue().then_some(logits))
    }

    /// As [`prefill_ragged`](Self::prefill_ragged), with the logits of more or fewer tokens: `on_logits` gets the row,
    /// the place of a token in it, and the logits after that token, for the tokens of row i from `first[i]` on, in
    /// order. A `first[i]` at the end of the row asks for none. Rows may be empty, and are then left as they are.
    ///
    /// So some rows can decode their next token while others read a part of their prompt.
    ///
    /// # Errors
    ///
    /// Those of [`prefill`](Self::prefill), and [`Error::Tokens`] if `first` is not as long as `rows`. The state is then untouched.
    ///
    /// ```
    /// # use hymba::HymbaLm;
    /// # use hymba::lm::{HymbaLmConfig, LoadOptions, log_prob};
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let (text, mut total) = ([1, 2, 3, 4], 0.0);
    /// lm.prefill_each(&[&text[..3]], &mut lm.new_state(1), &[0], |_row, i, logits| {
    ///     total += f64::from(log_prob(logits, text[i + 1]).unwrap_or_default());
    /// })?;
    /// assert_eq!(total, lm.log_likelihood(&text[..1], &text[1..])?.total);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn prefill_each<T: AsRef<[u32]>>(
        &self,
        rows: &[T],
        state: &mut LmState,
        first: &[usize],
        mut on_logits: impl FnMut(usize, usize, &[f32]) + Send,
    ) -> Result<()> {
        if first.len() != rows.len() {
            let (first, rows) = (first.len(), rows.len());
            return Err(Error::Tokens(format!("there are {first} first tokens for {rows} rows; give one for each")));
        }
        self.advance(rows, state, first, &mut |row, i, logits| {
            on_logits(row, i, logits);
            Ok(())
        })
    }

    /// Feeds one token for each row: ids `[b]` or `[b, 1]` → the logits after it `[b, vocab_size]`.
    ///
    /// # Errors
    ///
    /// Those of [`prefill`](Self::prefill).
    pub fn step<D: Dimension>(&self, ids: &ArrayRef<u32, D>, state: &mut LmState) -> Result<Array2<f32>> {
        self.check_state(ids.len(), state)?;
        let rows: Vec<[u32; 1]> = ids.iter().map(|&id| [id]).collect();
        self.prefill_ragged(&rows, state)
    }

    /// The residual stream of one row of tokens between the layers, to compare with another implementation.
    ///
    /// # Errors
    ///
    /// [`Error::Tokens`] if there are none, an id is not in the vocabulary, or the hidden states do not fit into memory: they are
    /// 4·H bytes per token and layer.
    pub fn inspect(&self, ids: &[u32]) -> Result<LmInspection> {
        if ids.is_empty() {
            return Err(Error::Tokens("there are none; give at least one, such as the beginning-of-text token".into()));
        }
        self.check_ids(&[ids])?;
        let (total, h) = (self.meta_tokens.nrows() + ids.len(), self.config.hidden_size);
        let states = (0..=self.blocks.len()).map(|_| zeros((total, h), "hidden states"));
        let mut hidden_states: Vec<Array2<f32>> = states.collect::<Result<_>>()?;
        let mut row = self.empty_row(self.kv_storage);
        let team = Team::alone();
        let mut first = 0;
        for input in self.meta_pieces().chain(ids.chunks(MOST_TOKENS).map(Input::Ids)) {
            let mut trace = Vec::new();
            let x = self.pass(&team, vec![(&mut row, input)], false, Some(&mut trace));
            let mut last = Array2::zeros(x.dim());
            self.final_norm.forward(&team, x.view(), 1.0, &mut last, Out::Set);
            trace.push(last);
            for (states, piece) in hidden_states.iter_mut().zip(&trace) {
                states.slice_mut(s![first..first + input.len(), ..]).assign(piece);
            }
            first += input.len();
        }
        Ok(LmInspection { hidden_states })
    }

    /// Checks what users give: the ids, and the state.
    pub(super) fn check(&self, rows: &[impl AsRef<[u32]>], state: Option<&LmState>) -> Result<()> {
        self.check_ids(rows)?;
        state.map_or(Ok(()), |state| self.check_state(rows.len(), state))
    }

    pub(super) fn check_ids(&self, rows: &[impl AsRef<[u32]>]) -> Result<()> {
        let vocabulary = self.config.vocab_size;
        for (i, row) in rows.iter().enumerate() {
            if let Some(id) = row.as_ref().iter().find(|id| **id as usize >= vocabulary) {
                return Err(Error::Tokens(format!(
                    "id {id} in row {i} is not in the vocabulary of {vocabulary}; is it another model's tokenizer?"
                )));
            }
        }
        Ok(())
    }

    /// Checks that a state of this model has so many rows.
    fn check_state(&self, rows: usize, state: &LmState) -> Result<()> {
        if state.model != self.cached.id {
            return Err(Error::State(
                "another model made it; make one with new_state, or read one with load_state".into(),
            ));
        }
        if state.rows.len() != rows {
            return Err(Error::State(format!(
                "it holds {} rows, and there are tokens for {rows}; make one with new_state({rows})",
                state.rows.len(),
            )));
        }
        Ok(())
    }

    pub(super) fn kv_storage(&self) -> KvStorage {
        self.kv_storage
    }

    /// A row that has seen nothing at all.
    pub(super) fn empty_row(&self, storage: KvStorage) -> SequenceState {
        let layers = self.blocks.iter().map(|block| block.new_state(storage)).collect();
        SequenceState { position: 0, layers }
    }

    /// A row that has seen the meta tokens.
    pub(super) fn prefix(&self) -> &SequenceState {
        self.cached.prefix.get(|| {
            let mut row = self.empty_row(self.kv_storage);
            with_team(self.meta_tokens.nrows().saturating_mul(self.num_parameters()), |team| {
                for piece in self.meta_pieces() {
                    self.pass(team, vec![(&mut row, piece)], false, None);
                }
            });
            row
        })
    }
}

impl fmt::Debug for HymbaLm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("HymbaLm");
        f.field("parameters", &self.num_parameters()).field("bytes", &self.num_bytes()).field("config", &self.config);
        f.finish()
    }
}
