//! Predictors in files: [`Predictor::save`] and [`Predictor::load`].

use std::path::Path;

use ndarray::{ArrayViewD, ArrayViewMutD};
use serde::{Deserialize, Serialize};

use super::{Normalization, Predictor, Task, parameters};
use crate::train::{views, views_mut};
use crate::weights::header;
use crate::weights::tensors::{Source, Tensors};
use crate::{HymbaOptions, Result, weights};

/// In front of `_mean` and `_scale`, in files.
const INPUT: &str = "input";
const OUTPUT: &str = "output";

/// The metadata entry of a saved predictor.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    options: HymbaOptions,
    /// Not there in the file of an encoder.
    task: Option<Task>,
}

impl Predictor {
    /// Writes the predictor to one safetensors file: every parameter as f32 under its own name, the normalizations as
    /// `input_mean`, `input_scale`, `output_mean` and `output_scale`, options and task in the metadata.
    ///
    /// As with [`Hymba::save`](crate::Hymba::save), `path` is at all times the old file or the complete new one.
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
    ///
    /// # Errors
    ///
    /// As [`Hymba::save`](crate::Hymba::save).
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let (options, task) = (self.options().clone(), Some(self.task.clone()));
        let saved = Saved { version: weights::VERSION, options, task };
        weights::write(path.as_ref(), &saved, &self.tensors())
    }

    /// Reads a predictor that [`save`](Self::save) wrote. The file need not be trusted, as in
    /// [`Hymba::load`](crate::Hymba::load).
    ///
    /// # Errors
    ///
    /// As [`Hymba::load`](crate::Hymba::load).
    pub fn load(path: impl AsRef<Path>) -> Result<Predictor> {
        let (mut tensors, saved) = header::read(Source::open(path.as_ref())?)?;
        let Saved { options, task, .. } = weights::entry(saved, &tensors)?;
        let Some(task) = task else {
            return Err(tensors.error(
                "it holds an encoder without a head: read it with Hymba::load, and put a head on it with \
                 Predictor::with_encoder",
            ));
        };
        let mut predictor = Predictor::with_room_for(&tensors, options, task)?;
        weights::fill(&mut tensors, predictor.tensors_mut())?;
        predictor.check_normalizations(&tensors)?;
        Ok(predictor)
    }

    /// What is saved: parameters and normalizations.
    fn tensors(&self) -> Vec<(String, ArrayViewD<'_, f32>)> {
        let mut all = views(self);
        for (name, normalization) in [(INPUT, &self.input), (OUTPUT, &self.output)] {
            all.extend(normalization.iter().flat_map(|normalization| normalization.tensors(name)));
        }
        all
    }

    /// As [`tensors`](Self::tensors), for reading them.
    fn tensors_mut(&mut self) -> Vec<(String, ArrayViewMutD<'_, f32>)> {
        let Predictor { encoder, head, input, output, .. } = self;
        let mut all = views_mut(encoder);
        head.visit_mut("head", &mut |name, array| all.push((name.to_string(), array)));
        for (name, normalization) in [(INPUT, input), (OUTPUT, output)] {
            all.extend(normalization.iter_mut().flat_map(|normalization| normalization.tensors_mut(name)));
        }
        all
    }

    /// A predictor of zeros that has the normalizations of the file.
    fn with_room_for(tensors: &Tensors, options: HymbaOptions, task: Task) -> Result<Self> {
        task.validate().map_err(|error| tensors.error(error.to_string()))?;
        weights::check_size(parameters(&options, &task), tensors)?;
        let has = |of: &str| ["mean", "scale"].iter().any(|part| tensors.shape(&format!("{of}_{part}")).is_some());
        let input = has(INPUT).then(|| Normalization::zeros(options.embed_dim));
        let output = (has(OUTPUT) && !task.is_classification()).then(|| Normalization::zeros(task.outputs()));
        Ok(Predictor { input, output, ..Predictor::zeros(options, task) })
    }

    /// Checks numbers that a stranger wrote and that are divided by.
    fn check_normalizations(&self, tensors: &Tensors) -> Result<()> {
        for (name, normalization) in [(INPUT, &self.input), (OUTPUT, &self.output)] {
            let Some(normalization) = normalization else { continue };
            Normalization::new(normalization.mean().clone(), normalization.scale().clone())
                .map_err(|error| tensors.error(format!("its {name} normalization is not usable: {error}")))?;
        }
        Ok(())
    }
}
