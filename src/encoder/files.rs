//! Encoders in files: [`Hymba::save`] and [`Hymba::load`].
//!
//! The format is safetensors. Files are written through a temporary one, and read as a stranger's: see
//! [`tensors`](crate::files::tensors) for the checks.

use std::path::Path;

use ndarray::Array2;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::model::Hymba;
use super::options::HymbaOptions;
use super::size::{check_size, first_storage};
use super::streaming::HymbaState;
use crate::files::saved::{VERSION, entry, fill, in_one_file, origin, write};
use crate::files::tensors::{Source, Tensors};
use crate::files::{Target, header};
use crate::kernels::matmul::Storage;
use crate::lora::{self, Adapted, SavedLora};
use crate::{Error, Result, states};

/// The metadata entry of a saved model.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    options: HymbaOptions,
    /// How the large matrices are stored; not there where they can be trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    storage: Option<Storage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lora: Option<SavedLora>,
    /// There in the file of a predictor.
    #[serde(default, skip_serializing)]
    task: Option<IgnoredAny>,
}

in_one_file!(Hymba {
    /// Writes the model to a safetensors file: every parameter as f32 under its own name, the options in the metadata. Matrices
    /// that are [stored](Self::store_as) for inference are written as they are stored; in 8 or 4 bits as two tensors:
    ///
    /// | of `NAME` `[n, k]`, with b = ⌈k / 32⌉ | type and shape | |
    /// |---|---|---|
    /// | `NAME` in 8 bits | U8 `[n, 32·b]` | the quantised values plus 128 |
    /// | `NAME` in 4 bits | U8 `[n, 16·b]` | the quantised values plus 8, two per byte, the first in the low bits |
    /// | `NAME_scale` | BF16 `[n, b]` | the factor of the quantised values of each 32 columns |
    ///
    /// [Adapters](Self::add_lora) that the model holds are written with it; the tensors of the map M of the adapter N are
    /// `lora.N.M.lora_A.weight` and `lora.N.M.lora_B.weight`.
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
    save,
    /// Reads a model that [`save`](Self::save) wrote. Nothing but `path` is needed: the options are in the file.
    ///
    /// A file made elsewhere, without the options, is read by [`load_with`](Self::load_with).
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
    load,
    /// ```
    /// use std::io::Cursor;
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// let bytes = model.to_bytes()?;
    /// assert_eq!(Hymba::from_bytes(&bytes)?.options(), model.options());
    /// assert!(Hymba::from_bytes(&bytes[..100]).is_err());
    ///
    /// let mut file = Cursor::new(Vec::new());
    /// model.write_to(&mut file)?;
    /// assert_eq!(Hymba::read_from(&mut file)?.options(), model.options());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    from_bytes,
});

impl Hymba {
    fn write(&self, target: Target) -> Result<()> {
        let (options, storage) = (self.options().clone(), self.storage());
        let lora = SavedLora::of(self);
        write(target, &Saved { version: VERSION, options, storage, lora, task: None }, lora::parameters(self))
    }

    fn read(source: Source) -> Result<Hymba> {
        Self::read_as(source, None)
    }

    fn read_as(source: Source, asked: Option<Storage>) -> Result<Hymba> {
        let (tensors, saved) = header::read(source)?;
        let Saved { options, storage: in_file, lora, task, .. } = entry(saved, &tensors)?;
        if task.is_some() {
            return Err(tensors.error("it holds an encoder with a head: read it with Predictor::load"));
        }
        model(options, tensors, in_file, asked, lora)
    }

    /// As [`load`](Self::load), with the large matrices stored in another type than in the file: see
    /// [`store_as`](Self::store_as). They are rounded while they are read, so that the wide ones are never in memory together.
    ///
    /// # Errors
    ///
    /// Those of [`load`](Self::load) and of [`store_as`](Self::store_as). A type wider than in the file takes memory beyond the limit
    /// that [`load`](Self::load) gives.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions, Storage};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("model.safetensors");
    /// Hymba::build(HymbaOptions::new(3).hidden_size(64).num_layers(1))?.save(&path)?;
    ///
    /// let narrow = Hymba::load_as(&path, Storage::Q8)?;
    /// narrow.save(&path)?;
    /// assert_eq!(Hymba::load(&path)?.storage(), Some(Storage::Q8));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load_as(path: impl AsRef<Path>, storage: Storage) -> Result<Hymba> {
        Self::read_as(Source::open(path.as_ref())?, Some(storage))
    }

    /// Reads the parameters of a model with these options from a safetensors file made elsewhere, in Python for
    /// instance. The tensors have the names that [`visit`](Self::visit) gives, matrices are `[out, in]`, and f32, f64,
    /// f16 and bf16 all become f32. Options in the file are ignored. The [crate's front page](crate#files) has a table of
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
            return Err(tensors.error(format!("its tensors do not have a model's names: {}", origin(&tensors))));
        }
        model(options, tensors, None, None, None)
    }
}

