//! The commands of series.

use std::fs;
use std::io::{BufRead, BufReader, Write};

use hymba::ndarray::{Array2, arr2};
use hymba::{HymbaOptions, Predictor, Task, softmax};

use crate::support::{command, examples, hymba, hymba_with};

#[test]
fn classes_are_learned_predicted_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    let model = model.to_str().unwrap();
    let (train, test) = (examples("JapaneseVowels_TRAIN.ts"), examples("JapaneseVowels_TEST.ts"));
    let out = hymba(&["train", &train, "--out", model, "--view", "kernels"]);
    assert_eq!((out.code, out.stdout.as_str()), (0, ""), "{}", out.stderr);

    let json = hymba(&["evaluate", model, &test, "--json"]).json();
    assert_eq!((json["series"].as_u64(), json["labels"].as_array().unwrap().len()), (Some(370), 9));
    let accuracy = json["accuracy"].as_f64().unwrap();
    assert!(accuracy > 0.9, "{accuracy}");

    let csv = hymba(&["predict", model, &test]).success();
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((lines.len(), lines[0][..3].to_vec()), (371, vec!["series", "predicted", "p(1)"]));
    let sum: f64 = lines[1][2..].iter().map(|p| p.parse::<f64>().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{:?}", lines[1]);
    let json = hymba(&["predict", model, &test, "--json"]).success();
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!((first["series"].as_str(), first["predicted"].as_str()), (Some("0"), Some(lines[1][1])));

    let info = hymba(&["info", model, "--json"]).json();
    assert!(info["kind"].as_str().unwrap().starts_with("predictor"), "{info}");
    let series = hymba(&["info", &test, "--json"]).json();
    assert_eq!((series["kind"].as_str(), series["options"]["series"].as_u64()), (Some("series"), Some(370)));
    let stream = hymba(&["predict", model, "--stream"]);
    assert_eq!(stream.code, 1);
    assert!(stream.stderr.contains("--streaming"), "{}", stream.stderr);
}

/// Series of a table: numbers that are to be predicted, or their signs.
fn table(numbers: bool) -> String {
    let mut text = String::from("id,time,x,y,target\n");
    for i in 0..40 {
        let slope = (i % 8) as f32 / 4.0 - 0.9;
        let target = if numbers { slope.to_string() } else { (if slope > 0.0 { "up" } else { "down" }).into() };
        for t in 0..12 {
            let x = slope * t as f32 + ((i * 7 + t * 3) % 5) as f32 * 0.05;
            text += &format!("s{i},{t},{x},{},{target}\n", -x * 0.5);
        }
    }
    text
}

#[test]
fn numbers_of_a_table_are_learned_and_predicted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    fs::write(path("data.csv"), table(true)).unwrap();
    let out = hymba(&["train", &path("data.csv"), "--out", &path("m.safetensors"), "--view", "kernels"]);
    assert_eq!(out.code, 0, "{}", out.stderr);
    let json = hymba(&["evaluate", &path("m.safetensors"), &path("data.csv"), "--json"]).json();
    assert!(json["r2"].as_f64().unwrap() > 0.9, "{json}");
    let csv = hymba(&["predict", &path("m.safetensors"), &path("data.csv")]).success();
    assert!(csv.starts_with("series,predicted\ns0,"), "{csv}");
    // targets are not looked at
    fs::write(path("words.csv"), table(false)).unwrap();
    let words = hymba(&["predict", &path("m.safetensors"), &path("words.csv")]);
    assert_eq!((words.stderr.matches("target").count(), words.success()), (0, csv));
    let info = hymba(&["info", &path("data.csv"), "--json"]).json();
    let options = &info["options"];
    assert_eq!((&options["channels"], &options["longest"]), (&serde_json::json!(["x", "y"]), &12.into()));
    fs::write(path("bad.csv"), "x,y\n1,a\n").unwrap();
    let bad = hymba(&["info", &path("bad.csv")]);
    assert_eq!(bad.code, 1);
    assert!(bad.stderr.contains("line 2"), "{}", bad.stderr);
}

