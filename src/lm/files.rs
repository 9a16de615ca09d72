//! Reading and writing folders as the Hugging Face Hub has them.

use std::fs;
use std::io::Write;
use std::path::Path;

use safetensors::Dtype;

use super::config::{HymbaLmConfig, Quantization, TorchDtype};
use super::load_options::LoadOptions;
use super::model::HymbaLm;
use super::names::{EMBEDDING, HEAD};
use super::python_json::without_bom;
use super::sample::end_tokens;
use super::size::is_matrix;
use crate::files::folder::{Folder, SINGLE, other_contents};
use crate::files::{Target, replace, stored};
use crate::kernels::matmul::Storage;
use crate::kernels::memory::fits;
use crate::parameters::Parameter;
use crate::{Error, Result};

const CONFIG: &str = "config.json";

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
    /// `model.safetensors.index.json` with the files it names. Weights may be bf16, f16, f32 or f64, and big matrices stay what
    /// they are (f64 becomes f32); or they may be what [`save_dir`](Self::save_dir) writes of a quantised model.
    ///
    /// Of a tied checkpoint (`tie_word_embeddings`) the embedding may be there, or `lm_head.weight`, or both. If both are and
    /// differ, the head is used, as newer versions of transformers do, and the configuration of the model says that it is not
    /// tied. Tensors named `…rotary_emb.inv_freq` are ignored.
    ///
    /// The folder need not be trusted. Reading takes at most twice the memory that the files have bytes, and a few megabytes;
    /// where matrices are so narrow that whole panels of them would take more, it is refused. Usually memory never holds more
    /// than the model and a row of a tensor.
    ///
    /// Where there is a `generation_config.json` with an `eos_token_id`, it takes the place of the configuration's, and
    /// is in [`config`](Self::config). Its other keys are for
    /// [`GenerateOptions::from_dir`](super::GenerateOptions::from_dir).
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

    /// As [`from_dir`](Self::from_dir), with options; `on_progress` is called about once per tensor. Matrices are
    /// quantised row by row as they are read, so that the original is never in memory.
    ///
    /// # Errors
    ///
    /// Those of [`from_dir`](Self::from_dir), and [`Error::Option`] if the checkpoint is quantised already and the
    /// options ask for other bits, or if they ask for a quantised model that can be trained. Where `dtype` or
    /// `trainable` widens the matrices, the wider numbers come on top of the memory that reading may take.
    pub fn from_dir_with(
        path: impl AsRef<Path>,
        options: &LoadOptions,
        on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        let folder = path.as_ref();
        if folder.is_file() {
            return Err(Error::format(folder, "not a folder: give the one that holds config.json and the weights"));
        }
        let path = folder.join(CONFIG);
        // a folder of something else has no config.json, or none of a model
        if let Some(hint) = other_contents(folder).filter(|_| !path.exists()) {
            return Err(Error::format(folder, format!("it has no {CONFIG}; {hint}")));
        }
        let text = HymbaLmConfig::text(&path)?;
        let mut config = HymbaLmConfig::from_text(&path, &text)?;
        if let Some(ids) = end_tokens(folder, config.vocab_size)? {
            config.eos_token_id = ids;
        }
        Self::read(Folder::open(folder)?, text, config, options, on_progress)
    }

    /// A model of this configuration, whose text is kept, with weights of the folder.
    pub(super) fn read(
        mut folder: Folder,
        text: String,
        mut config: HymbaLmConfig,
        options: &LoadOptions,
        mut on_progress: impl FnMut(Loading),
    ) -> Result<Self> {
        let stored = config.quantization;
        config.quantization = stored.resolve(options.quantize)?;
        if options.trainable && config.quantization != Quantization::None {
            return Err(Error::Option {
                option: "trainable",
                given: "true".into(),
                allowed: format!("weights that are quantised, as {:?}, cannot be trained", config.quantization),
            });
        }
        let dtype = if options.trainable { Some(TorchDtype::F32) } else { options.dtype };
        if let (Quantization::None, Some(dtype)) = (config.quantization, dtype) {
            config.torch_dtype = Some(dtype);
        }
        let embedding = check(&mut folder, &mut config, stored)?;

        let quantization = config.quantization;
        let storage = |name: &str| match (quantization.storage(name), dtype, folder.dtype(in_file(name, embedding))) {
            (Some(storage), ..) => storage,
            (None, Some(dtype), _) => dtype.storage(),
            (None, None, Some(Dtype::BF16)) => Storage::Bf16,
            (None, None, Some(Dtype::F16)) => Storage::F16,
            _ => Storage::F32,
        };
        check_memory(&folder, &config, &storage, &|name| {
            let asked = dtype.filter(|_| quantization == Quantization::None && is_matrix(name))?;
            Some(asked.size().saturating_sub(folder.dtype(in_file(name, embedding))?.bitsize() / 8))
        })?;
        let mut lm = Self::zeros(config, options, &|name| (!options.trainable).then(|| storage(name)));
        lm.source = Some(text);
        let mut progress = Loading { parameters: 0, of: lm.num_parameters() as u64 };
        let mut result = Ok(());
        lm.walk_mut(&mut |name, parameter| {
            if result.is_ok() {
                progress.parameters += parameter.len() as u64;
                result = stored::read(&mut folder, in_file(name, embedding), parameter, stored.storage(name));
                on_progress(progress);
            }
        });
        result.map(|()| lm)
    }

    /// Writes the model to a folder, which is made if there is none, in the form that [`from_dir`](Self::from_dir) reads:
    /// `config.json` and `model.safetensors`. Matrices are written in the type they have in memory, everything else as f32. Each
    /// file is written under a temporary name and then renamed.
    ///
    /// `config.json` is that of the folder the model was read from, to the letter but for `torch_dtype` (or `dtype`),
    /// `tie_word_embeddings`, `eos_token_id` and `quantization_config` where reading changed them. Of a model that was
    /// not read it has all keys of [`HymbaLmConfig`] and those that the published code needs besides, `auto_map` and
    /// `architectures` among them.
    ///
    /// Hugging Face's transformers read the folder with `trust_remote_code=True` if the model is not quantised and the published
    /// `configuration_hymba.py` and `modeling_hymba.py` are copied into it. They are not written here, and neither are
    /// `generation_config.json` and the files of a tokenizer: copy them from the original folder.
    ///
    /// Of a quantised matrix `NAME` `[n, k]`, with b = ⌈k / 32⌉ blocks of weights in a row, the files have
    ///
    /// | tensor | type and shape | |
    /// |---|---|---|
    /// | `NAME` in 8 bits | U8 `[n, 32·b]` | the integers, with 128 added |
    /// | `NAME` in 4 bits | U8 `[n, 16·b]` | the integers, with 8 added, two in a byte, the first in the low bits |
    /// | `NAME_scale` | BF16 `[n, b]` | the scale of each block, by which its integers are multiplied |
    ///
    /// and `config.json` says so: `"quantization_config": {"quant_method": "hymba", "bits": 8, "group_size": 32}`.
    /// Integers beyond column k do not matter.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if the model holds adapters, which are not written here: [`save_lora`](Self::save_lora) writes
    /// the active one, and [`merge_lora`](Self::merge_lora) adds it to the weights. [`Error::Io`] when a file cannot be
    /// written.
    pub fn save_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        self.check_no_lora()?;
        let path = path.as_ref();
        fs::create_dir_all(path).map_err(|source| Error::io(path, source))?;
        stored::write(Target::File(&path.join(SINGLE)), &[("format", "pt")], &self.parameters_in_files())?;
        let path = path.join(CONFIG);
        let text = self.config_text(&path)?;
        replace(&path, |file| file.write_all(text.as_bytes())).map_err(|source| Error::io(&path, source))
    }

    /// All parameters with their names and shapes in files, in the order there.
    pub(super) fn parameters_in_files(&self) -> Vec<(String, Vec<usize>, Parameter<'_>)> {
        let mut parameters = std::collections::BTreeMap::new();
        self.visit(&mut |name, parameter| {
            parameters.insert(name.to_string(), parameter);
        });
        let tensors = self.config().tensors().into_iter();
        tensors.filter_map(|(name, shape)| Some((name.clone(), shape, parameters.remove(&name)?))).collect()
    }

    /// The text of a `config.json` of this model, to be at `path`.
    pub(super) fn config_text(&self, path: &Path) -> Result<String> {
        match &self.source {
            Some(text) => {
                let text = String::from_utf8_lossy(without_bom(text.as_bytes()));
                Ok(self.config().written_over(&text, &HymbaLmConfig::from_text(path, &text)?))
            }
            None => serde_json::to_string_pretty(self.config()).map_err(|error| Error::format(path, error.to_string())),
        }
    }
}

