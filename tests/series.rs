//! Series from files.

use hymba::ndarray::{array, s};
use hymba::series::{ReadOptions, SeriesSet, Target, TimeInput};

fn shipped(part: &str) -> SeriesSet {
    let path = format!("{}/examples/data/JapaneseVowels_{part}.ts", env!("CARGO_MANIFEST_DIR"));
    SeriesSet::read(path, &ReadOptions::default()).expect("a file of this repository")
}

fn parse(text: &str) -> hymba::Result<SeriesSet> {
    SeriesSet::from_ts(text, &ReadOptions::default())
}

fn error(text: &str) -> String {
    parse(text).expect_err(text).to_string()
}

#[test]
fn the_shipped_files_are_what_their_authors_say() {
    for (part, cases) in [("TRAIN", 270), ("TEST", 370)] {
        let data = shipped(part);
        let lengths: Vec<usize> = data.cases.iter().map(|case| case.frames.nrows()).collect();
        assert_eq!((data.name.as_str(), data.width(), data.labels.len()), ("JapaneseVowels", 12, 9));
        assert_eq!(data.cases.len(), cases);
        assert!(lengths.iter().all(|length| (7..=29).contains(length)));
        assert!(data.cases.iter().all(|case| case.frames.iter().all(|value| value.is_finite())));
    }
    let train = shipped("TRAIN");
    for class in 0..9 {
        assert_eq!(train.cases.iter().filter(|case| case.target == Target::Class(class)).count(), 30);
    }
    assert_eq!(train.cases[0].frames.slice(s![..2, ..2]), array![[1.860936, -0.207383], [1.891651, -0.193249]]);
}

#[test]
fn univariate_cases_with_classes_missing_values_and_comments() {
    let text = "\u{feff}# a comment\r\n@PROBLEMNAME Tiny\r\n@TimeStamps FALSE\r\n@univariate true\r\n\
                @classlabel true up down\r\n@Data\r\n1, ?,3:down\r\n\r\n% another\r\nNaN,-2e-1:up\r\n5:?\r\n";
    let data = parse(text).unwrap();
    assert_eq!((data.name.as_str(), data.width()), ("Tiny", 1));
    assert_eq!(data.labels, ["up", "down"]);
    let targets: Vec<Target> = data.cases.iter().map(|case| case.target).collect();
    assert_eq!(targets, [Target::Class(1), Target::Class(0), Target::None]);
    assert_eq!(data.cases[0].frames.dim(), (3, 1));
    assert!(data.cases[0].frames[[1, 0]].is_nan() && data.cases[1].frames[[0, 0]].is_nan());
    assert_eq!(data.cases[1].frames[[1, 0]], -0.2);
}

#[test]
fn regression_targets_and_no_targets() {
    let data = parse("@targetLabel true\n@data\n1,2:3,4:0.5\n5:6:?\n").unwrap();
    assert_eq!((data.width(), data.cases[0].target, data.cases[1].target), (2, Target::Value(0.5), Target::None));
    assert_eq!(data.cases[0].frames, array![[1.0, 3.0], [2.0, 4.0]]);

    let data = parse("@classLabel false\n@dimension 2\n@data\n1,2:3,4\n").unwrap();
    assert_eq!((data.width(), data.cases[0].target), (2, Target::None));
}

