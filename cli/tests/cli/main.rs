//! Drives the program as a shell would, with the small models of the repository.

mod language_models;
mod series;
mod support;

use support::{data, hymba};

#[test]
fn arguments_that_cannot_be_used_are_told_with_exit_code_2() {
    let cases: [&[&str]; 5] = [
        &["complete"],
        &["nothing"],
        &["bench"],
        &["quantize", "a", "b", "--to", "5"],
        &["perplexity", "a", "b", "--window", "1"],
    ];
    for arguments in cases {
        let out = hymba(arguments);
        assert_eq!((out.code, out.stdout.as_str()), (2, ""), "{arguments:?}");
        assert!(out.stderr.starts_with("error:"), "{}", out.stderr);
    }
}

#[test]
fn errors_are_one_line_and_exit_code_1() {
    let text = data("byte_lm/text.txt");
    let (lm, other) = (data("byte_lm"), data("hymba_lm/a_minimal"));
    let cases: [&[&str]; 7] = [
        &["complete", "/no/such/folder", "x"],
        &["complete", &other, "x"],
        &["chat", &lm],
        &["info", &text],
        &["predict", &text, &text],
        &["perplexity", &lm, "/no/such/file"],
        &["complete", &lm, "x", "--temperature=-1"],
    ];
    for arguments in cases {
        let out = hymba(arguments);
        assert_eq!(out.code, 1, "{arguments:?}: {}", out.stderr);
        assert!(out.stdout.is_empty(), "{arguments:?}: {}", out.stdout);
        assert!(out.stderr.starts_with("hymba: ") && out.stderr.lines().count() == 1, "{arguments:?}: {}", out.stderr);
        assert!(!out.stderr.contains('\u{1b}'), "{}", out.stderr);
    }
}

#[test]
fn there_are_completions_and_a_manual() {
    for shell in ["bash", "zsh", "fish"] {
        let script = hymba(&["completions", shell]).success();
        assert!(script.contains("perplexity") && script.contains("train-lm"), "{shell}");
    }
    let manual = hymba(&["man"]).success();
    assert!(manual.contains(".TH") && manual.contains("lookahead"), "{manual}");
}
