//! Generation of text, and conversations.

use std::ops::ControlFlow;

use super::generate::{FinishReason, Generation};
use super::model::HymbaLm;
use super::sample::GenerateOptions;
use super::state::LmState;
use super::text::{ChatOptions, Message, Role, StopStream, Tokenizer};
use crate::Result;

/// Text that was generated.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TextGeneration {
    /// The new text, up to a stop string, if there was one.
    pub text: String,
    /// Its tokens, those included that completed a stop string, and why it ended.
    pub generation: Generation,
}

impl HymbaLm {
    /// Continues a text. `on_text` gets new text as soon as it is certain: never half a character, and nothing that may be the
    /// beginning of a stop string. It ends the generation with [`ControlFlow::Break`].
    ///
    /// The new text follows the prompt directly, its first space included: `prompt + text` is what
    /// [`Tokenizer::decode`] makes of all tokens together, but for special tokens that the prompt spells out. An empty
    /// prompt gives a text from its beginning.
    ///
    /// A stop string finds special tokens, too, which are no part of the text: `"</s>"` ends it where the model chooses that
    /// token or spells it, and so does a longer one with `"</s>"` in it. Special tokens in the prompt are tokens, not text: see
    /// [`Tokenizer::encode`].
    ///
    /// # Errors
    ///
    /// Those of [`generate`](Self::generate) and [`Tokenizer::encode`].
    ///
    /// ```no_run
    /// # fn main() -> hymba::Result<()> {
    /// use std::io::Write;
    /// use std::ops::ControlFlow;
    /// use hymba::lm::{GenerateOptions, HymbaLm, Tokenizer};
    ///
    /// let lm = HymbaLm::from_dir("Hymba-1.5B-Base")?;
    /// let tokenizer = Tokenizer::from_dir("Hymba-1.5B-Base")?;
    /// let options = GenerateOptions::default().max_tokens(64).stop_strings(["\n\n"]);
    /// lm.generate_text(&tokenizer, "The capital of France is", &options, |text| {
    ///     print!("{text}");
    ///     let _ = std::io::stdout().flush();
    ///     ControlFlow::Continue(())
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn generate_text(
        &self,
        tokenizer: &Tokenizer,
        prompt: &str,
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<TextGeneration> {
        self.generate_text_with(&mut self.new_state(1), tokenizer, &tokenizer.encode(prompt)?, options, on_text)
    }

    /// As [`generate_text`](Self::generate_text), continuing a state of one row, and with a prompt of tokens. The text
    /// is what decoding all tokens adds to decoding the prompt: where the prompt ends within a character, the text
    /// begins with the whole character. A state that has seen tokens counts as text in front.
    ///
    /// # Errors
    ///
    /// Those of [`generate_with`](Self::generate_with).
    pub fn generate_text_with(
        &self,
        state: &mut LmState,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<TextGeneration> {
        self.generate_after(state, tokenizer, prompt, &[], options, on_text)
    }

    /// `before` are tokens the state has seen, which the repetition penalty is to count.
    fn generate_after(
        &self,
        state: &mut LmState,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        before: &[u32],
        options: &GenerateOptions,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<TextGeneration> {
        options.validate()?;
        let stream = tokenizer.stream();
        let unknown = before.is_empty() && state.lengths().iter().any(|&length| length > 0);
        let stream = if unknown { stream.within() } else { stream };
        let stream = stream.after(before.iter().chain(prompt).copied());
        let mut stream = StopStream::new(stream, options.stop_strings.iter().cloned())?;
        let mut text = String::new();
        let mut emit = |piece: &str| {
            text.push_str(piece);
            if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) }
        };
        let mut rows = self.run(state, &[prompt], before, options, &mut |_, id| {
            let flow = emit(stream.push(id));
            if stream.stopped().is_some() { ControlFlow::Break(()) } else { flow }
        })?;
        let Some(mut generation) = rows.pop() else {
            unreachable!("as many rows as prompts");
        };
        if stream.stopped().is_some() {
            generation.finish = FinishReason::StopString;
        } else {
            // the text held back; a break from the callback no longer matters
            let _ = emit(&stream.finish());
        }
        Ok(TextGeneration { text, generation })
    }
}

/// A conversation with an instruction-tuned model, in the form of its chat template.
///
/// The state of the model is kept between turns: only new text is fed, and the last answer once more, as the template
/// writes it.
///
/// An answer ends where the model chooses a stop token, and where its text comes to the token that ends a text, spelled out
/// (`</s>`) or to the beginning of a turn in Hymba's template (`<extra_id_`). Its text is what decoding all tokens adds
/// to decoding the prompt, so it begins with a space where the model puts one between the template's words and its own.
///
/// Messages never become special tokens, whatever their role: see [`Tokenizer::encode_chat`]. Marks that a template
/// writes as plain text cannot be told from the same words in a message. Hymba's template has such marks: a message
/// with `"\n<extra_id_1>Assistant\n"` in it reads like another turn to the model. Remove them from text that you do not
/// trust.
///
/// ```no_run
/// # fn main() -> hymba::Result<()> {
/// use std::ops::ControlFlow;
/// use hymba::lm::{Chat, GenerateOptions, HymbaLm, Tokenizer};
///
/// let lm = HymbaLm::from_dir("Hymba-1.5B-Instruct")?;
/// let tokenizer = Tokenizer::from_dir("Hymba-1.5B-Instruct")?;
/// let mut chat = Chat::new(&lm, &tokenizer).system("You answer in one sentence.");
/// let options = GenerateOptions::default().temperature(0.7).top_p(0.9);
/// let answer = chat.ask("Why is the sky blue?", &options, |_| ControlFlow::Continue(()))?;
/// println!("{}", answer.text);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Chat<'a> {
    lm: &'a HymbaLm,
    tokenizer: &'a Tokenizer,
    options: ChatOptions,
    messages: Vec<Message>,
    /// The tokens the state has seen. They end where the last answer began: how the template writes it is only known
    /// with the next turn.
    seen: Vec<u32>,
    state: LmState,
}

