//! Generation: states, stops, seeds.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use hymba::lm::{FinishReason, HymbaLmConfig, LoadOptions};
use hymba::{Error, GenerateOptions, HymbaLm};

use crate::tiny_lm::{config, model};

const FILE: &str = "generation_config.json";

fn go<T>(_: T) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn go_on(_: usize, _: u32) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Draws, and never ends by a token.
fn drawn(tokens: usize) -> GenerateOptions {
    GenerateOptions::default().max_tokens(tokens).temperature(1.0).seed(5).stop_tokens(vec![])
}

#[test]
fn equal_prompts_draw_different_samples_that_can_be_had_alone() {
    let lm = model(100);
    let prompt = [1, 4, 5];
    for base in [0, 3, u64::MAX] {
        let options = drawn(20).stream(base).log_probs(true);
        let rows = lm.generate_batch(&[prompt; 4], &options, go_on).unwrap();
        for (i, row) in rows.iter().enumerate() {
            assert!(rows[..i].iter().all(|other| other.ids != row.ids), "row {i} of stream {base}");
            let alone = options.clone().stream(base.wrapping_add(i as u64));
            assert_eq!(lm.generate(&prompt, &alone, go).unwrap(), *row, "row {i} of stream {base}");
        }
        assert_eq!(lm.generate(&prompt, &options, go).unwrap(), rows[0]);
    }
    // without a draw there is nothing to tell equal rows apart
    let greedy = lm.generate_batch(&[prompt; 3], &drawn(20).temperature(0.0), go_on).unwrap();
    assert!(greedy.iter().all(|row| *row == greedy[0]));
}

#[test]
fn rows_have_options_of_their_own() {
    let lm = model(100);
    let prompts = [vec![1, 4, 5], vec![7], vec![1, 4, 5], vec![1, 4, 5]];
    let each = [
        drawn(3),
        GenerateOptions::default().max_tokens(0),
        drawn(9).stop_tokens((0..30).collect::<Vec<u32>>()).top_k(20).seed(1),
        drawn(3).log_probs(true),
    ];
    let rows = lm.generate_batch(&prompts, &each, go_on).unwrap();
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(lm.generate(&prompts[i], &each[i], go).unwrap(), *row, "row {i}");
    }
    // from a list every row has the stream that its own options say
    assert_eq!(rows[0].ids, rows[3].ids);
    let mut state = lm.new_state(4);
    assert_eq!(lm.generate_batch_with(&mut state, &prompts, &each.to_vec(), go_on).unwrap(), rows);

    let mut state = lm.new_state(4);
    for each in [&each[..3], &[]] {
        let error = lm.generate_batch_with(&mut state, &prompts, each, go_on).unwrap_err();
        assert!(matches!(error, Error::Option { option: "options", .. }), "{error}");
        assert!(error.to_string().contains("there are 4 prompts"), "{error}");
    }
    for bad in [drawn(1).top_p(0.0), drawn(1).stop_strings(["."])] {
        let each = [drawn(1), drawn(1), drawn(1), bad];
        assert!(matches!(lm.generate_batch_with(&mut state, &prompts, &each, go_on), Err(Error::Option { .. })));
    }
    assert_eq!(state.lengths(), [0; 4]);
}

#[test]
fn a_text_can_end_where_the_positions_do() {
    let mut config = config(100);
    (config.max_position_embeddings, config.orig_max_position_embeddings) = (64, Some(32));
    let lm = HymbaLm::random(config, 7, &LoadOptions::default()).unwrap();
    let room = 64 - lm.config().num_memory_tokens;
    let prompt = |length: usize| (0..length as u32).map(|i| 1 + i % 50).collect::<Vec<_>>();
    let unlimited = drawn(50);
    let limited = unlimited.clone().stop_at_max_positions(true);

    let lengths = [1, room - 7, room - 1, room, room + 1, 200];
    let prompts: Vec<_> = lengths.iter().map(|&length| prompt(length)).collect();
    let mut state = lm.new_state(lengths.len());
    let rows = lm.generate_batch_with(&mut state, &prompts, &limited, go_on).unwrap();
    let beyond = lm.generate_batch(&prompts, &unlimited, go_on).unwrap();
    for (i, (row, beyond)) in rows.iter().zip(&beyond).enumerate() {
        let left = room.saturating_sub(lengths[i]);
        let finish = if left < 50 { FinishReason::MaxPositions } else { FinishReason::MaxTokens };
        assert_eq!((row.ids.len(), row.finish), (left.min(50), finish), "a prompt of {}", lengths[i]);
        assert_eq!(state.lengths()[i], lengths[i].max((lengths[i] + 50).min(room)));
        // by default nothing ends there, and up to there nothing changes
        assert_eq!((beyond.ids.len(), beyond.finish), (50, FinishReason::MaxTokens));
        assert_eq!(row.ids, beyond.ids[..row.ids.len()]);
    }

    // what a state has seen takes positions, too
    let mut state = lm.new_state(1);
    lm.generate_with(&mut state, &prompt(20), &limited.clone().max_tokens(30), go).unwrap();
    let rest = lm.generate_with(&mut state, &[3], &limited, go).unwrap();
    assert_eq!((rest.ids.len(), rest.finish), (room - 51, FinishReason::MaxPositions));
    assert_eq!(state.lengths(), [room]);
}

