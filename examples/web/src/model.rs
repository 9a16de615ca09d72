//! Models, and streams of frames through them.

use std::rc::Rc;

use hymba::ndarray::{Array2, Axis, s};
use hymba::{HymbaOptions, Pooling, Predictor, PredictorOptions, PredictorState, Task, softmax};
use wasm_bindgen::JsError;
use wasm_bindgen::prelude::wasm_bindgen;

use crate::frames;

/// Sizes of a new model. It starts with those of a model for gestures, which some seconds are enough to train.
#[wasm_bindgen]
#[derive(Clone)]
pub struct ModelOptions {
    /// The width of every layer; `numHeads` must divide it.
    #[wasm_bindgen(js_name = hiddenSize)]
    pub hidden_size: usize,
    /// Numbers that the Mamba branch keeps for each of its features.
    #[wasm_bindgen(js_name = stateSize)]
    pub state_size: usize,
    /// Blocks.
    #[wasm_bindgen(js_name = numLayers)]
    pub num_layers: usize,
    /// Attention heads.
    #[wasm_bindgen(js_name = numHeads)]
    pub num_heads: usize,
    /// Frames that attention looks back.
    #[wasm_bindgen(js_name = windowSize)]
    pub window_size: usize,
    /// Vectors that sum a series up, each by an attention of its own; 0: the last frame does.
    pub queries: usize,
    /// Share of the activations left out in training.
    pub dropout: f32,
    /// What the first weights, the order of examples and dropout are drawn from.
    pub seed: u32,
}

#[wasm_bindgen]
impl ModelOptions {
    /// Sizes for gestures.
    #[wasm_bindgen(constructor)]
    #[allow(clippy::new_without_default)]
    pub fn new() -> ModelOptions {
        ModelOptions {
            hidden_size: 32,
            state_size: 8,
            num_layers: 2,
            num_heads: 4,
            window_size: 64,
            queries: 2,
            dropout: 0.1,
            seed: 0,
        }
    }

    /// The defaults of `HymbaOptions`: 256 wide, 4 blocks.
    #[wasm_bindgen(js_name = large)]
    pub fn large() -> ModelOptions {
        let HymbaOptions { hidden_size, state_size, num_layers, num_heads, window_size, dropout, .. } =
            HymbaOptions::new(1);
        ModelOptions { hidden_size, state_size, num_layers, num_heads, window_size, queries: 0, dropout, seed: 0 }
    }
}

impl ModelOptions {
    pub(crate) fn of(&self, width: usize) -> PredictorOptions {
        let encoder = HymbaOptions::new(width)
            .hidden_size(self.hidden_size)
            .state_size(self.state_size)
            .num_layers(self.num_layers)
            .num_heads(self.num_heads)
            .window_size(self.window_size)
            .dropout(self.dropout)
            .seed(self.seed.into());
        let pooling = match self.queries {
            0 => Pooling::Last,
            queries => Pooling::Attention { queries },
        };
        PredictorOptions::new(encoder).pooling(pooling)
    }
}

/// A model that tells series of frames apart. (A file of one that predicts numbers can be loaded as well: it has no classes, and gives
/// its numbers in place of probabilities.)
#[wasm_bindgen]
pub struct Model(Rc<Predictor>);

impl From<Predictor> for Model {
    fn from(predictor: Predictor) -> Model {
        Model(Rc::new(predictor))
    }
}

#[wasm_bindgen]
impl Model {
    /// A model with random weights.
    pub fn untrained(classes: Vec<String>, width: usize, options: &ModelOptions) -> Result<Model, JsError> {
        Ok(Predictor::build(options.of(width), Task::classify(classes))?.into())
    }

    /// The model of a file, which need not be trusted: what is wrong with it is said by the error.
    #[wasm_bindgen(js_name = fromBytes)]
    pub fn from_bytes(bytes: &[u8]) -> Result<Model, JsError> {
        Ok(Predictor::from_bytes(bytes)?.into())
    }

    /// A safetensors file, which `Predictor::load` reads outside the browser, too.
    #[wasm_bindgen(js_name = toBytes)]
    pub fn to_bytes(&self) -> Result<Vec<u8>, JsError> {
        Ok(self.0.to_bytes()?)
    }

    /// The names of the classes, in the order of their probabilities.
    #[wasm_bindgen(getter)]
    pub fn classes(&self) -> Vec<String> {
        self.0.task().labels().to_vec()
    }

    /// Numbers in a frame.
    #[wasm_bindgen(getter)]
    pub fn width(&self) -> usize {
        self.0.options().embed_dim
    }

    /// Parameters of the model.
    #[wasm_bindgen(getter, js_name = numParameters)]
    pub fn num_parameters(&self) -> usize {
        self.0.num_parameters()
    }

    /// A whole series, frame after frame → the probability of each class.
    pub fn predict(&self, series: &[f32]) -> Result<Vec<f32>, JsError> {
        let x = frames(series, self.width())?.insert_axis(Axis(0)); // [1, l, width]
        Ok(probabilities(&self.0, self.0.predict(&x, None)?))
    }

    /// A stream that has seen no frame yet. Any number of them can be open at the same time.
    pub fn stream(&self) -> Stream {
        Stream { model: self.0.clone(), state: self.0.new_state(1), seen: Vec::new() }
    }
}

/// Frames that come one by one.
#[wasm_bindgen]
pub struct Stream {
    model: Rc<Predictor>,
    state: PredictorState,
    /// The frames of the last window, one after the other.
    seen: Vec<f32>,
}

#[wasm_bindgen]
impl Stream {
    /// The next frame → the probability of each class, judged by all frames so far. It equals `Model.predict` on them.
    pub fn step(&mut self, frame: &[f32]) -> Result<Vec<f32>, JsError> {
        let z = self.model.step(&frames(frame, frame.len())?, &mut self.state)?;
        let kept = frame.len() * self.model.options().window_size;
        self.seen.extend_from_slice(frame);
        self.seen.drain(..self.seen.len().saturating_sub(kept));
        Ok(probabilities(&self.model, z))
    }

    /// How much of the last frame each block took from its Mamba branch, the rest being attention: the mean of its gate, from 0 to 1.
    /// Computed anew from the frames of the last window, which is all frames of a series that fits into it. Nothing before the first
    /// frame; a block without a gate has NaN.
    pub fn gates(&self) -> Result<Vec<f32>, JsError> {
        if self.seen.is_empty() {
            return Ok(Vec::new());
        }
        let x = frames(&self.seen, self.model.options().embed_dim)?.insert_axis(Axis(0));
        let seen = self.model.inspect(&x)?;
        let gate = |gate: &hymba::ndarray::Array3<f32>| match gate.is_empty() {
            true => f32::NAN,
            false => gate.slice(s![0, -1, ..]).mean().unwrap_or(f32::NAN),
        };
        Ok(seen.blocks.iter().map(|block| gate(&block.gate)).collect())
    }

    /// Frames seen so far.
    #[wasm_bindgen(getter)]
    pub fn frames(&self) -> usize {
        self.state.lengths()[0]
    }

    /// Forgets all frames.
    pub fn reset(&mut self) -> Result<(), JsError> {
        self.seen.clear();
        Ok(self.state.reset(0)?)
    }
}

/// Of a batch of one.
fn probabilities(model: &Predictor, z: Array2<f32>) -> Vec<f32> {
    let z = if model.task().is_classification() { softmax(&z) } else { z };
    z.into_raw_vec_and_offset().0
}
