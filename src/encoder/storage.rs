//! Models whose large matrices are stored for inference only, in fewer bits.

use super::model::Hymba;
use super::size::{check_storage, fits, parameter_bytes};
use crate::kernels::matmul::Storage;
use crate::{Error, Result};

impl Hymba {
    /// Stores the large matrices in this type, in the order in which products read them and nothing besides: for inference. A
    /// trained model takes 4 bytes per weight, and 4 more from the first call on for a copy in that order; this one takes what
    /// [`Storage`] says, and a step of a model that does not fit into the CPU's caches waits for so much less memory.
    ///
    /// | narrowed, in every block and the shared one | always f32 |
    /// |---|---|
    /// | `mamba.in_proj`, `mamba.out_proj` | `input_proj`: frames may have any scale, and 8 bits would lose small features |
    /// | `attention.{q,k,v,out}_proj` | `mamba.x_proj`, `mamba.dt_proj`: the time step, B and C add up in the state |
    /// | `gate`, `shared_proj`, `ffn.up`, `ffn.down` | norms, biases, convolution, A, D, meta tokens, the head of a [`Predictor`](crate::Predictor) |
    ///
    /// These matrices are most of the model: 96 % at the default sizes. [`save`](Self::save) writes them as they are stored, and
    /// [`load`](Self::load) gives the same model again, to the bit; [`load_as`](Self::load_as) reads a larger file into this form at
    /// once. States made before can no longer be used. To choose a wider type later does not undo the rounding.
    ///
    /// Such a model cannot be trained, but for low-rank adapters beside its matrices: see [`make_trainable`](Self::make_trainable) and
    /// [`add_lora`](Self::add_lora).
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if `hidden_size` is under 16, or the model does not fit into memory in a wider type. The model is then unchanged.
    ///
    /// ```
    /// use hymba::ndarray::Array3;
    /// use hymba::{Hymba, HymbaOptions, Storage};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(12).hidden_size(64).num_layers(2))?;
    /// let x = Array3::<f32>::ones((1, 20, 12));
    /// let (wide, bytes) = (model.forward(&x)?, model.num_bytes());
    ///
    /// model.store_as(Storage::Bf16)?;
    /// assert!(model.num_bytes() < bytes * 6 / 10);
    /// assert!((model.forward(&x)? - wide).iter().all(|difference| difference.abs() < 0.05));
    /// assert!(model.forward_train(&x, None, 0).is_err());
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn store_as(&mut self, storage: Storage) -> Result<()> {
        self.set_storage(Some(storage))
    }

    /// Widens the large matrices to f32 that can be trained. This does not undo the rounding of [`store_as`](Self::store_as): to train
    /// without it, load the original.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] if the model does not fit into memory; it is then unchanged.
    ///
    /// ```
    /// use hymba::ndarray::Array3;
    /// use hymba::{Hymba, HymbaOptions, Storage};
    ///
    /// let mut model = Hymba::build(HymbaOptions::new(5).hidden_size(16).num_heads(2).num_layers(1))?;
    /// model.store_as(Storage::Q8)?;
    /// model.make_trainable()?;
    /// assert!(model.storage().is_none());
    /// model.forward_train(&Array3::ones((1, 20, 5)), None, 0)?;
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn make_trainable(&mut self) -> Result<()> {
        self.set_storage(None)
    }

    fn set_storage(&mut self, storage: Option<Storage>) -> Result<()> {
        if storage == self.storage {
            return Ok(());
        }
        check_storage(&self.options, storage)?;
        let bytes = parameter_bytes(&self.options, storage);
        if bytes > self.num_bytes() && !fits(bytes) {
            return Err(Error::Option {
                option: "storage",
                given: storage.map_or("trainable".into(), |storage| format!("{storage:?}")),
                allowed: format!("the model would take {bytes} bytes, more than fit into memory; choose fewer bits"),
            });
        }
        // beside adapters they stay frozen
        let stored = storage.or((!self.adapters.is_empty()).then_some(Storage::F32));
        self.blocks.large_maps_mut().for_each(|map| map.store_as(stored));
        self.storage = storage;
        self.changed();
        self.adapters.forget();
        Ok(())
    }

    /// The type that the large matrices are stored in; `None` of a model that can be trained.
    pub fn storage(&self) -> Option<Storage> {
        self.storage
    }

    /// Bytes of memory that the parameters take. Where they can be trained, products make a packed copy of the matrices besides, of
    /// about the same size.
    pub fn num_bytes(&self) -> usize {
        let mut bytes = self.adapters.num_bytes();
        self.visit_parameters(&mut |_, parameter| bytes += parameter.num_bytes());
        bytes
    }

    /// Refuses to train a model whose matrices are stored for inference only, unless an adapter is trained.
    pub(crate) fn check_trainable(&self) -> Result<()> {
        self.adapters.check_trainable()?;
        match self.storage {
            Some(storage) if self.adapters.is_empty() => Err(Error::Option {
                option: "storage",
                given: format!("{storage:?}"),
                allowed:
                    "matrices stored for inference cannot be trained; train the original, an adapter (add_lora), or \
                          call make_trainable"
                        .into(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HymbaOptions, Pattern};

    #[test]
    fn bytes_are_counted_beforehand_as_they_are_taken() {
        for options in [
            HymbaOptions::new(3).hidden_size(16).num_heads(2).num_layers(2),
            HymbaOptions::new(30).hidden_size(72).num_layers(3),
            HymbaOptions::edifice(72).hidden_size(72).num_layers(1),
            HymbaOptions::jamba(30).hidden_size(40),
            HymbaOptions::zamba(30).hidden_size(72),
            HymbaOptions::new(9).hidden_size(32).pattern(Pattern::Attention),
        ] {
            let mut model = Hymba::build(options.clone()).unwrap();
            assert_eq!(model.num_bytes(), parameter_bytes(&options, None));
            for storage in [Storage::F32, Storage::F16, Storage::Bf16, Storage::Q8, Storage::Q4] {
                model.store_as(storage).unwrap();
                assert_eq!(model.num_bytes(), parameter_bytes(&options, Some(storage)), "{storage:?}");
            }
        }
        let options = HymbaOptions::new(3).hidden_size(usize::MAX / 2);
        assert_eq!(parameter_bytes(&options, Some(Storage::Q8)), usize::MAX);
    }
}
