//! Low-rank adapters of an encoder.

use super::model::{Cached, Hymba};
use crate::layers::Linear;
use crate::lora::{Adapters, Host, lora_calls};
use crate::parameters::Visitor;

impl Host for Hymba {
    type Cached = Cached;

    fn adapters(&self) -> &Adapters<Cached> {
        &self.adapters
    }

    fn adapters_mut(&mut self) -> &mut Adapters<Cached> {
        &mut self.adapters
    }

    fn cached_mut(&mut self) -> &mut Cached {
        &mut self.cached
    }

    fn visit_maps<'a>(&'a mut self, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.input_proj.iter_mut().for_each(|input_proj| f("input_proj".into(), input_proj));
        self.blocks.visit_maps(f);
    }

    fn visit_all<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        self.visit_parameters(f);
    }

    fn base_parameters(&self) -> usize {
        self.num_parameters()
    }

    /// The small matrices stay as they are: the walk of what is trained leaves them out.
    fn freeze(&mut self) {
        self.blocks.large_maps_mut().for_each(Linear::freeze);
    }

    fn thaw(&mut self) {
        if self.storage.is_none() {
            self.blocks.large_maps_mut().for_each(|map| map.store_as(None));
        }
    }
}

lora_calls!(
    Hymba,
    None,
    "use hymba::{Hymba, HymbaOptions, LoraOptions};
# use hymba::ndarray::Array3;

let mut model = Hymba::build(HymbaOptions::new(6).hidden_size(32).num_layers(2))?; // or of load_as, in bf16, 8 or 4 bits"
);
