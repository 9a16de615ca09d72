//! Series and streams of frames.

use std::path::Path;

use hymba::ndarray::Array2;
use hymba::{HymbaOptions, Predictor, Task, softmax};
use serde_json::{Value, json};
use tungstenite::Message;

use crate::client::Server;

fn predictor(name: &str) -> (Predictor, std::path::PathBuf) {
    let options = HymbaOptions::new(3).hidden_size(16).num_layers(2);
    let predictor = Predictor::build(options, Task::classify(["walking", "standing"])).unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    predictor.save(&path).unwrap();
    (predictor, path)
}

fn series(length: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((length, 3), |(t, c)| ((t * 7 + c * 5 + seed) % 11) as f32 * 0.25)
}

fn lists(series: &Array2<f32>) -> Value {
    series.rows().into_iter().map(|row| row.to_vec()).collect()
}

fn probabilities(row: &Value) -> Vec<f32> {
    ["walking", "standing"].map(|label| row["probabilities"][label].as_f64().unwrap() as f32).to_vec()
}

#[test]
fn classes_of_series() {
    let (predictor, path) = predictor("classes.safetensors");
    let server = Server::start(&path, &["--context", "3000"]);
    // more than are predicted in one turn
    let all = [series(9, 1), series(3000, 2), series(1, 3), series(2000, 5)];
    let asked = json!({"series": all.iter().map(lists).collect::<Vec<_>>(), "model": "classes"});
    let answer = server.post("/v1/classify", &asked).good();
    let expected = softmax(&predictor.predict_series(&all).unwrap());
    for (row, expected) in answer["data"].as_array().unwrap().iter().zip(expected.rows()) {
        assert_eq!(probabilities(row), expected.to_vec());
        assert_eq!(row["label"], if expected[0] >= expected[1] { "walking" } else { "standing" });
    }
    assert_eq!(server.get("/v1/models").good()["data"][0]["channels"], 3);
    for bad in [
        json!({}),
        json!({"series": []}),
        json!({"series": [[]]}),
        json!({"series": [[[1, 2]]]}),
        json!({"series": [[[1, 2, 3], [1]]]}),
        json!({"series": [[["a"]]]}),
        json!({"series": [[[1, 2, 1e39]]]}),
    ] {
        assert_eq!(server.post("/v1/classify", &bad).status, 400, "{bad}");
    }
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "a"})).status, 404);
    assert_eq!(server.metrics()["hymba_series_total"], 4.0);
    let long = server.post("/v1/classify", &json!({"series": [lists(&series(3001, 1))]}));
    assert_eq!((long.status, long.body.contains("3001 frames")), (400, true), "{long:?}");
}

#[test]
fn several_labels_can_be_right() {
    let options = HymbaOptions::new(3).hidden_size(16).num_layers(1);
    let predictor = Predictor::build(options, Task::multi_label(["rain", "wind"])).unwrap();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("labels.safetensors");
    predictor.save(&path).unwrap();
    let server = Server::start(&path, &[]);
    let all: Vec<_> = (0..6).map(|seed| series(5, seed)).collect();
    let asked = json!({"series": all.iter().map(lists).collect::<Vec<_>>()});
    let answer = server.post("/v1/classify", &asked).good();
    let want = predictor.predict_series(&all).unwrap().mapv(|logit| 1.0 / (1.0 + (-logit).exp()));
    for (row, want) in answer["data"].as_array().unwrap().iter().zip(want.rows()) {
        let right: Vec<&str> =
            ["rain", "wind"].into_iter().zip(want).filter(|(_, p)| **p > 0.5).map(|(l, _)| l).collect();
        assert_eq!((&row["labels"], &row["label"]), (&json!(right), &Value::Null));
        assert_eq!(row["probabilities"]["wind"].as_f64().unwrap() as f32, want[1]);
    }
}

#[test]
fn time_for_series_runs_out() {
    let (_, path) = predictor("late.safetensors");
    let server = Server::start(&path, &["--timeout", "0"]);
    let all: Vec<Value> = (0..4).map(|seed| lists(&series(4000, seed))).collect();
    assert_eq!(server.post("/v1/classify", &json!({"series": all})).status, 504);
}

#[test]
#[cfg(target_os = "linux")]
fn streams_are_told_that_the_server_goes_down() {
    let (_, path) = predictor("closing.safetensors");
    let mut server = Server::start(&path, &[]);
    let url = format!("ws://localhost:{}/stream", server.address.port());
    let mut socket = tungstenite::client(url.as_str(), server.connect()).unwrap().0;
    socket.send(Message::text("[1, 2, 3]")).unwrap();
    assert!(socket.read().unwrap().is_text());
    server.terminate();
    let Message::Close(Some(close)) = socket.read().unwrap() else { panic!("it ends without a word") };
    assert_eq!(u16::from(close.code), 1001);
    let _ = socket.read();
    assert!(server.child.wait().unwrap().success());
}

#[test]
fn streams_of_frames() {
    let (predictor, path) = predictor("frames.safetensors");
    let server = Server::start(&path, &["--concurrent", "2"]);
    let url = format!("ws://localhost:{}/stream", server.address.port());
    let connect = || tungstenite::client(url.as_str(), server.connect()).unwrap().0;
    let (mut one, mut other) = (connect(), connect());
    let busy = tungstenite::client(url.as_str(), server.connect());
    assert!(format!("{:?}", busy.err().unwrap()).contains("429"));
    let frames = series(20, 4);
    let mut state = predictor.new_state(1);
    let say = |socket: &mut tungstenite::WebSocket<_>, text: Value| -> Value {
        socket.send(Message::text(text.to_string())).unwrap();
        serde_json::from_str(socket.read().unwrap().to_text().unwrap()).unwrap()
    };
    for t in 0..10 {
        let expected =
            softmax(&predictor.step(&frames.slice(hymba::ndarray::s![t..t + 1, ..]).to_owned(), &mut state).unwrap());
        let answer = say(&mut one, json!(frames.row(t).to_vec()));
        assert_eq!((probabilities(&answer), &answer["frames"]), (expected.row(0).to_vec(), &json!(t + 1)));
        // the other stream has a state of its own
        assert_eq!(say(&mut other, json!([0.0, 0.0, 0.0]))["frames"], t + 1);
    }
    // what cannot be used changes nothing
    let long = lists(&series(4097, 0));
    for bad in [json!("x"), json!([1, 2]), json!([1, 2, 1e39]), json!([[1, 2, 3], [1]]), json!([]), json!({}), long] {
        assert!(say(&mut one, bad)["error"]["message"].is_string());
    }
    let rest = frames.slice(hymba::ndarray::s![10.., ..]).to_owned();
    let answer = say(&mut one, lists(&rest));
    assert_eq!(answer["frames"], 20);
    let whole = softmax(&predictor.predict_series(&[frames]).unwrap());
    assert!(probabilities(&answer).iter().zip(whole.row(0)).all(|(a, b)| (a - b).abs() < 1e-5));
    drop(one);
    server.wait_for("hymba_streams", 1.0);
    drop(other);
    server.wait_for("hymba_streams", 0.0);
}
