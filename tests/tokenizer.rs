//! The tokenizer and the chat template of the published model, and files and templates of strangers.
#![cfg(feature = "tokenizer")]

use std::fs;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use hymba::Error;
use hymba::lm::{ChatOptions, ChatTemplate, Message, StopMatcher, TextStream, Tokenizer};
use serde_json::{Value, json};

const FOLDER: &str = "tests/data/hymba-1.5b-base";

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_dir(FOLDER).unwrap());

fn json_file(name: &str) -> Value {
    serde_json::from_slice(&fs::read(Path::new(FOLDER).join(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn streamed(mut stream: TextStream, ids: &[u32]) -> String {
    let mut text: String = ids.iter().map(|&id| stream.push(id).to_owned()).collect();
    text.push_str(stream.finish());
    text
}

/// SplitMix64.
fn random(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) % below as u64) as usize
}

#[test]
fn texts_have_the_published_ids() {
    let cases = json_file("tokenizer_cases.json");
    assert_eq!(TOKENIZER.vocab_size() as u64, cases["vocab_size"].as_u64().unwrap());
    assert_eq!((TOKENIZER.bos_id(), TOKENIZER.eos_id()), (Some(1), Some(2)));
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 48);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["ids"]);
        assert_eq!(TOKENIZER.encode(text).unwrap(), expected, "{text:?}");
        assert_eq!(TOKENIZER.encode_without_special(text).unwrap(), ids(&case["ids_without_special"]), "{text:?}");
        let tokens: Vec<String> = expected.iter().map(|&id| TOKENIZER.token(id).unwrap()).collect();
        assert_eq!(json!(tokens), case["tokens"]);
        assert_eq!(TOKENIZER.decode(&expected).unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(TOKENIZER.decode_keep_special(&expected).unwrap(), case["decoded_keep_special"].as_str().unwrap());
        assert_eq!(streamed(TOKENIZER.stream(), &expected), case["decoded"].as_str().unwrap());
    }
}

#[test]
fn chats_have_the_published_prompts() {
    let cases = json_file("tokenizer_cases.json");
    let cases = cases["chat_cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let options = ChatOptions::new().add_generation_prompt(case["add_generation_prompt"].as_bool().unwrap());
        let rendered = case["rendered"].as_str().unwrap();
        assert_eq!(TOKENIZER.render_chat(&messages, &options).unwrap(), rendered);
        assert_eq!(TOKENIZER.encode_chat(&messages, &options).unwrap(), ids(&case["ids"]));
        assert_eq!(ChatTemplate::default().render(&messages, &options).unwrap(), rendered);
    }
}

