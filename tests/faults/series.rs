//! Series in `.ts` files.

use std::fs;
use std::path::PathBuf;

use hymba::ndarray::array;
use hymba::series::{Case, ReadOptions, SeriesSet, Target};
use hymba::train::Targets;

const HEADER: &str = "@problemName toy\n@timestamps false\n@univariate true\n";

/// Writes a file.
fn file(folder: &tempfile::TempDir, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join("TRAIN.ts");
    fs::write(&path, bytes).unwrap();
    path
}

fn read(bytes: &[u8]) -> Result<SeriesSet, String> {
    let folder = tempfile::tempdir().unwrap();
    SeriesSet::read(file(&folder, bytes), &ReadOptions::default()).map_err(|error| error.to_string())
}

fn parse(text: &str) -> hymba::Result<SeriesSet> {
    SeriesSet::from_ts(text, &ReadOptions::default())
}

/// A file of one case for each label.
fn labelled(header: &str, labels: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("{HEADER}{header}\n@data\n").into_bytes();
    for label in labels {
        bytes.extend([b"1,2,3:", *label, b"\n"].concat());
    }
    bytes
}

fn places(data: &SeriesSet) -> Vec<usize> {
    let class = |case: &Case| match case.target {
        Target::Class(class) => class,
        other => panic!("{other:?}"),
    };
    data.cases.iter().map(class).collect()
}

fn noted(data: &SeriesSet, words: &str) -> bool {
    data.notes.iter().any(|note| note.contains(words))
}

#[test]
fn every_byte_of_a_label_counts() {
    // labels that differ in one byte, which is no UTF-8; \xa0 and \x85 are white space in Latin-1
    let labels: [&[u8]; 6] = [b"caf\xe9", b"caf\xe8", b"tea", b"caf", b"caf\xa0", b"caf\x85"];
    for names in [&b""[..], &labels.join(&b' ')] {
        let mut bytes = format!("{HEADER}@classLabel true ").into_bytes();
        bytes.extend(names);
        bytes.extend(b"\r\n@data\r\n");
        for i in 0..18 {
            bytes.extend([b"1,2:", labels[i % 6], b"\r\n"].concat());
        }
        let data = read(&bytes).unwrap();
        assert_eq!(data.labels.len(), 6, "{:?}", data.labels);
        let classes = places(&data);
        for i in 0..18 {
            assert_eq!(data.labels[classes[i]], labels[i % 6].iter().map(|&byte| char::from(byte)).collect::<String>());
        }
        assert!(noted(&data, "Latin-1"), "{:?}", data.notes);
    }
    // both ways to write é in one file are two labels, and in two files one
    let both = read(&labelled("@classLabel true", &[b"\xe9", b"\xc3\xa9"])).unwrap();
    assert_eq!(both.labels.len(), 2);
    let latin = read(&labelled("@classLabel true", &[b"caf\xe9", b"tea"])).unwrap();
    let utf8 = read(&labelled("@classLabel true", &["café".as_bytes(), b"tea"])).unwrap();
    assert_eq!((&latin.labels, latin.notes.len(), utf8.notes.len()), (&utf8.labels, 1, 0));
}

#[test]
fn what_no_label_is_read_from_may_hold_any_bytes() {
    let mut bytes = b"\xef\xbb\xbf# caf\xe9\r\n@problemName caf\xe8\r\n% \xff\r\n".to_vec();
    bytes.extend("@classLabel true café thé\r\n@data\r\n# ".as_bytes());
    bytes.extend(b"\xe9\r\n1:th\xc3\xa9\r\n");
    let data = read(&bytes).unwrap();
    assert_eq!((&data.labels[..], places(&data)), (&["café".to_string(), "thé".into()][..], vec![1]));
    assert!(data.notes.is_empty(), "{:?}", data.notes);
    let error = read(b"\xff\xfe@\0d\0").unwrap_err();
    assert!(error.contains("UTF-16"), "{error}");
}

#[test]
fn classes_that_the_header_does_not_list_are_those_of_the_lines() {
    let data = read(&labelled("@classLabel true", &[b"tea", b"b10", b"tea", b"cup"])).unwrap();
    assert_eq!(data.labels, ["b10", "cup", "tea"]);
    assert_eq!(places(&data), [2, 0, 2, 1]);
    let data = read(&labelled("@classLabel true", &[b"10", b"9", b"-1"])).unwrap();
    assert_eq!((&data.labels[..], places(&data)), (&["-1", "9", "10"].map(String::from)[..], vec![2, 1, 0]));
    let data = read(&labelled("@classLabel true", &[b"?", b"a"])).unwrap();
    assert_eq!((data.labels.len(), data.cases[0].target), (1, Target::None));
}

