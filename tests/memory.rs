//! What reading and writing files takes in memory: at most twice the files and a little, whoever wrote them.
#![cfg(feature = "lm")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use hymba::lm::{HymbaLmConfig, KvStorage, LoadOptions, Quantization, TorchDtype};
use hymba::ndarray::Array2;
use hymba::{Error, HymbaLm};
use serde_json::json;

/// Memory that a call may take beyond twice the files.
const A_LITTLE: usize = 4 << 20;

/// Counts what all threads have allocated, and the most there was at once.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(now, Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The tests of this file count the same memory.
static ALONE: Mutex<()> = Mutex::new(());

/// What a call takes at most, besides what was there.
fn peak<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = call();
    (result, PEAK.load(Relaxed) - before)
}

fn alone() -> impl Drop {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options() -> [LoadOptions; 5] {
    let plain = LoadOptions::default();
    [
        plain.clone(),
        plain.clone().dtype(TorchDtype::BF16),
        plain.clone().dtype(TorchDtype::F16),
        plain.clone().quantize(Quantization::Bits8),
        plain.quantize(Quantization::Bits4),
    ]
}

/// A folder of zeros in bf16, of the shapes that the config asks for.
fn folder_of(config: &serde_json::Value, tensors: &[(&str, Vec<usize>)]) -> (tempfile::TempDir, usize) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.to_string(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header).unwrap();
    let path = folder.path().join("model.safetensors");
    fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], &header].concat()).unwrap();
    let length = 8 + header.len() + end;
    fs::File::options().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
    (folder, length)
}

/// One layer of width 1, of which everything else may be wide.
fn narrow(mlp: usize, vocabulary: usize) -> (tempfile::TempDir, usize) {
    let config = json!({
        "model_type": "hymba", "hidden_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1,
        "vocab_size": vocabulary, "intermediate_size": mlp, "mlp_hidden_act": "relu2", "kq_norm": "none",
        "tie_word_embeddings": true, "bos_token_id": null, "eos_token_id": null, "pad_token_id": null,
    });
    let layer = [
        ("input_layernorm.weight", vec![1]),
        ("mamba.in_proj.weight", vec![8, 1]),
        ("mamba.conv1d.weight", vec![2, 1, 4]),
        ("mamba.conv1d.bias", vec![2]),
        ("mamba.x_proj.0.weight", vec![33, 2]),
        ("mamba.dt_layernorm.weight", vec![1]),
        ("mamba.B_layernorm.weight", vec![16]),
        ("mamba.C_layernorm.weight", vec![16]),
        ("mamba.dt_proj.0.weight", vec![2, 1]),
        ("mamba.dt_proj.0.bias", vec![2]),
        ("mamba.A_log.0", vec![2, 16]),
        ("mamba.D.0", vec![2]),
        ("mamba.pre_avg_layernorm1.weight", vec![2]),
        ("mamba.pre_avg_layernorm2.weight", vec![2]),
        ("mamba.out_proj.weight", vec![1, 2]),
        ("pre_moe_layernorm.weight", vec![1]),
        ("moe.experts.0.up_proj.weight", vec![mlp, 1]),
        ("moe.experts.0.down_proj.weight", vec![1, mlp]),
    ];
    let layer = layer.map(|(name, shape)| (format!("model.layers.0.{name}"), shape));
    let outer = [("model.embed_tokens.weight", vec![vocabulary, 1]), ("model.final_layernorm.weight", vec![1])];
    let all: Vec<_> = layer.iter().map(|(name, shape)| (name.as_str(), shape.clone())).chain(outer).collect();
    folder_of(&config, &all)
}

