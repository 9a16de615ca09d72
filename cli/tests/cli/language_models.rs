//! The commands of language models.

use std::fs;
use std::io::Read;

use hymba::lm::{HymbaLmConfig, LoadOptions, Tokenizer};
use hymba::{GenerateOptions, HymbaLm};

use crate::support::{command, data, hymba, hymba_with};

#[test]
fn a_text_is_continued_as_by_the_library() {
    let folder = data("byte_lm");
    let lm = HymbaLm::from_dir(&folder).unwrap();
    let prompt: Vec<u32> = "\nThe name".bytes().map(u32::from).collect();
    let options = GenerateOptions::default().max_tokens(40);
    let ids = lm.generate(&prompt, &options, |_| std::ops::ControlFlow::Continue(())).unwrap().ids;
    let want = String::from_utf8(ids.iter().map(|&id| id as u8).collect()).unwrap();

    let arguments = ["complete", &folder, "The name", "--max-tokens", "40"];
    assert_eq!(hymba(&arguments).success(), format!("The name{want}\n"));
    let piped = hymba_with(&["complete", &folder, "--max-tokens", "40", "--lookahead"], "The name");
    assert_eq!((piped.stdout, piped.stderr.as_str(), piped.code), (format!("The name{want}\n"), "", 0));

    let json = hymba(&[&arguments[..], &["--json"]].concat()).json();
    assert_eq!((json["text"].as_str(), json["finish"].as_str()), (Some(&*want), Some("max-tokens")));
    assert_eq!(json["tokens"].as_array().unwrap().len(), 40);
    assert_eq!((json["prompt_tokens"].as_u64(), json["log_probs"].as_array().unwrap().len()), (Some(9), 40));

    let stop = &want[10..13];
    let stopped = hymba(&[&arguments[..], &["--stop", stop, "--json"]].concat()).json();
    let until = want.find(stop).unwrap();
    assert_eq!((stopped["text"].as_str(), stopped["finish"].as_str()), (Some(&want[..until]), Some("stop-string")));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = command(&["complete", &data("byte_lm"), "The", "--max-tokens", "100000"]).spawn().unwrap();
    drop(child.stdin.take());
    let mut first = [0; 20];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap(); // and is dropped
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), String::from_utf8(out.stderr).unwrap()), (Some(0), String::new()));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_text_with_exit_code_130() {
    let mut child = command(&["complete", &data("byte_lm"), "The", "--max-tokens", "1000000"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0; 20];
    stdout.read_exact(&mut first).unwrap();
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), rest.ends_with('\n')), (Some(130), true));
    assert_eq!(String::from_utf8(out.stderr).unwrap(), "hymba: interrupted: the text ends here\n");
}

