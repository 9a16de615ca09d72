//! Reading a file of an encoder takes no more memory than twice its length and a few megabytes, whatever it holds.

use std::fs;
use std::path::{Path, PathBuf};

#[path = "common/counting.rs"]
mod counting;

use counting::{Counting, NOW, PEAK};
use hymba::ndarray::Array2;
use hymba::train::{Dataset, Targets, Trainer, TrainerOptions};
use hymba::{Error, Hymba, HymbaOptions, Predictor, Storage, Task};
use serde_json::{Map, Value, json};

/// What reading may take beyond twice the file.
const A_LITTLE: usize = 4 << 20;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result of reading, which took no more than the law allows for files of so many bytes.
fn within<T>(what: &str, bytes: usize, read: impl FnOnce() -> hymba::Result<T>) -> hymba::Result<T> {
    let before = NOW.get();
    PEAK.set(before);
    let result = read();
    let (taken, allowed) = (PEAK.get() - before, 2 * bytes + A_LITTLE);
    assert!(taken <= allowed, "{what}: {bytes} bytes took {taken}, where {allowed} are allowed");
    result
}

fn length(path: &Path) -> usize {
    fs::metadata(path).unwrap().len() as usize
}

/// Tensors of f32 without data but for one of so many numbers, so that the file is sparse.
fn hostile(path: &Path, metadata: Option<Value>, names: impl Iterator<Item = String>, numbers: usize) {
    let info = |shape: usize, start: usize| json!({"dtype": "F32", "shape": [shape], "data_offsets": [start, start + 4 * shape]});
    let mut header: Map<String, Value> = names.map(|name| (name, info(0, 0))).collect();
    header.insert("x".into(), info(numbers, 0));
    if let Some(metadata) = metadata {
        header.insert("__metadata__".into(), json!({"hymba": metadata.to_string()}));
    }
    write(path, &Value::from(header).to_string(), 4 * numbers);
}

fn write(path: &Path, header: &str, data: usize) {
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len((8 + header.len() + data) as u64).unwrap();
}

fn narrow(layers: usize) -> HymbaOptions {
    HymbaOptions::new(1).hidden_size(1).state_size(1).num_heads(1).num_layers(layers)
}

fn metadata(layers: usize, task: Option<&Task>) -> Value {
    let options = json!({"embed_dim": 1, "hidden_size": 1, "state_size": 1, "num_heads": 1, "num_layers": layers});
    match task {
        Some(task) => json!({"version": 1, "options": options, "task": task}),
        None => json!({"version": 1, "options": options}),
    }
}

fn names(count: usize, prefix: &str) -> impl Iterator<Item = String> + use<'_> {
    (0..count).map(move |i| format!("{prefix}{i:x}"))
}

#[test]
fn a_file_cannot_hold_more_blocks_than_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let task = Task::Regress { outputs: 1 };
    for (layers, tensors, numbers) in [
        (4000, 0, 1),
        (40_000, 0, 2_300_000),
        (400_000, 0, 23_000_000),
        (4000, 4000, 1),
        (4000, 16_000, 100_000),
        (600, 16_383, 1),
        (300, 16_383, 1),
        (16, 16_383, 100_000),
    ] {
        for prefix in ["", "blocks."] {
            let what = format!("{layers} blocks, {tensors} tensors {prefix}");
            hostile(&path, Some(metadata(layers, None)), names(tensors, prefix), numbers);
            let bytes = length(&path);
            let error = within(&what, bytes, || Hymba::load(&path)).unwrap_err();
            if layers > tensors.max(16) {
                assert!(matches!(error, Error::Format { .. }), "{what}: {error}");
                assert!(error.to_string().contains("more blocks than tensors"), "{what}: {error}");
            }
            within(&what, bytes, || Hymba::load_with(&path, narrow(layers))).unwrap_err();

            hostile(&path, Some(metadata(layers, Some(&task))), names(tensors, prefix), numbers);
            within(&what, length(&path), || Predictor::load(&path)).unwrap_err();

            hostile(&path, None, names(tensors, prefix), numbers);
            within(&what, length(&path), || Hymba::load_edifice(&path, narrow(layers))).unwrap_err();
            nx(&path, &names(tensors, prefix).collect::<Vec<_>>(), "");
            let error = within(&what, length(&path), || Hymba::load_edifice(&path, narrow(layers))).unwrap_err();
            assert!(matches!(error, Error::Tensors { .. }), "{what}: {error}");
        }
    }
    // names that are joined
    let names: Vec<_> = names(16_000, "").collect();
    nx(&path, &names, &"o".repeat(240));
    let error = within("long outer name", length(&path), || Hymba::load_edifice(&path, narrow(4))).unwrap_err();
    assert!(error.to_string().contains("names of its tensors are too long"), "{error}");
}

