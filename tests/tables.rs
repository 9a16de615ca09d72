//! Series from tables.
#![cfg(feature = "csv")]

use hymba::Task;
use hymba::ndarray::array;
use hymba::series::{CsvLayout, ReadOptions, SeriesSet, Target, TargetKind, TimeInput};
use hymba::train::Targets;

fn read(text: &str, options: &ReadOptions) -> Result<SeriesSet, String> {
    SeriesSet::from_csv(text, options).map_err(|error| error.to_string())
}

fn usual() -> ReadOptions {
    ReadOptions::default()
}

fn targets(set: &SeriesSet) -> Vec<Target> {
    set.cases.iter().map(|case| case.target).collect()
}

#[test]
fn a_row_is_a_series_of_one_channel() {
    let text = "\u{feff}id,a,b,c,Class\r\nfirst,1,2.5,,tea\r\n\"second, one\",?,-1e2,3,7\r\nthird,1,1,1,\r\n";
    let mut set = read(text, &usual()).unwrap();
    assert_eq!((&set.channels[..], &set.labels[..]), (&["value".into()][..], &["7".into(), "tea".into()][..]));
    assert_eq!(targets(&set), [Target::Class(1), Target::Class(0), Target::None]);
    assert_eq!(set.cases[1].id, "second, one");
    set.fill_missing();
    assert_eq!(set.cases[0].frames, array![[1.0], [2.5]]);
    assert_eq!(set.cases[1].frames, array![[-100.0], [-100.0], [3.0]]);
    let error = set.into_dataset(&Task::classify(["7", "tea"])).unwrap_err().to_string();
    assert!(error.contains("series `third` has no class"), "{error}");
}

