//! Chats, and the template that makes a prompt of one.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use minijinja::machinery::{CodeGenerator, eval, make_string_output};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, State, Value};
use serde::{Deserialize, Serialize};

use super::python::{self, MAX_PROMPT};
use super::values::{self, Budget};
use super::{date, sandbox};
use crate::files::tensors::quoted;
use crate::{Error, Result};

/// That of the published Hymba models.
const HYMBA: &str = include_str!("hymba.jinja");
const NAME: &str = "chat template";
/// Units of fuel: one for about an instruction, or for 64 bytes of text, 96 MB in all. That is enough for a chat of 10
/// MB, and lasts about a second.
const FUEL: u64 = 1_500_000;
/// Of minijinja's own, those that take no fuel for what they make.
const NO_FILTERS: [&str; 8] = ["batch", "chain", "format", "groupby", "pprint", "slice", "sum", "zip"];
const NO_FUNCTIONS: [&str; 1] = ["debug"];

/// The author of a [`Message`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole chat.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// The result of a tool that the model called.
    Tool,
}

/// One message of a chat. As JSON: `{"role": "user", "content": "Hello"}`.
///
/// A special token that the content spells out stays text: see
/// [`Tokenizer::encode_chat`](super::Tokenizer::encode_chat), also for what this does not protect from.
///
/// ```
/// use hymba::lm::{Message, Role};
///
/// let message = Message::user("Hello");
/// assert_eq!(message, Message { role: Role::User, content: "Hello".into() });
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its author.
    pub role: Role,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of this role.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Message { role, content: content.into() }
    }

    /// A system message: instructions for the whole chat.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// A message of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// The result of a tool.
    pub fn tool(content: impl Into<String>) -> Self {
        Self::new(Role::Tool, content)
    }
}

/// The contents of a prompt beside the messages.
///
/// ```
/// use hymba::lm::ChatOptions;
///
/// let clock = serde_json::json!({"name": "clock", "parameters": {}});
/// let options = ChatOptions::new().tools([clock]).contexts(["It is raining."]);
/// assert!(options.add_generation_prompt);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ChatOptions {
    /// Descriptions of the tools that the model may call.
    pub tools: Vec<serde_json::Value>,
    /// Texts for the model to answer from.
    pub contexts: Vec<String>,
    /// Ends the prompt with the beginning of the model's answer. On by default; off to train on a whole chat.
    pub add_generation_prompt: bool,
    /// The time that templates write into the prompt with `strftime_now`, in UTC. `None`, the default, is the time of rendering;
    /// a set one makes prompts reproducible.
    pub now: Option<SystemTime>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl ChatOptions {
    /// No tools, no contexts, and the beginning of the model's answer.
    pub fn new() -> Self {
        ChatOptions { tools: Vec::new(), contexts: Vec::new(), add_generation_prompt: true, now: None }
    }

    /// Sets the descriptions of the tools that the model may call.
    pub fn tools(mut self, tools: impl IntoIterator<Item = serde_json::Value>) -> Self {
        self.tools = tools.into_iter().collect();
        self
    }

    /// Sets the texts for the model to answer from.
    pub fn contexts<S: Into<String>>(mut self, contexts: impl IntoIterator<Item = S>) -> Self {
        self.contexts = contexts.into_iter().map(Into::into).collect();
        self
    }

    /// Sets whether the prompt ends with the beginning of the model's answer.
    pub fn add_generation_prompt(mut self, add: bool) -> Self {
        self.add_generation_prompt = add;
        self
    }

    /// Sets the time that templates write into the prompt, in place of the time of rendering. Templates write it in UTC: add the
    /// offset of another time zone.
    ///
    /// ```
    /// use std::time::{Duration, SystemTime};
    /// use hymba::lm::{ChatOptions, ChatTemplate};
    ///
    /// let options = ChatOptions::new().now(SystemTime::UNIX_EPOCH + Duration::from_secs(1_722_297_600));
    /// let template = ChatTemplate::new("Today is {{ strftime_now('%d %b %Y') }}.")?;
    /// assert_eq!(template.render(&[], &options)?, "Today is 30 Jul 2024.");
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn now(mut self, now: SystemTime) -> Self {
        self.now = Some(now);
        self
    }
}

/// A Jinja template that makes a prompt of a chat. The default is that of the published Hymba models.
///
/// Templates see `messages`, `tools` (none without any), `contexts` (undefined without any), `add_generation_prompt` and the
/// special tokens `bos_token`, `eos_token`, `unk_token` and `pad_token` as texts. As with Hugging Face's transformers,
/// methods are Python's, `tojson` is `json.dumps`, there are `raise_exception` and `strftime_now` (in UTC, unless
/// [`ChatOptions::now`] says otherwise), `{% generation %}` adds nothing, and a line break after a tag is left out. Line ends of
/// the template become `\n`, those of messages stay.
///
/// Templates come with models, from strangers. One cannot run without end, fill the memory or overflow the stack: it ends with an
/// error after about 1.5 million instructions, and a little of Jinja is missing (the filters `batch`, `chain`, `format`, `groupby`,
/// `pprint`, `slice`, `sum` and `zip`; other templates; namespaces in lists).
///
/// ```
/// use hymba::lm::{ChatOptions, ChatTemplate, Message};
///
/// let chat = [Message::system("Be brief."), Message::user(" Name a colour. ")];
/// assert_eq!(
///     ChatTemplate::default().render(&chat, &ChatOptions::new())?,
///     "<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nName a colour.\n<extra_id_1>Assistant\n",
/// );
///
/// let template = ChatTemplate::new("{% for m in messages %}{{ m.role.upper() }}: {{ m.content|trim }}\n{% endfor %}")?;
/// assert_eq!(template.render(&chat, &ChatOptions::new())?, "SYSTEM: Be brief.\nUSER: Name a colour.\n");
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplate {
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    special_tokens: BTreeMap<&'static str, String>,
}

