//! Which matrices are quantised.

use super::config::Quantization;
use crate::kernels::matmul::Storage;
use crate::{Error, Result};

/// Matrices that get as few bits as requested. All others are small, or not matrices.
const LARGE: [&str; 7] = ["embed_tokens", "lm_head", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"];
/// Matrices that keep 8: they are 2 % of the weights, and the state depends on them.
const SMALL: [&str; 2] = ["x_proj.0", "dt_proj.0"];

impl Quantization {
    /// How a matrix is kept; `None` for what is kept as it is.
    pub(super) fn storage(self, name: &str) -> Option<Storage> {
        let name = name.strip_suffix(".weight")?;
        let is = |end: &&str| name.strip_suffix(*end).is_some_and(|start| start.is_empty() || start.ends_with('.'));
        let (large, small) = (LARGE.iter().any(is), SMALL.iter().any(is));
        match self {
            Quantization::Bits4 if large => Some(Storage::Q4),
            Quantization::Bits8 | Quantization::Bits4 if large || small => Some(Storage::Q8),
            _ => None,
        }
    }

    /// The quantisation of a loaded model, given that of its checkpoint and the one requested.
    pub(super) fn resolve(self, asked: Quantization) -> Result<Quantization> {
        match (self, asked) {
            (Quantization::None, _) => Ok(asked),
            (_, Quantization::None) => Ok(self),
            _ if self == asked => Ok(self),
            _ => Err(Error::Option {
                option: "quantize",
                given: format!("{asked:?}"),
                allowed: format!("the checkpoint is quantised already, as {self:?}; read the original instead"),
            }),
        }
    }
}