/// The metadata entry of saved streams.
#[derive(Serialize, Deserialize)]
struct SavedState {
    version: u32,
    /// Of the weights, in hexadecimal.
    fingerprint: String,
    /// Frames seen by each stream, and the meta tokens in front of them.
    positions: Vec<usize>,
}

impl Hymba {
    /// Writes a state to a safetensors file, for [`load_state`](Self::load_state): in another process, too, and for any model that has
    /// the same weights.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if a model with other weights made the state or it has too many streams for a file;
    /// [`Error::Io`] when the file cannot be written; an old file is then untouched.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    /// use hymba::ndarray::Array2;
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("streams");
    /// let model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// let (mut state, frame) = (model.new_state(2), Array2::ones((2, 3)));
    /// model.step(&frame, &mut state)?;
    /// model.save_state(&state, &path)?;
    /// let mut later = model.load_state(&path)?;
    /// assert_eq!(model.step(&frame, &mut later)?, model.step(&frame, &mut state)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn save_state(&self, state: &HymbaState, path: impl AsRef<Path>) -> Result<()> {
        self.save_state_with(state, path.as_ref(), 0, Vec::new())
    }

    /// As [`save_state`](Self::save_state), with `more` arrays that a predictor keeps of its streams; `salt` identifies what it
    /// makes them of.
    pub(crate) fn save_state_with(
        &self,
        state: &HymbaState,
        path: &Path,
        salt: u64,
        more: Vec<(String, &Array2<f32>)>,
    ) -> Result<()> {
        self.check_state(state, state.batch(), "it has")?;
        let saved = SavedState {
            version: VERSION,
            fingerprint: format!("{:016x}", self.fingerprint() ^ salt),
            positions: state.rows.iter().map(|row| row.position).collect(),
        };
        states::write_with(path, &saved, &state.rows, more)
    }

    /// Reads a state that [`save_state`](Self::save_state) wrote. The file need not be trusted.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file cannot be read, [`Error::Format`] when it is damaged or
    /// hostile, [`Error::Tensors`] when it has other tensors than a state,
    /// [`Error::State`] when it belongs to a model with other weights.
    pub fn load_state(&self, path: impl AsRef<Path>) -> Result<HymbaState> {
        self.load_state_with(path.as_ref(), 0, &[]).map(|(state, _)| state)
    }

    /// As [`load_state`](Self::load_state), of what [`save_state_with`](Self::save_state_with) wrote: with `more` arrays of these
    /// shapes for each stream.
    #[allow(clippy::type_complexity)]
    pub(crate) fn load_state_with(
        &self,
        path: &Path,
        salt: u64,
        more: &[(&str, (usize, usize))],
    ) -> Result<(HymbaState, Vec<Vec<Array2<f32>>>)> {
        let (mut tensors, saved) = header::read(Source::open(path)?)?;
        let SavedState { fingerprint, positions, .. } = entry(saved, &tensors)?;
        if fingerprint != format!("{:016x}", self.fingerprint() ^ salt) {
            return Err(Error::State("the file holds one of a model with other weights".into()));
        }
        let (least, empty) = (self.initial().position, || self.initial().layers.clone());
        let (rows, more) = states::read_with(&mut tensors, &positions, least, &empty, more)?;
        Ok((HymbaState { rows, ..self.new_state(0) }, more))
    }
}

/// A model with these options and the `tensors` as its parameters, of which the large matrices are in the file as `in_file`
/// says and are to be stored as `asked`, if they are to be otherwise.
fn model(
    options: HymbaOptions,
    mut tensors: Tensors,
    in_file: Option<Storage>,
    asked: Option<Storage>,
    lora: Option<SavedLora>,
) -> Result<Hymba> {
    check_size(&options, 1, options.parameters(), in_file, asked, &tensors)?;
    let mut model = Hymba::zeros(options, first_storage(in_file, asked));
    lora.iter().try_for_each(|lora| lora.make_room(&mut model, &tensors))?;
    fill(&mut tensors, in_file, &mut |f| {
        model.visit_parameters_mut(f);
        model.visit_others_mut("", f);
    })?;
    lora.iter().try_for_each(|lora| lora.activate(&mut model, &tensors))?;
    if let Some(asked) = asked {
        model.store_as(asked)?;
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;

    use safetensors::Dtype;

    use super::*;
    use crate::Error;
    use crate::files::header::OPTIONS_KEY;
    use crate::files::tensors::MAX_TENSORS;

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
