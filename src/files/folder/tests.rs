use serde_json::{Value, json};

use super::*;
use crate::files::float::Float;
use crate::files::{Target, write_streamed};

type Contents = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

/// Tensors of every type, with numbers that all of them can hold.
fn contents() -> Contents {
    let floats = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64].map(|dtype| (dtype, vec![3, 2, 4]));
    let mut contents = Vec::new();
    for (number, (dtype, shape)) in floats.into_iter().enumerate() {
        let numbers: Vec<f32> = (0..24).map(|index| index as f32 * 0.5 - number as f32).collect();
        let mut bytes = Vec::new();
        Float::of(dtype).unwrap().encode(&numbers, &mut bytes);
        contents.push((format!("float.{number}"), dtype, shape, bytes));
    }
    contents.push(("codes".into(), Dtype::I8, vec![5, 3], (0..15).map(|code| code * 17).collect()));
    contents.push(("bytes".into(), Dtype::U8, vec![7], (200..207).collect()));
    contents.push(("none".into(), Dtype::F32, vec![0, 1 << 40], Vec::new()));
    contents.push(("also.none".into(), Dtype::F32, vec![1 << 40, 0], Vec::new()));
    contents
}

fn write(path: &Path, contents: &Contents) {
    let infos: Vec<_> = contents.iter().map(|(name, dtype, shape, _)| (name.clone(), *dtype, shape.clone())).collect();
    write_streamed(Target::File(path), &infos, &[("format", "pt"), ("a", "b")], &mut |index, file| {
        // in two pieces, as a caller may
        let (first, second) = contents[index].3.split_at(contents[index].3.len() / 2);
        file.write_all(first)?;
        file.write_all(second)
    })
    .unwrap();
}

/// A folder with the contents in two files and an index.
fn sharded() -> (tempfile::TempDir, Value) {
    let folder = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    let all = contents();
    for (file, part) in [("a.safetensors", &all[..3]), ("b.safetensors", &all[3..])] {
        write(&folder.path().join(file), &part.to_vec());
        map.extend(part.iter().map(|(name, ..)| (name.clone(), file.into())));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    write_index(folder.path(), index.to_string().as_bytes());
    (folder, index)
}

fn write_index(folder: &Path, bytes: &[u8]) {
    fs::write(folder.join(INDEX), bytes).unwrap();
}

fn error(folder: &Path) -> String {
    match Folder::open(folder) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("the folder was opened"),
    }
}

fn check(folder: &Folder, expected: &Contents, optional: &[&str]) -> Result<()> {
    let kind = |dtype| if Float::of(dtype).is_some() { Kind::Float } else { Kind::Bytes };
    folder.check(expected.iter().map(|(name, dtype, shape, _)| (&name[..], &shape[..], kind(*dtype))), |name| {
        optional.contains(&name)
    })
}

#[test]
fn what_is_written_is_read_from_one_file_and_from_several() {
    let single = tempfile::tempdir().unwrap();
    write(&single.path().join(SINGLE), &contents());
    let (several, _) = sharded();
    for folder in [single.path(), several.path()] {
        let mut folder = Folder::open(folder).unwrap();
        check(&folder, &contents(), &[]).unwrap();
        assert_eq!(folder.dtype("absent"), None);
        for (name, dtype, shape, bytes) in contents() {
            assert_eq!(folder.dtype(&name), Some(dtype));
            let mut read = Vec::new();
            let mut rows = 0;
            folder
                .holding(&name)
                .unwrap()
                .read_byte_rows(&name, &mut |row, bytes| {
                    assert_eq!(row, rows);
                    rows += 1;
                    read.extend_from_slice(bytes);
                })
                .unwrap();
            assert_eq!(read, bytes, "{name}");
            let expected = if shape.len() > 1 { shape[0] } else { 1 };
            assert_eq!(rows, if bytes.is_empty() { 0 } else { expected }, "{name}");

            let mut rows = Vec::new();
            let read =
                folder.holding(&name).unwrap().read_rows(&name, &mut |row, numbers| rows.push((row, numbers.to_vec())));
            let Some(number) = name.strip_prefix("float.") else {
                assert_eq!(read.is_ok(), name.ends_with("none"), "{name}");
                assert!(rows.is_empty());
                continue;
            };
            let number: f32 = number.parse().unwrap();
            assert_eq!(rows.len(), 3);
            for (index, (row, numbers)) in rows.iter().enumerate() {
                assert_eq!(*row, index);
                let expected: Vec<_> = (0..8).map(|place| (8 * index + place) as f32 * 0.5 - number).collect();
                assert_eq!(*numbers, expected, "{name}");
            }
        }
    }
}

