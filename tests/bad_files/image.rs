//! Language models in one piece.

use std::io::Cursor;

use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, LoadOptions, Quantization};

use super::lm::small_lm;
use super::*;

fn load_image(path: &Path) -> hymba::Result<HymbaLm> {
    HymbaLm::read_from(fs::File::open(path).unwrap())
}

fn narrow() -> Vec<u8> {
    let (options, bytes) = (LoadOptions::default().quantize(Quantization::Bits4), small_lm().to_bytes().unwrap());
    HymbaLm::from_bytes_with(&bytes, &options, |_| {}).unwrap().to_bytes().unwrap()
}

fn bad_image(valid: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let parts = Parts::of(valid);
    let saved: Value = serde_json::from_str(parts.metadata["hymba"].as_str().unwrap()).unwrap();
    let entry = |entry: String| parts.with(|parts| parts.metadata["hymba"] = entry.into());
    let text = |text: &str| entry(json!({"version": 1, "config": text}).to_string());
    let config = |key: &str, value: Value| {
        let mut config: Value = serde_json::from_str(saved["config"].as_str().unwrap()).unwrap();
        config[key] = value;
        text(&config.to_string())
    };
    vec![
        ("no config", parts.with(|parts| parts.metadata = json!({"format": "pt"})), "HymbaLm::from_parts"),
        ("an encoder", saved_encoder(), "missing field `config`"),
        ("another version", entry(json!({"version": 2, "config": "{}"}).to_string()), "version 2"),
        ("a config that is no text", entry(json!({"version": 1, "config": {}}).to_string()), "not usable"),
        ("an empty config", text(""), "not a usable config"),
        ("a config nested in depth", text(&"[".repeat(100_000)), "not a usable config"),
        ("a long config", text(&format!("{{{}}}", " ".repeat(1 << 20))), "at most 1048576 are read"),
        ("hidden_size of 0", config("hidden_size", json!(0)), "hidden_size"),
        ("a larger model", config("hidden_size", json!(16)), "has shape [8], expected [16]"),
        ("a huge model", config("vocab_size", json!(1u64 << 40)), "vocab_size"),
        ("a layer more", config("num_hidden_layers", json!(4)), "missing, expected shape"),
        (
            "quantised by its own account",
            config("quantization_config", json!({"quant_method": "hymba", "bits": 8, "group_size": 32})),
            "_scale",
        ),
        (
            "a tensor too many",
            parts.with(|parts| parts.tensors.push(("x".into(), json!({"dtype": "F32", "shape": [1]}), vec![0; 4]))),
            "\"x\": unexpected",
        ),
    ]
}

fn saved_encoder() -> Vec<u8> {
    Hymba::build(small()).unwrap().to_bytes().unwrap()
}

#[test]
fn every_bad_image_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let valid = small_lm().to_bytes().unwrap();
    let mut faults = Vec::new();
    for (name, bytes, says) in bad_image(&valid).into_iter().chain(bad_safetensors(&valid)) {
        let from_bytes = HymbaLm::from_bytes(&bytes).map(drop).unwrap_err().to_string();
        fs::write(&path, bytes).unwrap();
        faults.extend(fault(load_image, &path, says).map(|fault| format!("{name}: {fault}")));
        assert_eq!(load_image(&path).unwrap_err().to_string(), from_bytes);
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    // and an encoder's file is told from one of these
    fs::write(&path, &valid).unwrap();
    assert_eq!(fault(load, &path, "not usable"), None);
}

#[test]
fn an_image_cut_short_anywhere_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    for bytes in [small_lm().to_bytes().unwrap(), narrow()] {
        fs::write(&path, &bytes).unwrap();
        load_image(&path).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        for length in (0..bytes.len()).rev() {
            file.set_len(length as u64).unwrap();
            assert_eq!(fault(load_image, &path, ""), None, "cut to {length} bytes");
        }
    }
}

#[test]
fn an_image_with_a_flipped_bit_is_a_model_or_an_error() {
    for valid in [small_lm().to_bytes().unwrap(), narrow()] {
        let mut models = 0;
        for at in 0..valid.len() {
            let mut bytes = valid.clone();
            bytes[at] ^= 1 << (at % 8);
            let before = NOW.get();
            PEAK.set(before);
            let read = HymbaLm::read_from(Cursor::new(&bytes));
            let taken = PEAK.get() - before;
            assert!(taken <= 2 * valid.len() + A_LITTLE, "byte {at}: took {taken} bytes");
            if let Ok(lm) = read {
                models += 1;
                assert!(lm.config().vocab_size <= HymbaLmConfig::hymba_1_5b().vocab_size);
            }
        }
        assert!(models > valid.len() / 4, "{models} of {}", valid.len());
    }
}
