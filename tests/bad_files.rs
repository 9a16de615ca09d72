//! Files from strangers: whatever they hold, reading one gives an `Error` that says what is wrong, never a panic or a
//! hang, and takes no more memory than twice the file and a little.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use counting::{Counting, NOW, PEAK};
use hymba::{Error, Hymba, HymbaOptions, Predictor, Task};
use serde_json::{Value, json};

#[path = "common/counting.rs"]
mod counting;
#[cfg(feature = "lm")]
#[path = "bad_files/image.rs"]
mod image;
#[cfg(feature = "lm")]
#[path = "bad_files/lm.rs"]
mod lm;
#[path = "bad_files/storage.rs"]
mod storage;

/// Memory that reading may take beyond twice the file.
const A_LITTLE: usize = 4 << 20;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

type Loader = fn(&Path) -> hymba::Result<Hymba>;

fn small() -> HymbaOptions {
    HymbaOptions::new(2).hidden_size(4).state_size(2).num_layers(1).num_heads(2).num_meta_tokens(1)
}

fn load(path: &Path) -> hymba::Result<Hymba> {
    Hymba::load(path)
}

/// With the options of `edifice/small`.
fn load_edifice(path: &Path) -> hymba::Result<Hymba> {
    Hymba::load_edifice(path, HymbaOptions::edifice(6).hidden_size(8).num_layers(2).num_heads(2).num_meta_tokens(2))
}

fn load_predictor(path: &Path) -> hymba::Result<Hymba> {
    Predictor::load(path).map(Predictor::into_encoder)
}

fn saved_predictor() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("predictor.safetensors");
    Predictor::build(small(), Task::classify(["a", "b"])).unwrap().save(&path).unwrap();
    fs::read(path).unwrap()
}

fn edifice_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/edifice/small").join(name)
}

/// The file of a small model.
fn saved() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    Hymba::build(small()).unwrap().save(&path).unwrap();
    fs::read(path).unwrap()
}

// ---- safetensors ----

fn safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A safetensors file taken apart.
#[derive(Clone)]
struct Parts {
    metadata: Value,
    tensors: Vec<(String, Value, Vec<u8>)>,
}

impl Parts {
    fn of(file: &[u8]) -> Self {
        let start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: serde_json::Map<_, _> = serde_json::from_slice(&file[8..start]).unwrap();
        let metadata = header.remove("__metadata__").unwrap_or(json!({}));
        let data = |info: &Value| {
            let offset = |i: usize| start + info["data_offsets"][i].as_u64().unwrap() as usize;
            file[offset(0)..offset(1)].to_vec()
        };
        let tensors = header.into_iter().map(|(name, info)| (name, info.clone(), data(&info))).collect();
        Parts { metadata, tensors }
    }

