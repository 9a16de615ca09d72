//! Predictors in files: [`Predictor::save`] and [`Predictor::load`].

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Differences, Normalization, Predictor, PredictorOptions, Task};
use crate::encoder::{check_size, first_storage};
use crate::files::saved::{self, entry, fill, in_one_file};
use crate::files::tensors::{Source, Tensors};
use crate::files::{Target, header};
use crate::kernels::matmul::Storage;
use crate::lora::{self, Adapted, SavedLora};
use crate::parameters::{Parameter, ParameterMut};
use crate::{HymbaOptions, Pooling, Result, Stem};

/// In front of `_mean` and `_scale`, in files.
pub(super) const INPUT: &str = "input";
pub(super) const OUTPUT: &str = "output";

/// The metadata entry of a saved predictor.
#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    version: u32,
    options: HymbaOptions,
    /// How the large matrices are stored; not there where they can be trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<SavedLora>,
    /// Not there in the file of an encoder.
    task: Option<Task>,
    #[serde(default, skip_serializing_if = "is_default")]
    normalize_series: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    differences: Differences,
    #[serde(default, skip_serializing_if = "is_default")]
    stem: Option<Stem>,
    #[serde(default, skip_serializing_if = "is_default")]
    bidirectional: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pooling: Pooling,
}

/// Options that old files lack are not written at their defaults.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

in_one_file!(Predictor {
    /// Writes the predictor to one safetensors file: every parameter under its own name, f32 or as it is
    /// [stored](Self::store_as), [adapters](Self::add_lora) as [`Hymba::save`](crate::Hymba::save) does, the normalizations as
    /// `input_mean`, `input_scale`, `output_mean` and `output_scale`, options and task in the metadata.
    ///
    /// ```
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let folder = tempfile::tempdir()?;
    /// let path = folder.path().join("predictor.safetensors");
    /// let options = HymbaOptions::new(3).hidden_size(8).num_layers(1);
    /// Predictor::build(options, Task::classify(["walking", "standing"]))?.save(&path)?;
    /// assert_eq!(Predictor::load(&path)?.task().labels(), ["walking", "standing"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    save,
    /// Reads a predictor that [`save`](Self::save) wrote.
    load,
    /// ```
    /// use hymba::{HymbaOptions, Predictor, Task};
    ///
    /// let options = HymbaOptions::new(3).hidden_size(8).num_layers(1);
    /// let bytes = Predictor::build(options, Task::classify(["walking", "standing"]))?.to_bytes()?;
    /// assert_eq!(Predictor::from_bytes(&bytes)?.task().labels(), ["walking", "standing"]);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    from_bytes,
});

impl Predictor {
    fn write(&self, target: Target) -> Result<()> {
        saved::write(target, &self.saved(), self.parameters())
    }

    /// The metadata entry.
    pub(super) fn saved(&self) -> Saved {
        let PredictorOptions { encoder: options, normalize_series, differences, stem, bidirectional, pooling } =
            self.options.clone();
        let (version, storage, task) = (saved::VERSION, self.encoder().storage(), Some(self.task.clone()));
        let lora = SavedLora::of(self);
        Saved { version, options, storage, lora, task, normalize_series, differences, stem, bidirectional, pooling }
    }

    /// As [`load`](Self::load), with the large matrices of the encoder stored in another type than in the file: see
    /// [`Hymba::load_as`](crate::Hymba::load_as).
    ///
    /// # Errors
    ///
    /// As [`Hymba::load_as`](crate::Hymba::load_as).
    pub fn load_as(path: impl AsRef<Path>, storage: Storage) -> Result<Predictor> {
        Self::read_as(Source::open(path.as_ref())?, Some(storage))
    }

    fn read(source: Source) -> Result<Predictor> {
        Self::read_as(source, None)
    }

