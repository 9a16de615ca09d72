//! How a language model is read.

use super::config::{Quantization, TorchDtype};
use crate::kernels::simd::Isa;
use crate::layers::KvStorage;

/// The type of activations in products with matrices in bf16; sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Arithmetic {
    /// f32: the weights are widened.
    #[default]
    F32,
    /// bf16, on CPUs that multiply bf16 faster (AVX-512-BF16, ARM's `bfdot`, or on Linux AMX); on others this is `F32`.
    /// The published code does the same, and also rounds the sums. Prompts gain most: decoding is bound by memory
    /// bandwidth. Subnormal numbers count as zero.
    ///
    /// Linux is asked for AMX when the first such model computes, for the whole process and for good, unless
    /// `HYMBA_SIMD` names an instruction set that the CPU has: from then on it refuses signal stacks that are too small
    /// for the registers of AMX.
    Bf16,
}

impl Arithmetic {
    /// The instruction set that multiplies matrices in bf16 on this machine: as [`simd_level`](crate::simd_level) says, or, for
    /// `Bf16`, `"amx"`, `"avx512-bf16"` or `"neon-bf16"` if it has that. For `Bf16`, this call may ask Linux for AMX,
    /// too.
    ///
    /// ```
    /// use hymba::lm::Arithmetic;
    ///
    /// assert_eq!(Arithmetic::F32.simd_level(), hymba::simd_level());
    /// let is_faster = ["amx", "avx512-bf16", "neon-bf16"].contains(&Arithmetic::Bf16.simd_level());
    /// assert_eq!(is_faster, Arithmetic::Bf16.simd_level() != hymba::simd_level());
    /// ```
    pub fn simd_level(self) -> &'static str {
        match self {
            Arithmetic::F32 => Isa::current().name(),
            Arithmetic::Bf16 => match Isa::with_tiles() {
                Isa::Avx512Bf16 => "avx512-bf16",
                Isa::NeonBf16 => "neon-bf16",
                level => level.name(),
            },
        }
    }
}

/// How a language model is read.
///
/// | option | default | |
/// |---|---|---|
/// | `kv_storage` | [`KvStorage::F32`] | the type in which states keep keys and values |
/// | `quantize` | [`Quantization::None`] | the bits of the big matrices in memory |
/// | `dtype` | as in the file | the type of the big matrices in memory, where they are not quantised |
/// | `arithmetic` | [`Arithmetic::F32`] | the type of activations in products with matrices in bf16 |
/// | `trainable` | `false` | whether the big matrices can be trained, which takes f32 |
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LoadOptions {
    /// The type in which states keep keys and values.
    pub kv_storage: KvStorage,
    /// The bits of the big matrices in memory. What is quantised in the checkpoint stays so.
    pub quantize: Quantization,
    /// The type of the big matrices in memory, where they are not quantised; `None` leaves each as it is in the file. Norms,
    /// biases, convolutions, A, D and meta tokens are always f32.
    pub dtype: Option<TorchDtype>,
    /// The type of activations in products with matrices in bf16. (For quantised ones it is 8 bits.)
    pub arithmetic: Arithmetic,
    /// Whether the big matrices can be trained. They are then in f32, whatever `dtype` says, and cannot be quantised.
    pub trainable: bool,
}

impl LoadOptions {
    /// Sets the type in which states keep keys and values.
    pub fn kv_storage(mut self, kv_storage: KvStorage) -> Self {
        self.kv_storage = kv_storage;
        self
    }

    /// Sets the bits of the big matrices in memory.
    pub fn quantize(mut self, quantize: Quantization) -> Self {
        self.quantize = quantize;
        self
    }

    /// Sets the type of the big matrices in memory: [`TorchDtype::BF16`] halves what a fine-tune saved in f32 takes. Numbers are
    /// rounded to the nearest while they are read.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions, TorchDtype};
    ///
    /// # let mut config = HymbaLmConfig::hymba_1_5b();
    /// # (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// # config.torch_dtype = Some(TorchDtype::F32);
    /// # let folder = tempfile::tempdir()?;
    /// HymbaLm::random(config, 0, &LoadOptions::default())?.save_dir(folder.path())?;
    /// let wide = HymbaLm::from_dir(folder.path())?;
    /// let narrow = HymbaLm::from_dir_with(folder.path(), &LoadOptions::default().dtype(TorchDtype::BF16), |_| {})?;
    /// assert!(narrow.num_bytes() < wide.num_bytes());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn dtype(mut self, dtype: TorchDtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    /// Sets whether the big matrices can be trained: see [`HymbaLm::forward_train`](crate::HymbaLm::forward_train).
    pub fn trainable(mut self, trainable: bool) -> Self {
        self.trainable = trainable;
        self
    }

    /// Sets the type of activations in products with matrices in bf16.
    pub fn arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
        self
    }
}