/// The tiny model after `edit`, in a folder.
fn folder(edit: impl FnOnce(&mut HymbaLmConfig)) -> tempfile::TempDir {
    let mut config = config(100);
    edit(&mut config);
    let folder = tempfile::tempdir().unwrap();
    HymbaLm::random(config, 7, &LoadOptions::default()).unwrap().save_dir(folder.path()).unwrap();
    folder
}

/// Makes NaN of what the model knows of a token: after it there are no usable logits.
fn damage(folder: &Path, token: usize) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let (header, file) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let embedding = file.info("model.embed_tokens.weight").unwrap();
    let (start, stop) = embedding.data_offsets;
    let row = (stop - start) / embedding.shape[0];
    let first = 8 + header + start + token * row;
    bytes[first..first + row].fill(0xff);
    fs::write(&path, bytes).unwrap();
}

#[test]
fn after_unusable_logits_the_state_has_seen_what_was_heard() {
    let folder = folder(|config| config.tie_word_embeddings = false);
    let lm = HymbaLm::from_dir(folder.path()).unwrap();
    let prompts = [vec![1, 2, 3], vec![9]];
    let options = drawn(8);
    let sound = lm.generate_batch(&prompts, &options, go_on).unwrap();
    // a token that only the second row takes, and only as its fourth
    let (last, token) = (3, sound[1].ids[3]);
    assert!(!sound[0].ids[..=last].contains(&token) && !sound[1].ids[..last].contains(&token));
    damage(folder.path(), token as usize);

    let lm = HymbaLm::from_dir(folder.path()).unwrap();
    let mut state = lm.new_state(2);
    let mut heard = [Vec::new(), Vec::new()];
    let error = lm.generate_batch_with(&mut state, &prompts, &options, |row, id| {
        heard[row].push(id);
        ControlFlow::Continue(())
    });
    assert!(matches!(error, Err(Error::Logits(_))), "{error:?}");
    for row in 0..2 {
        assert_eq!(heard[row], sound[row].ids[..=last], "row {row}");
        assert_eq!(state.lengths()[row], prompts[row].len() + heard[row].len());
    }
    // the other row goes on from there as if nothing had happened
    let mut first = state.select(&[0]).unwrap();
    let mut whole = lm.new_state(1);
    lm.generate_with(&mut whole, &prompts[0], &options.clone().max_tokens(last + 1), go).unwrap();
    let next = hymba::ndarray::arr1(&[4]);
    assert_eq!(lm.step(&next, &mut first).unwrap(), lm.step(&next, &mut whole).unwrap());
}