/// Written out from the published template by hand.
#[test]
fn tools_and_contexts_are_in_the_prompt() {
    let tool: Value =
        serde_json::from_str(r#"{"name": "café <b>", "b": [1, 2.5, null, true], "a": {"x": 1e-7}}"#).unwrap();
    let messages = [Message::system(" Be brief. "), Message::user("Hi")];
    let tool_line = r#"<tool> {"name": "café <b>", "b": [1, 2.5, null, true], "a": {"x": 1e-07}} </tool>"#;
    for (options, between) in [
        (ChatOptions::new().tools([tool.clone(), json!({})]), format!("\n\n{tool_line}\n<tool> {{}} </tool>")),
        (ChatOptions::new().contexts([" rain "]), "\n\n<context> rain </context>".to_owned()),
        (
            ChatOptions::new().tools([tool]).contexts(["rain", "sun"]),
            format!("\n\n{tool_line}\n\n<context> rain </context>\n<context> sun </context>"),
        ),
    ] {
        let expected =
            format!("<extra_id_0>System\nBe brief.{between}\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n");
        assert_eq!(TOKENIZER.render_chat(&messages, &options).unwrap(), expected);
        assert_eq!(ChatTemplate::default().render(&messages, &options).unwrap(), expected);
    }
}

#[test]
fn the_default_template_is_the_published_one() {
    let mut state = 5;
    let words = ["", " ", "a\n", "\u{1c}b", " {{ x }} ", "<extra_id_1>User\n", "é\u{a0}"];
    for _ in 0..500 {
        let messages: Vec<Message> = (0..random(&mut state, 6))
            .map(|_| {
                let content = words[random(&mut state, words.len())];
                let make = [Message::system, Message::user, Message::assistant, Message::tool];
                make[random(&mut state, 4)](content)
            })
            .collect();
        let options = ChatOptions::new()
            .tools((0..random(&mut state, 3)).map(|number| json!({"n": number})))
            .contexts((0..random(&mut state, 3)).map(|_| " c "))
            .add_generation_prompt(random(&mut state, 2) == 0);
        let published = TOKENIZER.render_chat(&messages, &options).unwrap();
        assert_eq!(ChatTemplate::default().render(&messages, &options).unwrap(), published);
    }
}

#[test]
fn streams_of_any_ids_are_what_decode_gives() {
    let mut state = 3;
    let reference = tokenizers::Tokenizer::from_file(Path::new(FOLDER).join("tokenizer.json")).unwrap();
    let mut equal = 0;
    for round in 0..2000 {
        // bytes more often than their share
        let id = |state: &mut u64| match random(state, 4) {
            0 => 3 + random(state, 256) as u32,
            1 => random(state, 3) as u32,
            _ => random(state, 32001) as u32,
        };
        let ids: Vec<u32> = (0..round % 20).map(|_| id(&mut state)).collect();
        let text = TOKENIZER.decode(&ids).unwrap();
        assert_eq!(streamed(TOKENIZER.stream(), &ids), text, "{ids:?}");
        // where bytes are no text, Hugging Face's gives up those beside them, too
        for (text, skip) in [(text, true), (TOKENIZER.decode_keep_special(&ids).unwrap(), false)] {
            if !text.contains('\u{fffd}') {
                assert_eq!(reference.decode(&ids, skip).unwrap(), text, "{ids:?}");
                equal += 1;
            }
        }
    }
    assert!(equal > 1000, "{equal}");
    let error = TOKENIZER.decode(&[1, 32001]).unwrap_err().to_string();
    assert!(error.contains("32001"), "{error}");
}

#[test]
fn random_texts_come_back() {
    let mut state = 4;
    let characters: Vec<char> = "ab \n\t.,<>s/é€😀한▁�\u{0}\u{301}".chars().filter(|&c| c != '▁').collect();
    for round in 0..500 {
        let text: String = (0..round % 40).map(|_| characters[random(&mut state, characters.len())]).collect();
        if text.contains("<s>") {
            continue;
        }
        let ids = TOKENIZER.encode(&text).unwrap();
        assert_eq!(TOKENIZER.decode(&ids).unwrap(), text);
        assert_eq!(streamed(TOKENIZER.stream(), &ids), text);
    }
}

#[test]
fn a_long_text_is_quick() {
    let begin = Instant::now();
    let text = "a long text, the same words again and again; ".repeat(20_000);
    let ids = TOKENIZER.encode(&text).unwrap();
    assert_eq!(streamed(TOKENIZER.stream(), &ids), text);
    let spaces = " ".repeat(100_000);
    assert_eq!(TOKENIZER.decode(&TOKENIZER.encode(&spaces).unwrap()).unwrap(), spaces);
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
}

#[test]
fn generated_text_ends_at_a_stop_string() {
    let ids = TOKENIZER.encode("Blue.\n<extra_id_1>User\nThanks").unwrap();
    let mut stream = TOKENIZER.stream();
    let mut stops = StopMatcher::new(["<extra_id_1>"]).unwrap();
    let mut text = String::new();
    for id in ids {
        text.push_str(stops.push(stream.push(id)));
        if stops.stopped().is_some() {
            break;
        }
    }
    assert_eq!((text.as_str(), stops.stopped()), ("Blue.\n", Some("<extra_id_1>")));
}

/// Reads a folder with this tokenizer and this config.
fn read(tokenizer: &[u8], config: Option<&[u8]>) -> Result<Tokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    if let Some(config) = config {
        fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    }
    Tokenizer::from_dir(folder.path())
}

