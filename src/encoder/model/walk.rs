//! The walk over the parameters of an encoder, and gradients of its kind.

use ndarray::{Array2, ArrayViewD, ArrayViewMutD};

use super::{Cached, Hymba};
use crate::layers::Linear;
use crate::lora::is_lora;
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};

impl Hymba {
    /// Calls `f` with the name and the values of every parameter, in a fixed order. The names are those in files. Matrices that are
    /// [stored](Self::store_as) for inference are left out, and of a model with [adapters](Self::add_lora) only the active one is
    /// visited, as only that is trained: for all parameters see [`visit_parameters`](Self::visit_parameters).
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions};
    ///
    /// let model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// let mut shapes = Vec::new();
    /// model.visit(&mut |name, array| shapes.push((name.to_string(), array.shape().to_vec())));
    /// assert_eq!(shapes[0], ("input_proj.weight".to_string(), vec![16, 5]));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.visit_parameters(&mut |name, parameter| match parameter {
            Parameter::Array(array) if self.adapters.trains(name) => f(name, array),
            _ => {}
        });
    }

    /// As [`visit`](Self::visit), with all parameters of the model and of its active adapter, each in the form in which it is stored.
    ///
    /// ```
    /// use hymba::{Hymba, HymbaOptions, Storage};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// model.store_as(Storage::Bf16)?;
    /// model.visit_parameters(&mut |name, parameter| match parameter.storage() {
    ///     Some(storage) => assert!(storage == Storage::Bf16 && name.ends_with(".weight")),
    ///     None => println!("{name} {:?}", parameter.shape()),
    /// });
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn visit_parameters<'a>(&'a self, f: &mut dyn FnMut(&str, Parameter<'a>)) {
        let f: &mut Visitor<'_, 'a> = f;
        if let Some(input_proj) = &self.input_proj {
            input_proj.visit("input_proj", f);
        }
        if let Some(tokens) = &self.meta_tokens {
            f("meta_tokens", Parameter::Array(tokens.view().into_dyn()));
        }
        self.blocks.visit(f);
        self.final_norm.visit("final_norm", f);
    }

    /// As [`visit`](Self::visit), for changing the parameters. States made before can no longer be used.
    pub fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        let all = self.adapters.is_empty();
        self.visit_parameters_mut(&mut |name, parameter| match parameter {
            ParameterMut::Array(array) if all || is_lora(name) => f(name, array),
            _ => {}
        });
    }

    pub(crate) fn visit_parameters_mut<'a>(&'a mut self, f: &mut VisitorMut<'_, 'a>) {
        self.changed();
        if let Some(input_proj) = &mut self.input_proj {
            input_proj.visit_mut("input_proj", f);
        }
        if let Some(tokens) = &mut self.meta_tokens {
            f("meta_tokens", ParameterMut::Array(tokens.view_mut().into_dyn()));
        }
        self.blocks.visit_mut(f);
        self.final_norm.visit_mut("final_norm", f);
    }

    /// A gradient of this model, zero.
    pub(in crate::encoder) fn zero_gradient(&self) -> Hymba {
        Hymba {
            input_proj: self.input_proj.as_ref().map(Linear::zeros_like),
            meta_tokens: self.meta_tokens.as_ref().map(|tokens| Array2::zeros(tokens.dim())),
            blocks: self.blocks.zeros_like(),
            final_norm: self.final_norm.zeros_like(),
            options: self.options.clone(),
            storage: self.storage,
            cached: Cached::default(),
            salt: 0,
            adapters: self.adapters.zeros_like(),
        }
    }
}
