//! What a folder says of generation: `generation_config.json`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::GenerateOptions;
use crate::files::header::printable;
use crate::files::tensors::Source;
use crate::lm::python_json::python_json;
use crate::{Error, Result};

const FILE: &str = "generation_config.json";
/// Longest file that is read; usual ones have some hundred bytes. A list takes sixteen times its length in memory.
const MAX_FILE: u64 = 1 << 16;

impl GenerateOptions {
    /// The options that a folder laid out like those of the Hugging Face Hub recommends in its `generation_config.json`.
    ///
    /// | key | option | if absent or null |
    /// |---|---|---|
    /// | `do_sample` | with false, `temperature` 0 | false |
    /// | `temperature` | `temperature`, if `do_sample` is true | 1 |
    /// | `top_k`, `top_p`, `min_p`, `repetition_penalty` | of the same name | their defaults, which leave them off |
    /// | `max_new_tokens` | `max_tokens` | its default |
    /// | `eos_token_id`, a number or a list | `stop_tokens` | none given: those of the model |
    ///
    /// Other keys are ignored; `NaN` and `Infinity` count as null. Where the file samples and says nothing of `top_k`, Hugging
    /// Face's `generate` would take 50: set it, if you want the same distribution. A folder without the file gives the defaults.
    ///
    /// [`HymbaLm::from_dir`](crate::HymbaLm::from_dir) takes the end tokens from there, too, so that they hold for any options.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when there is no such folder, or the file cannot be read; [`Error::Format`], which names key and value, when
    /// a value is not usable, or the file is not JSON or not an object.
    ///
    /// ```
    /// use hymba::GenerateOptions;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let text = r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]}"#;
    /// std::fs::write(folder.path().join("generation_config.json"), text)?;
    /// let options = GenerateOptions::from_dir(folder.path())?;
    /// assert_eq!(options, GenerateOptions::default().temperature(0.6).top_p(0.9).stop_tokens(vec![2, 7]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_dir(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        fs::metadata(path).map_err(|source| Error::io(path, source))?;
        let defaults = GenerateOptions::default();
        let Some(file) = GenerationConfig::open(path)? else { return Ok(defaults) };
        let samples = file.get("do_sample", "true or false", Value::as_bool)?.unwrap_or(false);
        let temperature = file.number("temperature")?.unwrap_or(1.0);
        let options = GenerateOptions {
            temperature: if samples { temperature } else { 0.0 },
            top_k: file.count("top_k")?.unwrap_or(defaults.top_k),
            top_p: file.number("top_p")?.unwrap_or(defaults.top_p),
            min_p: file.number("min_p")?.unwrap_or(defaults.min_p),
            repetition_penalty: file.number("repetition_penalty")?.unwrap_or(defaults.repetition_penalty),
            max_tokens: file.count("max_new_tokens")?.unwrap_or(defaults.max_tokens),
            stop_tokens: file.end_tokens()?,
            ..defaults
        };
        options.validate().map_err(|error| Error::format(&file.path, error.to_string()))?;
        Ok(options)
    }
}

/// The tokens that end a text according to a folder's `generation_config.json`, if it has one.
pub(in crate::lm) fn end_tokens(folder: &Path, vocabulary: usize) -> Result<Option<Vec<u32>>> {
    let Some(file) = GenerationConfig::open(folder)? else { return Ok(None) };
    let ids = file.end_tokens()?;
    match ids.iter().flatten().find(|&&id| id as usize >= vocabulary) {
        Some(id) => Err(file.refused("eos_token_id", &id.to_string(), &format!("below vocab_size = {vocabulary}"))),
        None => Ok(ids),
    }
}

/// The file, any value at any key.
struct GenerationConfig {
    path: PathBuf,
    values: Map<String, Value>,
}

impl GenerationConfig {
    /// `None` if the folder has no such file.
    fn open(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        let text = match Source::open(&path) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
            source => source?.text(MAX_FILE)?,
        };
        match serde_json::from_slice(&python_json(text.as_bytes())) {
            Ok(values) => Ok(Some(GenerationConfig { path, values })),
            Err(error) => {
                Err(Error::format(&path, format!("not an object of JSON: {}", printable(&error.to_string()))))
            }
        }
    }

    fn refused(&self, key: &str, given: &str, allowed: &str) -> Error {
        Error::format(&self.path, format!("{key} = {} is not usable: it must be {allowed}", printable(given)))
    }

    /// `None` where there is no value, or null.
    fn get<T>(&self, key: &str, allowed: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| self.refused(key, &value.to_string(), &format!("{allowed}, or null"))),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f32>> {
        self.get(key, "a finite 32-bit number", |value| {
            value.as_f64().map(|value| value as f32).filter(|value| value.is_finite())
        })
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number, 0 or more", |value| usize::try_from(value.as_u64()?).ok())
    }

    fn end_tokens(&self) -> Result<Option<Vec<u32>>> {
        let token = |value: &Value| u32::try_from(value.as_u64()?).ok();
        self.get("eos_token_id", "a token's number, 0 or more, or a list of them", |value| match value {
            Value::Array(values) => values.iter().map(token).collect(),
            value => token(value).map(|id| vec![id]),
        })
    }
}
