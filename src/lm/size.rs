//! How much memory a model takes, before any of it is taken.

use super::config::{HymbaLmConfig, Quantization, TorchDtype};
use crate::kernels::conv::TAPS;
use crate::kernels::matmul::{Matrix, Storage};

/// Whether the tensor of this name is a [`Matrix`], and not numbers in f32.
pub(super) fn is_matrix(name: &str) -> bool {
    Quantization::Bits8.storage(name).is_some()
}

impl HymbaLmConfig {
    /// Bytes of the parameters of a model whose matrices are kept as `storage` says, padding to whole panels included.
    /// `None` where they cannot be counted.
    pub(super) fn memory(&self, storage: &dyn Fn(&str) -> Storage) -> Option<usize> {
        self.tensors().iter().try_fold(0usize, |sum, (name, shape)| {
            let bytes = match shape[..] {
                [n, k] if is_matrix(name) => Matrix::bytes(n, k, storage(name))?,
                // there is always room for all taps, and for a bias
                [e, 1, _] if name.ends_with("conv1d.weight") => e.checked_mul((TAPS + 1) * size_of::<f32>())?,
                _ => shape.iter().try_fold(size_of::<f32>(), |size, axis| size.checked_mul(*axis))?,
            };
            sum.checked_add(bytes)
        })
    }
}

impl TorchDtype {
    pub(super) fn storage(self) -> Storage {
        match self {
            TorchDtype::F32 => Storage::F32,
            TorchDtype::F16 => Storage::F16,
            TorchDtype::BF16 => Storage::Bf16,
        }
    }

    /// Bytes of a number.
    pub(super) fn size(self) -> usize {
        match self {
            TorchDtype::F32 => 4,
            TorchDtype::F16 | TorchDtype::BF16 => 2,
        }
    }
}
