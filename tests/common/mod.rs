//! Reading the folders of `tests/data`.

#![allow(dead_code)] // every test file uses a part of it

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hymba::ndarray::{Array2, Array3, ArrayD, Dimension, IxDyn};
use hymba::{Hymba, HymbaOptions, Pattern};
use safetensors::{Dtype, SafeTensors};

/// The folders of `hybrids`, the patterns of blocks.
pub const HYBRIDS: [&str; 5] =
    ["alternating_window_ragged", "attention_only", "mamba_only", "shared_no_meta", "shared_window_ragged"];

/// Small models of every pattern but the parallel one, whose window 40 frames pass several times over.
pub fn patterns() -> Vec<HymbaOptions> {
    let small = |width, pattern| {
        let options = HymbaOptions::new(width).hidden_size(24).num_heads(3).num_layers(3).state_size(5).seed(3);
        options.window_size(6).pattern(pattern)
    };
    vec![
        small(7, Pattern::Mamba),
        small(24, Pattern::Attention),
        small(7, Pattern::Alternating { attention_every: 2 }).num_layers(4).num_meta_tokens(0),
        small(7, Pattern::Alternating { attention_every: 3 }).num_meta_tokens(9),
        small(7, Pattern::SharedAttention { attention_every: 1 }).num_layers(2),
        small(7, Pattern::SharedAttention { attention_every: 2 }).num_meta_tokens(0),
        small(24, Pattern::SharedAttention { attention_every: 2 }).num_layers(4).window_size(1),
        small(7, Pattern::SharedAttention { attention_every: 3 }).num_meta_tokens(1),
    ]
}

/// Whether an emulator runs the tests, which is slow: what they only repeat they then do less often.
pub fn emulated() -> bool {
    std::env::var_os("HYMBA_TEST_RUNNER").is_some_and(|runner| !runner.is_empty())
}

/// Numbers of threads whose results must be those of one.
pub fn threads() -> &'static [usize] {
    if emulated() { &[2, 8] } else { &[2, 3, 8] }
}

/// Relative to the package, where cargo starts tests; so they also run from a copy on another machine.
pub fn data(folder: &str) -> PathBuf {
    Path::new("tests/data").join(folder)
}

/// All tensors of a file as f64, whatever their type.
pub fn tensors(path: &Path) -> BTreeMap<String, ArrayD<f64>> {
    tensors_of(&std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

/// As [`tensors`], of the bytes of a file.
pub fn tensors_of(bytes: &[u8]) -> BTreeMap<String, ArrayD<f64>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let data = tensor.data();
            let numbers: Vec<f64> = match tensor.dtype() {
                Dtype::F32 => data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
                Dtype::F64 => data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
                Dtype::I64 => data.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, ArrayD::from_shape_vec(IxDyn(tensor.shape()), numbers).unwrap())
        })
        .collect()
}

pub fn frames(array: &ArrayD<f64>) -> Array3<f32> {
    array.mapv(|x| x as f32).into_dimensionality().unwrap()
}

pub fn options(folder: &Path) -> HymbaOptions {
    serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// The model of a `hymba` folder.
pub fn model(folder: &Path) -> Hymba {
    Hymba::load_with(folder.join("model.safetensors"), options(folder)).unwrap()
}

/// The largest absolute difference; NaN if there is one.
pub fn difference<D: Dimension>(got: &hymba::ndarray::Array<f32, D>, want: &ArrayD<f64>) -> f64 {
    assert_eq!(got.shape(), want.shape());
    let differences = got.iter().zip(want.iter()).map(|(got, want)| (*got as f64 - want).abs());
    differences.fold(0.0, |largest, d| if d.is_nan() || d > largest { d } else { largest })
}

/// A smooth, deterministic batch.
pub fn wave(batch: usize, length: usize, width: usize) -> Array3<f32> {
    Array3::from_shape_fn((batch, length, width), |(b, t, i)| {
        (0.37 * t as f32 + 1.3 * i as f32 + 2.1 * b as f32).sin() + 0.3 * (0.05 * (t * (i + 1)) as f32).cos()
    })
}

/// Frame `t` of every sequence.
pub fn frame(x: &Array3<f32>, t: usize) -> Array2<f32> {
    x.index_axis(hymba::ndarray::Axis(1), t).to_owned()
}
