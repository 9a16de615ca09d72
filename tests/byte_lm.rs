//! A small model that was trained on real text: does it predict as well as in another program, and what does quantisation cost?
#![cfg(feature = "lm")]

mod common;

use hymba::HymbaLm;
use hymba::lm::{Arithmetic, LoadOptions, Quantization};

/// Of the windows that `tests/data/byte_lm/README.md` tells of.
fn perplexity(options: &LoadOptions) -> f64 {
    let folder = common::data("byte_lm");
    let text: Vec<u32> = std::fs::read(folder.join("text.txt")).unwrap().into_iter().map(u32::from).collect();
    let lm = HymbaLm::from_dir_with(folder, options, |_| {}).unwrap();
    let windows = text.windows(97).step_by(96).take(20);
    let total: f64 = windows.map(|window| lm.log_likelihood(&window[..1], &window[1..]).unwrap().total).sum();
    (-total / (20.0 * 96.0)).exp()
}

#[test]
fn it_predicts_as_well_as_in_pytorch() {
    let here = perplexity(&LoadOptions::default());
    println!("{here}");
    assert!((here - 1.9012814).abs() < 1e-4, "{here}");
}

#[test]
fn quantisation_costs_little() {
    let full = perplexity(&LoadOptions::default());
    let bits = |bits| perplexity(&LoadOptions::default().quantize(bits)) / full;
    let [eight, four] = [Quantization::Bits8, Quantization::Bits4].map(bits);
    println!("{eight} {four}");
    assert!(eight < 1.001 && four < 1.01, "{eight} {four}");
}

#[test]
fn products_in_bf16_cost_little() {
    let full = perplexity(&LoadOptions::default());
    let rounded = perplexity(&LoadOptions::default().arithmetic(Arithmetic::Bf16)) / full;
    println!("{rounded} with {}", Arithmetic::Bf16.simd_level());
    assert!((rounded - 1.0).abs() < 1e-3, "{rounded}");
}