/// A file of `Nx.serialize` with empty tensors in a map, which may be in another map.
fn nx(path: &Path, names: &[String], outer: &str) {
    const MAP: &[u8] = b"h\x03w\x17Elixir.Nx.Container.Map";
    let binary = |name: &str| [b"m".as_slice(), &(name.len() as u32).to_be_bytes(), name.as_bytes()].concat();
    let map = |entries: &[Vec<u8>]| {
        let count = (entries.len() as u32).to_be_bytes();
        [MAP, b"l", &count, &entries.concat(), b"j", b"w\x02ok"].concat()
    };
    let tensor = [b"h\x07w\x01th\x01a\0h\x02w\x01fa\x20jj".as_slice(), b"a\0a\0"].concat();
    let entries: Vec<_> = names.iter().map(|name| [b"h\x02".as_slice(), &binary(name), &tensor].concat()).collect();
    let mut term = map(&entries);
    if !outer.is_empty() {
        term = map(&[[b"h\x02".as_slice(), &binary(outer), &term].concat()]);
    }
    let length = (term.len() as u64 + 1).to_be_bytes();
    fs::write(path, [b"nx\x01\0".as_slice(), &length, b"\x83", &term].concat()).unwrap();
}

#[test]
fn sound_files_keep_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    // wide, and with as many blocks as a file can have
    for options in [HymbaOptions::new(30).hidden_size(256).num_layers(2), narrow(600)] {
        Hymba::build(options.clone()).unwrap().save(&path).unwrap();
        within("load", length(&path), || Hymba::load(&path)).unwrap();
        within("load_with", length(&path), || Hymba::load_with(&path, options.clone())).unwrap();
        Predictor::build(options.clone(), Task::classify(["a", "b"])).unwrap().save(&path).unwrap();
        within("Predictor::load", length(&path), || Predictor::load(&path)).unwrap();
    }
    for options in [HymbaOptions::edifice(30).num_layers(2), narrow(500)] {
        edifice(&path, &options);
        within("load_edifice", length(&path), || Hymba::load_edifice(&path, options)).unwrap();
    }
}

/// Half precision, so that the model is twice as large as the file.
#[test]
fn files_of_half_precision_keep_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let options = HymbaOptions::new(30).hidden_size(512).num_layers(2);
    let (mut header, mut end) = (Map::new(), 0);
    Hymba::build(options.clone()).unwrap().visit(&mut |name, array| {
        let offsets = [end, end + 2 * array.len()];
        header.insert(name.into(), json!({"dtype": "BF16", "shape": array.shape(), "data_offsets": offsets}));
        end = offsets[1];
    });
    write(&path, &Value::from(header).to_string(), end);
    within("load_with", length(&path), || Hymba::load_with(&path, options)).unwrap();
}

