//! Reading and writing folders as the Hugging Face Hub has them.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use safetensors::Dtype;

use super::cache::KvStorage;
use super::config::{HymbaLmConfig, Quantization};
use super::model::{HEAD, HymbaLm};
use super::parameters::{Parameter, ParameterMut};
use super::quantization::{scales_of, tensors};
use crate::kernels::matrix::{Matrix, Storage};
use crate::kernels::simd::Level;
use crate::weights::float::Float;
use crate::weights::folder::{Folder, SINGLE};
use crate::weights::{replace, write_streamed};
use crate::{Error, Result};

const CONFIG: &str = "config.json";

/// What activations are rounded to before they are multiplied by matrices that are kept in bf16. Sums are f32 in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Arithmetic {
    /// Nothing: the weights are widened.
    #[default]
    F32,
    /// To bf16, on CPUs that multiply bf16 faster (AVX-512-BF16, or on Linux AMX); on others this is `F32`. Published code
    /// computes so, too, and rounds the sums besides. Prompts gain most: decoding waits for memory. Subnormal numbers count as
    /// zero.
    ///
    /// AMX is asked for when the first such model computes, for the whole process and for good: Linux then refuses signal stacks
    /// that are too small for its registers. `HYMBA_SIMD=avx512` leaves it out.
    Bf16,
}

impl Arithmetic {
    /// The instruction set that multiplies matrices in bf16 on this machine: as [`simd_level`](crate::simd_level) says, or, for
    /// `Bf16`, `"amx"` or `"avx512-bf16"` if it has that. For `Bf16` this, too, asks for AMX.
    ///
    /// ```
    /// use hymba::lm::Arithmetic;
    ///
    /// assert_eq!(Arithmetic::F32.simd_level(), hymba::simd_level());
    /// let is_faster = ["amx", "avx512-bf16"].contains(&Arithmetic::Bf16.simd_level());
    /// assert_eq!(is_faster, Arithmetic::Bf16.simd_level() != hymba::simd_level());
    /// ```
    pub fn simd_level(self) -> &'static str {
        match self {
            Arithmetic::F32 => Level::current().name(),
            Arithmetic::Bf16 => match Level::with_tiles() {
                Level::Avx512Bf16 => "avx512-bf16",
                level => level.name(),
            },
        }
    }
}

/// How a language model is read.
///
/// | option | default | |
/// |---|---|---|
/// | `kv_storage` | [`KvStorage::F32`] | the type in which states keep keys and values |
/// | `quantize` | [`Quantization::None`] | the bits of the big matrices in memory |
/// | `arithmetic` | [`Arithmetic::F32`] | what activations are rounded to for matrices in bf16 |
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The type in which states keep keys and values.
    pub kv_storage: KvStorage,
    /// The bits of the big matrices in memory. What is quantised in the checkpoint stays so.
    pub quantize: Quantization,
    /// What activations are rounded to for matrices in bf16. (For quantised ones they are rounded to 8 bits.)
    pub arithmetic: Arithmetic,
}

impl LoadOptions {
    /// Sets the type in which states keep keys and values.
    pub fn kv_storage(mut self, kv_storage: KvStorage) -> Self {
        self.kv_storage = kv_storage;
        self
    }

    /// Sets the bits of the big matrices in memory.
    pub fn quantize(mut self, quantize: Quantization) -> Self {
        self.quantize = quantize;
        self
    }

    /// Sets what activations are rounded to for matrices in bf16.
    pub fn arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
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
    /// `model.safetensors.index.json` with the files it names. Weights may be bf16, f16 or f32, and big matrices stay what they
    /// are; or they may be what [`save_dir`](Self::save_dir) writes of a quantised model.
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

    /// As [`from_dir`](Self::from_dir), with options; `on_progress` hears how far it has come, about once a tensor. What is to
    /// be quantised is quantised row by row, so that the original is never in memory.
    ///
    /// # Errors
    ///
    /// Those of [`from_dir`](Self::from_dir), and [`Error::Option`] if the checkpoint is quantised already and the options ask
    /// for other bits.
    pub fn from_dir_with(
        path: impl AsRef<Path>,
        options: &LoadOptions,
        mut on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        let path = path.as_ref();
        let mut config = HymbaLmConfig::from_file(path.join(CONFIG))?;
        let stored = config.quantization;
        config.quantization = stored.then(options.quantize)?;
        let mut folder = Folder::open(path)?;
        let expected: Vec<_> =
            config.tensors().into_iter().flat_map(|(name, shape)| tensors(name, shape, stored)).collect();
        let head_scales = scales_of(HEAD);
        let optional: &[&str] = if config.tie_word_embeddings { &[HEAD, &head_scales] } else { &[] };
        folder.check(expected.iter().map(|(name, shape, kind)| (&name[..], &shape[..], *kind)), optional)?;

        let quantization = config.quantization;
        let storage = |name: &str| match (quantization.storage(name), folder.dtype(name)) {
            (Some(storage), _) => storage,
            (None, Some(Dtype::BF16)) => Storage::Bf16,
            (None, Some(Dtype::F16)) => Storage::F16,
            _ => Storage::F32,
        };
        let mut lm = Self::zeros(config, options, &storage);
        let mut progress = Loading { parameters: 0, of: lm.num_parameters() as u64 };
        let mut result = Ok(());
        lm.visit_mut(&mut |name, parameter| {
            if result.is_ok() {
                progress.parameters += parameter.len() as u64;
                result = read(&mut folder, name, parameter, stored);
                on_progress(progress);
            }
        });
        result.map(|()| lm)
    }

