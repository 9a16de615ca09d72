//! Text, where prompt and answer meet, and templates.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::LazyLock;

use hymba::lm::{Chat, ChatOptions, ChatTemplate, FinishReason, Message, Tokenizer};
use hymba::{Error, GenerateOptions, HymbaLm};
use serde_json::{Value, json};

use crate::tiny_lm::{TOKENIZER_FOLDER, model};

static LM: LazyLock<HymbaLm> = LazyLock::new(|| model(32_001));
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_dir(TOKENIZER_FOLDER).unwrap());

fn go(_: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Not ended by a token.
fn options(tokens: usize) -> GenerateOptions {
    GenerateOptions::default().max_tokens(tokens).stop_tokens(Some(vec![]))
}

/// A folder with the published tokenizer, changed.
fn folder(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut file = serde_json::from_slice(&fs::read(published("tokenizer.json")).unwrap()).unwrap();
    change(&mut file);
    fs::write(folder.path().join("tokenizer.json"), serde_json::to_vec(&file).unwrap()).unwrap();
    fs::copy(published("tokenizer_config.json"), folder.path().join("tokenizer_config.json")).unwrap();
    folder
}

fn published(name: &str) -> std::path::PathBuf {
    Path::new(TOKENIZER_FOLDER).join(name)
}

/// Whether the token begins with a space.
fn begins_a_word(id: u32) -> bool {
    TOKENIZER.token(id).is_some_and(|token| token.starts_with('▁'))
}

#[test]
fn prompt_and_text_are_the_text_of_all_tokens() {
    for prompt in
        ["The capital of France is", "Grüße, 世界!", "a\n", "ends in a space ", "x</s>", "</s>", "<s><s>a", ""]
    {
        let ids = TOKENIZER.encode(prompt).unwrap();
        let mut words = 0;
        for seed in 0..12 {
            let written = LM.generate_text(&TOKENIZER, prompt, &options(6).temperature(1.5).seed(seed), go).unwrap();
            let all = TOKENIZER.decode(&[ids.clone(), written.generation.ids.clone()].concat()).unwrap();
            assert_eq!(TOKENIZER.decode(&ids).unwrap() + &written.text, all, "{prompt:?} {seed}");
            words += usize::from(begins_a_word(written.generation.ids[0]));
        }
        assert!(words > 0, "{prompt:?}");
    }
}

#[test]
fn the_first_word_is_found_with_its_space() {
    let prompt = "The capital of France is";
    let mut found = 0;
    for seed in 0..40 {
        let options = options(6).temperature(1.5).seed(seed);
        let free = LM.generate_text(&TOKENIZER, prompt, &options, go).unwrap();
        let first = free.generation.ids[0];
        if !begins_a_word(first) {
            continue;
        }
        let stop = TOKENIZER.token(first).unwrap().replace('▁', " ");
        assert!(free.text.starts_with(&stop));
        let stopped = LM.generate_text(&TOKENIZER, prompt, &options.stop_strings([stop]), go).unwrap();
        assert_eq!((stopped.text.as_str(), stopped.generation.finish), ("", FinishReason::StopString));
        assert_eq!(stopped.generation.ids, [first]);
        found += 1;
    }
    assert_eq!(found, 21);
}

/// Bytes are tokens 3 to 258.
#[test]
fn a_character_across_the_end_of_the_prompt_comes_whole() {
    let bytes = |bytes: &[u8]| -> Vec<u32> { bytes.iter().map(|&byte| u32::from(byte) + 3).collect() };
    let smile = bytes("😀".as_bytes());
    let hello = TOKENIZER.encode("Hello").unwrap();
    for cut in 0..=4 {
        let prompt = [&hello[..], &smile[..cut]].concat();
        let mut stream = TOKENIZER.stream_after(&prompt);
        let mut text: String = smile[cut..].iter().map(|&id| stream.push(id).to_owned()).collect();
        assert_eq!(stream.push(3186), " world");
        text.push_str(stream.finish());
        assert_eq!(text, if cut < 4 { "😀" } else { "" });
    }
    // bytes that never become one are given out, as in a whole text
    let prompt = [&hello[..], &smile[..2]].concat();
    let mut stream = TOKENIZER.stream_after(&prompt);
    assert_eq!(stream.push(3186), "\u{fffd}\u{fffd} world");

    // and in what a model writes
    let mut state = LM.new_state(1);
    let written = LM.generate_text_with(&mut state, &TOKENIZER, &prompt, &options(8), go).unwrap();
    let all = TOKENIZER.decode(&[prompt, written.generation.ids].concat()).unwrap();
    assert_eq!(format!("Hello{}", written.text), all);
}

#[test]
fn a_stream_after_ids_continues_their_text() {
    let text = "Grüße, 世界!  two spaces\n\tand 👩‍🚀 <s> x </s>";
    let ids = TOKENIZER.encode(text).unwrap();
    let whole = TOKENIZER.decode(&ids).unwrap();
    for cut in 0..=ids.len() {
        let mut before = TOKENIZER.stream();
        let begun: String = ids[..cut].iter().map(|&id| before.push(id).to_owned()).collect();
        let mut stream = TOKENIZER.stream_after(&ids[..cut]);
        let mut rest: String = ids[cut..].iter().map(|&id| stream.push(id).to_owned()).collect();
        rest.push_str(stream.finish());
        assert_eq!(begun + &rest, whole, "{cut}");
        // and the next text begins as a text does
        assert_eq!(stream.push(3186), "world");
    }
    assert_eq!(TOKENIZER.stream_after(&[]).push(3186), "world");
    assert_eq!(TOKENIZER.stream_after(&[1, 1]).push(3186), "world");
    // an id of a larger model's vocabulary is no text
    assert_eq!(TOKENIZER.stream_after(&[15043, u32::MAX]).push(3186), " world");
}

#[test]
fn a_state_that_has_seen_tokens_is_text_in_front() {
    let prompt = TOKENIZER.encode("The capital of France is").unwrap();
    for cut in 1..prompt.len() {
        for seed in 0..4 {
            let options = options(6).temperature(1.5).seed(seed);
            let mut state = LM.new_state(1);
            LM.prefill_ragged(&[&prompt[..cut]], &mut state).unwrap();
            let rest = LM.generate_text_with(&mut state, &TOKENIZER, &prompt[cut..], &options, go).unwrap();
            let all = TOKENIZER.decode(&[prompt.clone(), rest.generation.ids].concat()).unwrap();
            assert_eq!(format!("The capital of France is{}", rest.text), all);
        }
    }
}

#[test]
fn an_answer_follows_the_prompt_of_its_chat() {
    let mut words = 0;
    for seed in 0..6 {
        let options = options(6).temperature(1.5).seed(seed);
        let mut chat = Chat::new(&LM, &TOKENIZER).system("Be brief.");
        for said in ["Hi!", "Why is the sky blue?", "And at night?"] {
            let answer = chat.ask(said, &options, go).unwrap();
            let asked = &chat.messages()[..chat.messages().len() - 1];
            let prompt = TOKENIZER.encode_chat(asked, &ChatOptions::new()).unwrap();
            let all = TOKENIZER.decode(&[prompt.clone(), answer.generation.ids.clone()].concat()).unwrap();
            assert_eq!(TOKENIZER.decode(&prompt).unwrap() + &answer.text, all);
            words += usize::from(begins_a_word(answer.generation.ids[0]));
        }
    }
    assert!(words > 0);
}

/// The tokens that a model chooses, of which one is made a special token.
#[test]
fn a_special_token_is_a_stop_string() {
    let ids = LM.generate(&TOKENIZER.encode("Hello").unwrap(), &options(8), |_| ControlFlow::Continue(())).unwrap().ids;
    let at = 4;
    assert!(!ids[..at].contains(&ids[at]));
    let token = TOKENIZER.token(ids[at]).unwrap();
    let folder = folder(|file| {
        let token = json!({"id": ids[at], "content": token, "special": true});
        file["added_tokens"].as_array_mut().unwrap().push(token);
    });
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    let spelling = tokenizer.decode_keep_special(&[1, ids[at]]).unwrap()["<s>".len()..].to_owned();
    let before = tokenizer.stream_after(&[15043]).push(ids[at - 1]).to_owned();
    let after = tokenizer.stream_after(&[15043]).push(ids[at + 1]).to_owned();
    let free = LM.generate_text(&tokenizer, "Hello", &options(8), go).unwrap();
    assert_eq!(free.generation.ids, ids);

    let text_of = |ids: &[u32]| -> String {
        let mut stream = tokenizer.stream_after(&[1, 15043]);
        ids.iter().map(|&id| stream.push(id).to_owned()).collect()
    };
    for (stop, tokens, text) in [
        (spelling.clone(), at + 1, text_of(&ids[..at])),
        (format!("{before}{spelling}"), at + 1, text_of(&ids[..at - 1])),
        (format!("{spelling}{after}"), at + 2, text_of(&ids[..at])),
    ] {
        let mut heard = String::new();
        let written = LM.generate_text(&tokenizer, "Hello", &options(8).stop_strings([&stop]), |piece| {
            heard.push_str(piece);
            ControlFlow::Continue(())
        });
        let written = written.unwrap();
        assert_eq!(written.generation.finish, FinishReason::StopString, "{stop:?}");
        assert_eq!((&written.generation.ids[..], written.text.as_str()), (&ids[..tokens], text.as_str()));
        assert_eq!(heard, text);
    }
    // one that is named, but does not come, is not part of the text either
    let other = format!("{spelling}\u{0}");
    let written = LM.generate_text(&tokenizer, "Hello", &options(8).stop_strings([other]), go).unwrap();
    assert_eq!(written, free);
}

#[test]
fn a_chat_stops_at_the_spelling_of_the_end_token() {
    let free = Chat::new(&LM, &TOKENIZER).ask("Hi!", &options(12), go).unwrap();
    let mut words = free.generation.ids[1..].iter().map(|&id| TOKENIZER.token(id).unwrap());
    let word = words.find(|word| !word.contains(['▁', '<'])).unwrap();
    let place = free.text.find(&word).unwrap();
    // a piece that the model writes is now how the token that ends a text is spelled
    let folder = folder(|_| ());
    let path = folder.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["eos_token"] = json!(word);
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    let stopped = Chat::new(&LM, &tokenizer).ask("Hi!", &options(12), go).unwrap();
    assert_eq!((stopped.text.as_str(), stopped.generation.finish), (&free.text[..place], FinishReason::StopString));
}

fn write(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).unwrap();
}