#[test]
fn end_tokens_are_those_of_generation_config() {
    let folder = folder(|config| config.eos_token_id = vec![2, 3]);
    let path = folder.path().join(FILE);
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        HymbaLm::from_dir(folder.path())
    };
    let lm = HymbaLm::from_dir(folder.path()).unwrap();
    assert_eq!(lm.config().eos_token_id, [2, 3]);
    let greedy = GenerateOptions::default().max_tokens(12);
    let ids = lm.generate(&[1, 4], &greedy.clone().stop_tokens(vec![]), go).unwrap().ids;
    let end = ids[4];
    let before = ids.iter().position(|&id| id == end).unwrap();

    for (text, expected) in [
        (format!(r#"{{"eos_token_id": [2, {end}]}}"#), vec![2, end]),
        (format!("\u{feff}{{\"x\": NaN, \"eos_token_id\": {end}, \"y\": [-Infinity, {{}}]}}\r\n"), vec![end]),
        (r#"{"eos_token_id": null, "bos_token_id": 1}"#.into(), vec![2, 3]),
        (r#"{"_from_model_config": true}"#.into(), vec![2, 3]),
        (r#"{"eos_token_id": []}"#.into(), vec![]),
    ] {
        let lm = read(&text).unwrap();
        assert_eq!(lm.config().eos_token_id, expected, "{text}");
        if expected.contains(&end) {
            let generated = lm.generate(&[1, 4], &greedy, go).unwrap();
            assert_eq!((generated.ids.len(), generated.finish), (before, FinishReason::StopToken), "{text}");
            // what the model was read with is what is written
            let again = tempfile::tempdir().unwrap();
            lm.save_dir(again.path()).unwrap();
            assert_eq!(HymbaLm::from_dir(again.path()).unwrap().config().eos_token_id, expected);
        }
    }
    for (text, expected) in [
        (r#"{"eos_token_id": "</s>"}"#, r#"eos_token_id = "</s>""#),
        (r#"{"eos_token_id": -1}"#, "eos_token_id = -1"),
        (r#"{"eos_token_id": 2.5}"#, "eos_token_id = 2.5"),
        (r#"{"eos_token_id": [2, [3]]}"#, "eos_token_id = [2,[3]]"),
        (r#"{"eos_token_id": true}"#, "eos_token_id = true"),
        (r#"{"eos_token_id": 100}"#, "eos_token_id = 100 is not usable: it must be below vocab_size = 100"),
        (r#"{"eos_token_id": 4294967298}"#, "eos_token_id = 4294967298"),
        (r#"[2]"#, "not an object"),
        (r#"{"eos_token_id": 2"#, "not an object"),
        ("", "not an object"),
        (&"[".repeat(60_000), "not an object"),
        (&" ".repeat(70_000), "at most"),
    ] {
        let error = read(text).unwrap_err();
        assert!(matches!(&error, Error::Format { path, .. } if path.ends_with(FILE)), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn options_are_read_from_generation_config() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let read = |text: &str| {
        fs::write(&path, text).unwrap();
        GenerateOptions::from_dir(folder.path())
    };
    let default = GenerateOptions::default;
    assert_eq!(GenerateOptions::from_dir(folder.path()).unwrap(), default());
    assert!(matches!(GenerateOptions::from_dir(folder.path().join("no")), Err(Error::Io { .. })));

    for (text, expected) in [
        ("{}", default()),
        (r#"{"temperature": 0.7, "top_p": 0.9}"#, default().top_p(0.9)),
        (r#"{"do_sample": false, "temperature": 0}"#, default()),
        (r#"{"do_sample": true}"#, default().temperature(1.0)),
        (r#"{"do_sample": true, "temperature": 0}"#, default()),
        (r#"{"do_sample": true, "temperature": 2, "top_k": 0}"#, default().temperature(2.0)),
        (
            r#"{"do_sample": true, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "max_new_tokens": 64,
                "repetition_penalty": 1.1, "eos_token_id": [2, 7], "pad_token_id": -1, "suppress_tokens": ["x"]}"#,
            default()
                .temperature(0.7)
                .top_k(40)
                .top_p(0.9)
                .min_p(0.05)
                .max_tokens(64)
                .repetition_penalty(1.1)
                .stop_tokens(vec![2, 7]),
        ),
        (
            r#"{"do_sample": null, "temperature": null, "top_k": null, "top_p": null, "min_p": null,
                "repetition_penalty": null, "max_new_tokens": null, "eos_token_id": null}"#,
            default(),
        ),
        ("\u{feff}{\"do_sample\": true, \"x\": Infinity, \"temperature\": NaN}", default().temperature(1.0)),
        (r#"{"eos_token_id": []}"#, default().stop_tokens(vec![])),
        // of a key that is there twice Python takes the last
        (r#"{"max_new_tokens": 1, "max_new_tokens": 2}"#, default().max_tokens(2)),
    ] {
        assert_eq!(read(text).unwrap(), expected, "{text}");
    }
    for (key, bad) in [
        ("do_sample", &["1", "\"true\"", "[]"][..]),
        ("temperature", &["-1", "\"0.7\"", "true", "1e300", "[1]"]),
        ("top_k", &["-1", "1.5", "\"40\"", "1e30"]),
        ("top_p", &["0", "90", "-0.5", "{}"]),
        ("min_p", &["1.5", "-1"]),
        ("repetition_penalty", &["0", "-1", "\"\\n\""]),
        ("max_new_tokens", &["-5", "2.5", "99999999999999999999"]),
        ("eos_token_id", &["-1", "\"</s>\"", "[2, null]", "4294967296"]),
    ] {
        for value in bad {
            let sample = if key == "do_sample" { "" } else { r#""do_sample": true, "# };
            let error = read(&format!(r#"{{{sample}"{key}": {value}}}"#)).unwrap_err();
            assert!(matches!(&error, Error::Format { path, .. } if path.ends_with(FILE)), "{error}");
            assert!(error.to_string().contains(&format!("{key} = ")), "{key}: {value}: {error}");
        }
    }
}

/// The encoder's and the trainer's files are written by the same code.
#[cfg(unix)]
#[test]
fn saving_keeps_links_and_modes() {
    use std::os::unix::fs::{PermissionsExt, symlink};

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("big")).unwrap();
    fs::create_dir(at("model")).unwrap();
    let lm = model(100);
    let mut state = lm.new_state(1);
    lm.prefill_ragged(&[[1, 2, 3]], &mut state).unwrap();
    for (link, target) in [("model/config.json", "big/config"), ("model/model.safetensors", "big/v7"), ("s", "big/s")] {
        fs::write(at(target), "old").unwrap();
        fs::set_permissions(at(target), fs::Permissions::from_mode(0o640)).unwrap();
        symlink(at(target), at(link)).unwrap();
    }
    lm.save_dir(at("model")).unwrap();
    lm.save_state(&state, at("s")).unwrap();
    for (link, target) in [("model/config.json", "big/config"), ("model/model.safetensors", "big/v7"), ("s", "big/s")] {
        assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link}");
        assert_ne!(fs::read(at(target)).unwrap(), b"old");
        assert_eq!(fs::metadata(at(target)).unwrap().permissions().mode() & 0o7777, 0o640, "{target}");
    }
    assert_eq!(HymbaLm::from_dir(at("model")).unwrap().load_state(at("s")).unwrap().lengths(), [3]);
}