/// Checks that the folder has the tensors of the model, settles whether it is tied, and returns the name of the embedding.
fn check(folder: &mut Folder, config: &mut HymbaLmConfig, stored: Quantization) -> Result<&'static str> {
    let tied = config.tie_word_embeddings;
    let [has_embedding, has_head] = [EMBEDDING, HEAD].map(|name| folder.dtype(name).is_some());
    let embedding = if tied && has_head && !has_embedding { HEAD } else { EMBEDDING };
    let has_both = tied && has_head && has_embedding;
    // where both are there, both must be right
    config.tie_word_embeddings = tied && !has_both;
    let all = config.tensors().into_iter();
    let expected: Vec<_> = all
        .flat_map(|(name, shape)| stored::tensors(in_file(&name, embedding).to_string(), shape, stored.storage(&name)))
        .collect();
    let expected = expected.iter().map(|(name, shape, kind)| (&name[..], &shape[..], *kind));
    // buffers that older versions of transformers saved; the model has angles of its own
    folder.check(expected, |name| name.ends_with("rotary_emb.inv_freq"))?;
    if has_both {
        let scales = stored.storage(HEAD).map(|_| [EMBEDDING, HEAD].map(stored::scales_of));
        config.tie_word_embeddings = folder.are_same(EMBEDDING, HEAD)?
            && scales.map_or(Ok(true), |[embedding, head]| folder.are_same(&embedding, &head))?;
    }
    Ok(embedding)
}