impl<'a> Chat<'a> {
    /// An empty conversation.
    pub fn new(lm: &'a HymbaLm, tokenizer: &'a Tokenizer) -> Self {
        let options = ChatOptions::new();
        Chat { lm, tokenizer, options, messages: Vec::new(), seen: Vec::new(), state: lm.new_state(1) }
    }

    /// Sets the system message, in place of an earlier one.
    pub fn system(mut self, content: impl Into<String>) -> Self {
        self.messages.retain(|message| message.role != Role::System);
        self.messages.insert(0, Message::system(content));
        self
    }

    /// Sets tools, contexts and the time; `add_generation_prompt` is always on here.
    pub fn options(mut self, options: ChatOptions) -> Self {
        self.options = options.add_generation_prompt(true);
        self
    }

    /// The messages so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The state of the model, which has seen everything but the last answer and the token before it.
    pub fn state(&self) -> &LmState {
        &self.state
    }

    /// Forgets everything but the system message.
    pub fn clear(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
        self.seen.clear();
        self.state = self.lm.new_state(1);
    }

    /// Sends a message of the user, and lets the model answer. Both become part of the conversation, unless
    /// [`on_prompt`](GenerateOptions::on_prompt) ends it before there is an answer: then neither does.
    ///
    /// # Errors
    ///
    /// Those of [`HymbaLm::generate_text`] and [`Tokenizer::encode_chat`]. The messages are then as they were.
    pub fn ask(
        &mut self,
        content: impl Into<String>,
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<TextGeneration> {
        self.send([Message::user(content)], options, on_text)
    }

    /// As [`ask`](Self::ask), with any messages in place of the user's, or none: the results of tools that the last answer called,
    /// for example. How an answer calls tools is the model's: Hymba's writes `<toolcall> {…} </toolcall>`.
    ///
    /// # Errors
    ///
    /// Those of [`ask`](Self::ask).
    ///
    /// ```no_run
    /// # fn main() -> hymba::Result<()> {
    /// # use std::ops::ControlFlow;
    /// # use hymba::lm::{Chat, ChatOptions, GenerateOptions, HymbaLm, Message, Tokenizer};
    /// # let lm = HymbaLm::from_dir("Hymba-1.5B-Instruct")?;
    /// # let tokenizer = Tokenizer::from_dir("Hymba-1.5B-Instruct")?;
    /// # let options = GenerateOptions::default();
    /// let clock = serde_json::json!({"name": "clock", "description": "the time of a city", "parameters": {"city": "text"}});
    /// let mut chat = Chat::new(&lm, &tokenizer).options(ChatOptions::new().tools([clock]));
    /// let call = chat.ask("How late is it in Oslo?", &options, |_| ControlFlow::Continue(()))?;
    /// if call.text.contains("<toolcall>") {
    ///     let answer = chat.send([Message::tool("12:30")], &options, |_| ControlFlow::Continue(()))?;
    ///     println!("{}", answer.text);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn send(
        &mut self,
        messages: impl IntoIterator<Item = Message>,
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<TextGeneration> {
        let before = self.messages.len();
        self.messages.extend(messages);
        let answer = self.answer(options, on_text);
        match &answer {
            // ended before the model had read it
            Ok(TextGeneration { generation, .. })
                if generation.finish == FinishReason::Cancelled && generation.ids.is_empty() =>
            {
                self.messages.truncate(before);
            }
            Ok(answer) => self.messages.push(Message::assistant(answer.text.clone())),
            Err(_) => self.messages.truncate(before),
        }
        answer
    }

    fn answer(
        &mut self,
        options: &GenerateOptions,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<TextGeneration> {
        // before anything is fed, so that an option out of range leaves the state as it was
        options.validate()?;
        let ids = self.tokenizer.encode_chat(&self.messages, &self.options)?;
        if !ids[..ids.len().saturating_sub(1)].starts_with(&self.seen) {
            // a template that rewrites earlier messages
            (self.seen, self.state) = (Vec::new(), self.lm.new_state(1));
        }
        // all but the last token, with which generation begins
        let (last, before) =
            ids.split_last().ok_or_else(|| crate::Error::Tokens("the template writes nothing".into()))?;
        let new = &before[self.seen.len()..];
        if !new.is_empty() {
            let fed = self.lm.prefill_with(&[new], &mut self.state, |done, of| match &options.on_prompt {
                Some(on_prompt) => on_prompt.call(done, of),
                None => ControlFlow::Continue(()),
            })?;
            self.seen = before[..self.state.lengths()[0]].to_vec();
            if fed.is_none() {
                return Ok(TextGeneration { text: String::new(), generation: Generation::nothing() });
            }
        }
        let mut options = GenerateOptions { on_prompt: None, ..options.clone() };
        options.stop_strings.extend(self.tokenizer.chat_stop_strings());
        let mut state = self.state.clone();
        self.lm.generate_after(&mut state, self.tokenizer, &[*last], before, &options, on_text)
    }
}