#[test]
fn other_spellings_of_a_class_are_that_class_and_said() {
    for (header, labels, classes, expected) in [
        ("@classLabel true Up down", &["up", "DOWN", "Up"][..], &["Up", "down"][..], &[0, 1, 0][..]),
        ("@classLabel true 1 2", &["1.0", "2.00", "2"], &["1", "2"], &[0, 1, 1]),
        ("@classLabel true 1.0 -0.5", &["1", "-.5"], &["1.0", "-0.5"], &[0, 1]),
        ("@classLabel true", &["b", "B", "a"], &["a", "b"], &[1, 1, 0]),
        ("@classLabel true", &["2", "1.0", "1"], &["1.0", "2"], &[1, 0, 0]),
    ] {
        let labels: Vec<_> = labels.iter().map(|label| label.as_bytes()).collect();
        let data = read(&labelled(header, &labels)).unwrap();
        assert_eq!(data.labels, classes, "{header}");
        assert_eq!(places(&data), expected, "{header}");
        assert!(noted(&data, "is read as"), "{:?}", data.notes);
    }
    // a header that lists both means two, and what is like both is neither
    let data = read(&labelled("@classLabel true a A", &[b"A", b"a"])).unwrap();
    assert_eq!((places(&data), noted(&data, "differs from another")), (vec![1, 0], true));
    let error = read(&labelled("@classLabel true ab AB", &[b"Ab"])).unwrap_err();
    assert!(error.contains("line 6: class `Ab` is not in the header's list: ab AB"), "{error}");
    // numbers so long that 64 bits take them for one
    let long = [&b"123456789012345678"[..], b"123456789012345679"];
    assert_eq!(read(&labelled("@classLabel true", &long)).unwrap().labels.len(), 2);
    assert_eq!(read(&labelled("@classLabel true a b a", &[b"b"])).unwrap().labels, ["a", "b"]);
}

#[test]
fn evenly_spaced_timestamps_are_dropped() {
    for (lines, spacing) in [
        ("(0,1.5),(2,?),(4,3):a\n(7, 1),(9,2):b\n(3,1):a\n", "2 apart"),
        ("(0.1,1.5),(0.2,nan),(0.3,3):a\n(-1,1),(-0.9,2):b\n( 3 , 1 ):a", "0.1 apart"),
        (
            "(2004-08-10 00:00:00,1.5),(2004-08-10 01:00:00,?),(2004-08-10 02:00:00,3):a\n\
             (2003-12-31 23:00:00,1),(2004-01-01 00:00:00,2):b\n(2000-02-29,1):a",
            "3600 s apart",
        ),
        (
            "(2004-02-28T00:00:00Z,1.5),(2004-02-29,?),(2004/3/1 00:00,3):a\n(1969-12-31,1),(1970-01-01,2):b\n\
             (0000-01-01,1):a",
            "86400 s apart",
        ),
    ] {
        let text = format!("@timestamps true\n@univariate true\n@classLabel true a b\n@data\n{lines}");
        let data = parse(&text).unwrap();
        assert!(noted(&data, spacing) && noted(&data, "dropped"), "{:?}", data.notes);
        assert_eq!(places(&data), [0, 1, 0]);
        let first = &data.cases[0].frames;
        assert_eq!((first[[0, 0]], first[[1, 0]].is_nan(), first[[2, 0]]), (1.5, true, 3.0));
        assert_eq!(data.cases[1].frames, array![[1.0], [2.0]]);
    }
    let rounded = "(0.033,1),(0.067,2),(0.1,3),(0.133,4)";
    assert!(parse(&format!("@timestamps true\n@data\n{rounded}")).is_err(), "rounded to 3 % of the spacing");
    let rounded = "(0.0333,1),(0.0667,2),(0.1,3),(0.1333,4)";
    assert!(parse(&format!("@timestamps true\n@data\n{rounded}")).is_ok());
    let data = parse("@timestamps true\n@dimensions 2\n@data\n(0,1),(1,2):(0,3),(1,4)\n").unwrap();
    assert_eq!(data.cases[0].frames, array![[1.0, 3.0], [2.0, 4.0]]);
}

