//! Both views in one file.

use serde::{Deserialize, Serialize};

use super::super::features::Plan;
use super::super::file;
use super::{Ensemble, KernelPredictor, Mix, Predictor, Task, check_width};
use crate::Result;
use crate::files::saved::{self, entry, fill, in_one_file};
use crate::files::tensors::Source;
use crate::files::{Target, header};
use crate::parameters::ParameterMut;

/// In front of the names of the tensors of the kernels.
const KERNELS: &str = "features.";

/// The metadata entry of a saved ensemble.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    task: Task,
    kernels: Plan,
    encoder: Option<SavedEncoder>,
}

#[derive(Serialize, Deserialize)]
struct SavedEncoder {
    share: f32,
    factor: f32,
    predictor: file::Saved,
}

in_one_file!(Ensemble {
    /// Writes both views to one safetensors file: the kernels under names that begin with `features.`, the encoder as
    /// [`Predictor::save`] does, the rest in the metadata.
    save,
    /// Reads an ensemble that [`save`](Self::save) wrote.
    load,
    from_bytes,
});

impl Ensemble {
    fn write(&self, target: Target) -> Result<()> {
        let encoder = self.encoder.as_ref().map(|(predictor, Mix { share, factor })| SavedEncoder {
            share: *share,
            factor: *factor,
            predictor: predictor.saved(),
        });
        let (version, task, kernels) = (saved::VERSION, self.task().clone(), self.kernels.plan().clone());
        let mut tensors = self.kernels.tensors(KERNELS);
        tensors.extend(self.encoder().map_or(Vec::new(), Predictor::parameters));
        saved::write(target, &Saved { version, task, kernels, encoder }, tensors)
    }

    fn read(source: Source) -> Result<Self> {
        let (mut tensors, saved) = header::read(source)?;
        let Saved { task, kernels, encoder, .. } = entry(saved, &tensors)?;
        let kernels = KernelPredictor::with_room_for(&tensors, KERNELS, kernels, task)?;
        let in_file = encoder.as_ref().and_then(|encoder| encoder.predictor.storage);
        let mut lora = None;
        let encoder = match encoder {
            Some(SavedEncoder { share, factor, predictor }) => {
                if !(0.0..=1.0).contains(&share) || !factor.is_finite() {
                    return Err(tensors.error(format!("its encoder has the share {share} and the factor {factor}")));
                }
                let room = Predictor::with_saved(&predictor, &tensors, None)?;
                lora = predictor.lora;
                Some((room, Mix { share, factor }))
            }
            None => None,
        };
        let mut ensemble = Ensemble { kernels, encoder };
        if ensemble.encoder().is_some_and(|predictor| predictor.task() != ensemble.task()) {
            return Err(tensors.error("its encoder and its kernels have different tasks"));
        }
        if let Some(predictor) = ensemble.encoder() {
            check_width(predictor, &ensemble.kernels).map_err(|error| tensors.error(error.to_string()))?;
        }
        fill(&mut tensors, in_file, &mut |f| ensemble.visit_tensors_mut(f))?;
        ensemble.kernels.check(&tensors)?;
        if let Some((predictor, _)) = &mut ensemble.encoder {
            predictor.finish_reading(lora.as_ref(), &tensors)?;
        }
        Ok(ensemble)
    }

    fn visit_tensors_mut(&mut self, f: &mut dyn FnMut(&str, ParameterMut<'_>)) {
        self.kernels.visit_tensors_mut(KERNELS, &mut |name, array| f(name, ParameterMut::Array(array)));
        if let Some((predictor, _)) = &mut self.encoder {
            predictor.visit_tensors_mut(f);
        }
    }
}