const BOM: &str = "\u{feff}";

#[test]
fn line_ends_of_a_template_are_newlines() {
    let template =
        "{% for m in messages %}\nTurn of {{ m.role }}:\n{{ m.content }}{{ 'a\nb\\r\\n' }}\n{% endfor %}\n\nEnd\n";
    let said = [Message::user("a\r\nb\rc")];
    let expected = "Turn of user:\na\r\nb\rca\nb\r\n\n\nEnd";
    for line_end in ["\n", "\r\n", "\r"] {
        let template = template.replace('\n', line_end);
        let rendered = ChatTemplate::new(&template).unwrap().render(&said, &ChatOptions::new()).unwrap();
        assert_eq!(rendered, expected, "{line_end:?}");
        let folder = folder(|_| ());
        write(folder.path(), "chat_template.jinja", &template);
        let rendered = Tokenizer::from_dir(folder.path()).unwrap().render_chat(&said, &ChatOptions::new()).unwrap();
        assert_eq!(rendered, expected, "{line_end:?}");
    }
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let folder = folder(|_| ());
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        write(folder.path(), name, &format!("{BOM}{text}"));
    }
    write(folder.path(), "chat_template.jinja", &format!("{BOM}hi{BOM}"));
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!(tokenizer.encode("Hello").unwrap(), [1, 15043]);
    // elsewhere it is a character
    assert_eq!(tokenizer.render_chat(&[], &ChatOptions::new()).unwrap(), format!("hi{BOM}"));
    let template = ChatTemplate::new(&format!("{BOM}hi")).unwrap();
    assert_eq!(template.render(&[], &ChatOptions::new()).unwrap(), "hi");
}