/// A small model with the tokenizer of the big one, whose vocabulary it has.
fn small_with_tokenizer() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = HymbaLmConfig::hymba_1_5b();
    (config.hidden_size, config.intermediate_size, config.num_hidden_layers) = (100, 64, 3);
    (config.mamba_dt_rank, config.global_attn_idx, config.kv_reuse_group) = (None, Some(vec![0]), None);
    HymbaLm::random(config, 0, &LoadOptions::default()).unwrap().save_dir(folder.path()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(data(&format!("hymba-1.5b-base/{name}")), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn lines_that_are_piped_in_are_answered_one_by_one() {
    let folder = small_with_tokenizer();
    let path = folder.path().to_str().unwrap();
    let said = "Hello\n/help\n\nAnd again\n/clear\nHello\n/quit\nnot heard\n";
    let out = hymba_with(&["chat", path, "--max-tokens", "6", "--system", "Short."], said);
    let answers: Vec<&str> = out.stdout.split_terminator('\n').collect();
    assert_eq!(out.code, 0, "{}", out.stderr);
    // every answer ends with a line end, and may have others in it
    assert!(answers.len() >= 3, "{answers:?}");
    assert!(out.stderr.contains("(forgotten)"), "{}", out.stderr);

    // fewer bits, with the tokenizer beside them
    let smaller = folder.path().join("four");
    let smaller = smaller.to_str().unwrap();
    let json = hymba(&["quantize", path, smaller, "--to", "4", "--json"]).json();
    assert!(json["bytes_after"].as_u64() < json["bytes_before"].as_u64(), "{json}");
    let info = hymba(&["info", smaller, "--json"]).json();
    assert_eq!((info["kind"].as_str(), info["problem"].as_str()), (Some("language model"), None));
    assert_eq!(info["parameters"], json["parameters"]);
    assert!(info["options"]["text"].as_str().unwrap().starts_with("tokenizer"), "{info}");
    assert_eq!(
        hymba(&["complete", smaller, "Hello", "--max-tokens", "3", "--json"]).json()["tokens"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    let again = hymba(&["quantize", path, smaller, "--to", "8"]);
    assert_eq!(again.code, 1);
    assert!(again.stderr.contains("there is a model already"), "{}", again.stderr);
}

#[test]
fn perplexity_is_that_of_the_library_and_bits_are_compared() {
    let (folder, file) = (data("byte_lm"), data("byte_lm/text.txt"));
    let json =
        hymba(&["perplexity", &folder, &file, "--tokens", "600", "--window", "256", "--against", "4", "--json"]).json();
    let lm = HymbaLm::from_dir(&folder).unwrap();
    let ids: Vec<u32> = fs::read(&file).unwrap()[..600].iter().map(|&byte| byte.into()).collect();
    let total: f64 = ids.chunks(256).map(|window| -lm.log_likelihood(&[10], window).unwrap().total).sum();
    assert_eq!(json["tokens"], 600);
    assert!((json["nats_per_token"].as_f64().unwrap() - total / 600.0).abs() < 1e-12, "{json}");
    let against = &json["against"];
    assert!(against["same_choice"].as_f64().unwrap() > 0.9 && against["logits_rms"].as_f64().unwrap() > 0.0, "{json}");
}

#[test]
fn a_model_is_trained_tuned_and_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let text = fs::read(data("byte_lm/text.txt")).unwrap();
    fs::write(path("text.txt"), &text[..6000]).unwrap();
    let (model, adapter) = (path("model"), path("adapter"));
    let trained = hymba(&["train-lm", &path("text.txt"), "--out", &model, "--hidden", "64", "--layers", "2"]);
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    assert!(trained.stdout.is_empty() && trained.stderr.contains("tokens/s, training loss"), "{}", trained.stderr);
    assert!(!folder.path().join("model.checkpoint").exists());
    assert!(fs::read_to_string(folder.path().join("model/curve.svg")).unwrap().contains("held out"));
    assert_eq!(hymba(&["info", &model, "--json"]).json()["options"]["text"], "bytes");

    let lines: String = (0..20).map(|i| format!("{{\"text\": \"line {i} of some lines\"}}\n")).collect();
    fs::write(path("lines.jsonl"), lines).unwrap();
    let tuned = hymba(&["finetune", &model, &path("lines.jsonl"), "--out", &adapter, "--rank", "2", "--epochs", "2"]);
    assert_eq!(tuned.code, 0, "{}", tuned.stderr);
    let perplexities: Vec<f64> =
        tuned.stderr.lines().filter_map(|line| line.split_once("perplexity ")?.1.parse().ok()).collect();
    assert!(perplexities.len() == 3 && perplexities[2] < perplexities[0], "{}", tuned.stderr);
    assert_eq!(hymba(&["info", &adapter, "--json"]).json()["kind"], "low-rank adapter of a language model");
    hymba(&["complete", &model, "line", "--lora", &adapter, "--max-tokens", "5"]).success();

    // random weights in 4 bits, of which there are no files
    fs::create_dir(path("sizes")).unwrap();
    fs::copy(data("byte_lm/config.json"), path("sizes/config.json")).unwrap();
    let arguments = ["--random", "--quantize", "4", "--recompute", "--epochs", "3", "--learning-rate", "0.01"];
    let (sizes, lines, out) = (path("sizes"), path("lines.jsonl"), path("of-random"));
    let tuned = hymba(&[&["finetune", &sizes, &lines, "--out", &out][..], &arguments].concat());
    assert_eq!(tuned.code, 0, "{}", tuned.stderr);
    let losses: Vec<f64> = tuned
        .stderr
        .lines()
        .filter_map(|line| line.split_once("training loss ")?.1.split_once(',')?.0.parse().ok())
        .collect();
    assert!(losses.len() == 3 && losses[2] < losses[0], "{}", tuned.stderr);
    assert!(!cfg!(target_os = "linux") || tuned.stderr.contains("of memory at most"), "{}", tuned.stderr);

    // what is wrong is said, and told by the exit code
    fs::write(format!("{model}/model.safetensors"), b"damaged").unwrap();
    let info = hymba(&["info", &model, "--json"]);
    assert_eq!((info.code, info.stderr.lines().count()), (1, 1));
    let json: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    assert!(json["problem"].as_str().unwrap().contains("model.safetensors"), "{json}");
}

#[test]
fn a_tokenizer_is_trained_with_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let text = fs::read(data("byte_lm/text.txt")).unwrap();
    fs::write(path("text.txt"), &text[..6000]).unwrap();
    let train = |size: &str, out: &str| {
        let small = ["--hidden", "64", "--layers", "1", "--window", "64"];
        hymba(&[&["train-lm", &path("text.txt"), "--out", &path(out), "--vocabulary", size][..], &small].concat())
    };
    let trained = train("400", "model");
    assert_eq!(trained.code, 0, "{}", trained.stderr);
    assert_eq!(HymbaLm::from_dir(path("model")).unwrap().config().vocab_size, 400);
    hymba(&["complete", &path("model"), "line", "--max-tokens", "5"]).success();
    let json = hymba(&["perplexity", &path("model"), &path("text.txt"), "--json"]).json();
    assert!(json["tokens"].as_f64().unwrap() < 6000.0, "{json}");
    let refused = train("100", "other");
    assert!(refused.code == 1 && refused.stderr.contains("as many at least"), "{}", refused.stderr);
}

#[test]
fn speed_is_measured_of_random_weights() {
    let sizes = ["--hidden", "100", "--layers", "2", "--intermediate", "64", "--prompt-tokens", "5", "--tokens", "2"];
    let json = hymba(&[&["bench", "--random", "--json", "--threads", "1"][..], &sizes].concat()).json();
    assert_eq!((json["prompt"]["tokens"].as_u64(), json["threads"].as_u64()), (Some(5), Some(1)));
    assert!(json["decoding"]["tokens_per_s"]["median"].as_f64().unwrap() > 0.0, "{json}");
}

#[test]
fn a_text_is_scored_behind_one_beginning_token() {
    let folder = small_with_tokenizer();
    let (lm, tokenizer) = (HymbaLm::from_dir(folder.path()).unwrap(), Tokenizer::from_dir(folder.path()).unwrap());
    let text = folder.path().join("text.txt");
    fs::write(&text, "It was the best of times.").unwrap();
    let ids = tokenizer.encode_without_special("It was the best of times.").unwrap();
    let first = [lm.config().bos_token_id.unwrap()];
    let want = -lm.log_likelihood(&first, &ids).unwrap().total / ids.len() as f64;
    let json = hymba(&["perplexity", folder.path().to_str().unwrap(), text.to_str().unwrap(), "--json"]).json();
    assert_eq!(json["tokens"].as_u64(), Some(ids.len() as u64));
    assert!((json["nats_per_token"].as_f64().unwrap() - want).abs() < 1e-9, "{json} {want}");
}
