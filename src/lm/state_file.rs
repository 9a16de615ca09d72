//! States in files, to go on with a conversation later.

use std::io::Write;
use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::cache::{KvCache, KvStorage};
use super::config::HymbaLmConfig;
use super::model::HymbaLm;
use super::state::{LmState, RowState};
use crate::weights::float::Float;
use crate::weights::tensors::{MAX_TENSORS, Source};
use crate::weights::{VERSION, entry, header, write_streamed};
use crate::{Error, Result};

/// The metadata entry of a saved state.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    config: HymbaLmConfig,
    kv_storage: KvStorage,
    /// Tokens seen by each row, meta tokens included.
    positions: Vec<usize>,
}

/// More tokens than anybody feeds: positions in a file are not believed beyond it.
const MOST_TOKENS: usize = 1 << 40;

/// The name of a tensor.
fn name(row: usize, layer: usize, what: &str) -> String {
    format!("rows.{row}.layers.{layer}.{what}")
}

impl HymbaLm {
    /// Writes a state to a safetensors file, from which [`load_state`](Self::load_state) of the same model takes it up again.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if another model made the state or it has too many rows for a file; [`Error::Io`] when the file cannot
    /// be written; an old file is then untouched.
    ///
    /// ```
    /// # use hymba::HymbaLm;
    /// # use hymba::lm::{HymbaLmConfig, LoadOptions};
    /// # use hymba::ndarray::{arr1, arr2};
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("state");
    /// let mut state = lm.new_state(1);
    /// lm.prefill(&arr2(&[[1, 2, 3]]), &mut state)?;
    /// lm.save_state(&state, &path)?;
    /// let mut later = lm.load_state(&path)?;
    /// assert_eq!(lm.step(&arr1(&[4]), &mut later)?, lm.step(&arr1(&[4]), &mut state)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_state(&self, state: &LmState, path: impl AsRef<Path>) -> Result<()> {
        if state.model != self.id {
            return Err(Error::State("another model made it, and only that one can save it".into()));
        }
        let mut tensors = Vec::new();
        let mut numbers: Vec<Vec<f32>> = Vec::new();
        for (r, row) in state.rows.iter().enumerate() {
            for (l, layer) in row.layers.iter().enumerate() {
                let mamba = &layer.mamba;
                for (what, array) in [("conv", &mamba.conv), ("scan", &mamba.scan)] {
                    tensors.push((name(r, l, what), Dtype::F32, array.shape().to_vec()));
                    numbers.push(array.iter().copied().collect());
                }
                if let Some(kv) = &layer.kv {
                    for (what, kept) in ["keys", "values"].into_iter().zip(kv.kept()) {
                        tensors.push((name(r, l, what), dtype(kv.storage()), kept.shape().to_vec()));
                        numbers.push(kept.into_iter().collect());
                    }
                }
            }
        }
        if tensors.len() > MAX_TENSORS {
            return Err(Error::State(format!("it has {} rows, too many for one file; select some", state.rows.len())));
        }
        let saved = Saved {
            version: VERSION,
            config: self.config().clone(),
            kv_storage: self.kv_storage(),
            positions: state.rows.iter().map(|row| row.position).collect(),
        };
        let path = path.as_ref();
        let saved = serde_json::to_string(&saved).map_err(|error| Error::format(path, error.to_string()))?;
        let floats: Vec<_> = tensors.iter().map(|(_, dtype, _)| Float::of(*dtype)).collect();
        write_streamed(path, &tensors, &[("hymba", &saved)], &mut |i, file: &mut dyn Write| {
            let mut bytes = Vec::new();
            if let Some(float) = floats[i] {
                float.encode(&numbers[i], &mut bytes);
            }
            file.write_all(&bytes)
        })
    }

    /// Reads a state that [`save_state`](Self::save_state) wrote. The file need not be trusted.
    ///
    /// The configuration must be the same, and the keys of the meta tokens about the same: so a state of another model of
    /// the same sizes is noticed.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is damaged or hostile, [`Error::Tensors`] when it
    /// has other tensors than a state, [`Error::State`] when it belongs to another model.
    pub fn load_state(&self, path: impl AsRef<Path>) -> Result<LmState> {
        let (mut tensors, saved) = header::read(Source::open(path.as_ref())?)?;
        let Saved { config, kv_storage, positions, .. } = entry(saved, &tensors)?;
        // the same weights in fewer bits are the same model, here and below
        let config = HymbaLmConfig { quantization: self.config().quantization, ..config };
        if config != *self.config() {
            return Err(Error::State("the file holds one of a model with another configuration".into()));
        }
        let meta = config.num_memory_tokens;
        let layers = self.empty_row(kv_storage).layers;
        let of_a_row: usize = layers.iter().map(|layer| if layer.kv.is_some() { 4 } else { 2 }).sum();
        // one row may be lacking tensors, which are then listed; for a great many the list would fill the memory
        if positions.len() > tensors.names().len().div_ceil(of_a_row)
            || positions.iter().any(|position| !(meta..=MOST_TOKENS).contains(position))
        {
            return Err(tensors.error("its rows and their positions do not fit together"));
        }
        let mut places = Vec::new();
        for (r, &position) in positions.iter().enumerate() {
            for (l, layer) in layers.iter().enumerate() {
                places.push((name(r, l, "conv"), layer.mamba.conv.shape().to_vec()));
                places.push((name(r, l, "scan"), layer.mamba.scan.shape().to_vec()));
                if let Some(kv) = &layer.kv {
                    let (heads, rows, key, value) = kv.dim_at(position);
                    places.push((name(r, l, "keys"), vec![heads, rows, key]));
                    places.push((name(r, l, "values"), vec![heads, rows, value]));
                }
            }
        }
        tensors.check(&places.into_iter().collect(), Vec::new())?;

        let mut rows = Vec::new();
        for (r, &position) in positions.iter().enumerate() {
            let mut row = RowState { position, ..self.empty_row(kv_storage) };
            for (l, layer) in row.layers.iter_mut().enumerate() {
                tensors.read_into(&name(r, l, "conv"), layer.mamba.conv.view_mut().into_dyn())?;
                tensors.read_into(&name(r, l, "scan"), layer.mamba.scan.view_mut().into_dyn())?;
                if let Some(kv) = &mut layer.kv {
                    kv.restore(position, &mut |what, take| tensors.read_numbers(&name(r, l, what), take))?;
                }
            }
            self.check_meta_keys(&row)?;
            rows.push(row);
        }
        Ok(LmState { model: self.id, rows })
    }

    /// Compares the keys of the meta tokens, which do not depend on what follows them, with this model's.
    fn check_meta_keys(&self, row: &RowState) -> Result<()> {
        let keys = |row: &RowState| row.layers.iter().rev().find_map(|layer| layer.kv.as_ref().map(KvCache::meta_keys));
        let (Some(given), Some(own)) = (keys(row), keys(self.prefix())) else {
            return Ok(());
        };
        let (mut off, mut size) = (0.0, 0.0);
        for (own, given) in own.iter().zip(&given) {
            off += (own - given).abs();
            size += own.abs();
        }
        // the same weights in fewer bits are the same model
        if off <= 0.25 * size {
            Ok(())
        } else {
            Err(Error::State("the file holds one of a model with other weights".into()))
        }
    }
}

fn dtype(storage: KvStorage) -> Dtype {
    match storage {
        KvStorage::F32 => Dtype::F32,
        KvStorage::Bf16 => Dtype::BF16,
    }
}