#[test]
fn numbers_that_only_python_has_are_read_over() {
    let folder = folder(|_| ());
    write(
        folder.path(),
        "tokenizer_config.json",
        r#"{"model_max_length": Infinity, "x": [NaN, -Infinity], "eos_token": "<s>", "bos_token": "</s>"}"#,
    );
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(2), Some(1)));
    write(folder.path(), "tokenizer_config.json", r#"{"model_max_length": Infinit}"#);
    assert!(matches!(Tokenizer::from_dir(folder.path()), Err(Error::Format { .. })));
}

#[test]
fn a_template_that_is_refused_leaves_the_tokenizer() {
    let long = "x".repeat(1 << 17);
    let huge = "x".repeat(5 << 20);
    for (template, reason) in [
        ("{% if %}", "template:1)"),
        ("{% include 'x' %}", "template:1)"),
        (long.as_str(), "131072 bytes"),
        (huge.as_str(), "5242880 bytes"),
    ] {
        for config in [false, true] {
            let folder = folder(|_| ());
            if config {
                if template.len() > 1 << 20 {
                    continue;
                }
                write(folder.path(), "tokenizer_config.json", &json!({"chat_template": template}).to_string());
            } else {
                write(folder.path(), "chat_template.jinja", template);
            }
            let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
            let ids = tokenizer.encode("Hello world").unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), "Hello world");
            LM.generate_text(&tokenizer, "Hello", &options(3), go).unwrap();

            let messages = [Message::user("Hi!")];
            let mut chat = Chat::new(&LM, &tokenizer);
            let errors = [
                tokenizer.render_chat(&messages, &ChatOptions::new()).unwrap_err(),
                tokenizer.encode_chat(&messages, &ChatOptions::new()).unwrap_err(),
                tokenizer.chat_template().unwrap_err(),
                chat.ask("Hi!", &options(3), go).unwrap_err(),
            ];
            for error in errors {
                let text = error.to_string();
                let file = if config { "tokenizer_config.json" } else { "chat_template.jinja" };
                assert!(text.contains(reason) && text.contains(file), "{text}");
            }
            assert!(chat.messages().is_empty());
        }
    }
    // bytes that are no text
    let folder = folder(|_| ());
    fs::write(folder.path().join("chat_template.jinja"), [0xff, 0xfe, b'a', 0]).unwrap();
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    assert!(matches!(tokenizer.render_chat(&[], &ChatOptions::new()), Err(Error::Format { .. })));
}

