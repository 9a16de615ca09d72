//! States in files, to go on with a conversation later.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::HymbaLmConfig;
use super::model::HymbaLm;
use super::state::LmState;
use crate::files::header;
use crate::files::saved::{VERSION, entry};
use crate::files::tensors::Source;
use crate::layers::{KvCache, KvStorage, SequenceState};
use crate::{Error, Result, states};

/// The metadata entry of a saved state.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    config: HymbaLmConfig,
    kv_storage: KvStorage,
    /// Tokens seen by each row, meta tokens included.
    positions: Vec<usize>,
}

impl HymbaLm {
    /// Writes a state to a safetensors file, from which [`load_state`](Self::load_state) of the same model takes it up again. It
    /// takes little memory besides the state.
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
        // a state keeps the type it was made with, whatever the model would keep now
        let first = state.rows.first().and_then(|row| row.layers.iter().find_map(|layer| layer.kv.as_ref()));
        let saved = Saved {
            version: VERSION,
            config: self.config().clone(),
            kv_storage: first.map_or(self.kv_storage(), KvCache::storage),
            positions: state.rows.iter().map(|row| row.position).collect(),
        };
        states::write(path.as_ref(), &saved, &state.rows)
    }

    /// Reads a state that [`save_state`](Self::save_state) wrote. The file need not be trusted.
    ///
    /// All of the configuration that the layers depend on must be the same, and the keys of the meta tokens about the same: so a
    /// state of another model of the same sizes is noticed, if it has meta tokens. What tokens mean (`eos_token_id` and the like),
    /// the vocabulary, and the types and bits in which weights are stored may differ.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is damaged or hostile, [`Error::Tensors`] when it
    /// has other tensors than a state, [`Error::State`] when it belongs to another model.
    pub fn load_state(&self, path: impl AsRef<Path>) -> Result<LmState> {
        let (mut tensors, saved) = header::read(Source::open(path.as_ref())?)?;
        let Saved { config, kv_storage, positions, .. } = entry(saved, &tensors)?;
        if !config.has_layers_of(self.config()) {
            return Err(Error::State("the file holds one of a model with another configuration".into()));
        }
        let meta = config.num_memory_tokens;
        let rows = states::read(&mut tensors, &positions, meta, &|| self.empty_row(kv_storage).layers)?;
        rows.iter().try_for_each(|row| self.check_meta_keys(row))?;
        Ok(LmState { model: self.id, meta, rows })
    }

    /// Compares the keys of the meta tokens, which do not depend on what follows them, with this model's.
    fn check_meta_keys(&self, row: &SequenceState) -> Result<()> {
        let keys =
            |row: &SequenceState| row.layers.iter().rev().find_map(|layer| layer.kv.as_ref().map(KvCache::meta_keys));
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
