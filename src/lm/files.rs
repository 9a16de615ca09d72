//! Reading and writing folders as the Hugging Face Hub has them.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use safetensors::Dtype;

use super::cache::KvStorage;
use super::config::HymbaLmConfig;
use super::model::{HEAD, HymbaLm};
use super::parameters::{Parameter, ParameterMut};
use crate::kernels::matrix::{Matrix, Storage};
use crate::weights::float::Float;
use crate::weights::folder::{Folder, SINGLE};
use crate::weights::tensors::Kind;
use crate::weights::{replace, write_streamed};
use crate::{Error, Result};

const CONFIG: &str = "config.json";

/// How a language model is read.
///
/// | option | default | |
/// |---|---|---|
/// | `kv_storage` | [`KvStorage::F32`] | the type in which states keep keys and values |
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The type in which states keep keys and values.
    pub kv_storage: KvStorage,
}

impl LoadOptions {
    /// Sets the type in which states keep keys and values.
    pub fn kv_storage(mut self, kv_storage: KvStorage) -> Self {
        self.kv_storage = kv_storage;
        self
    }
}

/// How far reading a model has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loading {
    /// Parameters read.
    pub parameters: u64,
    /// Parameters of the model.
    pub of: u64,
}

impl HymbaLm {
    /// Reads a model from a folder laid out like those of the Hugging Face Hub: `config.json`, and `model.safetensors` or
    /// `model.safetensors.index.json` with the files it names. Weights may be bf16, f16 or f32; big matrices stay what they
    /// are.
    ///
    /// The folder need not be trusted. Memory never holds more than the model and one row of a tensor.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when a file cannot be read; [`Error::Format`] when one is damaged or hostile, or the configuration is of
    /// a model that is not supported; [`Error::Tensors`], with the whole list, when tensors are missing, unexpected or of the
    /// wrong shape or type.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let folder = tempfile::tempdir()?;
    /// HymbaLm::random(config, 0, &LoadOptions::default())?.save_dir(folder.path())?;
    /// let lm = HymbaLm::from_dir(folder.path())?;
    /// assert_eq!(lm.config().vocab_size, 50);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_dir(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_dir_with(path, &LoadOptions::default(), |_| {})
    }

    /// As [`from_dir`](Self::from_dir), with options; `on_progress` hears how far it has come, about once a tensor.
    ///
    /// # Errors
    ///
    /// Those of [`from_dir`](Self::from_dir).
    pub fn from_dir_with(
        path: impl AsRef<Path>,
        options: &LoadOptions,
        mut on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        let path = path.as_ref();
        let config = HymbaLmConfig::from_file(path.join(CONFIG))?;
        let mut folder = Folder::open(path)?;
        let tensors = config.tensors();
        let optional: &[&str] = if config.tie_word_embeddings { &[HEAD] } else { &[] };
        folder.check(tensors.iter().map(|(name, shape)| (&name[..], &shape[..], Kind::Float)), optional)?;

        let storage = |name: &str| match folder.dtype(name) {
            Some(Dtype::BF16) => Storage::Bf16,
            Some(Dtype::F16) => Storage::F16,
            _ => Storage::F32,
        };
        let mut lm = Self::zeros(config, options.kv_storage, &storage);
        let mut progress = Loading { parameters: 0, of: lm.num_parameters() as u64 };
        let mut result = Ok(());
        lm.visit_mut(&mut |name, parameter| {
            if result.is_ok() {
                progress.parameters += parameter.len() as u64;
                result = read(&mut folder, name, parameter);
                on_progress(progress);
            }
        });
        result.map(|()| lm)
    }

    /// Writes the model to a folder, which is made if there is none, in the form that [`from_dir`](Self::from_dir) reads, and
    /// Hugging Face's code, too: `config.json` and `model.safetensors`. Matrices are written in the type they have in memory,
    /// everything else as f32. Each file is written under a temporary name and then renamed. A tokenizer is not part of the
    /// model; copy its files.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when a file cannot be written.
    pub fn save_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        fs::create_dir_all(path).map_err(|source| Error::io(path, source))?;
        let mut parameters = Vec::new();
        self.visit(&mut |name, parameter| parameters.push((name.to_string(), parameter)));
        let mut shapes: std::collections::BTreeMap<_, _> = self.config().tensors().into_iter().collect();
        let contents: Vec<_> = parameters
            .iter()
            .map(|(name, parameter)| (name.clone(), parameter.dtype(), shapes.remove(name).unwrap_or_default()))
            .collect();
        write_streamed(&path.join(SINGLE), &contents, &[("format", "pt")], &mut |i, file| {
            write(&parameters[i].1, file)
        })?;

        let path = path.join(CONFIG);
        let config =
            serde_json::to_vec_pretty(self.config()).map_err(|error| Error::format(&path, error.to_string()))?;
        replace(&path, |file| file.write_all(&config)).map_err(|source| Error::io(&path, source))
    }
}

/// Reads a parameter, whose shape was checked.
fn read(folder: &mut Folder, name: &str, parameter: ParameterMut) -> Result<()> {
    match parameter {
        ParameterMut::Matrix(matrix) => folder.read_rows(name, &mut |row, numbers| matrix.set_row(row, numbers)),
        ParameterMut::Numbers(mut array) => {
            let mut places = array.iter_mut();
            folder.read_rows(name, &mut |_, numbers| {
                // the numbers come first: places must not advance past the last of them
                numbers.iter().zip(&mut places).for_each(|(number, place)| *place = *number);
            })
        }
    }
}

/// Writes the numbers of a parameter, row by row.
fn write(parameter: &Parameter, file: &mut dyn Write) -> io::Result<()> {
    let mut bytes = Vec::new();
    match parameter {
        Parameter::Matrix(matrix) => {
            let (rows, columns) = matrix.dim();
            let mut row = vec![0.0; columns];
            for i in 0..rows {
                matrix.row(i, &mut row);
                bytes.clear();
                float(matrix).encode(&row, &mut bytes);
                file.write_all(&bytes)?;
            }
        }
        Parameter::Numbers(array) => {
            array.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
            file.write_all(&bytes)?;
        }
    }
    Ok(())
}

/// The type of a matrix in files.
fn float(matrix: &Matrix) -> Float {
    match matrix.storage() {
        Storage::F32 => Float::F32,
        Storage::F16 => Float::F16,
        Storage::Bf16 => Float::BF16,
    }
}

impl Parameter<'_> {
    /// Its type in files.
    fn dtype(&self) -> Dtype {
        match self {
            Parameter::Numbers(_) => Dtype::F32,
            Parameter::Matrix(matrix) => match matrix.storage() {
                Storage::F32 => Dtype::F32,
                Storage::F16 => Dtype::F16,
                Storage::Bf16 => Dtype::BF16,
            },
        }
    }
}
