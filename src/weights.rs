//! Models in files: [`Hymba::save`] and [`Hymba::load`].
//!
//! The format is safetensors. Files are written through a temporary one, and read as a stranger's: see
//! [`tensors`] for the checks.

use std::path::Path;

use ndarray::{ArrayViewD, ArrayViewMutD};
use safetensors::Dtype;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use self::header::printable;
use self::tensors::{Source, Tensors};
pub(crate) use self::write::{replace, write_streamed};
use crate::{Error, Hymba, HymbaOptions, Result, train};

pub(crate) mod float;
#[cfg(feature = "lm")]
pub(crate) mod folder;
pub(crate) mod header;
pub(crate) mod tensors;
mod write;

/// Where the metadata of a file has the options.
const OPTIONS_KEY: &str = "hymba";
/// The version of what this crate writes.
pub(crate) const VERSION: u32 = 1;

/// The metadata entry of a saved model.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    options: HymbaOptions,
    /// There in the file of a predictor.
    #[serde(default, skip_serializing)]
    task: Option<IgnoredAny>,
}

impl Hymba {
    /// Writes the model to a safetensors file: every parameter as f32 under its own name, the options in the metadata.
    ///
    /// The file is written under a temporary name in the same folder and then renamed, so that `path` is at all times
    /// the old file, if there was one, or the complete new one.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("model.safetensors");
    /// let model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// model.save(&path)?;
    /// assert_eq!(Hymba::load(&path)?.options(), model.options());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be written; an old file is then untouched. [`Error::Format`] when the model
    /// has so many blocks that [`load`](Self::load) would refuse the file.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let saved = Saved { version: VERSION, options: self.options().clone(), task: None };
        write(path.as_ref(), &saved, &train::views(self))
    }

    /// Reads a model that [`save`](Self::save) wrote. Nothing but `path` is needed: the options are in the file.
    ///
    /// A file made elsewhere, without the options, is read by [`load_with`](Self::load_with).
    ///
    /// The file need not be trusted. Reading takes no more memory than twice its length and a few megabytes.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("model.safetensors");
    /// Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?.save(&path)?;
    /// let model = Hymba::load(&path)?;
    /// assert_eq!(model.options().hidden_size, 8);
    ///
    /// std::fs::write(&path, "not a model")?;
    /// assert!(Hymba::load(&path).is_err());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is damaged, hostile, or of another format,
    /// and [`Error::Tensors`], with the whole list, when tensors are missing, unexpected or of the wrong shape or type.
    pub fn load(path: impl AsRef<Path>) -> Result<Hymba> {
        let (tensors, saved) = header::read(Source::open(path.as_ref())?)?;
        let Saved { options, task, .. } = entry(saved, &tensors)?;
        if task.is_some() {
            return Err(tensors.error("it holds an encoder with a head: read it with Predictor::load"));
        }
        model(options, tensors)
    }

    /// Reads the parameters of a model with these options from a safetensors file made elsewhere, in Python for
    /// instance. The tensors have the names that [`visit`](Self::visit) gives, matrices are `[out, in]`, and f32, f64,
    /// f16 and bf16 all become f32. Options in the file are not looked at. The [crate's front page](crate#files) has a table of
    /// names and shapes.
    ///
    /// `num_heads` and `window_size` leave no trace in a file: wrong ones make another model, and nothing can notice.
    ///
    /// The file need not be trusted, as in [`load`](Self::load).
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("model.safetensors");
    /// let options = HymbaOptions::new(3).hidden_size(8).num_layers(1);
    /// Hymba::build(options.clone())?.save(&path)?;
    /// Hymba::load_with(&path, options.clone())?;
    ///
    /// let error = Hymba::load_with(&path, options.num_layers(2)).unwrap_err();
    /// assert!(error.to_string().contains("\"blocks.1.norm.weight\": missing, expected shape [8]"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load), and [`Error::Option`] when the options are not usable.
    pub fn load_with(path: impl AsRef<Path>, options: HymbaOptions) -> Result<Hymba> {
        options.validate()?;
        let (tensors, _) = header::read(Source::open(path.as_ref())?)?;
        if !tensors.names().any(|name| name.starts_with("blocks.")) {
            return Err(tensors.error(format!("its tensors have other names than a model's: {}", origin(&tensors))));
        }
        model(options, tensors)
    }
}