/// The name of a tensor in the file, where the embedding may have that of the head.
fn in_file<'a>(name: &'a str, embedding: &'a str) -> &'a str {
    if name == EMBEDDING { embedding } else { name }
}

/// Checks, before memory is taken, that reading takes no more than twice the files and a little, and that there is as much.
/// `widened` has the bytes that each number of a tensor takes more than in the file, by the user's wish.
fn check_memory(
    folder: &Folder,
    config: &HymbaLmConfig,
    storage: &dyn Fn(&str) -> Storage,
    widened: &dyn Fn(&str) -> Option<usize>,
) -> Result<()> {
    /// So much any folder may ask for: the matrices of small models are narrow.
    const A_LITTLE: u64 = 3 << 20;
    let (mut longest, mut wider) = (0, 0);
    for (name, shape) in config.tensors() {
        let count: u64 = shape.iter().map(|&axis| axis as u64).product();
        // as it stands in the file, as it is decoded, and as it may be rounded
        let rows = if shape.len() > 1 { shape[0] as u64 } else { 1 };
        longest = (3 * size_of::<f32>() as u64 * count / rows.max(1)).max(longest);
        wider += count * widened(&name).unwrap_or(0) as u64;
    }
    let memory = config.memory(storage).filter(|&memory| {
        (memory as u64).saturating_add(longest)
            <= folder.length().saturating_mul(2).saturating_add(wider).saturating_add(A_LITTLE)
    });
    let Some(memory) = memory else {
        return Err(folder.error(format!(
            "with matrices this narrow, which are filled up to whole panels, the model would take more memory than twice the {} \
             bytes of its files",
            folder.length()
        )));
    };
    if fits(memory) {
        Ok(())
    } else {
        Err(folder.error(format!("there is not enough memory: it takes {memory} bytes")))
    }
}
