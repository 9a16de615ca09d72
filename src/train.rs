//! Training: losses with their gradients, learning rate schedules, and the optimiser.
//!
//! A gradient is a further model: [`Hymba::zeros_like`] makes one, [`Hymba::backward`] adds into it, and
//! [`AdamW::step`] takes a step against it and clears it.
//!
//! ```
//! use hymba::ndarray::Array3;
//! use hymba::train::{AdamW, AdamWOptions, CrossEntropy};
//! use hymba::{Hymba, HymbaOptions};
//!
//! let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
//! let mut gradient = model.zeros_like();
//! let mut optimizer = AdamW::new(&model, AdamWOptions::default().learning_rate(1e-2))?;
//!
//! // two sequences, and which of the 8 outputs should be the largest
//! let (x, labels) = (Array3::ones((2, 20, 3)), [5, 5]);
//! let mut losses = Vec::new();
//! for step in 0..3 {
//!     let (y, cache) = model.forward_train(&x, None, step)?;
//!     let loss = CrossEntropy::new().evaluate(&y, &labels)?;
//!     model.backward(&cache, &loss.gradient, &mut gradient)?;
//!     optimizer.step(&mut model, &mut gradient)?;
//!     losses.push(loss.value);
//! }
//! assert!(losses[2] < losses[0]);
//! # Ok::<(), hymba::Error>(())
//! ```

use ndarray::{ArrayViewD, ArrayViewMutD};

use crate::Hymba;

mod augment;
mod collective;
mod data;
#[cfg(feature = "lm")]
mod lm;
mod loss;
mod optimizer;
mod recommend;
mod regression;
mod schedule;
mod trainer;

pub use augment::Augmentation;
pub use collective::{Alone, Collective, Threads, TrainingData};
use collective::{Hash, Ranks, hash_of, hash_of_every, hash_of_text};
pub use data::{Dataset, Targets};
use data::{cut, cut_into};
#[cfg(feature = "lm")]
pub use lm::{LmEpoch, LmProgress, LmTrained, LmTrainer, LmTrainerOptions, TokenRows};
pub use loss::{BinaryCrossEntropy, CrossEntropy, Loss, RegressionLoss};
pub use optimizer::{AdamW, AdamWOptions, StepInfo};
pub use regression::RegressionMetrics;
pub use schedule::Schedule;
pub use trainer::{
    BatchSource, DatasetBatches, Decay, EpochMetrics, Metrics, Progress, SeriesBatch, Stopped, Trained, Trainer,
    TrainerOptions, evaluate,
};

/// Anything that can be trained: it can visit its parameters.
///
/// A gradient and the moments of an optimiser are further values of the same type. To train a [`Hymba`] together with
/// layers of your own, implement this for a struct of both.
///
/// Every walk visits the same parameters in the same order. Their names differ from each other, and their numbers lie in
/// row-major order without gaps.
///
/// ```
/// use hymba::Hymba;
/// use hymba::ndarray::{Array1, ArrayViewD, ArrayViewMutD};
/// use hymba::train::Parameters;
///
/// struct Scaled {
///     encoder: Hymba,
///     scale: Array1<f32>,
/// }
///
/// impl Parameters for Scaled {
///     fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
///         self.encoder.visit(&mut |name, array| f(&format!("encoder.{name}"), array));
///         f("scale", self.scale.view().into_dyn());
///     }
///     fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
///         self.encoder.visit_mut(&mut |name, array| f(&format!("encoder.{name}"), array));
///         f("scale", self.scale.view_mut().into_dyn());
///     }
///     fn zeros_like(&self) -> Self {
///         Scaled { encoder: self.encoder.zeros_like(), scale: Array1::zeros(self.scale.dim()) }
///     }
/// }
/// ```
pub trait Parameters: Sized {
    /// Calls `f` with the name and the values of every parameter.
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>));
    /// As [`visit`](Self::visit), for changing the parameters.
    fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>));
    /// The same parameters, all zero.
    fn zeros_like(&self) -> Self;

    /// Refuses what cannot be trained, such as a model whose matrices are stored for inference only
    /// ([`Hymba::store_as`](crate::Hymba::store_as)): its walk does not have them. Optimisers ask before they begin.
    ///
    /// # Errors
    ///
    /// Any; its message says what to do.
    fn check_trainable(&self) -> crate::Result<()> {
        Ok(())
    }

    /// Sets every parameter to zero. Clears a gradient that is not to be used: after [`AdamW::step`] has refused one that is not
    /// finite, it would spoil all later steps.
    ///
    /// ```
    /// use hymba::train::{AdamW, AdamWOptions, Parameters};
    /// use hymba::{Error, Hymba, HymbaOptions};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(3).hidden_size(8).num_layers(1))?;
    /// let mut optimizer = AdamW::new(&model, AdamWOptions::default())?;
    /// let mut gradient = model.zeros_like();
    /// gradient.visit_mut(&mut |_, mut array| array.fill(f32::NAN)); // of a batch that went wrong
    /// if let Err(Error::NotFinite { .. }) = optimizer.step(&mut model, &mut gradient) {
    ///     gradient.fill_zero();
    /// }
    /// assert!(optimizer.step(&mut model, &mut gradient).is_ok());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    fn fill_zero(&mut self) {
        self.visit_mut(&mut |_, mut array| array.fill(0.0));
    }
}

impl Parameters for Hymba {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.visit(f);
    }

    fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.visit_mut(f);
    }

    fn zeros_like(&self) -> Self {
        self.zeros_like()
    }

    fn check_trainable(&self) -> crate::Result<()> {
        self.check_trainable()
    }
}

/// Matrices that are stored for products only are left out: they cannot be trained.
#[cfg(feature = "lm")]
impl Parameters for crate::HymbaLm {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&str, ArrayViewD<'a, f32>)) {
        self.visit(&mut |name, parameter| {
            // beside adapters nothing else is trained
            if let crate::Parameter::Array(array) = parameter
                && self.trains(name)
            {
                f(name, array);
            }
        });
    }

    fn visit_mut<'a>(&'a mut self, f: &mut dyn FnMut(&str, ArrayViewMutD<'a, f32>)) {
        self.visit_mut(f);
    }

    fn zeros_like(&self) -> Self {
        self.zeros_like()
    }

    fn check_trainable(&self) -> crate::Result<()> {
        self.check_trainable()
    }
}

/// All parameters with their names, in the order of the walk.
pub(crate) fn views(parameters: &impl Parameters) -> Vec<(String, ArrayViewD<'_, f32>)> {
    let mut views = Vec::new();
    parameters.visit(&mut |name, array| views.push((name.to_string(), array)));
    views
}

/// As [`views`], for changing the parameters.
pub(crate) fn views_mut(parameters: &mut impl Parameters) -> Vec<(String, ArrayViewMutD<'_, f32>)> {
    let mut views = Vec::new();
    parameters.visit_mut(&mut |name, array| views.push((name.to_string(), array)));
    views
}