/// A narrow model takes the memory that it says, and reading it no wide copy.
#[test]
fn narrow_models_are_small() {
    /// Lists, names and norms.
    const BOOKKEEPING: usize = 64 << 10;
    let folder = tempfile::tempdir().unwrap();
    let [path, narrow] = ["wide", "narrow"].map(|name| folder.path().join(name));
    // one block: a wide copy of a block would be a copy of the model
    Hymba::build(HymbaOptions::new(30).hidden_size(512).num_layers(1)).unwrap().save(&path).unwrap();
    let wide = length(&path);
    for (storage, share) in [(Storage::F32, 1.0), (Storage::Bf16, 0.53), (Storage::Q8, 0.31), (Storage::Q4, 0.19)] {
        let before = NOW.get();
        PEAK.set(before);
        let model = Hymba::load_as(&path, storage).unwrap();
        let (taken, most) = (NOW.get() - before, PEAK.get() - before);
        assert!(taken.abs_diff(model.num_bytes()) < BOOKKEEPING, "{storage:?}: {taken}, not {}", model.num_bytes());
        assert!((model.num_bytes() as f64) < share * wide as f64, "{storage:?}: {} of {wide}", model.num_bytes());
        assert!(most < taken + (1 << 20), "{storage:?}: {most} for {taken}");

        model.save(&narrow).unwrap();
        assert!(length(&narrow).abs_diff(model.num_bytes()) < BOOKKEEPING, "{storage:?}");
        drop(model);
        let model = within("load", length(&narrow), || Hymba::load(&narrow)).unwrap();
        // a matrix at a time, when it is built already
        let largest = 4 * 4 * 512 * 512;
        let before = NOW.get();
        PEAK.set(before);
        let mut model = model;
        model.make_trainable().unwrap();
        assert!(PEAK.get() - before < wide + largest, "{storage:?}");
        let before = NOW.get();
        model.store_as(storage).unwrap();
        let freed = before.saturating_sub(NOW.get());
        assert!(storage == Storage::F32 || freed > wide - (share * wide as f64) as usize - BOOKKEEPING, "{storage:?}");
    }
}

/// Writes the file of an Edifice model of zeros. What tensors a block has is what is missing in an empty file.
fn edifice(path: &Path, options: &HymbaOptions) {
    write(path, "{}", 0);
    let Err(Error::Tensors { problems, .. }) = Hymba::load_edifice(path, options.clone()) else {
        panic!("it is empty")
    };
    let (mut header, mut end) = (Map::new(), 0);
    for problem in &problems {
        let (name, shape) = problem.split_once(": missing, expected shape ").unwrap();
        let shape: Vec<usize> = serde_json::from_str(shape).unwrap();
        let name: String = serde_json::from_str(name).unwrap();
        let blocks = if name.contains("block_1") { options.num_layers } else { 1 };
        for block in 1..=blocks {
            let name = name.replace("block_1", &format!("block_{block}"));
            let offsets = [end, end + 4 * shape.iter().product::<usize>()];
            header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": offsets}));
            end = offsets[1];
        }
    }
    write(path, &Value::from(header).to_string(), end);
}

#[test]
fn trainings_keep_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let task = Task::Regress { outputs: 1 };
    let series = (0..4).map(|i| Array2::from_elem((3, 1), i as f32)).collect();
    let data = Dataset::new(&task, series, Targets::Values(Array2::zeros((4, 1)))).unwrap();
    let predictor = Predictor::build(HymbaOptions::new(1).hidden_size(128).num_layers(2), task.clone()).unwrap();
    let options = TrainerOptions::default().epochs(1).checkpoint(folder.path());
    let go_on = |_: &_| std::ops::ControlFlow::Continue(());
    Trainer::new(predictor, options).unwrap().fit(&data, go_on).unwrap();
    let files: Vec<PathBuf> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let bytes = files.iter().map(|path| length(path)).sum();
    within("Trainer::resume", bytes, || Trainer::resume(folder.path())).unwrap();

    let model = folder.path().join("model-1.safetensors");
    for (layers, tensors, numbers) in [(4000, 0, 1), (40_000, 0, 2_300_000), (4000, 4000, 1)] {
        hostile(&model, Some(metadata(layers, Some(&task))), names(tensors, ""), numbers);
        within("a hostile model", length(&model), || Trainer::resume(folder.path())).unwrap_err();
    }
}