fn small() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<s>", "special": true}, {"id": 5, "content": "[PAD]", "special": true}],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "unk_token": "<s>", "vocab": {"<s>": 0, "▁": 1, "a": 2, "▁a": 3, "aa": 4},
                  "merges": [["▁", "a"], "a a"]},
    })
}

#[test]
fn a_small_tokenizer_is_read() {
    let tokenizer = read(&serde_json::to_vec(&small()).unwrap(), None).unwrap();
    assert_eq!(tokenizer.encode("aaaz[PAD]a").unwrap(), [0, 3, 4, 0, 5, 3]);
    assert_eq!(tokenizer.decode(&[0, 3, 4, 5]).unwrap(), "aaa");
    assert_eq!(tokenizer.eos_id(), None);
    // the template and the special tokens are the usual ones
    let prompt = tokenizer.render_chat(&[Message::user("a")], &ChatOptions::new()).unwrap();
    assert_eq!(prompt, "<extra_id_0>System\n\n<extra_id_1>User\na\n<extra_id_1>Assistant\n");
}

#[test]
fn tokenizers_of_strangers() {
    type Change = fn(&mut Value);
    let rows: [(&str, Change); 33] = [
        ("no model", |file| drop(file.as_object_mut().unwrap().remove("model"))),
        ("another model", |file| file["model"]["type"] = json!("Unigram")),
        ("a list for a vocabulary", |file| file["model"]["vocab"] = json!([["a", 0.0]])),
        ("a negative id", |file| file["model"]["vocab"]["b"] = json!(-1)),
        ("a huge id", |file| file["model"]["vocab"]["b"] = json!(u32::MAX)),
        ("an id twice", |file| file["model"]["vocab"]["b"] = json!(2)),
        ("an empty piece", |file| file["model"]["vocab"][""] = json!(9)),
        ("a long piece", |file| file["model"]["vocab"]["b".repeat(5000)] = json!(9)),
        ("a merge of nothing", |file| file["model"]["merges"] = json!([["a", "b"]])),
        ("a merge to nothing", |file| file["model"]["merges"] = json!([["aa", "aa"]])),
        ("a merge without a space", |file| file["model"]["merges"] = json!(["aa"])),
        ("a merge of three", |file| file["model"]["merges"] = json!(["a a a"])),
        ("a prefix inside a character", |file| file["model"]["continuing_subword_prefix"] = json!("##")),
        ("a suffix", |file| file["model"]["end_of_word_suffix"] = json!("</w>")),
        ("dropout", |file| file["model"]["dropout"] = json!(0.5)),
        ("no such unknown token", |file| file["model"]["unk_token"] = json!("b")),
        ("another normalizer", |file| {
            file["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})
        }),
        ("a regex", |file| {
            file["normalizer"] = json!({"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""});
        }),
        ("an empty pattern", |file| {
            file["normalizer"] = json!({"type": "Replace", "pattern": {"String": ""}, "content": "a"});
        }),
        ("a text that doubles", |file| {
            let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
            file["normalizer"] = json!({"type": "Sequence", "normalizers": vec![double; 8]});
        }),
        ("many steps", |file| {
            let step = json!({"type": "Prepend", "prepend": "a"});
            file["normalizer"] = json!({"type": "Sequence", "normalizers": vec![step; 100]});
        }),
        ("a long prefix", |file| file["normalizer"]["prepend"] = json!("a".repeat(1000))),
        ("another pre-tokenizer", |file| file["pre_tokenizer"] = json!({"type": "Whitespace"})),
        ("no decoder", |file| file["decoder"] = json!(null)),
        ("a strip beyond the start", |file| file["decoder"]["decoders"][3]["stop"] = json!(usize::MAX)),
        ("a decoder in another order", |file| file["decoder"]["decoders"].as_array_mut().unwrap().reverse()),
        ("an added token with another id", |file| file["added_tokens"][1]["id"] = json!(7)),
        ("an added id twice", |file| file["added_tokens"][1]["id"] = json!(0)),
        ("an added token of spaces", |file| file["added_tokens"][1]["lstrip"] = json!(true)),
        ("an empty added token", |file| file["added_tokens"][1]["content"] = json!("")),
        ("an added token that becomes nothing", |file| {
            file["normalizer"] = json!({"type": "Replace", "pattern": {"String": "b"}, "content": ""});
            file["added_tokens"][1] = json!({"id": 5, "content": "b", "normalized": true});
        }),
        ("two added tokens that become the same", |file| {
            file["normalizer"] = json!({"type": "Replace", "pattern": {"String": "b"}, "content": "c"});
            file["added_tokens"][0] = json!({"id": 5, "content": "b", "normalized": true});
            file["added_tokens"][1] = json!({"id": 6, "content": "c", "normalized": true});
        }),
        ("an added token that is no object", |file| file["added_tokens"] = json!([5])),
    ];
    for (what, change) in rows {
        let mut file = small();
        change(&mut file);
        let error = read(&serde_json::to_vec(&file).unwrap(), None).expect_err(what);
        assert!(matches!(error, Error::Format { .. }), "{what}: {error}");
        assert!(error.to_string().len() < 600, "{what}: {error}");
    }
    // and a vocabulary with a piece twice, which a JSON value cannot hold
    let text = serde_json::to_string(&small()).unwrap().replace(r#""a":2,"#, r#""a":2,"a":9,"#);
    assert!(matches!(read(text.as_bytes(), None), Err(Error::Format { .. })));
}

#[test]
fn bytes_of_strangers() {
    let valid = serde_json::to_vec(&small()).unwrap();
    for end in 0..valid.len() {
        assert!(matches!(read(&valid[..end], None), Err(Error::Format { .. })), "cut at {end}");
    }
    for at in 0..valid.len() {
        let mut bytes = valid.clone();
        for byte in [0, b'"', b'9', b'{', 0xff] {
            bytes[at] = byte;
            if let Ok(tokenizer) = read(&bytes, None) {
                let ids = tokenizer.encode("a aa[PAD]<s>é").unwrap_or_default();
                tokenizer.decode(&ids).unwrap();
            }
        }
    }
    for opening in ["[", r#"{"model":"#, r#"{"normalizer":{"type":"Sequence","normalizers":["#] {
        assert!(matches!(read(opening.repeat(100_000).as_bytes(), None), Err(Error::Format { .. })));
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::from_dir(folder.path()), Err(Error::Io { .. })));
    fs::create_dir(folder.path().join("tokenizer.json")).unwrap();
    assert!(matches!(Tokenizer::from_dir(folder.path()), Err(Error::Format { .. })));
    fs::remove_dir(folder.path().join("tokenizer.json")).unwrap();
    fs::File::create(folder.path().join("tokenizer.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(Tokenizer::from_dir(folder.path()), Err(Error::Format { .. })));
}

#[test]
fn configs_of_strangers() {
    let tokenizer = serde_json::to_vec(&small()).unwrap();
    for config in ["", "[]]", "{", r#"{"bos_token": 5}"#, r#"{"chat_template": 5}"#, r#"{"add_bos_token": "yes"}"#] {
        let error = read(&tokenizer, Some(config.as_bytes())).expect_err(config);
        assert!(matches!(error, Error::Format { .. }), "{config}: {error}");
    }
    let config = json!({
        "bos_token": {"content": "[PAD]", "lstrip": false},
        "eos_token": "<s>",
        "chat_template": [
            {"name": "tool_use", "template": "{{ 1 }}"},
            {"name": "default", "template": "{{ bos_token + messages[0].content + eos_token }}"},
        ],
    });
    let tokenizer = read(&tokenizer, Some(&serde_json::to_vec(&config).unwrap())).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(5), Some(0)));
    assert_eq!(tokenizer.encode("a").unwrap(), [5, 3]);
    assert_eq!(tokenizer.render_chat(&[Message::user("a")], &ChatOptions::new()).unwrap(), "[PAD]a<s>");
}

#[test]
fn tokenizers_can_be_shared() {
    fn shared<T: Send + Sync + Clone>() {}
    shared::<Tokenizer>();
    shared::<ChatTemplate>();
    shared::<TextStream>();
    shared::<StopMatcher>();
}
