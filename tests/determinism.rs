//! The same bits for any number of threads, for any batch, over runs, and over saving and loading.

mod common;

use common::wave;
use hymba::ndarray::{Array2, Array3, s};
use hymba::{Hymba, HymbaOptions, Pattern};

/// Large enough that everything which may be shared among threads is.
fn options() -> HymbaOptions {
    HymbaOptions::new(20).hidden_size(128).num_layers(2).window_size(300).seed(9)
}

fn model() -> Hymba {
    Hymba::build(options()).unwrap()
}

/// The patterns, which have every kind of block.
const PATTERNS: [Pattern; 3] =
    [Pattern::Parallel, Pattern::Alternating { attention_every: 2 }, Pattern::SharedAttention { attention_every: 1 }];

#[cfg(feature = "rayon")]
#[test]
fn any_number_of_threads() {
    for pattern in PATTERNS {
        let model = Hymba::build(options().pattern(pattern)).unwrap();
        let (wide, long) = (wave(40, 30, 20), wave(1, 700, 20));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| (model.forward(&wide).unwrap(), model.forward_sequence(&long).unwrap()))
        };
        let one = run(1);
        for &threads in common::threads() {
            assert_eq!(run(threads), one, "{pattern:?} {threads} threads");
        }
        if !common::emulated() {
            assert_eq!((model.forward(&wide).unwrap(), model.forward_sequence(&long).unwrap()), one, "outside a pool");
        }
    }
}

/// A long sequence passes through the model in pieces; in training it does so as one, which sums attention in other groups of keys.
#[test]
fn pieces_of_a_long_sequence_are_the_whole() {
    for pattern in PATTERNS {
        for window in [70, if common::emulated() { 90 } else { 600 }] {
            let options = HymbaOptions::new(3).hidden_size(32).num_heads(2).num_layers(2).pattern(pattern);
            let model = Hymba::build(options.window_size(window)).unwrap();
            let x = wave(1, 8300, 3);
            let whole = model.forward_train(&x, None, 0).unwrap().0;
            let last = model.forward(&x).unwrap();
            let apart = (&last - &whole).fold(0f32, |most, difference| most.max(difference.abs()));
            assert!(apart < 5e-6, "{pattern:?}, window {window}: {apart}");
            let frames = model.forward_sequence(&x).unwrap();
            assert_eq!(frames.slice(s![.., -1, ..]), last, "{pattern:?}, window {window}");
            let shorter = model.forward_sequence(&x.slice(s![.., ..500, ..])).unwrap();
            assert_eq!(frames.slice(s![.., ..500, ..]), shorter, "{pattern:?}, window {window}");
        }
    }
}

/// Work cut for more threads than there are.
#[cfg(all(feature = "profile", feature = "rayon"))]
#[test]
fn any_cut() {
    use hymba::profile::simulate;
    for pattern in PATTERNS {
        let model = Hymba::build(options().pattern(pattern)).unwrap();
        let (wide, long) = (wave(40, 30, 20), wave(1, 700, 20));
        let run = || {
            let (y, cache) = model.forward_train(&wide, None, 1).unwrap();
            let mut gradient = model.zeros_like();
            let dx = model.backward(&cache, &y, &mut gradient).unwrap();
            (model.forward(&wide).unwrap(), model.forward_sequence(&long).unwrap(), y, dx, gradient.to_bytes().unwrap())
        };
        let one = run();
        for threads in [2, 4, 8, 16, 64] {
            let (many, simulation) = simulate(threads, run);
            assert!(many == one && !simulation.shared.is_empty(), "{pattern:?} {threads} threads");
        }
    }
}

