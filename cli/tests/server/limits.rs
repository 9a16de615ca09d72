//! What is refused, and how it ends.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Answer, Server};

const COMPLETE: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn endless() -> Value {
    json!({"prompt": "a", "max_tokens": 4000, "stream": true, "logit_bias": {"2": -100}})
}

/// Waits for the first words of an answer.
fn first_words(stream: &mut std::net::TcpStream) {
    let mut buffer = [0; 512];
    while !String::from_utf8_lossy(&buffer).contains("data:") {
        assert!(stream.read(&mut buffer).unwrap() > 0);
    }
}

#[test]
fn what_cannot_be_served_is_told() {
    let server = Server::language(&["--max-body", "20000", "--context", "100"]);
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    for (path, body, status) in [
        (COMPLETE, json!({}), 400),
        (COMPLETE, json!({"prompt": []}), 400),
        (COMPLETE, json!({"prompt": [[]]}), 400),
        (COMPLETE, json!({"prompt": [-1]}), 400),
        (COMPLETE, json!({"prompt": [99_999]}), 400),
        (COMPLETE, json!({"prompt": 5}), 400),
        (COMPLETE, json!({"prompt": "a", "model": "gpt-4"}), 404),
        (COMPLETE, json!({"prompt": "a", "n": 0}), 400),
        (COMPLETE, json!({"prompt": "a", "n": 1_000_000_000_000_u64}), 400),
        (COMPLETE, json!({"prompt": vec!["a"; 90]}), 400),
        (COMPLETE, json!({"prompt": "a", "temperature": -1}), 400),
        (COMPLETE, json!({"prompt": "a", "temperature": 1e300}), 400),
        (COMPLETE, json!({"prompt": "a", "top_p": 7}), 400),
        (COMPLETE, json!({"prompt": "a", "logprobs": 21}), 400),
        (COMPLETE, json!({"prompt": "a", "logit_bias": {"x": 1}}), 400),
        (COMPLETE, json!({"prompt": "a", "logit_bias": {"1": 101}}), 400),
        (COMPLETE, json!({"prompt": "a", "frequency_penalty": 3}), 400),
        (COMPLETE, json!({"prompt": "a", "stop": [""]}), 400),
        (COMPLETE, json!({"prompt": "a", "stop": vec!["a"; 17]}), 400),
        (COMPLETE, json!({"prompt": "a", "suffix": "b"}), 400),
        (COMPLETE, json!({"prompt": "a", "best_of": 2}), 400),
        (COMPLETE, json!({"prompt": "word ".repeat(200)}), 400),
        (COMPLETE, json!({"prompt": "a".repeat(30_000)}), 413),
        (CHAT, json!({"messages": []}), 400),
        (CHAT, json!({"messages": [{"role": "king", "content": "a"}]}), 400),
        (CHAT, user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), 400),
        (CHAT, user(json!("word ".repeat(200))), 400),
        (CHAT, json!({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}), 400),
        (CHAT, json!({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}), 400),
        ("/v1/nothing", json!({}), 404),
        ("/v1/classify", json!({}), 404),
        ("/v1/models", json!({}), 405),
    ] {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, status, "{path} {body} {answer:?}");
        assert!(answer.json()["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer:?}");
    }
    // not JSON, not whole, not HTTP, and JSON that a web page of others could send
    let head = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json";
    for body in ["", "{", "[1,2", "\u{0}\u{1}", &"[".repeat(10_000)] {
        assert_eq!(Answer::read(server.begin(head, body)).status, 400, "{body}");
    }
    let text = "POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain";
    assert_eq!(Answer::read(server.begin(text, "{\"prompt\": \"a\"}")).status, 415);
    let page = "GET /v1/models HTTP/1.1\r\nOrigin: https://evil.example";
    assert_eq!(Answer::read(server.begin(page, "")).status, 403);
    let mut stream = server.connect();
    stream.write_all(b"\xff\xfe\x00 nonsense\r\n\r\n").unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    let mut half = server.connect();
    half.write_all(format!("{head}\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{{").as_bytes()).unwrap();
    drop(half);
    // and it goes on
    let answer = server.post(COMPLETE, &json!({"prompt": "a", "max_tokens": 5000})).good();
    assert!(answer["usage"]["total_tokens"].as_u64().unwrap() <= 100);
}

