//! Files of encoders whose large matrices are stored in fewer bits.

use hymba::Storage;
use hymba::ndarray::Array3;

use super::*;

const NARROW: [Storage; 4] = [Storage::F16, Storage::Bf16, Storage::Q8, Storage::Q4];

fn narrow(storage: Storage) -> Vec<u8> {
    let mut model = Hymba::build(small().hidden_size(16).num_meta_tokens(0)).unwrap();
    model.store_as(storage).unwrap();
    model.to_bytes().unwrap()
}

fn narrow_predictor() -> Vec<u8> {
    let encoder = Hymba::from_bytes(&narrow(Storage::Q8)).unwrap();
    Predictor::with_encoder(encoder, Task::classify(["a", "b"])).unwrap().to_bytes().unwrap()
}

fn load_f32(path: &Path) -> hymba::Result<Hymba> {
    Hymba::load_as(path, Storage::F32)
}

fn bad_narrow(valid: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let parts = Parts::of(valid);
    let saved: Value = serde_json::from_str(parts.metadata["hymba"].as_str().unwrap()).unwrap();
    let entry = |key: &str, value: Value| {
        parts.with(|parts| {
            let mut saved = saved.clone();
            saved[key] = value;
            parts.metadata["hymba"] = saved.to_string().into();
        })
    };
    let tensor = |end: &str, change: fn(&mut Value, &mut Vec<u8>)| {
        parts.with(|parts| {
            let (_, info, data) = parts.tensors.iter_mut().find(|(name, ..)| name.ends_with(end)).unwrap();
            change(info, data);
        })
    };
    vec![
        ("a type there is not", entry("storage", json!("q3")), "unknown variant"),
        ("a number for a type", entry("storage", json!(8)), "not usable"),
        ("quantised, without a word of it", entry("storage", json!(null)), "_scale\": unexpected"),
        ("said to be bf16", entry("storage", json!("bf16")), "_scale\": unexpected"),
        ("said to have 4 bits", entry("storage", json!("q4")), "has shape [16, 32], expected [16, 16]"),
        (
            "too small for it",
            entry("options", json!({"embed_dim": 2, "hidden_size": 8})),
            "with hidden_size 8 it saves nothing",
        ),
        (
            "a model of 2 GB",
            entry("options", json!({"embed_dim": 2, "hidden_size": 4096, "num_layers": 6})),
            "do not fit in a file",
        ),
        (
            "scales missing",
            parts.with(|parts| parts.tensors.retain(|(name, ..)| !name.ends_with("gate.weight_scale"))),
            "blocks.0.gate.weight_scale\": missing, expected shape [16, 1]",
        ),
        (
            "whole numbers as floats",
            tensor("gate.weight", |info, data| {
                info["dtype"] = "F32".into();
                *data = data.repeat(4);
            }),
            "has type F32, expected I8 or U8",
        ),
        (
            "scales as whole numbers",
            tensor("gate.weight_scale", |info, data| {
                info["dtype"] = "U8".into();
                data.truncate(16);
            }),
            "has type U8, expected F32",
        ),
        (
            "a block more",
            tensor("gate.weight", |info, data| {
                info["shape"] = json!([16, 64]);
                *data = data.repeat(2);
            }),
            "has shape [16, 64], expected [16, 32]",
        ),
    ]
}

#[test]
fn every_bad_file_of_a_narrow_model_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let mut faults = Vec::new();
    let tables: [(&str, Loader, Vec<_>); 4] = [
        ("load", load, bad_narrow(&narrow(Storage::Q8))),
        ("load_as", load_f32, bad_narrow(&narrow(Storage::Q8))),
        ("load", load, bad_safetensors(&narrow(Storage::F32))),
        ("Predictor::load", load_predictor, bad_narrow(&narrow_predictor())),
    ];
    for (kind, loader, table) in tables {
        for (name, bytes, says) in table {
            fs::write(&path, bytes).unwrap();
            faults.extend(fault(loader, &path, says).map(|fault| format!("{kind}: {name}: {fault}")));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_narrow_model_cut_short_anywhere_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let files = NARROW.map(|storage| (load as Loader, narrow(storage)));
    for (loader, bytes) in files.into_iter().chain([(load_predictor as Loader, narrow_predictor())]) {
        fs::write(&path, &bytes).unwrap();
        loader(&path).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        for length in (0..bytes.len()).rev() {
            file.set_len(length as u64).unwrap();
            assert_eq!(fault(loader, &path, ""), None, "cut to {length} bytes");
        }
    }
}

/// A flipped bit may make another model, but nothing else.
#[test]
fn a_narrow_model_with_a_flipped_bit_is_a_model_or_an_error() {
    let x = Array3::ones((1, 3, 2));
    for storage in NARROW {
        let valid = narrow(storage);
        let mut models = 0;
        for at in 0..valid.len() {
            let mut bytes = valid.clone();
            bytes[at] ^= 1 << (at % 8);
            let before = NOW.get();
            PEAK.set(before);
            let read = Hymba::from_bytes(&bytes);
            let taken = PEAK.get() - before;
            assert!(taken <= 2 * valid.len() + A_LITTLE, "byte {at}: took {taken} bytes");
            if let Ok(model) = read {
                models += 1;
                // NaN, perhaps; all that is asked is an answer
                if models % 16 == 0 && model.options().embed_dim == 2 {
                    assert_eq!(model.forward(&x).unwrap().dim(), (1, 16));
                }
            }
        }
        // all of the numbers, at least
        assert!(models > valid.len() / 2, "{storage:?}: {models} of {}", valid.len());
    }
}
