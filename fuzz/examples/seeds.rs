//! Writes the seed corpus of the `load` target: a model of each kind of file that is read.

use std::fs;
use std::path::Path;

use hymba::{Hymba, HymbaOptions, Predictor, Task};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = here.join("corpus/load");
    fs::create_dir_all(&corpus)?;
    for (options, name) in [(HymbaOptions::new(2), "hymba"), (HymbaOptions::edifice(2), "edifice_preset")] {
        let options = options.hidden_size(4).state_size(2).num_layers(1).num_heads(2).num_meta_tokens(1);
        Hymba::build(options)?.save(corpus.join(name))?;
    }
    let options = HymbaOptions::new(2).hidden_size(4).state_size(2).num_layers(1).num_heads(2).num_meta_tokens(1);
    Predictor::build(options, Task::classify(["a", "b"]))?.save(corpus.join("predictor"))?;
    for name in ["model.safetensors", "model.nx", "model_data.nx"] {
        fs::copy(here.join("../tests/data/edifice/small").join(name), corpus.join(name))?;
    }
    println!("wrote the seeds to {}", corpus.display());
    Ok(())
}