#[test]
fn numbered_columns_are_frames_of_channels() {
    // in any order of columns; 10 comes after 9
    let text = "y_10,x_9,y_9,x_10,price\n4,1,3,2,0.5\n8,5,7,6,2\n";
    let set = read(text, &usual().target("price")).unwrap();
    assert_eq!(set.channels, ["y", "x"]);
    assert_eq!(set.cases[0].frames, array![[3.0, 1.0], [4.0, 2.0]]);
    assert_eq!(targets(&set), [Target::Value(0.5), Target::Value(2.0)]);
    assert_eq!(set.task().unwrap(), Task::Regress { outputs: 1 });
    let data = set.into_dataset(&Task::Regress { outputs: 1 }).unwrap();
    assert_eq!(*data.targets(), Targets::Values(array![[0.5], [2.0]]));
    for (header, expected) in [
        // one that is not numbered may be a target
        (
            "x_0,x_1,more",
            "line 1: some columns of values have a number, such as `x_0`, and some have none, such as `more`",
        ),
        ("x_0,x_1,y_0", "line 1: the columns of the channel `y` are not numbered as those of `x`"),
        ("x_0,x_00,y_0", "line 1: the channel `x` has two columns with the same number"),
    ] {
        let error = read(&format!("{header}\n1,2,3\n"), &usual()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_row_that_is_a_series_has_no_time() {
    let text = "time,x_0,x_1,class\n2024-01-01,1,2,a\n2024-01-02,3,4,b\n";
    let set = read(text, &usual()).unwrap();
    assert_eq!((&set.channels[..], &set.cases[1].frames), (&["x".into()][..], &array![[3.0], [4.0]]));
    assert!(
        set.notes.iter().any(|note| note == "the column `time` is left out: each row is a series"),
        "{:?}",
        set.notes
    );
    let error = read(text, &usual().time_column("time")).unwrap_err();
    assert!(error.contains("line 1: with a series in each row there is no column of times"), "{error}");
    // but a target may be called so
    let set = read("time,x\n0.5,1\n1,2\n", &usual().target("time")).unwrap();
    assert_eq!(targets(&set), [Target::Value(0.5), Target::Value(1.0)]);
}

#[test]
fn targets_that_are_not_known() {
    let set = read("x,target\n1,0.5\n2,NaN\n3,nan\n4,?\n5,\n6,2\n", &usual()).unwrap();
    let none = Target::None;
    assert_eq!(targets(&set), [Target::Value(0.5), none, none, none, none, Target::Value(2.0)]);
}

#[test]
fn more_classes_than_there_may_be() {
    let most = Task::MAX_LABELS;
    let text: String = (0..most).map(|i| format!("1,{i}\n")).collect();
    let text = format!("x,target\n{text}");
    assert_eq!(read(&text, &usual()).unwrap().labels.len(), most);
    let more = format!("{text}1,0\n1,{most}\n");
    let error = read(&more, &usual()).unwrap_err();
    let line = most + 3;
    assert!(error.contains(&format!("line {line}: `{most}` is one class too many")), "{error}");
    let set = read(&more, &usual().target_kind(TargetKind::Values)).unwrap();
    assert_eq!(set.cases[most + 1].target, Target::Value(most as f32));
}

#[test]
fn tables_without_a_header_and_with_other_delimiters() {
    let options = usual().header(false).target(0).delimiter(';');
    let set = read("1; 2;3\n2;4;5\n", &options).unwrap();
    assert_eq!(
        (&set.labels[..], targets(&set)),
        (&["1".into(), "2".into()][..], vec![Target::Class(0), Target::Class(1)])
    );
    assert_eq!(set.cases[0].frames, array![[2.0], [3.0]]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("Archive_TRAIN.tsv");
    std::fs::write(&path, "1\t0.5\tNaN\n2\t0.25\t1\n").unwrap();
    let set = SeriesSet::read(&path, &usual().header(false).target(0)).unwrap();
    assert_eq!((set.name.as_str(), set.cases.len(), set.cases[0].frames.nrows()), ("Archive_TRAIN", 2, 2));
    let error = SeriesSet::read(&path, &usual().header(false).target(7)).unwrap_err().to_string();
    assert!(error.ends_with("Archive_TRAIN.tsv: line 1: there is no column 7: there are 3, counted from 0"), "{error}");
    assert!(read("a\n1\n", &usual().delimiter('é')).unwrap_err().contains("option delimiter"));
}

#[test]
fn a_row_is_a_frame_of_a_series() {
    let text = "id,time,x,y,target\nb,2,3,,1.5\na,0,1,2,\nb,1,?,4,1.5\na,1,5,6,2\n";
    let set = read(text, &usual()).unwrap();
    assert_eq!(set.channels, ["x", "y"]);
    let [b, a] = &set.cases[..] else { panic!("{:?}", set.cases) };
    assert_eq!((b.id.as_str(), b.target, a.target), ("b", Target::Value(1.5), Target::Value(2.0)));
    assert_eq!(a.frames, array![[1.0, 2.0], [5.0, 6.0]]);
    assert!(b.frames[[0, 0]].is_nan() && b.frames[[1, 1]].is_nan());
    assert_eq!((b.frames[[0, 1]], b.frames[[1, 0]]), (4.0, 3.0));
    assert!(set.notes.iter().any(|note| note == "the timestamps (evenly 1 apart) are dropped"), "{:?}", set.notes);

    let dates = "who,when,x\na,2024-01-01 00:00:00,1\na,2024-01-01 00:00:10,2\na,2024-01-01 00:01:10,3\n";
    let options = usual().id("who").time_column("when").layout(CsvLayout::Long);
    let set = read(dates, &options.clone().time(TimeInput::Delta)).unwrap();
    assert_eq!(
        (&set.channels[1..], &set.cases[0].frames),
        (&["dt".into()][..], &array![[1.0, 10.0], [2.0, 10.0], [3.0, 60.0]])
    );
    let error = read(dates, &options).unwrap_err();
    assert!(
        error.contains("line 2: series `a`, which begins here: the timestamps are uneven, 10 s to 60 s"),
        "{error}"
    );
    // without times, in the order of the file
    let set = read("id,x\n1,5\n2,6\n1,7\n", &usual().layout(CsvLayout::Long)).unwrap();
    assert_eq!((set.cases.len(), &set.cases[0].frames, set.spacing), (2, &array![[5.0], [7.0]], None));
}

#[test]
fn targets_are_what_they_look_like_or_what_is_said() {
    let text = "x,target\n1,0\n2,1\n";
    let set = read(text, &usual()).unwrap();
    assert_eq!((targets(&set), set.notes.len()), (vec![Target::Class(0), Target::Class(1)], 1));
    let set = read(text, &usual().target_kind(TargetKind::Values)).unwrap();
    assert_eq!((targets(&set), set.notes.len()), (vec![Target::Value(0.0), Target::Value(1.0)], 0));
    let set = read("x,target\n1,0.5\n2,1\n", &usual().target_kind(TargetKind::Classes)).unwrap();
    assert_eq!(set.labels, ["0.5", "1"]);
    let set = read("x,target\n1,a\n2,0.5\n", &usual().target_kind(TargetKind::Ignored)).unwrap();
    assert_eq!((set.width(), targets(&set), set.notes.len()), (1, vec![Target::None; 2], 0));
    let long = usual().layout(CsvLayout::Long).target_kind(TargetKind::Ignored);
    assert_eq!(targets(&read("id,x,target\n1,5,a\n1,6,b\n", &long).unwrap()), [Target::None]);
    let error = read("x,target\n1,a\n", &usual().target_kind(TargetKind::Values)).unwrap_err();
    assert!(error.contains("line 2: target: `a` is not a number"), "{error}");
}

#[test]
fn errors_name_the_line_and_the_fault() {
    let long = usual().layout(CsvLayout::Long);
    for (text, options, expected) in [
        ("", usual(), "the table is empty"),
        ("a,b\n", usual(), "no rows of values"),
        ("a,b\n1,2\n\n1,2,3\n", usual(), "line 4: 3 fields, and 2 columns"),
        ("a,b\r\n\r\n1,2\r\n\"1\n\",2\r\n1,x\r\n", usual(), "line 6: column `b`"),
        ("a,b\n1,2\n1\n", usual(), "line 3: 1 fields, and 2 columns"),
        ("a,b\n1,x\n", usual(), "line 2: column `b`: `x` is not a number"),
        ("a,b\n1,1e99\n", usual(), "line 2: column `b`: `1e99` is not a finite 32-bit number"),
        ("x_0,x_1,price\n1,2,3\n", usual(), "line 1: some columns of values have a number, such as `x_0`"),
        ("a,b\n1,2\n", usual().target("c"), "line 1: there is no column `c`: a, b"),
        ("a,b\n1,2\n", usual().target("a").id("a"), "line 1: id, time and target must be different columns"),
        ("id,class\n1,2\n", usual(), "line 1: there are no columns of values"),
        ("a,b\n1,2\n", usual().time(TimeInput::Delta), "there is no column of times"),
        ("a,b\n1,2\n", long.clone(), "line 1: a table with a frame in each row needs a column of ids"),
        ("id,b\n,2\n", long.clone(), "line 2: its id is empty"),
        ("id,time,b\n1,x,2\n", usual(), "line 2: `x` is not a timestamp"),
        ("id,time,b\n1,2,2\n1,2024-01-01,2\n", usual(), "line 3: some times of the series are dates"),
        ("id,time,b\n1,2,2\n1,2,2\n", usual(), "line 2: series `1`, which begins here: the timestamps do not ascend"),
        ("id,b,class\n1,2,x\n1,2,y\n", long, "line 3: its series has the targets `x` and `y`"),
        ("\u{feff}", usual(), "the table is empty"),
    ] {
        let error = read(text, &options).expect_err(text);
        assert!(error.contains(expected), "{text:?}\n  gives   {error}\n  without {expected}");
    }
    assert!(SeriesSet::from_csv(b"\xff\xfea", &usual()).unwrap_err().to_string().contains("UTF-16"));
    let latin = SeriesSet::from_csv(b"x,class\n1,caf\xe9\n", &usual()).unwrap();
    assert_eq!((latin.labels[0].as_str(), latin.notes.len()), ("café", 2));
}

#[test]
fn a_damaged_table_gives_series_or_an_error() {
    let wide = "x_0,x_1,y_0,y_1,id,class\n1,2.5,3,?,\"a b\",t\n-4,,5e1,0,b,u\n";
    let long = "id,time,x,target\na,0,1,0.5\nb,2024-01-01,3,\na,1,?,0.5\n";
    for text in [wide, long] {
        for (at, _) in text.char_indices() {
            let _ = read(&text[..at], &usual());
            for other in ["", ",", "\"", "?", "\n", "\0", "é", "9e99", "_", "_99999999999999999999", "id,time"] {
                let damaged = format!("{}{other}{}", &text[..at], &text[at + 1..]);
                for options in [usual(), usual().header(false), usual().time(TimeInput::LogDelta)] {
                    if let Ok(mut set) = read(&damaged, &options) {
                        set.fill_missing();
                        assert!(set.cases.iter().all(|case| case.frames.ncols() == set.width()), "{damaged:?}");
                        let task = set.task();
                        let _ = task.map(|task| set.into_dataset(&task));
                    }
                }
            }
        }
    }
}
