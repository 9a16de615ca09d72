//! The folder of a language model, its states, and its tokenizer.

use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, LoadOptions, TorchDtype};
use hymba::ndarray::Array2;

use super::*;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// With windows, meta tokens, and keys and values that are shared.
pub fn small_lm() -> HymbaLm {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (8, 4, 10);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (3, 2, 1);
    (config.global_attn_idx, config.kv_reuse_group) = (Some(vec![0]), Some(vec![vec![1, 2]]));
    (config.sliding_window, config.num_memory_tokens) = (Some(2), 2);
    (config.mamba_d_state, config.mamba_dt_rank, config.torch_dtype) = (2, Some(2), Some(TorchDtype::F32));
    HymbaLm::random(config, 1, &LoadOptions::default()).unwrap()
}

/// The files of a folder.
type Files = Vec<(&'static str, Vec<u8>)>;

fn saved_lm() -> Files {
    let folder = tempfile::tempdir().unwrap();
    small_lm().save_dir(folder.path()).unwrap();
    ["config.json", SINGLE].map(|name| (name, fs::read(folder.path().join(name)).unwrap())).into()
}

/// The same in two shards: the tensors in turns.
fn sharded() -> Files {
    let [(_, config), (_, single)] = <[_; 2]>::try_from(saved_lm()).unwrap();
    let parts = Parts::of(&single);
    let shards = [0, 1].map(|shard| {
        parts.with(|parts| {
            let tensors = std::mem::take(&mut parts.tensors).into_iter().enumerate();
            parts.tensors = tensors.filter(|(i, _)| i % 2 == shard).map(|(_, tensor)| tensor).collect();
        })
    });
    let places = parts.tensors.iter().enumerate().map(|(i, (name, ..))| (name.clone(), json!(SHARDS[i % 2])));
    let index = json!({"weight_map": serde_json::Map::from_iter(places)});
    let [first, second] = shards;
    vec![("config.json", config), (INDEX, index.to_string().into_bytes()), (SHARDS[0], first), (SHARDS[1], second)]
}

fn file<'a>(files: &'a mut Files, name: &str) -> &'a mut Vec<u8> {
    &mut files.iter_mut().find(|(other, _)| *other == name).unwrap().1
}

fn with(files: &Files, change: impl FnOnce(&mut Files)) -> Files {
    let mut files = files.clone();
    change(&mut files);
    files
}

fn load_lm(path: &Path) -> hymba::Result<HymbaLm> {
    HymbaLm::from_dir(path)
}

/// What reading a folder of these files does that it must not do.
fn fault_of(files: &Files, says: &str) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    fault(load_lm, folder.path(), says)
}

/// With other values in the config.
fn config(files: &Files, values: Value) -> Files {
    with(files, |files| {
        let mut config: Value = serde_json::from_slice(&files[0].1).unwrap();
        values.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        files[0].1 = config.to_string().into_bytes();
    })
}

/// With tensors changed.
fn tensors(files: &Files, name: &str, change: impl FnOnce(&mut Vec<(String, Value, Vec<u8>)>)) -> Files {
    with(files, |files| {
        let file = file(files, name);
        *file = Parts::of(file).with(|parts| change(&mut parts.tensors));
    })
}

/// With other places in the index.
fn index(files: &Files, change: impl FnOnce(&mut serde_json::Map<String, Value>)) -> Files {
    with(files, |files| {
        let file = file(files, INDEX);
        let mut index: Value = serde_json::from_slice(file).unwrap();
        change(index["weight_map"].as_object_mut().unwrap());
        *file = index.to_string().into_bytes();
    })
}

fn remove_first(places: &mut serde_json::Map<String, Value>) -> Option<Value> {
    let first = places.keys().next()?.clone();
    places.remove(&first)
}

/// With the first tensor of the index in another file.
fn placed(files: &Files, place: impl Into<Value>) -> Files {
    index(files, |places| *places.values_mut().next().unwrap() = place.into())
}

fn text(files: &Files, name: &str, text: impl Into<Vec<u8>>) -> Files {
    with(files, |files| *file(files, name) = text.into())
}