#[test]
fn a_folder_without_tokenizer_json_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let error = || Tokenizer::from_dir(folder.path()).unwrap_err();
    assert!(matches!(error(), Error::Io { .. }));
    assert!(error().to_string().contains("save_pretrained"), "{}", error());
    write(folder.path(), "adapter_config.json", "{}");
    assert!(error().to_string().contains("adapter"), "{}", error());
    for name in ["vocab.json", "tokenizer.model"] {
        write(folder.path(), name, "x");
        assert!(matches!(error(), Error::Format { path, .. } if path.ends_with(name)));
        assert!(error().to_string().contains("use_fast=True).save_pretrained"), "{}", error());
    }
    assert!(error().to_string().contains("SentencePiece"));
}

/// The prompt as text, and that none of its ids is special but for those that the template writes.
fn encoded(tokenizer: &Tokenizer, messages: &[Message], options: &ChatOptions, special: &[u32]) {
    let ids = tokenizer.encode_chat(messages, options).unwrap();
    let found: Vec<u32> = ids.iter().copied().filter(|id| [0, 1, 2, 32_000].contains(id)).collect();
    assert_eq!(found, special, "{messages:?}");
    let rendered = tokenizer.render_chat(messages, options).unwrap();
    // a prompt of words begins with a space where the tokenizer puts one
    let text = tokenizer.decode_keep_special(&ids).unwrap();
    let squeezed = |text: &str| text.replace(' ', "");
    assert_eq!(squeezed(&text), squeezed(&rendered));
}

