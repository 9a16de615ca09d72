//! A small sound checkpoint of two shards and an index, and a state, each of them changed: an error, or a model that runs and
//! a state that goes on.

#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use hymba::lm::{HymbaLmConfig, LoadOptions, RopeType};
use hymba::ndarray::{arr1, arr2};
use hymba::{Error, HymbaLm};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const INDEX: &str = "model.safetensors.index.json";
/// The files of the folder, and the state in a file of its own.
const FILES: [&str; 5] = ["config.json", INDEX, "first.safetensors", "second.safetensors", "state"];
const STATE: usize = 4;

#[derive(Debug, Arbitrary)]
enum Change<'a> {
    /// One byte of a file.
    Byte {
        file: u8,
        at: u16,
        byte: u8,
    },
    /// Bytes in place of as many of a file.
    Bytes {
        file: u8,
        at: u16,
        bytes: &'a [u8],
    },
    Cut {
        file: u8,
        at: u16,
    },
    Append {
        file: u8,
        bytes: &'a [u8],
    },
    /// What the file says of the length of its header.
    HeaderLength {
        file: u8,
        length: u64,
    },
    /// One field of one tensor in the header of a shard or of the state, given as JSON.
    Field {
        file: u8,
        tensor: u8,
        field: u8,
        value: &'a str,
    },
    /// The name of a tensor there, or in the index.
    Name {
        file: u8,
        tensor: u8,
        name: &'a str,
    },
    Remove {
        file: u8,
        tensor: u8,
    },
    /// Where the index has a tensor.
    Place {
        tensor: u8,
        shard: &'a str,
    },
    Swap {
        tensor: u8,
        shard: u8,
    },
    /// A key of the config, given as JSON.
    Config {
        key: u8,
        value: &'a str,
    },
    /// The metadata of the state, a text in the text.
    Saved {
        from: &'a str,
        to: &'a str,
    },
}

/// The sound files.
static FILE: LazyLock<[Vec<u8>; 5]> = LazyLock::new(|| {
    let folder = FOLDER.path();
    let lm = &*LM;
    lm.save_dir(folder).expect("a folder");
    let whole = folder.join("model.safetensors");
    let (header, data) = split(&fs::read(&whole).expect("a file")).expect("a file of ours");
    fs::remove_file(whole).expect("a file");
    let mut shards = [(Map::new(), Vec::new()), (Map::new(), Vec::new())];
    let mut index = Map::new();
    for (i, (name, mut info)) in header.into_iter().filter(|(name, _)| name != "__metadata__").enumerate() {
        let offset = |i: usize| info["data_offsets"][i].as_u64().expect("an offset") as usize;
        let bytes = &data[offset(0)..offset(1)];
        let (header, data) = &mut shards[i % 2];
        info["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
        data.extend(bytes);
        header.insert(name.clone(), info);
        index.insert(name, FILES[2 + i % 2].into());
    }
    let [first, second] = shards.map(|(header, data)| join(&header, &data));
    let config = fs::read(folder.join("config.json")).expect("a file");
    let index = json!({"metadata": {"total_size": data.len()}, "weight_map": index}).to_string().into_bytes();
    let mut state = lm.new_state(1);
    lm.prefill(&arr2(&[[1, 2, 3]]), &mut state).expect("the tokens fit the model");
    let path = folder.join(FILES[STATE]);
    lm.save_state(&state, &path).expect("a file");
    [config, index, first, second, fs::read(path).expect("a file")]
});

static LM: LazyLock<HymbaLm> = LazyLock::new(|| {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (8, 4, 10);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (2, 2, 1);
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![]), Some(vec![vec![0, 1]]));
    (config.mamba_inner_layernorms, config.mamba_conv_bias) = (false, false);
    (config.sliding_window, config.num_memory_tokens) = (Some(2), 2);
    (config.mamba_d_state, config.mamba_dt_rank, config.rope_type) = (2, Some(2), RopeType::Default);
    HymbaLm::random(config, 1, &LoadOptions::default()).expect("a sound config")
});

/// In memory where the system has such a folder.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let shared = Path::new("/dev/shm");
    let folder = if shared.is_dir() { TempDir::new_in(shared) } else { TempDir::new() };
    folder.expect("a temporary folder")
});

fuzz_target!(|changes: Vec<Change>| {
    let mut files = FILE.clone();
    for change in &changes {
        // a change that fits nothing is left out
        let _ = change.make(&mut files);
    }
    for (name, bytes) in FILES.iter().zip(&files) {
        fs::write(path(name), bytes).expect("a file");
    }
    // what is as it was need not be read again
    if changes.is_empty() || files[..STATE] != FILE[..STATE] {
        read_folder(&files);
    }
    if changes.is_empty() || files[STATE] != FILE[STATE] {
        read_state(changes.is_empty());
    }
});

fn read_folder(files: &[Vec<u8>; 5]) {
    match HymbaLm::from_dir(FOLDER.path()) {
        Ok(lm) => {
            assert!(!leads_outside(&files[1]), "it read files outside of the folder");
            if lm.config().vocab_size > 2 {
                let logits = lm.forward(&arr2(&[[0, 1, 2]])).expect("the tokens fit the model");
                assert_eq!(logits.dim(), (1, 3, lm.config().vocab_size));
            }
        }
        Err(error) => refused(&error, *files == *FILE),
    }
}

