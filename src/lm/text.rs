//! Text: the tokenizer and the chat template.

mod chat;
mod date;
mod file;
mod guard;
mod python;
mod sandbox;
mod stop;
mod stream;
mod tokenizer;
mod values;

pub use chat::{ChatOptions, ChatTemplate, Message, Role};
pub use stop::StopMatcher;
pub use stream::TextStream;
pub use tokenizer::Tokenizer;
