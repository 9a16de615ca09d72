//! Low-rank adapters of a predictor's encoders: each holds the parts of its own maps.

use std::collections::BTreeMap;

use ndarray::{ArrayD, Ix1};

use super::file::{INPUT, OUTPUT};
use super::{Normalization, Predictor};
use crate::Result;
use crate::lora::{Adapted, LoraOptions, Maps, Parts, is_lora, lora_calls};
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};

/// In front of the maps of the encoder that reads from the end.
const REVERSE: &str = "reverse";
/// What is trained beside an adapter, around the encoders.
const AROUND: [&str; 4] = ["head", "stem", "pooling", "reverse.pooling"];

impl Adapted for Predictor {
    fn maps(&mut self) -> Maps {
        let mut maps = self.reader.encoder.maps();
        let reverse = self.reverse.iter_mut().flat_map(|reverse| reverse.encoder.maps());
        maps.extend(reverse.map(|(name, dim)| (join(REVERSE, &name), dim)));
        maps
    }

    fn hold(&mut self, name: &str, options: LoraOptions, parts: Parts) {
        let (mut own, mut of_reverse) = (Parts::new(), Parts::new());
        for (map, part) in parts {
            match of_the_reverse(&map) {
                Some(map) => of_reverse.insert(map.into(), part),
                None => own.insert(map, part),
            };
        }
        let (reverse, maps): (Vec<_>, Vec<_>) =
            options.maps.iter().cloned().partition(|map| of_the_reverse(map).is_some());
        self.reader.encoder.hold(name, LoraOptions { maps, ..options.clone() }, own);
        if let Some(other) = &mut self.reverse {
            let maps = reverse.iter().filter_map(|map| of_the_reverse(map)).map(Into::into).collect();
            other.encoder.hold(name, LoraOptions { maps, ..options }, of_reverse);
        }
    }

    fn activate(&mut self, name: Option<&str>) {
        self.readers_mut().for_each(|reader| reader.encoder.activate(name));
    }

    fn merge(&mut self) {
        self.readers_mut().for_each(|reader| reader.encoder.merge());
    }

    fn remove(&mut self, name: Option<&str>) {
        self.readers_mut().for_each(|reader| reader.encoder.remove(name));
    }

    fn names(&self) -> Vec<&str> {
        self.reader.encoder.names()
    }

    fn active(&self) -> Option<&str> {
        self.reader.encoder.active()
    }

    fn options_of(&self, name: &str) -> Option<LoraOptions> {
        let mut options = self.reader.encoder.options_of(name)?;
        let reverse = self.reverse.as_ref().and_then(|reverse| reverse.encoder.options_of(name));
        options.maps.extend(reverse.into_iter().flat_map(|reverse| reverse.maps).map(|map| join(REVERSE, &map)));
        Some(options)
    }

    fn visit_every<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        self.visit_parameters(f);
    }

    fn visit_others<'a>(&'a self, prefix: &str, f: &mut Visitor<'_, 'a>) {
        self.reader.encoder.visit_others(prefix, f);
        self.reverse.iter().for_each(|reverse| reverse.encoder.visit_others(&join(prefix, REVERSE), f));
    }

    fn visit_others_mut<'a>(&'a mut self, prefix: &str, f: &mut VisitorMut<'_, 'a>) {
        self.reader.encoder.visit_others_mut(prefix, f);
        self.reverse.iter_mut().for_each(|reverse| reverse.encoder.visit_others_mut(&join(prefix, REVERSE), f));
    }

    fn model_parameters(&self) -> usize {
        self.num_parameters()
    }

    fn around(&self) -> Vec<(&'static str, String, Parameter<'_>)> {
        let mut all = Vec::new();
        self.visit_parameters(&mut |name, parameter| {
            all.extend(module_of(name).map(|module| (module, name.to_string(), parameter)));
        });
        for (module, normalization) in [(INPUT, &self.input), (OUTPUT, &self.output)] {
            let tensors = normalization.iter().flat_map(|normalization| normalization.tensors(module));
            all.extend(tensors.map(|(name, array)| (module, name, Parameter::Array(array))));
        }
        all
    }

    fn around_shapes(&self) -> Vec<(&'static str, String, Vec<usize>)> {
        let mut all = Vec::new();
        self.visit_parameters(&mut |name, parameter| {
            all.extend(module_of(name).map(|module| (module, name.to_string(), parameter.shape())));
        });
        let output = self.task.is_regression().then_some((OUTPUT, self.task.outputs()));
        for (module, width) in [(INPUT, self.options.features())].into_iter().chain(output) {
            all.extend(["mean", "scale"].map(|part| (module, format!("{module}_{part}"), vec![width])));
        }
        all
    }

    fn set_around(&mut self, mut tensors: BTreeMap<String, ArrayD<f32>>) -> Result<()> {
        let mut normalization = |of: &str| {
            let mut part = |part: &str| tensors.remove(&format!("{of}_{part}"))?.into_dimensionality::<Ix1>().ok();
            let both = part("mean").zip(part("scale"));
            both.map(|(mean, scale)| Normalization::new(mean, scale)).transpose()
        };
        let (input, output) = (normalization(INPUT)?, normalization(OUTPUT)?);
        if output.is_some() {
            self.output = output;
        }
        if input.is_some() {
            self.input = input;
            self.salt_encoder();
        }
        let f: &mut VisitorMut = &mut |name, parameter| {
            if let (ParameterMut::Array(mut array), Some(read)) = (parameter, tensors.get(name)) {
                array.assign(read);
            }
        };
        // not through the encoders: nothing in them changes
        self.reader.pool.visit_mut("pooling", f);
        self.reverse.iter_mut().for_each(|reverse| reverse.pool.visit_mut(&join(REVERSE, "pooling"), f));
        self.stem.iter_mut().for_each(|stem| stem.visit_mut("stem", f));
        self.head.visit_mut("head", f);
        Ok(())
    }
}

/// The name of a map without what is in front of it, if it is of the encoder that reads from the end.
fn of_the_reverse(map: &str) -> Option<&str> {
    map.strip_prefix(REVERSE)?.strip_prefix('.')
}

/// Whether a parameter is trained in a predictor with adapters: those of the active one, and all that is around the encoders.
pub(super) fn trains_beside_adapters(name: &str) -> bool {
    is_lora(name) || module_of(name).is_some()
}

/// Which part around the encoders a parameter is of.
fn module_of(name: &str) -> Option<&'static str> {
    AROUND.into_iter().find(|module| name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.')))
}

lora_calls!(
    Predictor,
    None,
    "use hymba::{HymbaOptions, LoraOptions, Predictor, Task};

let options = HymbaOptions::new(6).hidden_size(32).num_layers(2);
let mut model = Predictor::build(options, Task::classify([\"walking\", \"standing\"]))?; // or of load_as, in bf16, 8 or 4 bits"
);
