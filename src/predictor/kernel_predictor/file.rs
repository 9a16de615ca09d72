//! Kernel predictors in files.

use ndarray::{Array1, Array2, ArrayViewMutD};
use serde::{Deserialize, Serialize};

use super::super::features::Plan;
use super::{KernelFeatures, KernelPredictor, Normalization, Ridge, Task};
use crate::Result;
use crate::files::saved::{self, entry, fill, in_one_file};
use crate::files::tensors::{Source, Tensors};
use crate::files::{Target, header};
use crate::parameters::{Parameter, ParameterMut};

/// The metadata entry of a saved kernel predictor.
#[derive(Serialize, Deserialize)]
struct Saved {
    version: u32,
    kernels: Plan,
    task: Task,
}

in_one_file!(KernelPredictor {
    /// Writes the predictor to one safetensors file: `kernels.*` and `head.*` as f32, the rest in the metadata.
    save,
    /// Reads a predictor that [`save`](Self::save) wrote.
    load,
    from_bytes,
});

impl KernelPredictor {
    fn write(&self, target: Target) -> Result<()> {
        let saved = Saved { version: saved::VERSION, kernels: self.plan().clone(), task: self.task.clone() };
        saved::write(target, &saved, self.tensors(""))
    }

    fn read(source: Source) -> Result<Self> {
        let (mut tensors, saved) = header::read(source)?;
        let Saved { kernels, task, .. } = entry(saved, &tensors)?;
        let mut predictor = Self::with_room_for(&tensors, "", kernels, task)?;
        fill(&mut tensors, None, &mut |f| {
            predictor.visit_tensors_mut("", &mut |name, array| f(name, ParameterMut::Array(array)))
        })?;
        predictor.check(&tensors)?;
        Ok(predictor)
    }

    pub(in crate::predictor) fn plan(&self) -> &Plan {
        &self.features.plan
    }

    /// What is saved, under names that begin with `prefix`.
    pub(in crate::predictor) fn tensors(&self, prefix: &str) -> Vec<(String, Parameter<'_>)> {
        let [mean, scale] = self.features.input.tensors("kernels.input");
        let all = [
            mean,
            scale,
            ("kernels.biases".into(), self.features.biases.view().into_dyn()),
            ("kernels.weights".into(), self.features.weights.view().into_dyn()),
            ("head.weight".into(), self.ridge.weight.view().into_dyn()),
            ("head.bias".into(), self.ridge.bias.view().into_dyn()),
        ];
        all.map(|(name, array)| (format!("{prefix}{name}"), Parameter::Array(array))).into()
    }

    /// As [`tensors`](Self::tensors), for reading them.
    pub(in crate::predictor) fn visit_tensors_mut(
        &mut self,
        prefix: &str,
        f: &mut dyn FnMut(&str, ArrayViewMutD<'_, f32>),
    ) {
        for (name, array) in self.features.input.tensors_mut("kernels.input") {
            f(&format!("{prefix}{name}"), array);
        }
        f(&format!("{prefix}kernels.biases"), self.features.biases.view_mut().into_dyn());
        f(&format!("{prefix}kernels.weights"), self.features.weights.view_mut().into_dyn());
        f(&format!("{prefix}head.weight"), self.ridge.weight.view_mut().into_dyn());
        f(&format!("{prefix}head.bias"), self.ridge.bias.view_mut().into_dyn());
    }

    /// A predictor of zeros for what the file has, if the plan is usable and the file is as large as it says.
    pub(in crate::predictor) fn with_room_for(tensors: &Tensors, prefix: &str, plan: Plan, task: Task) -> Result<Self> {
        task.validate().map_err(|error| tensors.error(error.to_string()))?;
        if task.is_frame_wise() {
            return Err(tensors.error("its task is per frame, but kernel features are per series"));
        }
        if task.is_multi_label() {
            return Err(tensors.error("its task has several labels at once, which kernel features do not support"));
        }
        plan.check().map_err(|reason| tensors.error(format!("its kernels are not usable: {reason}")))?;
        // every size of the plan stands in the shape of a tensor, whose numbers the file holds
        let shapes = plan.shapes(task.outputs());
        for (name, shape) in shapes {
            let name = format!("{prefix}{name}");
            if tensors.shape(&name) != Some(&shape) {
                return Err(tensors.error(format!("its tensor {name} must have shape {shape:?} with these kernels")));
            }
        }
        let (channels, outputs) = (plan.channels, task.outputs());
        let features = KernelFeatures::with_plan(plan, Normalization::zeros(channels));
        let weight = Array2::zeros((outputs, features.num_features()));
        Ok(KernelPredictor { task, features, ridge: Ridge { weight, bias: Array1::zeros(outputs) } })
    }

    pub(in crate::predictor) fn check(&self, tensors: &Tensors) -> Result<()> {
        self.features.input.check(tensors, "input")
    }
}