#[test]
fn other_timestamps_are_refused_by_name() {
    let uneven = "line 3: the timestamps are uneven, 1 to 2 apart";
    for (line, expected) in [
        ("(0,1),(1,2),(3,4)", uneven),
        ("(0,1),(1,2),(1,4)", "line 3: the timestamps do not ascend"),
        ("(2,1),(1,2)", "do not ascend"),
        ("(2004-08-10,1),(2004-08-11,2),(2004-08-13,2)", "uneven, 86400 s to 172800 s apart"),
        ("(2004-08-10,1),(2,2)", "value 2: some times of the series are dates"),
        ("(0,1),(1,2)\n(0,1),(2,2)", "line 4: its timestamps are 2 apart, those of the series before 1"),
        ("(yesterday,1)", "value 1: `yesterday` is not a timestamp"),
        ("(2004-13-01,1)", "not a timestamp"),
        ("(99999999999-01-01,1)", "not a timestamp"),
        ("(2004-08-10 25:00:00,1)", "not a timestamp"),
        ("(nan,1)", "`nan` is not a timestamp"),
        ("(-1e308,1),(1e308,2)", "do not ascend"),
        ("(0,x)", "value 1: `x` is not a number"),
        ("(1)", "has no `,`"),
        ("(0,1", "is not a `(time,value)`"),
        ("(0,1)(1,2)", "expected `,`"),
        ("(0,1),", "line 3: dimension 1: value 2"),
        ("", "no cases"),
    ] {
        let error = parse(&format!("@timestamps true\n@data\n{line}")).unwrap_err().to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
    let text = "@timestamps true\n@dimensions 2\n@data\n(0,1),(1,2):(0,3),(2,4)\n";
    let error = parse(text).unwrap_err().to_string();
    assert!(error.contains("line 4: dimension 2: its timestamps are not those of dimension 1"), "{error}");
    // announced or not, the error speaks of timestamps
    let dates = "(2004-08-10 00:00:00,1.0),(2004-08-10 01:00:00,2.0):a";
    for header in ["@timestamps false\n@univariate true", "@univariate true\n"] {
        let error = parse(&format!("{header}\n@classLabel true a b\n@data\n{dates}")).unwrap_err().to_string();
        assert!(error.contains(": line 5: ") && error.contains("with timestamps the header needs"), "{error}");
    }
}

/// From a training file and a test file.
fn prepared(train: &str, test: &str) -> Result<(hymba::train::Dataset, Vec<String>), String> {
    let filled = |text: &str| {
        let mut set = parse(text)?;
        set.fill_missing();
        Ok::<_, hymba::Error>(set)
    };
    let prepare = || {
        let train = filled(train)?;
        let task = train.task()?;
        train.into_dataset(&task)?;
        let test = filled(test)?;
        let notes = test.compare_labels(&task);
        Ok::<_, hymba::Error>((test.into_dataset(&task)?, notes))
    };
    prepare().map_err(|error| error.to_string())
}

#[test]
fn a_class_that_training_never_saw_counts_as_wrong() {
    let train = "@classLabel true a b c\n@data\n1:a\n2:b\n";
    let (test, notes) = prepared(train, "@classLabel true c B d A\n@data\n1:c\n2:B\n3:d\n4:A\n5:c\n").unwrap();
    assert_eq!(test.task().labels(), ["a", "b", "c", "d"]);
    assert_eq!(*test.targets(), Targets::Classes(vec![2, 1, 3, 0, 2]));
    assert!(notes.iter().any(|note| note.starts_with("3 series are of classes that no") && note.ends_with("c, d")));
    assert!(notes.iter().any(|note| note == "class `B` is read as `b`"), "{notes:?}");

    let (_, notes) = prepared(train, "@classLabel true\n@data\n1:a\n").unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    let numbers = "@classLabel true\n@data\n1:1\n2:2\n";
    let (test, _) = prepared(numbers, "@classLabel true 2.0 1.0\n@data\n1:2.0\n").unwrap();
    assert_eq!(*test.targets(), Targets::Classes(vec![1]));
    for (train, test, expected) in [
        ("@targetLabel true\n@data\n1:0.5\n", train, "it is a classification"),
        ("@targetLabel true\n@data\n1:0.5\n2:?\n", train, "series 2 has no number"),
        (train, "@targetLabel true\n@data\n1:0.5\n", "it is a regression problem"),
        ("@classLabel false\n@data\n1\n", train, "have no targets"),
        ("@classLabel true\n@data\n1:?\n", train, "have no targets"),
        (train, "@classLabel true a b\n@data\n1:?\n", "series 1 has no class"),
        ("@classLabel true a b\n@data\n1:a\n", train, "of one class"),
    ] {
        let error = prepared(train, test).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_is_missing_is_filled_and_said() {
    let text =
        "@dimensions 2\n@classLabel true a b\n@data\n?,?,1,?,2,?:NaN,3,?,?,4,?:a\n?,?,?:?,?,?:b\n?,?:1,2:a\n1:2:b\n";
    let mut data = parse(text).unwrap();
    data.fill_missing();
    assert_eq!(data.cases[0].frames, array![[1.0, 3.0], [1.0, 3.0], [1.0, 3.0], [1.0, 3.0], [2.0, 4.0]]);
    assert_eq!(data.cases[1].frames, array![[0.0, 0.0]]);
    assert_eq!(data.cases[2].frames, array![[0.0, 1.0], [0.0, 2.0]]);
    for words in [
        "3 frames at the ends of series hold no value",
        "1 series hold no value at all",
        "1 dimensions of single series hold no value at all",
        "3 values are missing at the beginnings",
        "10 values are missing in 3 series",
    ] {
        assert!(noted(&data, words), "{words}: {:?}", data.notes);
    }
    let mut whole = parse("@classLabel true a b\n@data\n1:a\n2:b\n").unwrap();
    whole.fill_missing();
    assert!(whole.notes.is_empty(), "{:?}", whole.notes);
    // dimensions of unequal lengths are no frames
    let error = parse("@classLabel true a\n@data\n1,2:3:a\n").unwrap_err().to_string();
    assert!(error.contains("line 3: lengths differ: dimension 1 has 2, dimension 2 has 1"), "{error}");
}
