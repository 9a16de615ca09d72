//! The clients that people have: `tests/clients.sh` installs them and says where.

use std::ops::ControlFlow;
use std::process::Command;

use hymba::lm::{Chat, GenerateOptions, HymbaLm, Tokenizer};
use serde_json::json;

use crate::client::{Server, folder};

#[test]
fn openai_and_lm_eval() {
    let Ok(python) = std::env::var("HYMBA_PYTHON") else {
        println!("!! left out: run tests/clients.sh, or set HYMBA_PYTHON to a Python with openai and lm_eval[api]");
        return;
    };
    let (lm, tokenizer) = (HymbaLm::from_dir(folder()).unwrap(), Tokenizer::from_dir(folder()).unwrap());
    let mut cases = Vec::new();
    for i in 0..12 {
        let prompt = "It was the best of times, ".repeat(1 + i * 3) + ["it was", "and", "so"][i % 3];
        let continuation = [" the worst of times", " night", " say we all of us, é and 😀"][i % 3];
        // as lm_eval does it: what the whole text has beyond the prompt
        let context = tokenizer.encode_without_special(&prompt).unwrap();
        let whole = tokenizer.encode_without_special(&(prompt.clone() + continuation)).unwrap();
        let likelihood = lm.log_likelihood(&context, &whole[context.len()..]).unwrap();
        cases.push(json!({
            "prompt": prompt, "continuation": continuation,
            "log_likelihood": likelihood.total, "is_greedy": likelihood.is_greedy,
        }));
    }
    let mut chat = Chat::new(&lm, &tokenizer).system("Be brief.");
    let options = GenerateOptions::default().max_tokens(20);
    let answer = chat.ask("Name a colour.", &options, |_| ControlFlow::Continue(())).unwrap();
    let place = tempfile::tempdir().unwrap();
    let expected = place.path().join("expected.json");
    std::fs::write(&expected, json!({"chat": answer.text, "cases": cases}).to_string()).unwrap();

    let server = Server::language(&["--api-key", "secret"]);
    let url = format!("http://{}", server.address);
    let status =
        Command::new(python).arg("tests/clients.py").args([&url]).arg(folder()).arg(expected).status().unwrap();
    assert!(status.success());
}
