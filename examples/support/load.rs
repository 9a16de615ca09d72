//! The arguments that say how a language model is read.

use hymba::lm::{Arithmetic, KvStorage, LoadOptions, Quantization};

use crate::arguments::Arguments;

pub const USAGE: &str = "\
  --quantize none|8|4     bits of the weights, none: as in the files
  --arithmetic f32|bf16   what activations are rounded to before products with bf16, f32
  --kv f32|bf16           type of the kept keys and values, f32";

/// Whether this was one of them.
pub fn set(options: &mut LoadOptions, name: &str, arguments: &mut Arguments) -> Result<bool, String> {
    match name {
        "--quantize" => options.quantize = bits(name, arguments)?,
        "--arithmetic" => {
            options.arithmetic = one_of(name, arguments, [("f32", Arithmetic::F32), ("bf16", Arithmetic::Bf16)])?;
        }
        "--kv" => options.kv_storage = one_of(name, arguments, [("f32", KvStorage::F32), ("bf16", KvStorage::Bf16)])?,
        _ => return Ok(false),
    }
    Ok(true)
}

pub fn bits(name: &str, arguments: &mut Arguments) -> Result<Quantization, String> {
    one_of(name, arguments, [("none", Quantization::None), ("8", Quantization::Bits8), ("4", Quantization::Bits4)])
}

fn one_of<T, const N: usize>(name: &str, arguments: &mut Arguments, choices: [(&str, T); N]) -> Result<T, String> {
    let value = arguments.value::<String>(name)?;
    let names = choices.each_ref().map(|(choice, _)| *choice).join(", ");
    let chosen = choices.into_iter().find(|(choice, _)| *choice == value);
    chosen.map(|(_, chosen)| chosen).ok_or_else(|| format!("{name} is one of {names}, not {value:?}"))
}