/// The first call computes what the meta tokens leave behind, on several threads, while others need it too.
#[cfg(feature = "rayon")]
#[test]
fn first_calls_from_within_a_pool_do_not_wait_for_each_other() {
    use rayon::prelude::*;
    let x = wave(1, 40, 20);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
    for _ in 0..if common::emulated() { 3 } else { 20 } {
        let options = HymbaOptions::new(20).hidden_size(128).num_layers(2).num_meta_tokens(128);
        let model = Hymba::build(options).unwrap();
        let all: Vec<_> = pool.install(|| (0..16).into_par_iter().map(|_| model.forward(&x).unwrap()).collect());
        assert!(all.iter().all(|y| *y == all[0]));
    }
}

#[test]
fn any_batch_and_any_padding() {
    for pattern in PATTERNS {
        let model = Hymba::build(options().pattern(pattern)).unwrap();
        let x = wave(40, 30, 20);
        let lengths: Vec<usize> = (0..40).map(|row| 1 + row * 7 % 30).collect();
        let mut padded = x.clone();
        for (row, &length) in lengths.iter().enumerate() {
            padded.slice_mut(s![row, length.., ..]).fill(f32::NAN);
        }
        let together = model.forward_ragged(&padded, &lengths).unwrap();
        for (row, &length) in lengths.iter().enumerate().step_by(if common::emulated() { 3 } else { 1 }) {
            let alone = model.forward(&x.slice(s![row..row + 1, ..length, ..])).unwrap();
            assert_eq!(together.row(row), alone.row(0), "{pattern:?} row {row} of length {length}");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_model() {
    let parameters = |seed| {
        let mut all = Vec::new();
        let options = HymbaOptions::new(6).hidden_size(16).num_heads(2).num_layers(2).seed(seed);
        Hymba::build(options).unwrap().visit(&mut |_, array| all.extend(array.iter().map(|x| x.to_bits())));
        all
    };
    assert_eq!(parameters(1), parameters(1));
    assert_ne!(parameters(1), parameters(2));
    // a portable generator: these numbers are part of what a version promises
    let first: Vec<f32> = parameters(0)[..3].iter().map(|bits| f32::from_bits(*bits)).collect();
    assert_eq!(first, FIRST_WEIGHTS);
}

const FIRST_WEIGHTS: [f32; 3] = [0.1263096, 0.17070928, 0.18768796];

#[test]
fn saved_and_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let edifice = HymbaOptions::edifice(20).hidden_size(24).num_heads(3).num_layers(2);
    for options in [options(), edifice].into_iter().chain(common::patterns()) {
        let model = Hymba::build(options).unwrap();
        model.save(&path).unwrap();
        let loaded = Hymba::load(&path).unwrap();
        let x = wave(3, 50, model.options().embed_dim);
        assert_eq!(model.forward(&x).unwrap(), loaded.forward(&x).unwrap());
        assert_eq!(model.options(), loaded.options());
    }
}

#[test]
fn any_memory_order() {
    let model = model();
    let x = wave(3, 25, 20);
    let want = model.forward(&x).unwrap();

    let fortran = Array3::from_shape_fn((20, 25, 3), |(i, t, b)| x[[b, t, i]]).reversed_axes();
    assert!(!fortran.is_standard_layout());
    assert_eq!(model.forward(&fortran).unwrap(), want, "transposed");

    let mut backwards = x.clone();
    backwards.invert_axis(hymba::ndarray::Axis(1));
    let backwards = backwards.as_standard_layout().into_owned();
    assert_eq!(model.forward(&backwards.slice(s![.., ..;-1, ..])).unwrap(), want, "negative strides");

    let mut inside = Array3::from_elem((5, 50, 24), f32::NAN);
    inside.slice_mut(s![1..4, ..;2, 2..22]).assign(&x);
    assert_eq!(model.forward(&inside.slice(s![1..4, ..;2, 2..22])).unwrap(), want, "a slice");

    let same = Array2::<f32>::ones((1, 20));
    let broadcast = same.broadcast((3, 20)).unwrap();
    let mut state = model.new_state(3);
    assert_eq!(model.step(&broadcast, &mut state).unwrap().dim(), (3, 128), "a broadcast frame");
}