#[test]
fn errors_name_the_line_and_the_fault() {
    let classes = "@classLabel true a b\n@data\n";
    let table = [
        ("", "no @data line"),
        ("@dimensions 2\n", "no @data line"),
        ("@data\n", "no cases"),
        ("1,2,3\n", "line 1: expected a header line"),
        ("# x\n@timeStamps true\n@data\n1,2\n", "line 4: dimension 1: value 1: `1,2` is not a `(time,value)`"),
        ("@timeStamps\n", "line 1: @timeStamps needs `true` or `false`, found nothing"),
        ("@dimensions zero\n", "line 1: @dimensions needs a whole number of at least 1, found `zero`"),
        ("@dimensions 0\n", "line 1: @dimensions needs a whole number"),
        ("@dimensions 99999999999999999999\n", "line 1: @dimensions needs a whole number"),
        (
            "@dimensions 18446744073709551615\n@classLabel true a\n@data\n1:a\n",
            "line 4: fields separated by `:`: 2, but",
        ),
        ("@univariate true\n@dimensions 2\n", "line 2: the header says both 1 and 2 dimensions"),
        ("@classLabel true\n@data\n1:\n", "line 3: there is no class after the last `:`"),
        ("@classLabel true a\n@targetLabel true\n@data\n", "line 3: the header has both"),
        (&format!("{classes}1,2\n"), "line 3: fields separated by `:`: 1, but expected 1 with values and a class"),
        (
            &format!("{classes}1:2:a\n3:a\n"),
            "line 4: fields separated by `:`: 2, but expected 2 with values and a class",
        ),
        (&format!("{classes}1,2:c\n"), "line 3: class `c` is not in the header's list: a b"),
        (&format!("{classes}1,2::a\n"), "line 3: dimension 2: no values"),
        (&format!("{classes}1,,2:a\n"), "line 3: dimension 1: value 2: `` is not a number"),
        (&format!("{classes}1,1e99:a\n"), "line 3: dimension 1: value 2: `1e99` is not a finite"),
        (&format!("{classes}(0,1):a\n"), "line 3: dimension 1: value 1: `(0` looks like a timestamp"),
        (&format!("{classes}1,2:3:a\n"), "line 3: lengths differ: dimension 1 has 2, dimension 2 has 1"),
        ("@targetLabel true\n@data\n1:x\n", "line 3: target: `x` is not a number"),
    ];
    for (text, expected) in table {
        let error = error(text);
        assert!(error.contains(expected), "{text:?}\n  gives   {error}\n  without {expected}");
    }
    let missing = SeriesSet::read("no/such/file.ts", &ReadOptions::default()).unwrap_err().to_string();
    assert!(missing.starts_with("no/such/file.ts: "), "{missing}");
}

#[test]
fn a_damaged_file_gives_a_dataset_or_an_error() {
    let text = "@univariate false\n@dimensions 2\n@classLabel true a b\n@data\n1,2.5:3,?:a\n-4:5e1:b\n";
    for (at, _) in text.char_indices() {
        let _ = parse(&text[..at]);
        for other in ["", ":", ",", "?", "@", "\n", "\0", "é", "9e99", "true", "@data\n"] {
            let damaged = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            if let Ok(data) = parse(&damaged) {
                assert!(data.cases.iter().all(|case| case.frames.ncols() == data.width()), "{damaged:?}");
            }
        }
    }
}

#[test]
fn times_become_a_channel_where_that_is_asked_for() {
    let text = "@timestamps true\n@classLabel true a b\n@data\n(0,5),(1,6),(3,7),(3.5,?):a\n(9,1):b\n";
    let read = |time| SeriesSet::from_ts(text, &ReadOptions::default().time(time));
    let set = read(TimeInput::Delta).unwrap();
    assert_eq!(set.channels, ["dimension 1", "dt"]);
    assert_eq!(set.cases[0].frames.column(1), array![1.0, 1.0, 2.0, 0.5]);
    assert_eq!(set.cases[1].frames, array![[1.0, 1.0]]);
    assert!(set.notes.iter().any(|note| note.contains("become the channel `dt`")), "{:?}", set.notes);
    let set = read(TimeInput::LogDelta).unwrap();
    assert_eq!(set.cases[0].frames.column(1), array![0.0, 0.0, 2f32.ln(), 0.5f32.ln()]);
    assert_eq!(set.cases[1].frames, array![[1.0, 0.0]]);

    let error = read(TimeInput::Even).unwrap_err().to_string();
    assert!(error.contains("line 4: the timestamps are uneven, 0.5 to 2 apart"), "{error}");
    let ask =
        |text: &str| SeriesSet::from_ts(text, &ReadOptions::default().time(TimeInput::Delta)).unwrap_err().to_string();
    assert!(ask("@data\n1,2\n").contains("line 1: times are to be an input, and the file has no timestamps"));
    assert!(ask("@timestamps true\n@data\n(1,1),(1,2)\n").contains("line 3: the timestamps do not ascend"));
    assert!(ask("@timestamps true\n@data\n(-1e300,1),(1e300,2)\n").contains("so far apart"));
}
