//! Low-rank adapters of a language model.

use super::model::{Cached, HymbaLm};
use super::names::HEAD_MAP;
use crate::layers::Linear;
use crate::lora::{Adapters, Host, lora_calls};
use crate::parameters::Visitor;
use crate::{Error, Result};

impl Host for HymbaLm {
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
        self.blocks.iter_mut().for_each(|block| block.visit_maps(f));
        self.head.iter_mut().for_each(|head| f(HEAD_MAP.into(), head));
    }

    fn visit_all<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        self.visit(f);
    }

    fn base_parameters(&self) -> usize {
        self.num_parameters()
    }

    fn freeze(&mut self) {
        self.frozen = self.embedding.rows_mut().is_some();
        self.embedding.freeze();
        self.visit_maps(&mut |_, map| map.freeze());
    }

    fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            self.embedding.thaw();
            self.visit_maps(&mut |_, map| map.store_as(None));
        }
    }
}

lora_calls!(
    HymbaLm,
    Some("CAUSAL_LM"),
    "use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, LoadOptions, LoraOptions};

# let mut config = HymbaLmConfig::hymba_1_5b();
# (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
let mut model = HymbaLm::random(config, 0, &LoadOptions::default())?;"
);

impl HymbaLm {
    /// Refuses to write the weights alone where adapters belong to them.
    pub(super) fn check_no_lora(&self) -> Result<()> {
        match self.has_lora() {
            false => Ok(()),
            true => Err(Error::State(
                "the model has adapters, which are not written with it: save them by save_lora, or add the active one to the weights \
                 by merge_lora"
                    .into(),
            )),
        }
    }

    pub(crate) fn check_trainable(&self) -> Result<()> {
        self.adapters.check_trainable()
    }

    /// Whether a parameter is trained.
    pub(crate) fn trains(&self, name: &str) -> bool {
        self.adapters.trains(name)
    }
}