    fn read_as(source: Source, asked: Option<Storage>) -> Result<Predictor> {
        let (mut tensors, saved) = header::read(source)?;
        let saved: Saved = entry(saved, &tensors)?;
        let in_file = saved.storage;
        let mut predictor = Self::with_saved(&saved, &tensors, asked)?;
        fill(&mut tensors, in_file, &mut |f| predictor.visit_tensors_mut(f))?;
        predictor.finish_reading(saved.lora.as_ref(), &tensors)?;
        if let Some(asked) = asked {
            predictor.store_as(asked)?;
        }
        Ok(predictor)
    }

    /// A predictor of zeros for what the file has, into which its matrices can be read if they are to be stored as `asked`.
    pub(super) fn with_saved(saved: &Saved, tensors: &Tensors, asked: Option<Storage>) -> Result<Predictor> {
        let options = PredictorOptions {
            encoder: saved.options.clone(),
            normalize_series: saved.normalize_series,
            differences: saved.differences,
            stem: saved.stem.clone(),
            bidirectional: saved.bidirectional,
            pooling: saved.pooling,
        };
        let Some(task) = saved.task.clone() else {
            return Err(tensors.error(
                "it holds an encoder without a head: read it with Hymba::load, and put a head on it with \
                 Predictor::with_encoder",
            ));
        };
        let mut predictor = Predictor::with_room_for(tensors, options, saved.storage, asked, task)?;
        saved.lora.iter().try_for_each(|lora| lora.make_room(&mut predictor, tensors))?;
        Ok(predictor)
    }

    /// Once every tensor has been read.
    pub(super) fn finish_reading(&mut self, lora: Option<&SavedLora>, tensors: &Tensors) -> Result<()> {
        lora.map_or(Ok(()), |lora| lora.activate(self, tensors))?;
        for (name, normalization) in [(INPUT, &self.input), (OUTPUT, &self.output)] {
            normalization.iter().try_for_each(|normalization| normalization.check(tensors, name))?;
        }
        self.salt_encoder();
        Ok(())
    }

    /// What is saved: parameters and normalizations.
    pub(super) fn parameters(&self) -> Vec<(String, Parameter<'_>)> {
        let mut all = lora::parameters(self);
        for (name, normalization) in [(INPUT, &self.input), (OUTPUT, &self.output)] {
            let tensors = normalization.iter().flat_map(|normalization| normalization.tensors(name));
            all.extend(tensors.map(|(name, array)| (name, Parameter::Array(array))));
        }
        all
    }

    /// As [`parameters`](Self::parameters), for reading them.
    pub(super) fn visit_tensors_mut(&mut self, f: &mut dyn FnMut(&str, ParameterMut<'_>)) {
        self.visit_parameters_mut(f);
        self.visit_others_mut("", f);
        for (name, normalization) in [(INPUT, &mut self.input), (OUTPUT, &mut self.output)] {
            let tensors = normalization.iter_mut().flat_map(|normalization| normalization.tensors_mut(name));
            tensors.for_each(|(name, array)| f(&name, ParameterMut::Array(array)));
        }
    }

    /// A predictor of zeros that has the normalizations of the file.
    fn with_room_for(
        tensors: &Tensors,
        options: PredictorOptions,
        in_file: Option<Storage>,
        asked: Option<Storage>,
        task: Task,
    ) -> Result<Self> {
        task.validate().map_err(|error| tensors.error(error.to_string()))?;
        let encoders = if options.bidirectional { 2 } else { 1 };
        check_size(&options.encoder, encoders, options.parameters(&task), in_file, asked, tensors)?;
        options.validate(&task).map_err(|error| tensors.error(error.to_string()))?;
        let has = |of: &str| ["mean", "scale"].iter().any(|part| tensors.shape(&format!("{of}_{part}")).is_some());
        let input = has(INPUT).then(|| Normalization::zeros(options.features()));
        let output = (has(OUTPUT) && task.is_regression()).then(|| Normalization::zeros(task.outputs()));
        Ok(Predictor { input, output, ..Predictor::zeros(options, first_storage(in_file, asked), task) })
    }
}