#[test]
fn rows_longer_and_shorter_than_a_piece_are_whole() {
    let folder = tempfile::tempdir().unwrap();
    for shape in [vec![200_001], vec![3, 150_001], vec![100_003, 3], vec![2, 1]] {
        let size: usize = shape.iter().product();
        let numbers: Vec<f32> = (0..size).map(|index| (index % 4099) as f32).collect();
        let mut bytes = Vec::new();
        Float::F32.encode(&numbers, &mut bytes);
        write(&folder.path().join(SINGLE), &vec![("t".into(), Dtype::F32, shape.clone(), bytes)]);
        let width = if shape.len() > 1 { shape[1] } else { size };
        let mut read = Vec::new();
        let take = &mut |row, numbers: &[f32]| {
            assert_eq!((row * width, width), (read.len(), numbers.len()));
            read.extend_from_slice(numbers);
        };
        Folder::open(folder.path()).unwrap().holding("t").unwrap().read_rows("t", take).unwrap();
        assert!(read == numbers);
    }
}

#[test]
fn every_difference_from_the_model_is_in_the_error() {
    let (folder, _) = sharded();
    let folder = Folder::open(folder.path()).unwrap();
    let mut expected = contents();
    expected[0].0 = "new".into();
    expected[1].2 = vec![2, 3, 4];
    expected[2].1 = Dtype::U8;
    expected[4].1 = Dtype::F32;
    expected.retain(|(name, ..)| name != "none");
    let Error::Tensors { problems, .. } = check(&folder, &expected, &["none", "lm_head.weight"]).unwrap_err() else {
        panic!("another error");
    };
    assert_eq!(
        problems,
        [
            "\"codes\": has type I8, expected F32, F64, F16 or BF16",
            "\"float.0\": unexpected, has shape [3, 2, 4]",
            "\"float.1\": has shape [3, 2, 4], expected [2, 3, 4]",
            "\"float.2\": has type BF16, expected I8 or U8",
            "\"new\": missing, expected shape [3, 2, 4]",
        ]
    );
}

#[test]
fn folders_without_a_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert!(error(folder.path()).contains("neither"));
    assert!(error(&folder.path().join("absent")).contains("absent"));
    fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    assert!(error(folder.path()).contains("torch.save"));
    assert!(error(&folder.path().join("pytorch_model.bin")).contains("not a folder"));
    fs::write(folder.path().join(SINGLE), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    assert!(error(folder.path()).contains("git lfs pull"));
    fs::remove_file(folder.path().join(SINGLE)).unwrap();
    fs::create_dir(folder.path().join(SINGLE)).unwrap();
    assert!(error(folder.path()).contains("not a regular file"));
}

#[test]
fn files_cut_short_or_grown_are_refused() {
    let (folder, index) = sharded();
    for file in ["a.safetensors", "b.safetensors"] {
        let path = folder.path().join(file);
        let whole = fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(7).chain(whole.len() - 9..whole.len()) {
            fs::write(&path, &whole[..length]).unwrap();
            error(folder.path());
        }
        fs::write(&path, [&whole[..], b"1"].concat()).unwrap();
        error(folder.path());
        fs::write(&path, whole).unwrap();
    }
    let index = index.to_string();
    for length in 0..index.len() {
        write_index(folder.path(), &index.as_bytes()[..length]);
        error(folder.path());
    }
    write_index(folder.path(), index.as_bytes());
    Folder::open(folder.path()).unwrap();
}

#[test]
fn an_index_that_leaves_the_folder_is_refused() {
    let (folder, index) = sharded();
    let outside = tempfile::tempdir().unwrap();
    write(&outside.path().join("x"), &contents());
    let absolute = outside.path().join("x").display().to_string();
    let long = "x".repeat(300);
    for file in ["../x", "..", ".", "", "/x", "sub/x", "sub\\x", "..\\x", "C:x", "./x", "x/", "x\0", &absolute, &long] {
        let mut index = index.clone();
        index["weight_map"]["codes"] = file.into();
        write_index(folder.path(), index.to_string().as_bytes());
        assert!(error(folder.path()).contains("not the name of a file in the folder"), "{file:?}");
    }
}