fn read_state(sound: bool) {
    match LM.load_state(path(FILES[STATE])) {
        Ok(mut state) => {
            LM.save_state(&state, path("again")).expect("what was read can be written");
            assert_eq!(LM.load_state(path("again")).expect("what was written can be read").lengths(), state.lengths());
            let ids = arr1(&vec![1; state.batch()]);
            assert_eq!(LM.step(&ids, &mut state).expect("one token a row").dim(), (state.batch(), 10));
        }
        Err(error) => refused(&error, sound),
    }
}

fn refused(error: &Error, sound: bool) {
    assert!(!sound, "{error}");
    assert!(!error.to_string().contains('\u{1b}'), "{error:?}");
}

fn path(name: &str) -> PathBuf {
    FOLDER.path().join(name)
}

impl Change<'_> {
    fn make(&self, files: &mut [Vec<u8>; 5]) -> Option<()> {
        match *self {
            Change::Byte { file, at, byte } => *of(files, file).get_mut(usize::from(at))? = byte,
            Change::Bytes { file, at, bytes } => {
                of(files, file).get_mut(usize::from(at)..)?.get_mut(..bytes.len())?.copy_from_slice(bytes);
            }
            Change::Cut { file, at } => of(files, file).truncate(usize::from(at)),
            Change::Append { file, bytes } => of(files, file).extend(bytes),
            Change::HeaderLength { file, length } => {
                of(files, 2 + file % 3).get_mut(..8)?.copy_from_slice(&length.to_le_bytes());
            }
            Change::Field { file, tensor, field, value } => {
                let value = serde_json::from_str(value).ok()?;
                header(of(files, 2 + file % 3), |header| {
                    let field = ["dtype", "shape", "data_offsets"][usize::from(field % 3)];
                    if let Some(Value::Object(info)) = nth(header, tensor).and_then(|name| header.get_mut(&name)) {
                        info.insert(field.into(), value);
                    }
                })?;
            }
            Change::Name { file, tensor, name } => entries(files, file, |entries| {
                if let Some(value) = nth(entries, tensor).and_then(|name| entries.remove(&name)) {
                    entries.insert(name.into(), value);
                }
            })?,
            Change::Remove { file, tensor } => entries(files, file, |entries| {
                nth(entries, tensor).and_then(|name| entries.remove(&name));
            })?,
            Change::Place { tensor, shard } => place(files, tensor, shard)?,
            Change::Swap { tensor, shard } => place(files, tensor, FILES[usize::from(shard % 5)])?,
            Change::Config { key, value } => {
                let value = serde_json::from_str(value).ok()?;
                let mut config: Map<_, _> = serde_json::from_slice(&files[0]).ok()?;
                let key = nth(&config, key)?;
                config.insert(key, value);
                files[0] = serde_json::to_vec(&config).ok()?;
            }
            Change::Saved { from, to } => header(&mut files[STATE], |header| {
                if let Some(Value::String(saved)) = header.get_mut("__metadata__").and_then(|all| all.get_mut("hymba"))
                {
                    *saved = saved.replacen(from, to, 1);
                }
            })?,
        }
        Some(())
    }
}

fn of(files: &mut [Vec<u8>; 5], file: u8) -> &mut Vec<u8> {
    &mut files[usize::from(file % 5)]
}

fn nth(entries: &Map<String, Value>, n: u8) -> Option<String> {
    entries.keys().nth(usize::from(n) % entries.len().max(1)).cloned()
}

fn split(file: &[u8]) -> Option<(Map<String, Value>, Vec<u8>)> {
    let (length, rest) = file.split_first_chunk()?;
    let (header, data) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
    Some((serde_json::from_slice(header).ok()?, data.to_vec()))
}

fn join(header: &Map<String, Value>, data: &[u8]) -> Vec<u8> {
    let header = serde_json::to_vec(header).expect("plain values");
    [&(header.len() as u64).to_le_bytes(), &header[..], data].concat()
}

/// Changes the header of a safetensors file.
fn header(file: &mut Vec<u8>, change: impl FnOnce(&mut Map<String, Value>)) -> Option<()> {
    let (mut header, data) = split(file)?;
    change(&mut header);
    *file = join(&header, &data);
    Some(())
}

/// Changes the index.
fn index(file: &mut Vec<u8>, change: impl FnOnce(&mut Map<String, Value>)) -> Option<()> {
    let mut index: Value = serde_json::from_slice(file).ok()?;
    change(index.get_mut("weight_map")?.as_object_mut()?);
    *file = index.to_string().into_bytes();
    Some(())
}

/// Changes the tensors of the index or of another file.
fn entries(files: &mut [Vec<u8>; 5], file: u8, change: impl FnOnce(&mut Map<String, Value>)) -> Option<()> {
    match 1 + file % 4 {
        1 => index(&mut files[1], change),
        file => header(of(files, file), change),
    }
}

fn place(files: &mut [Vec<u8>; 5], tensor: u8, shard: &str) -> Option<()> {
    index(&mut files[1], |places| {
        if let Some(name) = nth(places, tensor) {
            places.insert(name, shard.into());
        }
    })
}

/// Whether the index names a file by more than a name.
fn leads_outside(index: &[u8]) -> bool {
    let index: Value = serde_json::from_slice(index).unwrap_or_default();
    let outside = |file: &Value| file.as_str().is_some_and(|file| file.contains(['/', '\\']) || file == "..");
    index["weight_map"].as_object().is_some_and(|places| places.values().any(outside))
}