    /// Writes the model to a folder, which is made if there is none, in the form that [`from_dir`](Self::from_dir) reads, and
    /// Hugging Face's code, too, unless the model is quantised: `config.json` and `model.safetensors`. Matrices are written in
    /// the type they have in memory, everything else as f32. Each file is written under a temporary name and then renamed. A
    /// tokenizer is not part of the model; copy its files.
    ///
    /// Of a quantised matrix `NAME` `[n, k]`, with b = ⌈k / 32⌉ blocks of weights in a row, the files have
    ///
    /// | tensor | type and shape | |
    /// |---|---|---|
    /// | `NAME` in 8 bits | U8 `[n, 32·b]` | 128 more than the whole numbers |
    /// | `NAME` in 4 bits | U8 `[n, 16·b]` | 8 more than they are, two in a byte, the first in the low bits |
    /// | `NAME_scale` | BF16 `[n, b]` | what the whole numbers of a block are multiplied by |
    ///
    /// and `config.json` says so: `"quantization_config": {"quant_method": "hymba", "bits": 8, "group_size": 32}`. What stands
    /// beyond k does not matter.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when a file cannot be written.
    pub fn save_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        fs::create_dir_all(path).map_err(|source| Error::io(path, source))?;
        let mut parameters = std::collections::BTreeMap::new();
        self.visit(&mut |name, parameter| {
            parameters.insert(name.to_string(), parameter);
        });
        let quantization = self.config().quantization;
        let (mut contents, mut parts) = (Vec::new(), Vec::new());
        for (name, shape) in self.config().tensors() {
            let Some(parameter) = parameters.get(&name) else { continue };
            for (part, shape, _) in tensors(name.clone(), shape, quantization) {
                let scales = part != name;
                contents.push((part, parameter.dtype(scales), shape));
                parts.push((parameter, scales));
            }
        }
        write_streamed(&path.join(SINGLE), &contents, &[("format", "pt")], &mut |i, file| {
            let (parameter, scales) = parts[i];
            write(parameter, scales, file)
        })?;

        let path = path.join(CONFIG);
        let config =
            serde_json::to_vec_pretty(self.config()).map_err(|error| Error::format(&path, error.to_string()))?;
        replace(&path, |file| file.write_all(&config)).map_err(|source| Error::io(&path, source))
    }
}

/// Reads a parameter, whose shape was checked.
fn read(folder: &mut Folder, name: &str, parameter: ParameterMut, stored: Quantization) -> Result<()> {
    match parameter {
        ParameterMut::Matrix(matrix) if stored.storage(name).is_some() => {
            let Some(quantized) = matrix.quantized_mut() else { return Ok(()) };
            folder.read_rows(&scales_of(name), &mut |row, scales| quantized.set_scales(row, scales))?;
            folder.read_byte_rows(name, &mut |row, bytes| quantized.set_bytes(row, bytes))
        }
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

/// Writes the numbers of a parameter, row by row, or the scales of a quantised one.
fn write(parameter: &Parameter, scales: bool, file: &mut dyn Write) -> io::Result<()> {
    let mut bytes = Vec::new();
    match parameter {
        Parameter::Matrix(matrix) => {
            let (rows, columns) = matrix.dim();
            let mut numbers = vec![0.0; columns];
            for row in 0..rows {
                bytes.clear();
                match matrix.quantized() {
                    Some(quantized) if scales => {
                        numbers.clear();
                        quantized.scales(row, &mut numbers);
                        Float::BF16.encode(&numbers, &mut bytes);
                    }
                    Some(quantized) => quantized.bytes(row, &mut bytes),
                    None => {
                        matrix.row(row, &mut numbers);
                        float(matrix).encode(&numbers, &mut bytes);
                    }
                }
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

/// The type of a matrix, or of its scales, in files.
fn float(matrix: &Matrix) -> Float {
    match matrix.storage() {
        Storage::F32 => Float::F32,
        Storage::F16 => Float::F16,
        Storage::Bf16 | Storage::Q8 | Storage::Q4 => Float::BF16,
    }
}

impl Parameter<'_> {
    /// Its type in files, or that of its scales.
    fn dtype(&self, scales: bool) -> Dtype {
        match self {
            Parameter::Numbers(_) => Dtype::F32,
            Parameter::Matrix(matrix) if matrix.quantized().is_some() && !scales => Dtype::U8,
            Parameter::Matrix(matrix) => match float(matrix) {
                Float::F32 | Float::F64 => Dtype::F32,
                Float::F16 => Dtype::F16,
                Float::BF16 => Dtype::BF16,
            },
        }
    }
}