#[test]
fn an_index_and_its_files_must_agree() {
    let (folder, index) = sharded();
    let changed = |key: &str, value: Value| {
        let mut index = index.clone();
        match value {
            Value::Null => drop(index["weight_map"].as_object_mut().unwrap().remove(key)),
            value => index["weight_map"][key] = value,
        }
        write_index(folder.path(), index.to_string().as_bytes());
        error(folder.path())
    };
    let absent = changed("codes", "c.safetensors".into());
    assert!(absent.contains("1 of its files are not in the folder: \"c.safetensors\""), "{absent}");
    assert!(changed("codes", Value::Null).contains("\"codes\": in \"b.safetensors\", and not in the index"));
    let more = changed("more", "a.safetensors".into());
    assert!(more.contains("\"more\": not in \"a.safetensors\", where the index has it"), "{more}");
    let moved = changed("codes", "a.safetensors".into());
    assert!(moved.contains("\"codes\": not in \"a.safetensors\""), "{moved}");
    assert!(moved.contains("\"codes\": in \"b.safetensors\", and the index has it in \"a.safetensors\""), "{moved}");

    // the same tensor in two files
    write(&folder.path().join("a.safetensors"), &[&contents()[..3], &contents()[4..5]].concat());
    write_index(folder.path(), index.to_string().as_bytes());
    let twice = error(folder.path());
    assert!(twice.contains("\"codes\": in \"a.safetensors\", and the index has it in \"b.safetensors\""), "{twice}");
    assert_eq!(twice.lines().count(), 2, "{twice}");
}

#[test]
fn hostile_indexes_are_refused() {
    let (folder, _) = sharded();
    let entry = |number: usize| format!("\"t{number}\": \"f{number}\"");
    let many = |count: usize| (0..count).map(entry).collect::<Vec<_>>().join(",");
    for (index, reason) in [
        ("not json".to_string(), "not a usable index"),
        ("[]".into(), "not a usable index"),
        ("{}".into(), "weight_map"),
        ("{\"weight_map\": 3}".into(), "an object of file names"),
        ("{\"weight_map\": {\"a\": 3}}".into(), "expected a string"),
        ("{\"weight_map\": {\"a\": [\"b\"]}}".into(), "expected a string"),
        ("{\"weight_map\": {}, \"weight_map\": {}}".into(), "duplicate field"),
        ("{\"weight_map\": {\"a\": \"f\", \"a\": \"f\"}}".into(), "\"a\" appears twice"),
        (format!("{{\"weight_map\": {}", "{\"a\":".repeat(100_000)), "expected a string"),
        (format!("{{\"metadata\": {}", "[".repeat(100_000)), "not a usable index"),
        (format!("{{\"weight_map\": {{\"{}\": \"f\"}}}}", "n".repeat(300)), "is too long"),
        (format!("{{\"weight_map\": {{{}}}}}", many(MAX_SHARDS + 1)), "more than 256 files"),
        (format!("{{\"weight_map\": {{{}}}}}", many(MAX_SHARDS)), "256 of its files"),
        (" ".repeat(MAX_HEADER as usize + 1), "at most"),
    ] {
        write_index(folder.path(), index.as_bytes());
        let error = error(folder.path());
        assert!(error.contains(reason), "{reason}: {error}");
    }
    write_index(folder.path(), b"{\"weight_map\": {\"\xff\": \"f\"}}");
    assert!(error(folder.path()).contains("UTF-8"));
}

#[cfg(unix)]
#[test]
fn links_are_followed_as_the_cache_of_the_hub_needs() {
    use std::os::unix::fs::symlink;

    let blobs = tempfile::tempdir().unwrap();
    write(&blobs.path().join("0123"), &contents());
    let folder = tempfile::tempdir().unwrap();
    symlink(blobs.path().join("0123"), folder.path().join(SINGLE)).unwrap();
    check(&Folder::open(folder.path()).unwrap(), &contents(), &[]).unwrap();
    fs::remove_file(blobs.path().join("0123")).unwrap();
    assert!(matches!(Folder::open(folder.path()), Err(Error::Io { .. })));
}