/// Writes a safetensors file of f32 tensors, with `saved` in its metadata. One entry there, so that saving twice gives the
/// same bytes.
pub(crate) fn write(path: &Path, saved: &impl Serialize, tensors: &[(String, ArrayViewD<'_, f32>)]) -> Result<()> {
    let saved = serde_json::to_string(saved).map_err(|error| Error::format(path, error.to_string()))?;
    let infos: Vec<_> =
        tensors.iter().map(|(name, array)| (name.clone(), Dtype::F32, array.shape().to_vec())).collect();
    write_streamed(path, &infos, &[(OPTIONS_KEY, &saved)], &mut |index, file| {
        const PIECE: usize = 1 << 16;
        let mut piece = Vec::new();
        for number in &tensors[index].1 {
            piece.extend(number.to_le_bytes());
            if piece.len() == PIECE {
                file.write_all(&piece)?;
                piece.clear();
            }
        }
        file.write_all(&piece)
    })
}

/// A model with these options and the `tensors` as its parameters.
fn model(options: HymbaOptions, mut tensors: Tensors) -> Result<Hymba> {
    check_size(options.parameters(), &tensors)?;
    let mut model = Hymba::zeros(options);
    fill(&mut tensors, train::views_mut(&mut model))?;
    Ok(model)
}

/// Checks that the file has exactly the tensors that have a place, and reads them.
pub(crate) fn fill(tensors: &mut Tensors, places: Vec<(String, ArrayViewMutD<'_, f32>)>) -> Result<()> {
    let expected = places.iter().map(|(name, array)| (name.clone(), array.shape().to_vec())).collect();
    tensors.check(&expected, Vec::new())?;
    places.into_iter().try_for_each(|(name, array)| tensors.read_into(&name, array))
}

/// What [`write`] put into the metadata.
pub(crate) fn entry<T: DeserializeOwned>(saved: Option<String>, tensors: &Tensors) -> Result<T> {
    let Some(saved) = saved else {
        return Err(tensors.error(format!(
            "its metadata has no entry {OPTIONS_KEY:?} with the options of a model: {}",
            origin(tensors)
        )));
    };
    parse(&saved, tensors)
}

/// Reads what [`write`] put into the metadata.
pub(crate) fn parse<T: DeserializeOwned>(saved: &str, tensors: &Tensors) -> Result<T> {
    /// Read first: what another version wrote may not be readable.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }

    let unusable = |error: serde_json::Error| {
        let reason = printable(&error.to_string());
        tensors.error(format!("the options in its metadata are not usable: {reason}"))
    };
    let Version { version } = serde_json::from_str(saved).map_err(unusable)?;
    if version != VERSION {
        return Err(tensors.error(format!(
            "written in version {version} of the format, and this version of the crate reads version {VERSION}"
        )));
    }
    serde_json::from_str(saved).map_err(unusable)
}

/// Where a file without options probably comes from, by the names of its tensors.
fn origin(tensors: &Tensors) -> &'static str {
    let has = |prefix: &str| tensors.names().any(|name| name.starts_with(prefix));
    if has("hymba_block_") {
        "it seems to come from Edifice; read it with Hymba::load_edifice"
    } else if has("model.layers.") {
        "it seems to be a language model of Hugging Face; read its folder with HymbaLm::from_dir (feature lm)"
    } else if has("blocks.") {
        "its names look right, so it was probably made elsewhere; read it with Hymba::load_with and the options"
    } else if tensors.names().any(|name| name.contains(".blocks.")) {
        "all of them stand under a further name; remove it"
    } else {
        "it is some other model"
    }
}

/// Checks, before memory is taken, that the file holds enough for so many `parameters`, of which there may be too many to
/// count.
pub(crate) fn check_size(parameters: Option<usize>, tensors: &Tensors) -> Result<()> {
    /// So much any file may ask for: a small model is built although tensors are missing, and then all are listed.
    const SMALL: usize = 1 << 20;
    let twice_the_file = usize::try_from(tensors.file_length()).unwrap_or(usize::MAX).saturating_mul(2);
    let parameters = parameters.unwrap_or(usize::MAX);
    if parameters.saturating_mul(size_of::<f32>()) <= twice_the_file.max(SMALL) {
        return Ok(());
    }
    Err(tensors.error(format!(
        "the options ask for {parameters} parameters, which do not fit in a file of {} bytes",
        tensors.file_length()
    )))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;

    use super::tensors::MAX_TENSORS;
    use super::*;

    fn model() -> Hymba {
        let options = HymbaOptions::new(3).hidden_size(4).num_layers(2).num_heads(2).dropout(0.3).seed(u64::MAX);
        Hymba::build(options).unwrap()
    }

    fn parameters(model: &Hymba) -> Vec<(String, Vec<usize>, Vec<u32>)> {
        let mut all = Vec::new();
        model.visit(&mut |name, array| {
            all.push((name.to_string(), array.shape().to_vec(), array.iter().map(|number| number.to_bits()).collect()));
        });
        all
    }

    #[test]
    fn a_saved_model_comes_back_to_the_bit() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        let mut model = model();
        let unusual = [f32::from_bits(0x7fc0_1234), f32::NEG_INFINITY, -0.0, f32::from_bits(1)];
        model.visit_mut(&mut |_, mut array| array.iter_mut().zip(unusual).for_each(|(place, number)| *place = number));
        model.save(&first).unwrap();
        let loaded = Hymba::load(&first).unwrap();
        assert_eq!(loaded.options(), model.options());
        assert_eq!(parameters(&loaded), parameters(&model));
        loaded.save(&second).unwrap();
        assert!(fs::read(first).unwrap() == fs::read(second).unwrap());
    }

    #[test]
    fn saving_replaces_the_old_file_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let files = || fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        let path = folder.path().join("model");
        fs::write(&path, "old").unwrap();
        model().save(&path).unwrap();
        assert!(Hymba::load(&path).is_ok());
        assert_eq!(files(), ["model"]);

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(model().save(&path), Err(Error::Io { .. })));
        assert_eq!(files(), ["model"]);
        assert!(matches!(model().save(path.join("absent/model")), Err(Error::Io { .. })));
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }

    #[test]
    fn what_could_not_be_loaded_is_not_saved() {
        let folder = tempfile::tempdir().unwrap();
        let options = HymbaOptions::new(1).hidden_size(1).num_heads(1).state_size(1).num_layers(MAX_TENSORS / 20);
        let error = Hymba::build(options).unwrap().save(folder.path().join("model")).unwrap_err();
        assert!(error.to_string().contains("num_layers"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_of_other_writers_and_types_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let mut model = model();
        // numbers that bf16 can hold
        model
            .visit_mut(&mut |_, mut array| array.mapv_inplace(|number| f32::from_bits(number.to_bits() & 0xffff_0000)));
        let options =
            r#"{"version": 1, "options": {"embed_dim": 3, "hidden_size": 4, "num_layers": 2, "num_heads": 2}}"#;
        type Bytes = fn(f32) -> Vec<u8>;
        let types: [(Dtype, Bytes); 2] = [
            (Dtype::F64, |number| f64::from(number).to_le_bytes().to_vec()),
            (Dtype::BF16, |number| number.to_le_bytes()[2..].to_vec()),
        ];
        for (dtype, bytes) in types {
            let mut tensors = Vec::new();
            model.visit(&mut |name, array| {
                let data: Vec<u8> = array.iter().flat_map(|&number| bytes(number)).collect();
                tensors.push((name.to_string(), array.shape().to_vec(), data));
            });
            let views = tensors.iter().map(|(name, shape, data)| {
                (name, safetensors::tensor::TensorView::new(dtype, shape.clone(), data).unwrap())
            });
            let metadata = HashMap::from([("format", "pt"), (OPTIONS_KEY, options)].map(|(k, v)| (k.into(), v.into())));
            fs::write(&path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
            assert_eq!(parameters(&Hymba::load(&path).unwrap()), parameters(&model), "{dtype}");
        }
    }
}
