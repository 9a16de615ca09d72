//! Adapters in the file of a model, beside its weights.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Adapted, LORA_NAMES, LoraOptions, MOST, Maps, Parameter, check_name, in_model_file, is_lora, zeros};
use crate::Result;
use crate::files::tensors::Tensors;

/// In the metadata of a model. The parts of the map M of the adapter N are `lora.N.M.lora_A.weight` and `lora_B.weight`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedLora {
    active: Option<String>,
    adapters: BTreeMap<String, LoraOptions>,
}

impl SavedLora {
    /// Of a model that holds some.
    pub(crate) fn of(model: &impl Adapted) -> Option<Self> {
        let options = |name: &str| Some((name.to_string(), model.options_of(name)?));
        // one encoder of two may have no map of an adapter: to it, that is none
        let has_maps = |(_, options): &(String, LoraOptions)| !options.maps.is_empty();
        let mut adapters = BTreeMap::new(); // filled one by one, as in `zeros`
        adapters.extend(model.names().into_iter().filter_map(options).filter(has_maps));
        let active = model.active().filter(|name| adapters.contains_key(*name)).map(Into::into);
        (!adapters.is_empty()).then_some(SavedLora { active, adapters })
    }

    /// Gives `model` adapters of zeros for what the file has, none of them active.
    pub(crate) fn make_room(&self, model: &mut impl Adapted, tensors: &Tensors) -> Result<()> {
        if self.adapters.len() > MOST {
            return Err(tensors.error(format!("it has {} adapters, and at most {MOST} are read", self.adapters.len())));
        }
        let all = model.maps();
        for (name, options) in &self.adapters {
            let bad = |error: crate::Error| tensors.error(format!("its adapter {name:?} is not usable: {error}"));
            check_name(name).map_err(bad)?;
            options.validate().map_err(bad)?;
            if options.maps.is_empty() || options.maps.len() > all.len() {
                return Err(tensors.error(format!("its adapter {name:?} has no maps, or more than the model")));
            }
            let mut maps = Maps::new();
            for map in &options.maps {
                let found = all.iter().find(|(name, _)| name == map);
                // memory is taken for what is there only
                let is_there = |(_, (outputs, inputs)): &&(String, (usize, usize))| {
                    let shapes = [[options.rank, *inputs], [*outputs, options.rank]];
                    let place = in_model_file(name, "", map);
                    let has = |(part, shape): (&str, [usize; 2])| {
                        tensors.shape(&format!("{place}.{part}")).is_some_and(|held| held == shape)
                    };
                    LORA_NAMES.into_iter().zip(shapes).all(has)
                };
                let Some(map) = found.filter(is_there) else {
                    return Err(tensors.error(format!("it has no tensors for {map:?} of its adapter {name:?}")));
                };
                maps.push(map.clone());
            }
            model.hold(name, options.clone(), zeros(&maps, options));
        }
        model.activate(None);
        Ok(())
    }

    /// Once all tensors have been read.
    pub(crate) fn activate(&self, model: &mut impl Adapted, tensors: &Tensors) -> Result<()> {
        match &self.active {
            Some(name) if !self.adapters.contains_key(name) => {
                Err(tensors.error(format!("its active adapter {name:?} is not there")))
            }
            name => {
                model.activate(name.as_deref());
                Ok(())
            }
        }
    }
}

/// The parameters of a model and the parts of all its adapters, under their names in its file.
pub(crate) fn parameters(model: &impl Adapted) -> Vec<(String, Parameter<'_>)> {
    let (mut parameters, active) = (Vec::new(), model.active());
    model.visit_every(&mut |name, parameter| match active {
        Some(active) if is_lora(name) => parameters.push((in_model_file(active, "", name), parameter)),
        _ => parameters.push((name.to_string(), parameter)),
    });
    model.visit_others("", &mut |name, parameter| parameters.push((name.to_string(), parameter)));
    parameters
}
