//! What is fitted to the training series.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::ndarray::Array2;
use hymba::train::{Dataset, Trained, Trainer};
use hymba::{Ensemble, KernelPredictor, Predictor, Task};

use crate::arguments::{Arguments, Views};
use crate::encoder::train_encoder;

/// What is saved.
pub enum Model {
    Ensemble(Box<Ensemble>),
    Encoder(Box<Predictor>),
}

impl Model {
    pub fn save(&self, path: &Path) -> hymba::Result<()> {
        match self {
            Model::Ensemble(ensemble) => ensemble.save(path),
            Model::Encoder(predictor) => predictor.save(path),
        }
    }

    pub fn load(path: &Path, views: Views) -> hymba::Result<Model> {
        Ok(match views {
            Views::Encoder => Model::Encoder(Box::new(Predictor::load(path)?)),
            Views::Both | Views::Kernels => Model::Ensemble(Box::new(Ensemble::load(path)?)),
        })
    }

    /// `[series, outputs]`
    pub fn predict(&self, data: &Dataset) -> hymba::Result<Array2<f32>> {
        match self {
            Model::Ensemble(ensemble) => ensemble.predict(data.series()),
            Model::Encoder(predictor) => predictor.predict_series(data.series()),
        }
    }
}

/// Fits the views that are asked for; with the training of the encoder, if one was trained with all series and has a checkpoint.
pub fn fit(
    arguments: &Arguments,
    task: &Task,
    data: &Dataset,
    checkpoint: Option<&Path>,
) -> Result<(Model, Option<Trained>), Box<dyn Error>> {
    let train = |part: &Dataset, checkpoint: Option<&Path>| match checkpoint {
        Some(checkpoint) => train_encoder(arguments, task, part, checkpoint),
        None => {
            let predictor = Predictor::build(arguments.model(part), task.clone())?;
            Ok(Trainer::new(predictor, arguments.training(part))?.fit(part, |_| ControlFlow::Continue(()))?)
        }
    };
    let mut trained = None;
    let model = match arguments.views {
        Views::Encoder => {
            let encoder = trained.insert(train(data, checkpoint)?);
            Model::Encoder(Box::new(encoder.predictor.clone()))
        }
        Views::Kernels => Model::Ensemble(Box::new(Ensemble::new(KernelPredictor::fit(data, arguments.seed)?, None)?)),
        Views::Both => {
            let ensemble = Ensemble::fit(data, arguments.seed, |part| -> Result<Predictor, Box<dyn Error>> {
                let whole = part.num_series() == data.num_series();
                println!("trains an encoder with {} of {} series", part.num_series(), data.num_series());
                let encoder = train(part, checkpoint.filter(|_| whole))?;
                let predictor = encoder.predictor.clone();
                trained = whole.then_some(encoder);
                Ok(predictor)
            })?;
            match ensemble.encoder() {
                Some(_) => println!("the encoder has a share of {:.1} beside the kernels", ensemble.share()),
                None => println!("kernels alone: an encoder promises nothing more"),
            }
            Model::Ensemble(Box::new(ensemble))
        }
    };
    Ok((model, trained))
}
