//! Any bytes as a model file: an error, or a model that runs and comes back from a file of its own.

#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use hymba::ndarray::Array3;
use hymba::{Hymba, HymbaOptions, Predictor};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// In memory where the system has such a folder.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() { TempDir::new_in(shared) } else { TempDir::new() };
    folder.expect("a temporary folder")
});

fuzz_target!(|bytes: &[u8]| {
    let path = file("given");
    fs::write(&path, bytes).expect("a file");
    // the sizes of the seeds
    let options = HymbaOptions::edifice(6).hidden_size(8).num_layers(2).num_heads(2).num_meta_tokens(2);
    let models = [Hymba::load(&path), Hymba::load_edifice(&path, options)];
    if let Ok(predictor) = Predictor::load(&path) {
        let x = Array3::ones((1, 2, predictor.options().embed_dim));
        let y = predictor.predict(&x, None).expect("the input fits the model");
        assert_eq!(y.dim(), (1, predictor.task().outputs()));
        let saved = file("saved");
        predictor.save(&saved).expect("what was read can be written");
        Predictor::load(&saved).expect("what was written can be read");
    }
    for model in models.into_iter().flatten() {
        let x = Array3::ones((1, 2, model.options().embed_dim));
        let y = model.forward(&x).expect("the input fits the model");
        assert_eq!(y.dim(), (1, model.options().output_size()));

        let saved = file("saved");
        model.save(&saved).expect("what was read can be written");
        let again = Hymba::load(&saved).expect("what was written can be read");
        assert_eq!(again.options(), model.options());
        assert!(bits(&again) == bits(&model));
    }
});

fn file(name: &str) -> PathBuf {
    FOLDER.path().join(name)
}

fn bits(model: &Hymba) -> Vec<u32> {
    let mut bits = Vec::new();
    model.visit(&mut |_, array| bits.extend(array.iter().map(|number| number.to_bits())));
    bits
}
