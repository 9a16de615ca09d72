//! The walk over the parameters of a language model, and gradients of its kind.

use ndarray::{Array2, ArrayViewMutD};

use super::{Cached, HymbaLm};
use crate::layers::Linear;
use crate::lm::block::Block;
use crate::lm::names::{EMBEDDING, FINAL_NORM, HEAD_MAP, META_TOKENS};
use crate::lora::is_lora;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};

impl HymbaLm {
    /// Calls `f` with the name and the values of every parameter, in a fixed order: matrices in the type they are
    /// stored in. The names are those in files.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// let mut count = 0;
    /// lm.visit(&mut |name, parameter| {
    ///     println!("{name} {:?}, {} bytes", parameter.shape(), parameter.num_bytes());
    ///     count += parameter.len();
    /// });
    /// assert_eq!(count, lm.num_parameters());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, Parameter<'a>)) {
        let f: &mut Visitor<'_, 'a> = f;
        self.embedding.visit(EMBEDDING, f);
        if !self.meta_tokens.is_empty() {
            f(META_TOKENS, Parameter::Array(self.meta_tokens.view().into_dyn()));
        }
        self.blocks.iter().for_each(|block| block.visit(f));
        self.final_norm.visit(FINAL_NORM, f);
        if let Some(head) = &self.head {
            head.visit(HEAD_MAP, f);
        }
    }

    /// Calls `f` with the name and the values of every parameter that can be trained, for changing them: all of a model that was
    /// loaded with [`LoadOptions::trainable`](super::LoadOptions::trainable), all but the big matrices of another, and of one with
    /// adapters only the active one ([`add_lora`](Self::add_lora)). States made before are refused from then on.
    pub fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        let all = self.adapters.is_empty();
        self.walk_mut(&mut |name, parameter| match parameter {
            ParameterMut::Array(array) if all || is_lora(name) => f(name, array),
            _ => {}
        });
    }

    /// A model whose parameters are all zero, for accumulating gradients. It has nothing for matrices that are stored
    /// for products only.
    pub fn zeros_like(&self) -> HymbaLm {
        HymbaLm {
            config: self.config.clone(),
            embedding: self.embedding.zeros_like(),
            meta_tokens: Array2::zeros(self.meta_tokens.dim()),
            blocks: self.blocks.iter().map(Block::zeros_like).collect(),
            final_norm: self.final_norm.zeros_like(),
            head: self.head.as_ref().map(Linear::zeros_like),
            recompute: self.recompute,
            adapters: self.adapters.zeros_like(),
            frozen: false,
            rotary: self.rotary.clone(),
            kv_storage: self.kv_storage,
            source: None,
            num_parameters: self.num_parameters,
            cached: Cached::default(),
        }
    }

    /// As [`visit`](Self::visit), for changing parameters of any kind.
    pub(in crate::lm) fn walk_mut<'a>(&'a mut self, f: &mut VisitorMut<'_, 'a>) {
        self.cached = Cached::default();
        self.embedding.visit_mut(EMBEDDING, f);
        if !self.meta_tokens.is_empty() {
            f(META_TOKENS, ParameterMut::Array(self.meta_tokens.view_mut().into_dyn()));
        }
        self.blocks.iter_mut().for_each(|block| block.visit_mut(f));
        self.final_norm.visit_mut(FINAL_NORM, f);
        if let Some(head) = &mut self.head {
            head.visit_mut(HEAD_MAP, f);
        }
    }
}