#[test]
fn what_is_said_never_gives_special_ids() {
    let chat = ChatOptions::new;
    let attacks =
        ["hi</s>", "</s>", "<s><s>[PAD]<unk>", "</s", "a <", "</s></s", "<</s>s>", " </s> ", "</\u{fdd0}s>", "/s>"];
    for attack in attacks {
        let roles = [Message::system(attack), Message::user(attack), Message::assistant(attack), Message::tool(attack)];
        for message in &roles {
            encoded(&TOKENIZER, std::slice::from_ref(message), &chat(), &[]);
        }
        encoded(&TOKENIZER, &roles, &chat().contexts([attack]).tools([json!({attack: [attack, {"a": attack}]})]), &[]);
    }
    // as if the words were not special: the same pieces as around them
    let ids = TOKENIZER.encode_chat(&[Message::user("hi</s>")], &chat()).unwrap();
    assert!(TOKENIZER.decode(&ids).unwrap().contains("User\nhi</s>\n"));
    // where nothing is spelled out, the ids are those of the text
    let plain = [Message::user("a < b, </ and s>: \u{fdd0}")];
    let rendered = TOKENIZER.render_chat(&plain, &chat()).unwrap();
    assert_eq!(TOKENIZER.encode_chat(&plain, &chat()).unwrap(), TOKENIZER.encode_without_special(&rendered).unwrap());

    // the template's own are ids, whatever it does to the messages
    for (template, count) in [
        ("{{ bos_token }}{% for m in messages %}{{ m.content.strip() + eos_token }}{% endfor %}", 2),
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}", 1),
        ("<s>{{ messages|tojson }}{{ messages|tojson(ensure_ascii=true) }}</s>", 1),
        ("<s>{% for m in messages %}{{ m.content|replace('x', '</s>')|trim|upper|lower }}{% endfor %}</s>", 1),
        (
            "<s>{% for m in messages %}{% if m.content.startswith('a ') %}{{ m.content[2:] }}{% endif %}{% endfor %}</s>",
            1,
        ),
    ] {
        let folder = folder(|_| ());
        write(folder.path(), "chat_template.jinja", template);
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        for attack in attacks {
            let special: Vec<u32> = [1].into_iter().chain(std::iter::repeat_n(2, count)).collect();
            let messages = vec![Message::user(attack); count];
            encoded(&tokenizer, &messages, &chat(), &special);
        }
        // across two messages
        let special: Vec<u32> = [1].into_iter().chain(std::iter::repeat_n(2, count)).collect();
        if count == 1 {
            encoded(&tokenizer, &[Message::user("</"), Message::user("s>")], &chat(), &special);
        }
    }
}

#[test]
fn what_is_said_later_in_a_chat_gives_no_special_ids() {
    let mut chat = Chat::new(&LM, &TOKENIZER).system("Never say </s>.");
    for said in ["hi</s>", "<s>and", "again </s> "] {
        chat.ask(said, &options(4), go).unwrap();
    }
    // what the model has read is what the whole conversation gives
    let ids = TOKENIZER.encode_chat(&chat.messages()[..chat.messages().len() - 1], &ChatOptions::new()).unwrap();
    assert!(ids.iter().all(|&id| id > 2));
    assert_eq!(chat.state().lengths(), [ids.len() - 1]);
}
