//! How a language model is read, and with how many threads it runs.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use hymba::HymbaLm;
use hymba::lm::{Arithmetic, KvStorage, LoadOptions, Quantization};

use crate::output;

#[derive(Args, Clone)]
#[command(next_help_heading = "Model")]
pub struct LoadArgs {
    /// Bits of the weights in memory.
    #[arg(long, value_enum, default_value_t = Bits::None, value_name = "BITS")]
    quantize: Bits,
    /// Type of the activations in products with bf16 weights.
    #[arg(long, value_enum, default_value_t = Float::F32, value_name = "TYPE")]
    arithmetic: Float,
    /// Type of the cached keys and values.
    #[arg(long, value_enum, default_value_t = Float::F32, value_name = "TYPE")]
    kv: Float,
    /// Folder of a low-rank adapter, as `hymba finetune` and the PEFT library write it.
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadArgs,
}

#[derive(Args, Clone)]
pub struct ThreadArgs {
    /// Number of threads; all cores by default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
pub enum Bits {
    /// as in the files
    None,
    #[value(name = "8")]
    Eight,
    #[value(name = "4")]
    Four,
}

#[derive(ValueEnum, Clone, Copy, PartialEq)]
pub enum Float {
    F32,
    Bf16,
}

impl From<Bits> for Quantization {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::None => Quantization::None,
            Bits::Eight => Quantization::Bits8,
            Bits::Four => Quantization::Bits4,
        }
    }
}

impl ThreadArgs {
    /// Must come before anything runs.
    pub fn start(&self) -> Result<()> {
        if let Some(threads) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global()?;
        }
        Ok(())
    }
}

impl LoadArgs {
    pub fn options(&self) -> LoadOptions {
        let arithmetic = match self.arithmetic {
            Float::F32 => Arithmetic::F32,
            Float::Bf16 => Arithmetic::Bf16,
        };
        let kv = match self.kv {
            Float::F32 => KvStorage::F32,
            Float::Bf16 => KvStorage::Bf16,
        };
        LoadOptions::default().quantize(self.quantize.into()).arithmetic(arithmetic).kv_storage(kv)
    }

    pub fn start(&self) -> Result<()> {
        self.threads.start()
    }

    /// Reads the model of a folder, and its adapter; starts the threads, too.
    pub fn read(&self, folder: &Path) -> Result<HymbaLm> {
        self.start()?;
        self.read_as(folder, &self.options())
    }

    /// The same model in these bits and in f32 arithmetic, once the threads are started.
    pub fn read_in(&self, folder: &Path, bits: Bits) -> Result<HymbaLm> {
        self.read_as(folder, &self.options().arithmetic(Arithmetic::F32).quantize(bits.into()))
    }

    fn read_as(&self, folder: &Path, options: &LoadOptions) -> Result<HymbaLm> {
        let mut lm = read(folder, options)?;
        if let Some(adapter) = &self.lora {
            lm.load_lora(adapter)?;
        }
        Ok(lm)
    }

    /// The instruction set of most of the work.
    pub fn simd_level(&self) -> &'static str {
        let options = self.options();
        match options.quantize {
            Quantization::None => options.arithmetic.simd_level(),
            _ => hymba::simd_level(),
        }
    }
}

/// Reads the model of a folder, with a bar.
pub fn read(folder: &Path, options: &LoadOptions) -> Result<HymbaLm> {
    let bar = output::progress_bar(0, "reading {wide_bar} {percent} %");
    let lm = HymbaLm::from_dir_with(folder, options, |loading| {
        bar.set_length(loading.of);
        bar.set_position(loading.parameters);
    });
    bar.finish_and_clear();
    Ok(lm?)
}