#[test]
fn a_full_house() {
    let server = Server::language(&["--concurrent", "1", "--waiting", "1"]);
    let mut first = server.begin_post(COMPLETE, &endless());
    first_words(&mut first);
    let second = server.begin_post(COMPLETE, &json!({"prompt": "a", "max_tokens": 3}));
    server.wait_for("hymba_sequences_waiting", 1.0);
    let refused = server.post(COMPLETE, &json!({"prompt": "a"}));
    assert_eq!(refused.status, 429);
    assert!(refused.head.contains("retry-after: 1"), "{}", refused.head);
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    // who goes away makes room at once
    drop(first);
    assert_eq!(Answer::read(second).good()["usage"]["completion_tokens"], 3);
    // also one that waits for a whole answer
    let waits = server.begin_post(COMPLETE, &json!({"prompt": "a", "max_tokens": 4000, "logit_bias": {"2": -100}}));
    server.wait_for("hymba_sequences_writing", 1.0);
    drop(waits);
    server.wait_for("hymba_sequences_writing", 0.0);
    assert_eq!(server.metrics()["hymba_sequences_ended_total{end=\"cancelled\"}"], 2.0);
}

#[test]
fn who_reads_slowly_holds_up_nobody() {
    let server = Server::language(&["--concurrent", "4"]);
    let slow: Vec<_> = (0..3)
        .map(|_| {
            server.begin_post(
                COMPLETE,
                &json!({"prompt": "a", "max_tokens": 300, "stream": true, "logit_bias": {"2": -100}}),
            )
        })
        .collect();
    // their rows are done while nobody has read a word
    server.wait_for("hymba_sequences_ended_total{end=\"length\"}", 3.0);
    server.post(COMPLETE, &json!({"prompt": "a", "max_tokens": 3})).good();
    for stream in slow {
        assert_eq!(Answer::read(stream).events().last().unwrap(), "[DONE]");
    }
}

#[test]
fn time_runs_out() {
    let server = Server::language(&["--timeout", "1", "--io-timeout", "1"]);
    let body = json!({"prompt": "a", "max_tokens": 4000, "logit_bias": {"2": -100}, "n": 16});
    let answer = server.post(COMPLETE, &body);
    assert_eq!(answer.status, 504, "{answer:?}");
    // a client that does not send what it has promised, nor a head
    for beginning in [
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
        "GET /health HT",
    ] {
        let (mut stream, since, mut rest) = (server.connect(), Instant::now(), Vec::new());
        stream.write_all(beginning.as_bytes()).unwrap();
        let _ = stream.read_to_end(&mut rest);
        assert!(since.elapsed() < Duration::from_secs(20));
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&rest));
    }
}

#[test]
fn keys() {
    let server = Server::language(&["--api-key", "secret"]);
    let answer = server.get("/v1/models");
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (401, &"invalid_api_key".into()));
    assert_eq!(server.post(COMPLETE, &json!({"prompt": "a"})).status, 401);
    assert_eq!(server.get("/metrics").status, 401);
    assert_eq!(server.get("/health").status, 200);
    let head = "GET /v1/models HTTP/1.1\r\nAuthorization: Bearer secret";
    assert_eq!(Answer::read(server.begin(head, "")).status, 200);
}

#[test]
#[cfg(target_os = "linux")]
fn what_was_begun_comes_to_its_end() {
    let mut server = Server::language(&[]);
    let mut stream = server
        .begin_post(COMPLETE, &json!({"prompt": "a", "max_tokens": 400, "stream": true, "logit_bias": {"2": -100}}));
    first_words(&mut stream);
    server.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]"), "{rest}");
    assert!(server.child.wait().unwrap().success());
    assert!(std::net::TcpStream::connect(server.address).is_err());
    // not for longer than it is given
    let mut server = Server::language(&["--drain", "0"]);
    let mut stream = server.begin_post(COMPLETE, &endless());
    first_words(&mut stream);
    let since = Instant::now();
    server.terminate();
    assert!(server.child.wait().unwrap().success());
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
    // nor where it is told twice
    let mut server = Server::language(&["--drain", "600"]);
    let mut stream = server.begin_post(COMPLETE, &endless());
    first_words(&mut stream);
    server.terminate();
    while std::net::TcpStream::connect(server.address).is_ok() {
        std::thread::sleep(Duration::from_millis(10));
    }
    server.terminate();
    assert_eq!(server.child.wait().unwrap().code(), Some(130));
}
