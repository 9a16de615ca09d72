//! `hymba` for web pages: models that classify series are trained, streamed, saved and loaded in the browser.
//!
//! ```js
//! import init, { Examples, ModelOptions, Training, TrainingOptions } from "./pkg/hymba_web.js";
//!
//! await init();
//! const examples = new Examples(["walking", "standing"], 6); // frames of 6 numbers
//! examples.add(0, frames); //                                    Float32Array, frame after frame
//! const training = new Training(examples, new ModelOptions(), new TrainingOptions());
//! while (!training.done) {
//!     console.log(training.advance(4)); //                       the loss; the page may draw in between
//! }
//! const stream = training.model().stream();
//! const probabilities = stream.step(frame);
//! ```

mod model;
mod training;

pub use model::{Model, ModelOptions, Stream};
pub use training::{Examples, Training, TrainingOptions};

use hymba::ndarray::Array2;
use wasm_bindgen::JsError;
use wasm_bindgen::prelude::wasm_bindgen;

/// The instructions the module is made of: `"simd128"` or `"scalar"`.
#[wasm_bindgen(js_name = simdLevel)]
pub fn simd_level() -> String {
    hymba::simd_level().into()
}

/// Numbers, frame after frame → `[length, width]`
fn frames(numbers: &[f32], width: usize) -> Result<Array2<f32>, JsError> {
    let count = numbers.len();
    if width == 0 || count == 0 || !count.is_multiple_of(width) {
        return Err(JsError::new(&format!("{count} numbers are not one or more whole frames of {width}")));
    }
    Ok(Array2::from_shape_vec((count / width, width), numbers.to_vec())?)
}
