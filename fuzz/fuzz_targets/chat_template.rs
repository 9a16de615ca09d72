//! Any text as a chat template, and any messages: an error, or a prompt of a bounded length.

#![no_main]

use hymba::lm::{ChatOptions, ChatTemplate, Message, Role};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    add_generation_prompt: bool,
    messages: Vec<(u8, &'a str)>,
    contexts: Vec<&'a str>,
    tools: Vec<&'a str>,
    /// Last, so that what is left of the bytes is the template.
    template: &'a str,
}

fuzz_target!(|input: Input| {
    let Ok(template) = ChatTemplate::new(input.template) else { return };
    let roles = [Role::System, Role::User, Role::Assistant, Role::Tool];
    let messages: Vec<Message> = input
        .messages
        .iter()
        .map(|(role, content)| Message::new(roles[usize::from(role % 4)], *content))
        .collect();
    let tools = input.tools.iter().map(|tool| serde_json::from_str(tool).unwrap_or_else(|_| (*tool).into()));
    let options = ChatOptions::new()
        .tools(tools)
        .contexts(input.contexts)
        .add_generation_prompt(input.add_generation_prompt);
    if let Ok(prompt) = template.render(&messages, &options) {
        assert!(prompt.len() <= 16 << 20);
        assert_eq!(template.render(&messages, &options).expect("it was rendered before"), prompt);
    }
});