#[test]
fn a_stream_is_answered_line_by_line_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    fs::write(path("data.csv"), table(false)).unwrap();
    let model = path("m.safetensors");
    let sizes = ["--hidden", "16", "--layers", "1", "--epochs", "2"];
    let out = hymba(&[&["train", &path("data.csv"), "--out", &model, "--streaming"][..], &sizes].concat());
    assert_eq!(out.code, 0, "{}", out.stderr);
    assert!(!folder.path().join("m.safetensors.checkpoint").exists());

    let mut child = command(&["predict", &model, "--stream"]).spawn().unwrap();
    let (mut stdin, mut lines) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
    assert_eq!(lines.next().unwrap().unwrap(), "predicted,p(down),p(up)");
    let predictor = Predictor::load(&model).unwrap();
    let mut state = predictor.new_state(1);
    for i in 0..6 {
        if i == 3 {
            stdin.write_all(b"\n").unwrap();
            state = predictor.new_state(1);
        }
        let frame = [i as f32 * 0.3, -1.0];
        // the answer comes before the next line is written
        stdin.write_all(format!("{}, {}\n", frame[0], frame[1]).as_bytes()).unwrap();
        let want = softmax(&predictor.step(&Array2::from(vec![frame]), &mut state).unwrap());
        let line = lines.next().unwrap().unwrap();
        assert!(line.ends_with(&format!(",{},{}", want[[0, 0]], want[[0, 1]])), "{line} {want}");
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());

    let bad = hymba_with(&["predict", &model, "--stream"], "1,2\n1,2,3\n");
    assert_eq!((bad.code, bad.stdout.lines().count()), (1, 2));
    assert_eq!(bad.stderr, "hymba: line 2: it has 3 numbers, and the model's frames have 2\n");
}

#[test]
fn several_labels_have_probabilities_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    fs::write(path("data.csv"), "id,time,x,y\na,0,0.5,-1\na,1,2,3\nb,0,-4,1\n").unwrap();
    let options = HymbaOptions::new(2).hidden_size(16).num_layers(1);
    let predictor = Predictor::build(options, Task::multi_label(["rain", "wind", "a;b"])).unwrap();
    predictor.save(path("m.safetensors")).unwrap();
    let series = [arr2(&[[0.5, -1.0], [2.0, 3.0]]), arr2(&[[-4.0, 1.0]])];
    let want = predictor.predict_series(&series).unwrap().mapv(|logit| 1.0 / (1.0 + (-logit).exp()));
    let labels = |row: usize| -> Vec<&str> {
        ["rain", "wind", "a;b"]
            .into_iter()
            .zip(want.row(row))
            .filter(|(_, p)| **p > 0.5)
            .map(|(label, _)| label)
            .collect()
    };

    let csv = hymba(&["predict", &path("m.safetensors"), &path("data.csv")]).success();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines[0], "series,predicted,p(rain),p(wind),p(a;b)");
    for (i, id) in ["a", "b"].into_iter().enumerate() {
        let numbers: Vec<String> = want.row(i).iter().map(f32::to_string).collect();
        assert_eq!(lines[i + 1], format!("{id},{},{}", labels(i).join(";"), numbers.join(",")));
    }
    let json = hymba(&["predict", &path("m.safetensors"), &path("data.csv"), "--json"]).success();
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!(first["predicted"], serde_json::json!(labels(0)));
    assert_eq!(first["probabilities"]["wind"].as_f64().unwrap() as f32, want[[0, 1]]);
    let stream = hymba_with(&["predict", &path("m.safetensors"), "--stream"], "-4,1\n").success();
    assert_eq!(stream.lines().nth(1).unwrap().split(',').next(), Some(labels(1).join(";").as_str()));
}
