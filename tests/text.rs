//! From a text to a text: a small model with random weights, the published tokenizer beside it, as in a folder of the Hub.
#![cfg(feature = "tokenizer")]

#[path = "common/tiny_lm.rs"]
mod tiny_lm;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::LazyLock;

use hymba::lm::{Chat, ChatOptions, FinishReason, Message, Tokenizer};
use hymba::{Error, GenerateOptions, HymbaLm};
use tiny_lm::{TOKENIZER_FOLDER, model};

/// What a user has after downloading.
static HUB: LazyLock<(HymbaLm, Tokenizer)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    model(32_001).save_dir(folder.path()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(Path::new(TOKENIZER_FOLDER).join(name), folder.path().join(name)).unwrap();
    }
    (HymbaLm::from_dir(folder.path()).unwrap(), Tokenizer::from_dir(folder.path()).unwrap())
});

/// Greedy, and not ended by a token.
fn greedy(tokens: usize) -> GenerateOptions {
    GenerateOptions::default().max_tokens(tokens).stop_tokens(Some(vec![]))
}

fn go(_: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn the_pieces_of_a_text_are_the_text() {
    let (lm, tokenizer) = &*HUB;
    for (seed, prompt) in
        ["The capital of France is", "", "Grüße, 世界! 👩‍🚀 \u{301}\0\n\t", "a <s> b </s>"].iter().enumerate()
    {
        for options in [greedy(30), greedy(30).temperature(1.5).seed(seed as u64)] {
            let mut pieces = Vec::new();
            let written = lm.generate_text(tokenizer, prompt, &options, |piece| {
                pieces.push(piece.to_owned());
                ControlFlow::Continue(())
            });
            let written = written.unwrap();
            assert_eq!(pieces.concat(), written.text, "{prompt:?}");
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            let generation = written.generation;
            assert_eq!((generation.ids.len(), generation.finish), (30, FinishReason::MaxTokens));
            // the same tokens as without text, and their text
            let ids = tokenizer.encode(prompt).unwrap();
            assert_eq!(lm.generate(&ids, &options, |_| ControlFlow::Continue(())).unwrap(), generation);
            let mut stream = tokenizer.stream_after(&ids);
            let mut text: String = generation.ids.iter().map(|id| stream.push(*id).to_owned()).collect();
            text.push_str(stream.finish());
            assert_eq!(text, written.text);
        }
    }
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_part_of_it() {
    let (lm, tokenizer) = &*HUB;
    let whole = lm.generate_text(tokenizer, "Hello", &greedy(40), go).unwrap().text;
    let places: Vec<usize> = whole.char_indices().map(|(at, _)| at).collect();
    // from within one token into others
    for (from, to) in [(5, 8), (11, 30), (0, 2), (20, 21)] {
        let stop = &whole[places[from]..places[to]];
        let want = &whole[..whole.find(stop).unwrap()];
        let mut heard = String::new();
        let options = greedy(40).stop_strings(["not there", stop]);
        let written = lm.generate_text(tokenizer, "Hello", &options, |piece| {
            heard.push_str(piece);
            ControlFlow::Continue(())
        });
        let written = written.unwrap();
        assert_eq!((heard.as_str(), written.text.as_str()), (want, want), "{stop:?}");
        assert_eq!(written.generation.finish, FinishReason::StopString);
        assert!(written.generation.ids.len() < 40);
    }
    // the beginning of one, held back to the end, is text after all
    let last = format!("{}\u{0}", &whole[places[places.len() - 1]..]);
    let written = lm.generate_text(tokenizer, "Hello", &greedy(40).stop_strings([last]), go).unwrap();
    assert_eq!((written.text, written.generation.finish), (whole, FinishReason::MaxTokens));
    let empty = lm.generate_text(tokenizer, "Hello", &greedy(4).stop_strings([""]), go);
    assert!(matches!(empty, Err(Error::Option { option: "stop_strings", .. })), "{empty:?}");
}

#[test]
fn a_reader_ends_the_text() {
    let (lm, tokenizer) = &*HUB;
    let whole = lm.generate_text(tokenizer, "Hello", &greedy(40), go).unwrap().text;
    let mut heard = String::new();
    let mut calls = 0;
    let written = lm.generate_text(tokenizer, "Hello", &greedy(40), |piece| {
        heard.push_str(piece);
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let written = written.unwrap();
    assert_eq!(written.generation.finish, FinishReason::Cancelled);
    assert_eq!(written.text, heard);
    assert!(whole.starts_with(&heard) && heard.len() < whole.len());
}

/// The answer to a whole conversation that is encoded afresh, by a state that has seen nothing.
fn afresh(messages: &[Message], options: &GenerateOptions) -> String {
    let (lm, tokenizer) = &*HUB;
    let ids = tokenizer.encode_chat(messages, &ChatOptions::new()).unwrap();
    let options = options.clone().stop_strings(["<extra_id_"]);
    lm.generate_text_with(&mut lm.new_state(1), tokenizer, &ids, &options, go).unwrap().text
}

#[test]
fn a_chat_is_what_the_whole_conversation_gives() {
    let (lm, tokenizer) = &*HUB;
    // the penalty is on the words of the whole conversation, too
    for (system, penalty) in [(None, 1.0), (Some("Be brief; répondez en français."), 1.5)] {
        let options = greedy(20).repetition_penalty(penalty);
        let mut chat = Chat::new(lm, tokenizer);
        let mut messages = Vec::new();
        if let Some(system) = system {
            chat = chat.system(system);
            messages.push(Message::system(system));
        }
        let start = messages.len();
        let mut lengths = vec![0];
        for said in ["Hi!", "Why is the sky blue? 🌈", "And at night?\n\nIn two lines."] {
            let mut heard = String::new();
            let answer = chat.ask(said, &options, |piece| {
                heard.push_str(piece);
                ControlFlow::Continue(())
            });
            let answer = answer.unwrap();
            messages.push(Message::user(said));
            assert_eq!(answer.text, afresh(&messages, &options), "{said:?}");
            assert_eq!(answer.text, heard);
            messages.push(Message::assistant(answer.text));
            assert_eq!(chat.messages(), messages);
            lengths.push(chat.state().lengths()[0]);
        }
        assert!(lengths.is_sorted_by(|before, after| before < after), "{lengths:?}");

        chat.clear();
        messages.truncate(start);
        assert_eq!((chat.messages(), chat.state().lengths()), (&messages[..], vec![0]));
        let answer = chat.ask("Hi!", &options, go).unwrap().text;
        messages.push(Message::user("Hi!"));
        assert_eq!(answer, afresh(&messages, &options));
    }
}

/// Cancelled, and ended by a string: what was heard is part of the conversation.
#[test]
fn a_chat_goes_on_from_what_was_heard() {
    let (lm, tokenizer) = &*HUB;
    let options = greedy(20);
    let mut chat = Chat::new(lm, tokenizer);
    let cut = chat.ask("Hi!", &options, |_| ControlFlow::Break(())).unwrap();
    assert_eq!(cut.generation.finish, FinishReason::Cancelled);
    let whole = afresh(&[Message::user("Hi!")], &options);
    assert!(whole.starts_with(&cut.text) && cut.text.len() < whole.len());
    let messages = [Message::user("Hi!"), Message::assistant(cut.text), Message::user("Go on.")];
    assert_eq!(chat.messages(), &messages[..2]);
    assert_eq!(chat.ask("Go on.", &options, go).unwrap().text, afresh(&messages, &options));
}

#[test]
fn an_error_leaves_the_conversation_as_it_was() {
    let (lm, tokenizer) = &*HUB;
    let options = greedy(12);
    let mut chat = Chat::new(lm, tokenizer).system("Be brief.");
    chat.ask("Hi!", &options, go).unwrap();
    let (messages, length) = (chat.messages().to_vec(), chat.state().lengths());
    for bad in [options.clone().temperature(f32::NAN), options.clone().stop_strings([""])] {
        assert!(matches!(chat.ask("lost words", &bad, go), Err(Error::Option { .. } | Error::Text { .. })));
        assert_eq!((chat.messages(), chat.state().lengths()), (&messages[..], length.clone()));
    }
    let said = [messages.clone(), vec![Message::user("Still there?")]].concat();
    assert_eq!(chat.ask("Still there?", &options, go).unwrap().text, afresh(&said, &options));
    assert!(chat.state().lengths() > length);
}

#[test]
fn the_tokenizer_of_a_larger_vocabulary_is_noticed() {
    let tokenizer = &HUB.1;
    let lm = model(1000);
    let answer = lm.generate_text(tokenizer, "The capital of France is", &greedy(3), go);
    assert!(matches!(&answer, Err(Error::Tokens(reason)) if reason.contains("another model's")), "{answer:?}");
    let mut chat = Chat::new(&lm, tokenizer);
    for _ in 0..2 {
        assert!(matches!(chat.ask("The capital of France?", &greedy(3), go), Err(Error::Tokens(_))));
        assert!(chat.messages().is_empty());
    }
}