    /// Puts the file together again after `change`, with offsets that fit.
    fn with(&self, change: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut parts = self.clone();
        change(&mut parts);
        let mut header = serde_json::Map::from_iter([("__metadata__".to_string(), parts.metadata)]);
        let mut data = Vec::new();
        for (name, mut info, bytes) in parts.tensors {
            info["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
            data.extend(bytes);
            header.insert(name, info);
        }
        safetensors(serde_json::to_vec(&header).unwrap(), &data)
    }

    fn with_options(&self, options: &str) -> Vec<u8> {
        self.with(|parts| parts.metadata["hymba"] = format!(r#"{{"version":1,"options":{options}}}"#).into())
    }
}

/// A file that holds `data`, and whose header is the text of one tensor.
fn one(info: &str, data: &[u8]) -> Vec<u8> {
    safetensors(format!(r#"{{"a":{info}}}"#), data)
}

fn two(first: [u64; 2], second: [u64; 2]) -> Vec<u8> {
    let info = |offsets| json!({"dtype": "U8", "shape": [4], "data_offsets": offsets});
    safetensors(json!({"a": info(first), "b": info(second)}).to_string(), &[0; 8])
}

/// Eight tensors of 2^61 - 1 bytes: the sum of their size and the length of the header overflows.
fn nearly_all_numbers() -> Vec<u8> {
    let size = (1u64 << 61) - 1;
    let info = |i| json!({"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]});
    let tensors = (0..8).map(|i| (i.to_string(), info(i)));
    safetensors(Value::from(serde_json::Map::from_iter(tensors)).to_string(), &[0; 8])
}

/// What a safetensors file can get wrong, whatever it is the file of.
fn bad_safetensors(valid: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let parts = Parts::of(valid);
    let length = |length: u64| [&length.to_le_bytes(), &valid[8..]].concat();
    let u8s = |offsets: &str| format!(r#"{{"dtype":"U8","shape":[4],"data_offsets":{offsets}}}"#);
    let shape = |shape: &str| one(&format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}"#), &[0; 8]);
    let more = |count: usize| {
        let empty = json!({"dtype": "F32", "shape": [0]});
        parts.with(|parts| parts.tensors.extend((0..count).map(|i| (i.to_string(), empty.clone(), vec![]))))
    };
    vec![
        ("empty", vec![], "ends before"),
        ("seven bytes", vec![0; 7], "ends before"),
        ("header length 0", length(0), "its header is not usable: EOF"),
        ("header length past the end", length(valid.len() as u64), "cut short"),
        ("header length past the cap", safetensors(vec![b' '; (4 << 20) + 1], &[]), "at most 4194304"),
        ("header length 2^63", length(1 << 63), "cut short"),
        ("header length 2^64 - 1", length(u64::MAX), "cut short"),
        ("header length one less", length(u64::from_le_bytes(valid[..8].try_into().unwrap()) - 1), "its "),
        ("not UTF-8", safetensors([b'{', b'"', 0xff, b'"', b'}'], &[]), "not UTF-8"),
        ("not JSON", safetensors("{hello}", &[]), "its header is not usable"),
        ("a list", safetensors("[1, 2]", &[]), "an object of tensors by name"),
        ("two objects", safetensors("{}{}", &[]), "trailing characters"),
        ("nested in depth", safetensors("{\"__metadata__\":".repeat(100_000), &[]), "expected a string"),
        ("nested in a tensor", one(&"{\"a\":".repeat(100_000), &[]), "its header is not usable"),
        ("nested in a shape", shape(&"[".repeat(100_000)), "its header is not usable"),
        ("one name twice", safetensors(format!(r#"{{"a":{0},"a":{0}}}"#, u8s("[0,4]")), &[0; 4]), r#"name "a""#),
        ("metadata twice", safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), "twice"),
        ("options twice", safetensors(r#"{"__metadata__":{"hymba":"1","hymba":"2"}}"#, &[]), "hymba twice"),
        ("metadata is a list", safetensors(r#"{"__metadata__":[]}"#, &[]), "an object of strings"),
        ("metadata of numbers", safetensors(r#"{"__metadata__":{"hymba":1}}"#, &[]), "expected a string"),
        ("one name, too long", safetensors(format!(r#"{{"{}":{}}}"#, "a".repeat(257), u8s("[0,4]")), &[0; 4]), "long"),
        ("a tensor without type", one(r#"{"shape":[8],"data_offsets":[0,8]}"#, &[0; 8]), "missing field `dtype`"),
        ("a field twice", one(r#"{"dtype":"U8","dtype":"U8"}"#, &[]), "duplicate field"),
        ("unknown type", one(r#"{"dtype":"Z\u001b9","shape":[8],"data_offsets":[0,8]}"#, &[0; 8]), "Z\\u{1b}9"),
        ("half a byte", one(r#"{"dtype":"F4","shape":[1],"data_offsets":[0,1]}"#, &[0; 1]), "not a size"),
        ("negative size", shape("[-2]"), "invalid value"),
        ("fraction of a size", shape("[2.0]"), "invalid type"),
        ("size past 64 bits", shape("[99999999999999999999]"), "its header is not usable"),
        ("sizes that overflow", shape("[4294967296,4294967296]"), "not a size"),
        ("bytes that overflow", shape("[4611686018427387906]"), "not a size"),
        ("huge size", shape("[1099511627776]"), "do not fit its offsets"),
        ("size zero", shape("[0]"), "is 0 bytes"),
        ("many axes", shape("[1,1,1,1,1,1,1,1,2]"), "at most 8"),
        ("a million axes", shape(&format!("[{}0]", "0,".repeat(1_000_000))), "at most 8"),
        ("offsets reversed", one(&u8s("[4,0]"), &[0; 4]), "do not fit its offsets"),
        ("offsets too wide", one(&u8s("[0,8]"), &[0; 8]), "do not fit its offsets"),
        ("three offsets", one(&u8s("[0,4,8]"), &[0; 4]), "its header is not usable"),
        ("offsets past the end", one(&u8s("[0,4]"), &[0; 3]), "cut short"),
        ("offsets past 63 bits", one(&u8s("[18446744073709551611,18446744073709551615]"), &[0; 4]), "instead of 0"),
        ("bytes past 64 bits with the header", nearly_all_numbers(), "cut short"),
        ("tensors that overlap", two([0, 4], [2, 6]), "tensors overlap"),
        ("tensors in one place", two([0, 4], [0, 4]), "tensors overlap"),
        ("a gap", two([0, 4], [5, 9]), "leave a gap"),
        ("a gap in front", two([1, 5], [5, 9]), "leave a gap"),
        ("bytes added", [valid, &[0]].concat(), "bytes were added"),
        ("thousands of tensors without data", more(16_000), "unexpected"),
        ("more thousands", more(50_000), "more than 16384 tensors"),
        ("a zip archive", b"PK\x03\x04\x14\0\0\0\x08\0\0\0".to_vec(), "torch.save"),
        ("a checkpoint of Axon.Loop", vec![131, 104, 2, 97, 1, 116, 0, 0, 0, 1], "Axon.Loop"),
        // tensors that are sound, but not the model's
        ("no tensors", parts.with(|parts| parts.tensors.clear()), "missing"),
        ("one missing", parts.with(|parts| drop(parts.tensors.remove(3))), ": missing, expected shape ["),
        ("one of another name", parts.with(|parts| parts.tensors[0].0 = "\u{1b}]0;".into()), r#""\u{1b}]0;": unex"#),
        ("one flattened", parts.with(|parts| flatten(&mut parts.tensors)), "], expected ["),
        (
            "one of integers",
            parts.with(|parts| parts.tensors[0].1["dtype"] = json!("I32")),
            "has type I32, expected F32",
        ),
    ]
}

/// Makes a list of the first matrix.
fn flatten(tensors: &mut [(String, Value, Vec<u8>)]) {
    let (_, info, data) = tensors.iter_mut().find(|(_, info, _)| info["shape"][1].is_number()).unwrap();
    info["shape"] = json!([data.len() / 4]);
}

/// What the file of a saved model can get wrong besides.
fn bad_saved(valid: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let parts = Parts::of(valid);
    let options = |options: &str| parts.with_options(options);
    let entry = |entry: &str| parts.with(|parts| parts.metadata["hymba"] = entry.into());
    vec![
        ("of Nx.serialize", fs::read(edifice_file("model.nx")).unwrap(), "Hymba::load_edifice"),
        ("of Edifice", fs::read(edifice_file("model.safetensors")).unwrap(), "Hymba::load_edifice"),
        ("no options", parts.with(|parts| parts.metadata = json!({})), "read it with Hymba::load_with"),
        (
            "no options, other names",
            one(r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#, &[0]),
            "some other model",
        ),
        ("options that are not JSON", entry("embed_dim: 2"), "not usable"),
        ("options nested in depth", entry(&"[".repeat(100_000)), "not usable"),
        ("another version", entry(r#"{"version":2,"options":{"new":[]}}"#), "version 2"),
        ("no version", entry(r#"{"options":{"embed_dim":2}}"#), "missing field `version`"),
        ("an unknown option", options(r#"{"embed_dim":2,"colour":3}"#), "unknown field"),
        ("an option twice", options(r#"{"embed_dim":2,"embed_dim":2}"#), "duplicate field"),
        ("no embed_dim", options("{}"), "missing field `embed_dim`"),
        ("embed_dim of 0", options(r#"{"embed_dim":0}"#), "embed_dim = 0"),
        ("negative hidden_size", options(r#"{"embed_dim":2,"hidden_size":-4}"#), "invalid value"),
        ("heads that do not divide", options(r#"{"embed_dim":2,"hidden_size":4,"num_heads":3}"#), "num_heads = 3"),
        ("dropout of 1", options(r#"{"embed_dim":2,"dropout":1.0}"#), "dropout = 1"),
        ("dropout of NaN", options(r#"{"embed_dim":2,"dropout":NaN}"#), "not usable"),
        ("dropout of 1e999", options(r#"{"embed_dim":2,"dropout":1e999}"#), "not usable"),
        ("window of 0", options(r#"{"embed_dim":2,"window_size":0}"#), "window_size = 0"),
        ("a model of 8 GB", options(r#"{"embed_dim":2,"hidden_size":4096,"num_layers":6}"#), "do not fit in a file"),
        ("layers without end", options(r#"{"embed_dim":2,"num_layers":18446744073709551615}"#), "than can be counted"),
        ("a larger model", options(r#"{"embed_dim":2,"hidden_size":8}"#), "expected ["),
        (
            "more blocks",
            options(r#"{"embed_dim":2,"hidden_size":4,"num_layers":2}"#),
            r#""blocks.1.norm.bias": missing"#,
        ),
        ("another preset", options(r#"{"embed_dim":2,"hidden_size":4,"preset":"edifice"}"#), "a_log\": unexpected"),
    ]
}

// ---- Nx.serialize ----

fn nx(term: &[u8], data: &[u8]) -> Vec<u8> {
    [b"nx\x01\0", &(term.len() as u64 + 1).to_be_bytes()[..], &[131], term, data].concat()
}

fn atom(name: &str) -> Vec<u8> {
    [&[119, name.len() as u8], name.as_bytes()].concat()
}

fn binary(name: impl AsRef<[u8]>) -> Vec<u8> {
    let name = name.as_ref();
    [&[109], &(name.len() as u32).to_be_bytes()[..], name].concat()
}

fn tuple(elements: &[&[u8]]) -> Vec<u8> {
    [&[104, elements.len() as u8], &elements.concat()[..]].concat()
}

fn list(elements: &[Vec<u8>]) -> Vec<u8> {
    [&[108], &(elements.len() as u32).to_be_bytes()[..], &elements.concat(), &[106]].concat()
}

fn integer(number: u64) -> Vec<u8> {
    [&[110, 8, 0], &number.to_le_bytes()[..]].concat()
}

fn map(entries: &[(&[u8], &[u8])]) -> Vec<u8> {
    let entries: Vec<_> = entries.iter().map(|(key, value)| tuple(&[&binary(key), value])).collect();
    tuple(&[&atom("Elixir.Nx.Container.Map"), &list(&entries), &atom("ok")])
}

/// An `Axon.ModelState` with fields called `data`.
fn state(data: &[Vec<u8>]) -> Vec<u8> {
    let fields: Vec<_> = data.iter().map(|data| tuple(&[&atom("data"), data])).collect();
    tuple(&[&atom("Elixir.Nx.Container.Axon.ModelState"), &list(&fields), &[106]])
}

/// A map with one tensor of two numbers, whose description is `shape, {:f, 32}, names, axes, offset, size` but for the
/// part that `change` changes.
fn tensor(part: usize, change: &[u8]) -> Vec<u8> {
    let kind = tuple(&[&atom("f"), &[97, 32]]);
    let mut parts: Vec<&[u8]> = vec![b"w\x01t", &[104, 1, 97, 2], &kind, &[106], &[106], &[97, 0], &[97, 8]];
    parts[part] = change;
    nx(&map(&[(b"a", &tuple(&parts))]), &[0; 8])
}

/// What the term of a map begins with; the list of its entries comes next.
const MAP: &[u8] = b"h\x03w\x17Elixir.Nx.Container.Map";

fn bad_nx(valid: &[u8]) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    const SHAPE: usize = 1;
    const KIND: usize = 2;
    const NAMES: usize = 3;
    const AXES: usize = 4;
    const OFFSET: usize = 5;
    const SIZE: usize = 6;
    let byte = |at: usize, byte: u8| {
        let mut file = valid.to_vec();
        file[at] = byte;
        file
    };
    let length = |length: u64| [&valid[..4], &length.to_be_bytes(), &valid[12..]].concat();
    let sound =
        tuple(&[b"w\x01t", &[104, 1, 97, 2], &tuple(&[&atom("f"), &[97, 32]]), &[106], &[106], &[97, 0], &[97, 8]]);
    let nested = |depth: usize| (0..depth).fold(sound.clone(), |inner, _| map(&[(b"a", &inner)]));
    vec![
        ("two bytes", b"nx".to_vec(), "cut short"),
        ("version 2", byte(2, 2), "version 2"),
        ("big-endian", byte(3, 1), "not little-endian"),
        ("term length 0", length(0), "cut short"),
        ("term length past the end", length(valid.len() as u64), "cut short"),
        ("term length past the cap", nx(&vec![0; 4 << 20], &[]), "at most 4194304"),
        ("term length 2^63", length(1 << 63), "cut short"),
        ("no term", byte(12, 0), "does not start as an Erlang term"),
        ("compressed", nx(&[80, 255, 255, 255, 255, 1], &[]), "compressed"),
        ("a number", nx(&[97, 1], &[]), "where a tuple was expected"),
        ("a tensor alone", nx(&sound, &[0; 8]), "\"\": unexpected"),
        ("a map of Erlang", nx(&[116, 0, 0, 0, 0], &[]), "where a tuple was expected"),
        ("another container", nx(&tuple(&[&atom("Elixir.Some.Struct"), &[106], &[106]]), &[]), "neither a map"),
        ("a tuple of 2^32", nx(&[105, 255, 255, 255, 255, 119, 1, b't'], &[]), "neither a map"),
        ("a list of 2^32", nx(&[MAP, &[108, 255, 255, 255, 255]].concat(), &[]), "cut short"),
        ("a list without end", nx(&[MAP, &[108, 0, 0, 0, 0, 97]].concat(), &[]), "no end"),
        ("a name of 2^32", nx(&[MAP, &[108, 0, 0, 0, 1, 104, 2, 109, 255, 255, 255, 255]].concat(), &[]), "cut short"),
        ("a name that is a number", nx(&[MAP, &[108, 0, 0, 0, 1, 104, 2, 97, 1]].concat(), &[]), "binary was expected"),
        ("an entry of three", nx(&[MAP, &[108, 0, 0, 0, 1, 104, 3, 97, 1]].concat(), &[]), "not a pair"),
        ("a model state without data", nx(&state(&[]), &[]), "missing"),
        (
            "a model state with data twice",
            nx(&state(&[map(&[(b"a", &sound)]), map(&[(b"a", &sound)])]), &[0; 8]),
            "name",
        ),
        ("a model state in itself", nx(&state(&[state(&[])]), &[]), "neither a map"),
        ("bytes after the term", nx(&[&map(&[])[..], &[106]].concat(), &[]), "1 bytes follow"),
        ("maps in depth", nx(&nested(9), &[0; 8]), "in one another"),
        (
            "maps in great depth",
            nx(&[MAP, b"l\0\0\0\x01h\x02m\0\0\0\0"].concat().repeat(50_000), &[]),
            "in one another",
        ),
        ("one name twice", nx(&map(&[(b"a", &sound), (b"a", &sound)]), &[0; 8]), r#"the name "a""#),
        ("a long name", nx(&map(&[(&[b'a'; 300], &sound)]), &[0; 8]), "too long"),
        ("a name not UTF-8", nx(&map(&[(&[255], &sound)]), &[0; 8]), "not UTF-8"),
        ("tensors in one place", nx(&map(&[(b"a", &sound), (b"b", &sound)]), &[0; 8]), "tensors overlap"),
        ("many axes", tensor(SHAPE, &[&[104, 255][..], &[97; 510]].concat()), "255 axes"),
        ("a shape of atoms", tensor(SHAPE, &[104, 1, 119, 1, b'a']), "where a whole number was expected"),
        ("negative size", tensor(SHAPE, &[104, 1, 98, 255, 255, 255, 255]), "-1 where a size was expected"),
        ("negative big size", tensor(SHAPE, &[104, 1, 110, 1, 1, 2]), "no size"),
        ("size past 64 bits", tensor(SHAPE, &[&[104, 1, 110, 9, 0][..], &[1; 9]].concat()), "no size"),
        ("sizes that overflow", tensor(SHAPE, &tuple(&[&integer(1 << 32), &integer(1 << 32)])), "not a size"),
        ("huge size", tensor(SHAPE, &tuple(&[&integer(1 << 40)])), "do not fit its offsets"),
        ("size zero", tensor(SHAPE, &[104, 1, 97, 0]), "is 0 bytes"),
        ("unknown type", tensor(KIND, &tuple(&[&atom("\u{1b}"), &[97, 8]])), r"type \x1b8"),
        ("type without bits", tensor(KIND, &tuple(&[&atom("f")])), "not a pair"),
        ("integers", tensor(KIND, &tuple(&[&atom("s"), &[97, 32]])), "unexpected"),
        ("names in depth", tensor(NAMES, &[108, 0, 0, 0, 1].repeat(100_000)), "cut short"),
        ("names of 2^32", tensor(NAMES, &[116, 255, 255, 255, 255]), "cut short"),
        ("names of another tag", tensor(NAMES, &[88]), "tag 88"),
        ("vectorized axes", tensor(AXES, &list(&[atom("a")])), "vectorized"),
        ("offset past the end", tensor(OFFSET, &[97, 8]), "instead of 0"),
        ("offset past 64 bits", tensor(OFFSET, &integer(u64::MAX)), "too large"),
        ("negative offset", tensor(OFFSET, &[98, 255, 255, 255, 248]), "-8"),
        ("data too small", tensor(SIZE, &[97, 4]), "do not fit its offsets"),
        ("data too large", tensor(SIZE, &integer(u64::MAX)), "do not fit its offsets"),
        ("bytes added", [valid, &[0]].concat(), "bytes were added"),
        ("other tensors", nx(&map(&[(b"a", &sound)]), &[0; 8]), r#""a": unexpected"#),
    ]
}

// ---- the laws ----

/// Bytes of a file, or of the files in a folder.
fn length(path: &Path) -> usize {
    let length = |path: &Path| fs::metadata(path).map_or(0, |file| file.len() as usize);
    match fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| length(&entry.path())).sum(),
        Err(_) => length(path),
    }
}

/// What reading the file did that it must not do.
fn fault<T>(loader: impl Fn(&Path) -> hymba::Result<T>, path: &Path, says: &str) -> Option<String> {
    let before = NOW.get();
    PEAK.set(before);
    let read = catch_unwind(AssertUnwindSafe(|| loader(path).err().map(|error| error.to_string())));
    let taken = PEAK.get() - before;
    let allowed = 2 * length(path) + A_LITTLE;
    match read {
        Err(_) => Some("panicked".into()),
        Ok(None) => Some("was accepted".into()),
        Ok(Some(message)) if !message.contains(says) => Some(format!("does not say {says:?} but {message}")),
        Ok(Some(message)) if message.contains('\u{1b}') => Some(format!("repeats a control character: {message:?}")),
        Ok(Some(_)) if taken > allowed => Some(format!("took {taken} bytes, where {allowed} are allowed")),
        Ok(Some(_)) => None,
    }
}

#[test]
fn every_bad_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let (saved, edifice) = (saved(), fs::read(edifice_file("model.safetensors")).unwrap());
    let valid_nx = fs::read(edifice_file("model.nx")).unwrap();
    let tables: [(&str, Loader, Vec<_>); 5] = [
        ("Predictor::load", load_predictor, bad_safetensors(&saved_predictor())),
        ("load", load, bad_safetensors(&saved)),
        ("load", load, bad_saved(&saved)),
        ("load_edifice", load_edifice, bad_safetensors(&edifice)),
        ("load_edifice, nx", load_edifice, bad_nx(&valid_nx)),
    ];
    let mut faults = Vec::new();
    for (kind, loader, table) in tables {
        for (name, bytes, says) in table {
            fs::write(&path, bytes).unwrap();
            faults.extend(fault(loader, &path, says).map(|fault| format!("{kind}: {name}: {fault}")));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_file_cut_short_anywhere_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    let edifice = |name: &str| fs::read(edifice_file(name)).unwrap();
    let files: [(Loader, _); 4] = [
        (load, saved()),
        (load_predictor, saved_predictor()),
        (load_edifice, edifice("model.safetensors")),
        (load_edifice, edifice("model.nx")),
    ];
    for (loader, bytes) in files {
        fs::write(&path, &bytes).unwrap();
        loader(&path).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        for length in (0..bytes.len()).rev() {
            file.set_len(length as u64).unwrap();
            assert_eq!(fault(loader, &path, ""), None, "cut to {length} bytes");
        }
    }
}

#[test]
fn only_regular_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(fault(load, folder.path(), "not a regular file"), None);
    assert!(matches!(load(&folder.path().join("absent")), Err(Error::Io { .. })));
    #[cfg(unix)]
    {
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(fault(load, &pipe, "not a regular file"), None);
        assert_eq!(fault(load_edifice, Path::new("/dev/zero"), "not a regular file"), None);
    }
}
