//! Language models in one piece: configuration and weights in one safetensors file, from memory or from whatever can be read.

use std::io::{Read, Seek, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::{HymbaLmConfig, MAX_CONFIG};
use super::files::Loading;
use super::load_options::LoadOptions;
use super::model::HymbaLm;
use crate::files::folder::Folder;
use crate::files::header::{self, OPTIONS_KEY};
use crate::files::saved::{VERSION, parse};
use crate::files::tensors::{BYTES, Source};
use crate::files::{Target, stored};
use crate::{Error, Result};

/// The metadata entry of a model in one piece.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    /// The text of `config.json`.
    config: String,
}

impl HymbaLm {
    /// Writes the model in one piece: a safetensors file as that in a folder of [`save_dir`](Self::save_dir), and in its metadata,
    /// under `hymba`, the JSON `{"version": 1, "config": …}` with the text of `config.json`. Matrices are written in the type
    /// they have in memory.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if the model holds adapters, as of [`save_dir`](Self::save_dir); [`Error::Format`] if the
    /// configuration that it was read with is so long that it could not be read again; [`Error::Io`] when the writer
    /// gives an error: what was written until then is not a model.
    ///
    /// ```
    /// use std::io::Cursor;
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let mut file = Cursor::new(Vec::new()); // or a File, a socket, a compressor
    /// lm.write_to(&mut file)?;
    /// assert_eq!(HymbaLm::read_from(&mut file)?.config(), lm.config());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn write_to(&self, mut writer: impl Write) -> Result<()> {
        self.check_no_lora()?;
        let path = Path::new(BYTES);
        let saved = Saved { version: VERSION, config: self.config_text(path)? };
        let saved = serde_json::to_string(&saved).map_err(|error| Error::format(path, error.to_string()))?;
        let metadata = [("format", "pt"), (OPTIONS_KEY, &saved)];
        stored::write(Target::Writer(&mut writer), &metadata, &self.parameters_in_files())
    }

    /// The bytes that [`write_to`](Self::write_to) writes: for a database, a network, a browser.
    ///
    /// # Errors
    ///
    /// [`Error::State`] and [`Error::Format`], as [`write_to`](Self::write_to).
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.write_to(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a model that [`write_to`](Self::write_to) wrote: from the reader's beginning to its end, wherever it stands. It need not
    /// be trusted, and reading takes no more memory than [`from_dir`](Self::from_dir).
    ///
    /// # Errors
    ///
    /// As [`from_dir`](Self::from_dir).
    pub fn read_from(reader: impl Read + Seek) -> Result<Self> {
        Self::read_from_with(reader, &LoadOptions::default(), |_| {})
    }

    /// As [`read_from`](Self::read_from), with options; `on_progress` is called about once per tensor.
    ///
    /// # Errors
    ///
    /// As [`from_dir_with`](Self::from_dir_with).
    pub fn read_from_with(
        reader: impl Read + Seek,
        options: &LoadOptions,
        on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        Self::read_image(Source::reader(reader)?, options, on_progress)
    }

    /// As [`read_from`](Self::read_from), from what [`to_bytes`](Self::to_bytes) gave: a model inside the program, by
    /// `include_bytes!`, from a database, in a browser. The bytes need not be trusted either.
    ///
    /// # Errors
    ///
    /// As [`from_dir`](Self::from_dir).
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    /// use hymba::ndarray::arr2;
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let bytes = lm.to_bytes()?;
    /// let ids = arr2(&[[1, 2, 3]]);
    /// assert_eq!(HymbaLm::from_bytes(&bytes)?.forward(&ids)?, lm.forward(&ids)?);
    /// assert!(HymbaLm::from_bytes(&bytes[..1000]).is_err());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::from_bytes_with(bytes, &LoadOptions::default(), |_| {})
    }

    /// As [`from_bytes`](Self::from_bytes), with options; `on_progress` is called about once per tensor.
    ///
    /// # Errors
    ///
    /// As [`from_dir_with`](Self::from_dir_with).
    pub fn from_bytes_with(bytes: &[u8], options: &LoadOptions, on_progress: impl FnMut(Loading)) -> Result<Self> {
        Self::read_image(Source::memory(bytes), options, on_progress)
    }

    /// As [`from_dir_with`](Self::from_dir_with), from the contents of the two files of a folder: `config.json` and
    /// `model.safetensors`. (A `generation_config.json` is not read; the configuration says which tokens end a text.)
    ///
    /// # Errors
    ///
    /// As [`from_dir_with`](Self::from_dir_with).
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # let folder = tempfile::tempdir()?;
    /// # HymbaLm::random(config, 0, &LoadOptions::default())?.save_dir(folder.path())?;
    /// let config = std::fs::read_to_string(folder.path().join("config.json"))?;
    /// let weights = std::fs::read(folder.path().join("model.safetensors"))?;
    /// let lm = HymbaLm::from_parts(&config, &weights, &LoadOptions::default(), |_| {})?;
    /// assert_eq!(lm.config(), HymbaLm::from_dir(folder.path())?.config());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_parts(
        config: &str,
        weights: &[u8],
        options: &LoadOptions,
        on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        let (tensors, _) = header::read(Source::memory(weights))?;
        Self::read_parts(Folder::of(tensors), config.to_string(), options, on_progress)
    }

    fn read_image(source: Source, options: &LoadOptions, on_progress: impl FnMut(Loading)) -> Result<Self> {
        let (tensors, saved) = header::read(source)?;
        let Some(saved) = saved else {
            return Err(tensors.error(format!(
                "its metadata has no entry {OPTIONS_KEY:?} with a config.json: HymbaLm::write_to did not write it; give the \
                 config, too, to HymbaLm::from_parts"
            )));
        };
        let Saved { config, .. } = parse(&saved, &tensors)?;
        Self::read_parts(Folder::of(tensors), config, options, on_progress)
    }

    fn read_parts(
        folder: Folder,
        text: String,
        options: &LoadOptions,
        on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        if text.len() as u64 > MAX_CONFIG {
            return Err(folder.error(format!("its config has {} bytes, and at most {MAX_CONFIG} are read", text.len())));
        }
        let config = HymbaLmConfig::from_text(Path::new(BYTES), &text)?;
        Self::read(folder, text, config, options, on_progress)
    }
}
