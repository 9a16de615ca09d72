//! Text: the tokenizer and the chat template.

mod date;
mod file;
mod guard;
mod python;
mod sandbox;
mod stop;
mod stream;
mod template;
mod tokenizer;
mod train;
mod values;

pub use stop::{StopMatcher, StopStream};
pub use stream::TextStream;
pub use template::{ChatOptions, ChatTemplate, Message, Role};
pub use tokenizer::Tokenizer;
