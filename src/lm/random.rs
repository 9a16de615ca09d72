//! Models with random weights: to be measured, and to be trained.

use ndarray::ArrayViewMut2;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Normal};

use super::config::{HymbaLmConfig, Quantization, TorchDtype};
use super::load_options::LoadOptions;
use super::model::HymbaLm;
use crate::kernels::matmul::Storage;
use crate::kernels::memory::fits;
use crate::layers::{Linear, Rng};
use crate::parameters::ParameterMut;
use crate::{Error, Result};

impl HymbaLm {
    /// A model with random weights, quantised or in the type that the options say, or else `torch_dtype` of the
    /// configuration, or else bf16: for measuring speed and memory without the real weights. Its text is noise.
    /// `trainable` of the options is ignored: [`build`](Self::build) makes a model to be trained.
    ///
    /// # Errors
    ///
    /// Those of [`HymbaLmConfig::validate`], and [`Error::Option`] if the configuration and the options quantise in different
    /// ways, or the model does not fit into memory.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::{HymbaLmConfig, LoadOptions};
    /// use hymba::ndarray::arr2;
    ///
    /// let mut config = HymbaLmConfig::hymba_1_5b();
    /// (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::random(config, 0, &LoadOptions::default())?;
    /// assert_eq!(lm.forward(&arr2(&[[1, 2, 3], [4, 5, 6]]))?.dim(), (2, 3, 50));
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn random(mut config: HymbaLmConfig, seed: u64, options: &LoadOptions) -> Result<Self> {
        config.validate()?;
        config.quantization = config.quantization.resolve(options.quantize)?;
        if let Some(dtype) = options.dtype {
            config.torch_dtype = Some(dtype);
        }
        let quantization = config.quantization;
        let storage = config.torch_dtype.unwrap_or(TorchDtype::BF16).storage();
        let storage = |name: &str| quantization.storage(name).unwrap_or(storage);
        check_memory(&config, &storage)?;
        let mut lm = Self::zeros(config, options, &|name| Some(storage(name)));
        let mut rng = Rng::seed_from_u64(seed);
        lm.walk_mut(&mut |name, parameter| match parameter {
            ParameterMut::Stored(matrix) => {
                let (_, columns) = matrix.dim();
                let bound = 1.0 / (columns as f32).sqrt();
                let seed: u64 = rng.random();
                matrix.set_rows(|row, numbers| {
                    // a generator for each row, so that threads do not matter
                    let mut rng = Rng::seed_from_u64(seed.wrapping_add(row as u64));
                    numbers.iter_mut().for_each(|x| *x = rng.random_range(-bound..=bound));
                });
            }
            ParameterMut::Array(mut numbers) => {
                let states = numbers.shape().last().copied().unwrap_or(1).max(1);
                for (i, x) in numbers.iter_mut().enumerate() {
                    *x = match name {
                        // the usual start of Mamba: A = −1 … −N, and Δ about 0.01
                        _ if name.ends_with("A_log.0") => ((i % states + 1) as f32).ln(),
                        _ if name.ends_with("dt_proj.0.bias") => -4.6,
                        _ if name.ends_with("norm.weight") || name.contains("layernorm") || name.ends_with("D.0") => {
                            1.0
                        }
                        _ => rng.random_range(-0.5..=0.5),
                    };
                }
            }
        });
        Ok(lm)
    }

    /// A model to be trained, whose weights are drawn from `seed`: maps uniform in ±1/√inputs, those that end a branch smaller by
    /// 1/√(2·layers), embedding, head and meta tokens normal with a deviation of 0.02, norms 1, and Mamba's parts as Mamba starts.
    ///
    /// # Errors
    ///
    /// Those of [`HymbaLmConfig::validate`], and [`Error::Option`] if the configuration is of a quantised model, which cannot be
    /// trained, or the model does not fit into memory.
    ///
    /// ```
    /// use hymba::HymbaLm;
    /// use hymba::lm::HymbaLmConfig;
    ///
    /// let mut config = HymbaLmConfig::hymba_1_5b();
    /// (config.hidden_size, config.intermediate_size, config.vocab_size) = (100, 64, 50);
    /// let lm = HymbaLm::build(config, 0)?;
    /// let (loss, _) = lm.forward_train(&[vec![1, 2, 3, 4]], None)?;
    /// assert!((loss.mean() - 50f64.ln()).abs() < 1.0); // it knows nothing yet
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn build(mut config: HymbaLmConfig, seed: u64) -> Result<Self> {
        config.validate()?;
        if config.quantization != Quantization::None {
            return Err(Error::Option {
                option: "quantization",
                given: format!("{:?}", config.quantization),
                allowed: "a quantised model cannot be trained; use Quantization::None".into(),
            });
        }
        config.torch_dtype = Some(TorchDtype::F32);
        check_memory(&config, &|_| Storage::F32)?;
        let mut lm = Self::zeros(config, &LoadOptions::default().trainable(true), &|_| None);
        let mut rng = Rng::seed_from_u64(seed);
        let normal = Normal::new(0.0, DEVIATION).expect("the deviation is positive");
        let draw = |rows: Option<ArrayViewMut2<f32>>, rng: &mut Rng| {
            rows.into_iter().for_each(|mut rows| rows.mapv_inplace(|_| normal.sample(rng)));
        };
        draw(lm.embedding.rows_mut(), &mut rng);
        draw(Some(lm.meta_tokens.view_mut()), &mut rng);
        let layers = lm.blocks.len();
        lm.blocks.iter_mut().for_each(|block| block.init(layers, &mut rng));
        lm.final_norm.init();
        draw(lm.head.as_mut().and_then(Linear::rows_mut), &mut rng);
        Ok(lm)
    }
}

/// Standard deviation of new vectors.
const DEVIATION: f32 = 0.02;

fn check_memory(config: &HymbaLmConfig, storage: &dyn Fn(&str) -> Storage) -> Result<()> {
    /// For the threads that fill it.
    const A_LITTLE: usize = 16 << 20;
    let bytes = config.memory(storage);
    if bytes.and_then(|bytes| bytes.checked_add(A_LITTLE)).is_none_or(|bytes| !fits(bytes)) {
        let bytes = bytes.map_or("more bytes than can be counted".into(), |bytes| format!("{bytes} bytes"));
        return Err(Error::Option {
            option: "num_hidden_layers",
            given: config.num_hidden_layers.to_string(),
            allowed: format!("the model takes {bytes}, which do not fit into memory; make it smaller"),
        });
    }
    Ok(())
}
