//! The examples' reader of `.ts` files.

#[path = "../examples/support/ts.rs"]
mod ts;

use std::path::Path;

use hymba::ndarray::{array, s};
use ts::{Dataset, Target, cut_missing_end, fill_missing, pad};

fn shipped(part: &str) -> Dataset {
    let path = format!("{}/examples/data/JapaneseVowels_{part}.ts", env!("CARGO_MANIFEST_DIR"));
    Dataset::read(Path::new(&path)).expect("a file of this repository")
}

fn error(text: &str) -> String {
    Dataset::parse(text).expect_err(text).to_string()
}

#[test]
fn the_shipped_files_are_what_their_authors_say() {
    for (part, cases) in [("TRAIN", 270), ("TEST", 370)] {
        let data = shipped(part);
        let lengths: Vec<usize> = data.cases.iter().map(|case| case.frames.nrows()).collect();
        assert_eq!((data.name.as_str(), data.dims, data.classes.len()), ("JapaneseVowels", 12, 9));
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
    let data = Dataset::parse(text).unwrap();
    assert_eq!((data.name.as_str(), data.dims), ("Tiny", 1));
    assert_eq!(data.classes, ["up", "down"]);
    let targets: Vec<Target> = data.cases.iter().map(|case| case.target).collect();
    assert_eq!(targets, [Target::Class(1), Target::Class(0), Target::None]);
    assert_eq!(data.cases[0].frames.dim(), (3, 1));
    assert!(data.cases[0].frames[[1, 0]].is_nan() && data.cases[1].frames[[0, 0]].is_nan());
    assert_eq!(data.cases[1].frames[[1, 0]], -0.2);
}

#[test]
fn regression_targets_and_no_targets() {
    let data = Dataset::parse("@targetLabel true\n@data\n1,2:3,4:0.5\n5:6:?\n").unwrap();
    assert_eq!((data.dims, data.cases[0].target, data.cases[1].target), (2, Target::Value(0.5), Target::None));
    assert_eq!(data.cases[0].frames, array![[1.0, 3.0], [2.0, 4.0]]);

    let data = Dataset::parse("@classLabel false\n@dimension 2\n@data\n1,2:3,4\n").unwrap();
    assert_eq!((data.dims, data.cases[0].target), (2, Target::None));
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
    let missing = Dataset::read(Path::new("no/such/file.ts")).unwrap_err().to_string();
    assert!(missing.starts_with("no/such/file.ts: "), "{missing}");
}

#[test]
fn missing_values_take_the_one_before() {
    let nan = f32::NAN;
    let mut frames = array![[nan, nan, 1.0], [2.0, nan, nan], [nan, nan, nan], [4.0, nan, 3.0]];
    assert_eq!(fill_missing(&mut frames), 8);
    assert_eq!(frames, array![[2.0, 0.0, 1.0], [2.0, 0.0, 1.0], [2.0, 0.0, 1.0], [4.0, 0.0, 3.0]]);
    assert_eq!(fill_missing(&mut frames), 0);
}

#[test]
fn frames_missing_at_the_end_are_cut_off() {
    let nan = f32::NAN;
    let mut frames = array![[nan, nan], [1.0, nan], [nan, nan], [nan, 2.0], [nan, nan], [nan, nan]];
    assert_eq!(cut_missing_end(&mut frames), 2);
    assert_eq!((frames.nrows(), frames[[3, 1]]), (4, 2.0));
    assert_eq!(cut_missing_end(&mut frames), 0);
    let mut nothing = array![[nan], [nan]];
    assert_eq!((cut_missing_end(&mut nothing), nothing.nrows()), (1, 1));
}

#[test]
fn padding_keeps_every_frame() {
    let data = shipped("TEST");
    let (frames, lengths) = pad(&data.cases[..5]);
    assert_eq!(frames.dim(), (5, *lengths.iter().max().unwrap(), 12));
    for (row, case) in data.cases[..5].iter().enumerate() {
        assert_eq!(frames.slice(s![row, ..lengths[row], ..]), case.frames);
        assert!(frames.slice(s![row, lengths[row].., ..]).iter().all(|&value| value == 0.0));
    }
    let chosen = [&data.cases[300], &data.cases[7]];
    assert_eq!(pad(&chosen).1, [chosen[0].frames.nrows(), chosen[1].frames.nrows()]);
    assert_eq!(pad::<ts::Case>(&[]).0.dim(), (0, 0, 0));
}

#[test]
fn a_damaged_file_gives_a_dataset_or_an_error() {
    let text = "@univariate false\n@dimensions 2\n@classLabel true a b\n@data\n1,2.5:3,?:a\n-4:5e1:b\n";
    for (at, _) in text.char_indices() {
        let _ = Dataset::parse(&text[..at]);
        for other in ["", ":", ",", "?", "@", "\n", "\0", "é", "9e99", "true", "@data\n"] {
            let damaged = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            if let Ok(data) = Dataset::parse(&damaged) {
                assert!(data.cases.iter().all(|case| case.frames.ncols() == data.dims), "{damaged:?}");
            }
        }
    }
}