fn bad_single(files: &Files) -> Vec<(&'static str, Files, &'static str)> {
    let dtype = |dtype: &'static str, size: usize| {
        tensors(files, SINGLE, move |tensors| {
            let (_, info, data) = &mut tensors[0];
            info["dtype"] = json!(dtype);
            data.resize(data.len() / 4 * size, 0);
        })
    };
    let larger = |values: Value| config(files, values);
    vec![
        ("I64", dtype("I64", 8), "has type I64, expected F32"),
        ("BOOL", dtype("BOOL", 1), "has type BOOL, expected F32"),
        ("F8", dtype("F8_E4M3", 1), "has type F8_E4M3, expected F32"),
        ("no file of tensors", with(files, |files| drop(files.pop())), "neither model.safetensors nor"),
        ("files of torch.save", with(files, |files| files[1].0 = "pytorch_model.bin"), "convert them to safetensors"),
        ("no config", with(files, |files| drop(files.remove(0))), "config.json"),
        ("an empty config", text(files, "config.json", ""), "not a usable config"),
        ("a config of NaN", config(files, json!({"rms_norm_eps": null, "mamba_expand": "x"})), "mamba_expand"),
        ("a wider model", larger(json!({"hidden_size": 16})), "], expected ["),
        ("more layers", larger(json!({"num_hidden_layers": 4})), r#""model.layers.3.mamba.D.0": missing"#),
        ("fewer layers", larger(json!({"num_hidden_layers": 2, "kv_reuse_group": null})), "unexpected"),
        ("more tokens", larger(json!({"vocab_size": 1 << 30})), "expected [1073741824, 8]"),
        ("wide states", larger(json!({"mamba_d_state": 1 << 24})), "expected [16, 16777216]"),
        ("many meta tokens", larger(json!({"num_memory_tokens": 1 << 14})), "expected [16384, 8]"),
        ("too many meta tokens", larger(json!({"num_memory_tokens": 1 << 24})), "0 to 16384"),
        ("a wide MLP", larger(json!({"intermediate_size": 1 << 24})), "expected [16777216, 8]"),
        ("all layers there can be", larger(json!({"num_hidden_layers": 512})), "missing"),
        ("layers without end", larger(json!({"num_hidden_layers": u64::MAX})), "num_hidden_layers"),
        ("an untied head", larger(json!({"tie_word_embeddings": false})), r#""lm_head.weight": missing"#),
        ("a bias", larger(json!({"mamba_proj_bias": true})), r#"in_proj.bias": missing"#),
        ("no sharing", larger(json!({"kv_reuse_group": null})), "in_proj.weight\": has shape"),
        ("other heads", larger(json!({"num_key_value_heads": 2})), "in_proj.weight\": has shape"),
    ]
}

fn bad_shards(files: &Files) -> Vec<(&'static str, Files, &'static str)> {
    let plain = "is not the name of a file in the folder";
    let others = Parts::of(&files[3].1).tensors.swap_remove(0).0;
    let many = |places: std::ops::Range<usize>, file: fn(usize) -> String| {
        index(files, |all| all.extend(places.map(|i| (i.to_string(), file(i).into()))))
    };
    vec![
        ("a file beside the folder", placed(files, "../model.safetensors"), plain),
        ("the folder above", placed(files, ".."), plain),
        ("the folder", placed(files, "."), plain),
        ("a folder within", placed(files, "a/model.safetensors"), plain),
        ("an absolute path", placed(files, "/etc/passwd"), plain),
        ("a device", placed(files, "/dev/zero"), plain),
        ("a path of Windows", placed(files, "..\\model.safetensors"), plain),
        ("a drive of Windows", placed(files, "C:model.safetensors"), plain),
        ("no name", placed(files, ""), plain),
        ("a name with a zero", placed(files, "a\0b"), plain),
        ("a name of 300 bytes", placed(files, "a".repeat(300)), plain),
        ("a number for a name", placed(files, 5), "expected a string"),
        ("an absent file", placed(files, "\u{1b}absent"), r#"1 of its files are not in the folder: "\u{1b}absent""#),
        ("the config for a shard", placed(files, "config.json"), "config.json"),
        ("the index for a shard", placed(files, INDEX), "index.json"),
        ("the other shard", placed(files, SHARDS[1]), "and the index has it in"),
        ("a name too many", index(files, |places| drop(places.insert("a".into(), json!(SHARDS[0])))), "\"a\": not in"),
        ("a name too few", index(files, |places| drop(remove_first(places))), "and not in the index"),
        ("no names", index(files, |places| places.clear()), "missing"),
        ("hundreds of files", many(0..300, |i| format!("{i}")), "more than 256 files"),
        ("thousands of names", many(0..16_000, |_| SHARDS[0].into()), "where the index has it"),
        ("more thousands", many(0..50_000, |_| SHARDS[0].into()), "more than 16384 tensors"),
        ("an empty index", text(files, INDEX, ""), "not a usable index"),
        ("an index without names", text(files, INDEX, "{}"), "missing field `weight_map`"),
        ("an index of lists", text(files, INDEX, r#"{"weight_map": []}"#), "an object of file names"),
        ("an index not UTF-8", text(files, INDEX, [b'"', 0xff]), "not UTF-8"),
        ("an index in depth", text(files, INDEX, "{\"weight_map\":".repeat(100_000)), "not a usable index"),
        ("an index past the cap", text(files, INDEX, vec![b' '; (4 << 20) + 1]), "at most 4194304"),
        (
            "a name twice",
            text(files, INDEX, r#"{"weight_map": {"a": "config.json", "a": "config.json"}}"#),
            "\"a\" appears twice",
        ),
        (
            "a tensor in both shards",
            tensors(files, SHARDS[0], |tensors| {
                tensors.push((others, json!({"dtype": "F32", "shape": [0]}), vec![]));
            }),
            "and the index has it in",
        ),
        ("integers in a shard", tensors(files, SHARDS[1], |all| all[0].1["dtype"] = json!("I32")), "has type I32"),
    ]
}

#[test]
fn every_bad_folder_is_an_error() {
    let (single, sharded) = (saved_lm(), sharded());
    assert_eq!(fault_of(&single, ""), Some("was accepted".into()));
    assert_eq!(fault_of(&sharded, ""), Some("was accepted".into()));
    let mut tables = vec![("single", bad_single(&single)), ("shards", bad_shards(&sharded))];
    for (files, name) in [(&single, SINGLE), (&sharded, SHARDS[0])] {
        let valid = &files.iter().find(|(other, _)| *other == name).unwrap().1;
        let rows = bad_safetensors(valid).into_iter().map(|(what, bytes, says)| {
            // what a shard lacks or has besides, the index tells
            let says = if name == SHARDS[0] && (says.contains("missing, ") || says == "missing") {
                "where the index has it"
            } else if name == SHARDS[0] && says.contains("unex") {
                "and not in the index"
            } else {
                says
            };
            (what, text(files, name, bytes), says)
        });
        tables.push((name, rows.collect()));
    }
    let mut faults = Vec::new();
    for (kind, table) in tables {
        for (name, files, says) in table {
            faults.extend(fault_of(&files, says).map(|fault| format!("{kind}: {name}: {fault}")));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// All that is wrong with the tensors stands in one error.
#[test]
fn what_is_wrong_with_tensors_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let files = tensors(&saved_lm(), SINGLE, |tensors| {
        tensors.retain(|(name, ..)| name != "model.layers.0.mamba.D.0");
        for (name, info, data) in tensors.iter_mut() {
            match name.as_str() {
                "model.layers.1.mamba.D.0" => info["shape"] = json!([4, 4]),
                "model.layers.2.mamba.D.0" => info["dtype"] = json!("I32"),
                "model.final_layernorm.weight" => *name = "model.norm.weight".into(),
                "model.memory_tokens" => {
                    info["dtype"] = json!("I64");
                    data.resize(2 * data.len(), 0);
                }
                _ => {}
            }
        }
    });
    files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
    let Err(Error::Tensors { problems, path }) = HymbaLm::from_dir(folder.path()) else {
        panic!("another error");
    };
    assert_eq!(path, folder.path().join(SINGLE));
    assert_eq!(
        problems,
        [
            r#""model.final_layernorm.weight": missing, expected shape [8]"#,
            r#""model.layers.0.mamba.D.0": missing, expected shape [16]"#,
            r#""model.layers.1.mamba.D.0": has shape [4, 4], expected [16]"#,
            r#""model.layers.2.mamba.D.0": has type I32, expected F32, F64, F16 or BF16"#,
            r#""model.memory_tokens": has type I64, expected F32, F64, F16 or BF16"#,
            r#""model.norm.weight": unexpected, has shape [8]"#,
        ]
    );
}

#[test]
fn a_folder_cut_short_anywhere_is_an_error() {
    for files in [saved_lm(), sharded()] {
        let folder = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| fs::write(folder.path().join(name), bytes).unwrap());
        load_lm(folder.path()).unwrap();
        for (name, bytes) in &files {
            let path = folder.path().join(name);
            let file = fs::File::options().write(true).open(&path).unwrap();
            for length in (0..bytes.len()).rev().filter(|length| length % 7 == 0 || length + 20 > bytes.len()) {
                file.set_len(length as u64).unwrap();
                assert_eq!(fault(load_lm, folder.path(), ""), None, "{name} cut to {length} bytes");
            }
            fs::write(&path, bytes).unwrap();
        }
    }
}

#[test]
fn only_folders_of_regular_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(fault(load_lm, &folder.path().join("absent"), "config.json"), None);
    let files = saved_lm();
    for (name, _) in &files {
        fs::write(folder.path().join(name), "").unwrap();
    }
    assert_eq!(fault(load_lm, &folder.path().join("config.json"), "config.json"), None);
    fs::write(folder.path().join("config.json"), &files[0].1).unwrap();
    fs::remove_file(folder.path().join(SINGLE)).unwrap();
    fs::create_dir(folder.path().join(SINGLE)).unwrap();
    assert_eq!(fault(load_lm, folder.path(), "not a regular file"), None);
    // a sparse file of a terabyte, whose header does not say so
    fs::remove_dir(folder.path().join(SINGLE)).unwrap();
    fs::write(folder.path().join(SINGLE), &files[1].1).unwrap();
    let file = fs::File::options().write(true).open(folder.path().join(SINGLE)).unwrap();
    if file.set_len(1 << 40).is_ok() {
        let before = NOW.get();
        PEAK.set(before);
        assert!(matches!(load_lm(folder.path()), Err(Error::Format { .. })));
        assert!(PEAK.get() - before < A_LITTLE);
    }
    #[cfg(unix)]
    {
        fs::remove_file(folder.path().join(SINGLE)).unwrap();
        std::os::unix::fs::symlink("absent", folder.path().join(SINGLE)).unwrap();
        assert!(matches!(load_lm(folder.path()), Err(Error::Io { .. })));
    }
}

// ---- states ----

/// A state of one row that has seen so many tokens, and what loads it.
fn saved_state(lm: &HymbaLm, tokens: usize) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut state = lm.new_state(1);
    lm.prefill(&Array2::ones((1, tokens)), &mut state).unwrap();
    lm.save_state(&state, &path).unwrap();
    fs::read(path).unwrap()
}

fn bad_states(valid: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let parts = Parts::of(valid);
    let entry = |change: &dyn Fn(&mut Value)| {
        parts.with(|parts| {
            let mut saved: Value = serde_json::from_str(parts.metadata["hymba"].as_str().unwrap()).unwrap();
            change(&mut saved);
            parts.metadata["hymba"] = saved.to_string().into();
        })
    };
    let fit = "do not fit together";
    let positions = |positions: Value| entry(&|saved| saved["positions"] = positions.clone());
    let rows_without_data = |rows: usize| {
        let mut parts = parts.clone();
        parts.tensors = (0..rows).map(|i| (i.to_string(), json!({"dtype": "F32", "shape": [0]}), vec![])).collect();
        let saved: &mut Value = &mut parts.metadata["hymba"];
        *saved = saved.as_str().unwrap().replace("[5]", &json!(vec![5; rows]).to_string()).into();
        parts.with(|_| {})
    };
    vec![
        ("a model", saved_lm().remove(1).1, "language model of Hugging Face"),
        ("another version", entry(&|saved| saved["version"] = json!(2)), "version 2"),
        ("another type", entry(&|saved| saved["kv_storage"] = json!("f64")), "not usable"),
        ("no positions", entry(&|saved| drop(saved.as_object_mut().unwrap().remove("positions"))), "positions"),
        ("a config out of range", entry(&|saved| saved["config"]["hidden_size"] = json!(0)), "hidden_size"),
        ("another config", entry(&|saved| saved["config"]["rope_theta"] = json!(5)), "another configuration"),
        ("a config in depth", entry(&|saved| saved["config"] = "[".repeat(100_000).into()), "not usable"),
        ("no rows", positions(json!([])), "unexpected"),
        ("a row too many", positions(json!([5, 5])), fit),
        ("fewer tokens than meta tokens", positions(json!([1])), fit),
        ("a negative position", positions(json!([-1])), "not usable"),
        ("more tokens than anybody feeds", positions(json!([u64::MAX])), fit),
        ("very many tokens", positions(json!([1u64 << 40])), "expected [1, 1099511627776, 4]"),
        ("a token too many", positions(json!([6])), "rows.0.layers.0.keys\": has shape [1, 5, 4], expected [1, 6, 4]"),
        ("rows without end", positions(json!(vec![5; 100_000])), fit),
        ("as many rows as tensors", rows_without_data(16_000), fit),
        (
            "other keys of meta tokens",
            parts.with(|parts| {
                let (.., data) = parts.tensors.iter_mut().find(|(name, ..)| name == "rows.0.layers.1.keys").unwrap();
                data.fill(0x40);
            }),
            "other weights",
        ),
        (
            "keys of NaN",
            parts.with(|parts| {
                let (.., data) = parts.tensors.iter_mut().find(|(name, ..)| name == "rows.0.layers.1.keys").unwrap();
                data.fill(0xff);
            }),
            "other weights",
        ),
    ]
}

#[test]
fn every_bad_state_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let lm = small_lm();
    let load = |path: &Path| lm.load_state(path);
    let valid = saved_state(&lm, 3);
    let mut rows = bad_states(&valid);
    rows.extend(bad_safetensors(&valid));
    let mut faults = Vec::new();
    for (name, bytes, says) in rows {
        // without a tensor there cannot be a row
        let says = if name == "no tensors" { "do not fit together" } else { says };
        fs::write(&path, bytes).unwrap();
        faults.extend(fault(load, &path, says).map(|fault| format!("{name}: {fault}")));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));

    fs::write(&path, &valid).unwrap();
    load(&path).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for length in (0..valid.len()).rev() {
        file.set_len(length as u64).unwrap();
        assert_eq!(fault(load, &path, ""), None, "cut to {length} bytes");
    }
    assert_eq!(fault(load, folder.path(), "not a regular file"), None);
}

/// A long state takes the memory that it says and no second copy.
#[test]
fn a_long_state_is_read_with_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let lm = small_lm();
    // as bf16, the file is half of what it becomes
    let file = Parts::of(&saved_state(&lm, 3)).with(|parts| {
        let saved = parts.metadata["hymba"].as_str().unwrap().replace("[5]", "[500000]");
        parts.metadata["hymba"] = saved.into();
        for (name, info, data) in &mut parts.tensors {
            if name.ends_with("keys") || name.ends_with("values") {
                info["dtype"] = json!("BF16");
                let mut narrow: Vec<u8> = data.chunks_exact(4).flat_map(|number| [number[2], number[3]]).collect();
                if name.contains("layers.0") {
                    info["shape"][1] = json!(500_000);
                    narrow.resize(narrow.len() / 5 * 500_000, 0);
                }
                *data = narrow;
            }
        }
    });
    fs::write(&path, &file).unwrap();
    let before = NOW.get();
    PEAK.set(before);
    let state = lm.load_state(&path).unwrap();
    assert_eq!(state.lengths(), [499_998]);
    let taken = PEAK.get() - before;
    assert!(taken <= 2 * file.len() + A_LITTLE, "{taken} bytes for a file of {}", file.len());
}

#[test]
fn configs_of_language_models_are_read_with_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config = |path: &Path| hymba::lm::HymbaLmConfig::from_file(path);
    // filled up to the most that is read
    let filled = |start: &str, entry: &str| format!("{start}{}", entry.repeat(((1 << 20) - start.len()) / entry.len()));
    let zeros = format!("[{}0],", "0,".repeat(510));
    for (text, says) in [
        (filled("{\"hidden_size\": [0", ",0"), "at most 64 whole numbers"),
        (filled("{\"hidden_size\": ", "["), "line 1"),
        (filled("{\"hidden_size\": {\"a\": 0", ",\"a\": 0"), "line 1"),
        (filled("{\"hidden_act\": \"", "\\u001b"), "line 1"),
        (format!("{{\"kq_norm\": \"{}\"}}", "\\u001b".repeat(100_000)), "is required"),
        (filled("{\"global_attn_idx\": [0", ",0"), "at most 512"),
        (filled("{\"kv_reuse_group\": [[0]", ",[0]"), "at most 512"),
        (filled("{\"kv_reuse_group\": [", &zeros), "at most 512"),
        (filled("{\"kv_reuse_group\": ", "["), "line 1"),
        (filled("{\"other\": ", "["), "line 1"),
        (filled("{\"other\": ", "{\"a\":"), "line 1"),
        (" ".repeat((1 << 20) + 1), "at most 1048576"),
    ] {
        fs::write(&path, &text).unwrap();
        assert_eq!(fault(config, &path, says), None, "{}", &text[..40]);
    }
    assert_eq!(fault(config, folder.path(), "not a regular file"), None);
}
