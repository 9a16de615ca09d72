//! States in files, to continue a conversation later.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::HymbaLmConfig;
use super::model::HymbaLm;
use super::state::LmState;
use crate::files::header;
use crate::files::saved::{VERSION, entry};
use crate::files::tensors::Source;
use crate::layers::{KvCache, KvStorage, SequenceState};
use crate::lora::is_lora;
use crate::parameters::Parameter;
use crate::{Error, Result, states};

/// The metadata entry of a saved state.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    config: HymbaLmConfig,
    kv_storage: KvStorage,
    /// Of the adapter that was active, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lora: Option<String>,
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
        if state.model != self.cached.id {
            return Err(Error::State("another model made it, and only that one can save it".into()));
        }
        // a state keeps the type it was made with, whatever the model would keep now
        let first = state.rows.first().and_then(|row| row.layers.iter().find_map(|layer| layer.kv.as_ref()));
        let saved = Saved {
            version: VERSION,
            config: self.config().clone(),
            lora: self.fingerprint_of_lora(),
            kv_storage: first.map_or(self.kv_storage(), KvCache::storage),
            positions: state.rows.iter().map(|row| row.position).collect(),
        };
        states::write(path.as_ref(), &saved, &state.rows)
    }

    /// Reads a state that [`save_state`](Self::save_state) wrote. The file need not be trusted.
    ///
    /// All of the configuration that the layers depend on must be the same, and the keys of the meta tokens about the same: so a
    /// state of another model of the same sizes is noticed, if it has meta tokens. What tokens mean (`eos_token_id` and the like),
    /// the vocabulary, and the types and bits in which weights are stored may differ. The active [adapter](Self::add_lora), if there is
    /// one, must be the same, to the bit.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is damaged or hostile, [`Error::Tensors`] when it
    /// has other tensors than a state, [`Error::State`] when it belongs to another model.
    pub fn load_state(&self, path: impl AsRef<Path>) -> Result<LmState> {
        let (mut tensors, saved) = header::read(Source::open(path.as_ref())?)?;
        let Saved { config, kv_storage, lora, positions, .. } = entry(saved, &tensors)?;
        if !config.has_layers_of(self.config()) {
            return Err(Error::State("the file holds one of a model with another configuration".into()));
        }
        if lora != self.fingerprint_of_lora() {
            return Err(Error::State(
                "the file holds one that was made with another adapter; activate it by set_lora".into(),
            ));
        }
        let meta = config.num_memory_tokens;
        let rows = states::read(&mut tensors, &positions, meta, &|| self.empty_row(kv_storage).layers)?;
        rows.iter().try_for_each(|row| self.check_meta_keys(row))?;
        Ok(LmState { model: self.cached.id, meta, rows })
    }

    /// Of the numbers and the scale of the active adapter.
    fn fingerprint_of_lora(&self) -> Option<String> {
        /// FNV-1a over words.
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        let mut hash = 0xcbf2_9ce4_8422_2325 ^ u64::from(self.lora_options()?.scale().to_bits());
        self.visit(&mut |name, parameter| match parameter {
            Parameter::Array(array) if is_lora(name) => {
                name.bytes().for_each(|byte| hash = (hash ^ u64::from(byte)).wrapping_mul(PRIME));
                array.iter().for_each(|x| hash = (hash ^ u64::from(x.to_bits())).wrapping_mul(PRIME));
            }
            _ => {}
        });
        Some(format!("{hash:016x}"))
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
