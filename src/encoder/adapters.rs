//! Low-rank adapters of an encoder.

use std::sync::Arc;

use super::model::Hymba;
use crate::layers::{Lazy, Linear, SequenceState};
use crate::lora::{Adapters, Host, lora_calls};
use crate::parameters::{Visitor, next_id};

/// What follows from the weights: see the fields of [`Hymba`] of these names.
#[derive(Clone)]
pub(crate) struct Cached {
    initial: Lazy<Arc<SequenceState>>,
    fingerprint: Lazy<u64>,
    id: u64,
}

impl Default for Cached {
    fn default() -> Self {
        Cached { initial: Lazy::new(), fingerprint: Lazy::new(), id: next_id() }
    }
}

impl Host for Hymba {
    type Cached = Cached;

    fn adapters(&self) -> &Adapters<Cached> {
        &self.adapters
    }

    fn adapters_mut(&mut self) -> &mut Adapters<Cached> {
        &mut self.adapters
    }

    fn swap_cached(&mut self, other: &mut Cached) {
        std::mem::swap(&mut self.initial, &mut other.initial);
        std::mem::swap(&mut self.fingerprint, &mut other.fingerprint);
        std::mem::swap(&mut self.id, &mut other.id);
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
