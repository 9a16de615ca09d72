//! Text: the tokenizer and the chat template.

mod chat;
mod file;
mod python;
mod sandbox;
mod stop;
mod stream;
mod tokenizer;

pub use chat::{ChatOptions, ChatTemplate, Message, Role};
pub use stop::StopMatcher;
pub use stream::TextStream;
pub use tokenizer::Tokenizer;
