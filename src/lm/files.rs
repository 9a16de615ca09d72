//! Reading and writing folders as the Hugging Face Hub has them.

use std::path::Path;

use super::cache::KvStorage;
use super::config::HymbaLmConfig;
use super::model::HymbaLm;
use super::parameters::ParameterMut;
use crate::Result;
use crate::kernels::matrix::Storage;
use crate::weights::header;
use crate::weights::tensors::Source;

/// How a language model is read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The type in which states keep keys and values.
    pub kv_storage: KvStorage,
}

impl LoadOptions {
    /// Sets the type in which states keep keys and values.
    pub fn kv_storage(mut self, kv_storage: KvStorage) -> Self {
        self.kv_storage = kv_storage;
        self
    }
}

impl HymbaLm {
    /// Reads a model.
    pub fn from_dir(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let config = HymbaLmConfig::from_file(path.join("config.json"))?;
        let (mut tensors, _) = header::read(Source::open(&path.join("model.safetensors"))?)?;
        let mut lm = Self::zeros(config, KvStorage::F32, &|_| Storage::F32);
        let mut result = Ok(());
        lm.visit_mut(&mut |name, parameter| {
            if result.is_err() {
                return;
            }
            result = match parameter {
                ParameterMut::Matrix(matrix) => {
                    let (n, k) = matrix.dim();
                    let mut array = ndarray::Array2::zeros((n, k));
                    let result = tensors.read_into(name, array.view_mut().into_dyn());
                    (0..n).for_each(|i| matrix.set_row(i, array.row(i).as_slice().unwrap()));
                    result
                }
                ParameterMut::Numbers(numbers) => tensors.read_into(name, numbers),
            };
        });
        result.map(|()| lm)
    }
}
