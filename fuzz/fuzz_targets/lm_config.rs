//! Any bytes as the `config.json` of a language model: an error, or a config that holds and comes back as it was.

#![no_main]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use hymba::lm::HymbaLmConfig;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// In memory where the system has such a folder.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() { TempDir::new_in(shared) } else { TempDir::new() };
    folder.expect("a temporary folder")
});

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.path().join("config.json");
    fs::write(&path, bytes).expect("a file");
    let config = match HymbaLmConfig::from_file(&path) {
        Ok(config) => config,
        Err(error) => {
            assert!(!error.to_string().contains(char::is_control), "{error:?}");
            return;
        }
    };
    config.validate().expect("it was checked");
    assert!(config.num_parameters().is_some_and(|count| count as u64 <= HymbaLmConfig::MAX_PARAMETERS));

    fs::write(&path, serde_json::to_vec(&config).expect("a config is plain values")).expect("a file");
    assert_eq!(HymbaLmConfig::from_file(&path).expect("what was written can be read"), config);
});