/// Panels of 32 rows, and blocks of 32 columns, have room that the file does not pay for.
#[test]
fn hostile_folders_take_no_more_than_twice_their_size() {
    let _alone = alone();
    let mut refused = 0;
    for (mlp, vocabulary) in [(1 << 16, 3), (1 << 20, 3), (1 << 22, 3), (8, 1 << 21), (1 << 20, 1 << 20)] {
        let (folder, length) = narrow(mlp, vocabulary);
        for options in options() {
            let (read, taken) = peak(|| HymbaLm::from_dir_with(folder.path(), &options, |_| {}));
            assert!(taken <= 2 * length + A_LITTLE, "{options:?}: {taken} bytes for {length}");
            match read {
                Ok(lm) => assert!(lm.num_bytes() <= 2 * length + A_LITTLE),
                Err(Error::Format { reason, .. }) => {
                    refused += 1;
                    assert!(reason.contains("panels"), "{reason}");
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert!(refused > 10, "{refused}");
    // a small one is read, however narrow
    let (folder, _) = narrow(1 << 10, 3);
    options().iter().for_each(|options| drop(HymbaLm::from_dir_with(folder.path(), options, |_| {}).unwrap()));
}

fn config(change: impl FnOnce(&mut HymbaLmConfig)) -> HymbaLmConfig {
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (200, 300, 20_000);
    (config.num_hidden_layers, config.global_attn_idx) = (2, Some(vec![0]));
    config.mamba_dt_rank = None;
    config.torch_dtype = Some(TorchDtype::F32);
    change(&mut config);
    config
}

fn length(folder: &Path) -> usize {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len() as usize);
    files.sum()
}

#[test]
fn folders_are_read_and_written_with_little_memory() {
    let _alone = alone();
    for tied in [true, false] {
        let lm =
            HymbaLm::random(config(|config| config.tie_word_embeddings = tied), 0, &LoadOptions::default()).unwrap();
        for options in options() {
            let folder = tempfile::tempdir().unwrap();
            let (_, taken) = peak(|| lm.save_dir(folder.path()).unwrap());
            assert!(taken <= A_LITTLE, "{taken}");
            let (again, taken) = peak(|| HymbaLm::from_dir_with(folder.path(), &options, |_| {}).unwrap());
            assert!(taken <= again.num_bytes() + A_LITTLE, "{taken} bytes for {}", again.num_bytes());
            assert!(taken <= 2 * length(folder.path()) + A_LITTLE);
        }
    }
}

#[test]
fn states_are_saved_a_piece_at_a_time() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    for storage in [KvStorage::F32, KvStorage::Bf16] {
        let config = config(|config| {
            (config.sliding_window, config.intermediate_size, config.vocab_size) = (None, 8, 10);
        });
        let lm = HymbaLm::random(config, 0, &LoadOptions::default().kv_storage(storage)).unwrap();
        let mut state = lm.new_state(1);
        lm.prefill(&Array2::ones((1, 2000)), &mut state).unwrap();
        // many rows, that none is large
        let state = state.select(&[0; 12]).unwrap();
        assert!(state.num_bytes() > 5_000_000, "{}", state.num_bytes());
        let (_, taken) = peak(|| lm.save_state(&state, &path).unwrap());
        assert!(taken <= 1 << 20, "{taken} bytes for {}", state.num_bytes());
        let (again, taken) = peak(|| lm.load_state(&path).unwrap());
        assert!(taken <= 2 * length(folder.path()) + A_LITTLE, "{taken}");
        assert_eq!(again.layer(11, 1), state.layer(11, 1));
    }
}

/// A state takes what its rows and their places take: the check before it is made counts both.
#[test]
fn the_memory_of_states_is_that_of_their_rows() {
    let _alone = alone();
    let lm = HymbaLm::random(config(|config| config.intermediate_size = 8), 0, &LoadOptions::default()).unwrap();
    lm.new_state(1);
    let (state, taken) = peak(|| lm.new_state(20));
    assert_eq!(state.batch(), 20);
    assert!(taken >= state.num_bytes());
    // the first thing that is asked for is as much as it will be
    assert!(taken <= state.num_bytes() * 11 / 10 + A_LITTLE, "{taken} {}", state.num_bytes());
}