impl Default for ChatTemplate {
    fn default() -> Self {
        Self::new(HYMBA).expect("the crate's own template is one that it takes")
    }
}

impl ChatTemplate {
    /// Reads a template.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] where it is longer than 64 KiB, has a tag of more than 512 words or more than 64 `elif`, or is
    /// not Jinja; the message names the line. Filters that do not exist are found by [`render`](Self::render).
    pub fn new(source: &str) -> Result<Self> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|error| failed(&error))?;
        let source = sandbox::prepare(source, &syntax).map_err(|reason| Error::text(NAME, shown(reason)))?;

        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python::method);
        NO_FILTERS.iter().for_each(|name| environment.remove_filter(name));
        NO_FUNCTIONS.iter().for_each(|name| environment.remove_global(name));
        environment.add_function(sandbox::BOUNDED, |state: &State, value| values::bounded(state, value));
        environment.add_function(sandbox::KEPT, |state: &State, value| values::kept(state, value));
        environment.add_filter("join", python::join);
        environment.add_filter("tojson", python::tojson);
        environment.add_filter("trim", python::trim);
        environment.add_function("raise_exception", python::raise_exception);
        environment.add_function("strftime_now", date::strftime_now);
        let build = environment.globals().find(|(name, _)| *name == "namespace").map(|(_, build)| build);
        if let Some(build) = build {
            environment.add_function("namespace", move |state: &mut State, given: Kwargs| {
                python::namespace(state, &build, given)
            });
        }
        Ok(ChatTemplate { source: source.into(), environment: Arc::new(environment), special_tokens: BTreeMap::new() })
    }

    /// The text of a special token, for templates that write it.
    pub(super) fn with_special_token(mut self, name: &'static str, text: &str) -> Self {
        self.special_tokens.insert(name, text.to_owned());
        self
    }

    /// The prompt for these messages. What the messages say and what the template writes is one text: special tokens that are
    /// spelled out in a message cannot be told from the template's own. [`Tokenizer::encode_chat`](super::Tokenizer::encode_chat)
    /// tells them apart.
    ///
    /// # Errors
    ///
    /// [`Error::Text`] where the template fails (it may refuse the messages), where it does not come to an end within 1.5
    /// million instructions, and where the prompt is longer than 16 MiB.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        // each time: what is compiled borrows from the source, and takes less than rendering
        let template = sandbox::template(&self.source, self.environment.syntax());
        let template = template.map_err(|reason| Error::text(NAME, shown(reason)))?;
        let mut generator = CodeGenerator::new(NAME, &self.source);
        generator.compile_stmt(&template);
        let (instructions, blocks) = generator.finish();

        let budget = Arc::new(Budget::new());
        let root = self.context(messages, options, &budget).map_err(|error| failed(&error))?;
        let mut prompt = String::new();
        let mut output = make_string_output(&mut prompt);
        let done = eval(&self.environment, &instructions, root, &blocks, &mut output, AutoEscape::None).map(|_| ());
        if budget.is_empty() {
            return Err(Error::text(NAME, "it goes too often through too long lists"));
        }
        done.map_err(|error| failed(&error))?;
        if prompt.len() > MAX_PROMPT {
            return Err(Error::text(NAME, format!("the prompt is longer than {MAX_PROMPT} bytes")));
        }
        Ok(prompt)
    }

    /// The variables of the template.
    fn context(
        &self,
        messages: &[Message],
        options: &ChatOptions,
        budget: &Arc<Budget>,
    ) -> Result<Value, minijinja::Error> {
        let mut context = BTreeMap::from([
            ("messages", values::given(Value::from(Serde(messages)), budget)?),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
            (Budget::NAME, Value::from_dyn_object(Arc::clone(budget))),
            (date::NOW, date::seconds(options.now)),
        ]);
        if !options.tools.is_empty() {
            context.insert("tools", values::given(Value::from(Serde(&options.tools)), budget)?);
        }
        if !options.contexts.is_empty() {
            context.insert("contexts", values::given(Value::from(Serde(&options.contexts)), budget)?);
        }
        context.extend(self.special_tokens.iter().map(|(&name, text)| (name, Value::from(text.as_str()))));
        Ok(Value::from_pairs(context))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("special_tokens", &self.special_tokens).finish_non_exhaustive()
    }
}

fn failed(error: &minijinja::Error) -> Error {
    Error::text(NAME, shown(error.to_string()))
}

/// What went wrong may quote the template: not more than a few lines of it, and nothing that a terminal obeys.
pub(super) fn shown(text: String) -> String {
    const LONGEST: usize = 400;
    if text.len() <= LONGEST && !text.contains(char::is_control) { text } else { quoted(&text) }
}
