//! `hymba chat DIR`: a conversation, typed or piped in line by line.

use std::io::{self, BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use hymba::GenerateOptions;
use hymba::lm::{Chat, Tokenizer};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::interrupt;
use crate::load::LoadArgs;
use crate::output::{one_line, out, size};
use crate::sampling::{Clock, SamplingArgs};

#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model: config.json, *.safetensors, tokenizer.json.
    dir: PathBuf,
    /// Instructions for the whole conversation (the system prompt).
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    load: LoadArgs,
}

const HELP: &str = "/clear forgets what was said, /quit or Ctrl-D ends the chat, Ctrl-C ends an answer.";

pub fn run(args: Args) -> Result<()> {
    let options = args.sampling.options(&args.dir)?;
    let tokenizer = Tokenizer::from_dir(&args.dir)?;
    let lm = args.load.read(&args.dir)?;
    interrupt::listen()?;
    let mut chat = Chat::new(&lm, &tokenizer);
    if let Some(system) = args.system {
        chat = chat.system(system);
    }
    let mut lines = Lines::new()?;
    if lines.asks() {
        eprintln!("Say something. {HELP}");
    }
    while let Some(line) = lines.next()? {
        match line.trim() {
            "" => {}
            "/quit" => break,
            "/clear" => {
                chat.clear();
                eprintln!("(forgotten)");
            }
            "/help" => eprintln!("{HELP}"),
            said => answer(&mut chat, said, &options, lines.asks())?,
        }
        // the rest of a pipe is not read any more; a user at a terminal goes on
        if interrupt::asked() && !lines.asks() {
            return Err(interrupt::Interrupted("the chat ends here").into());
        }
        interrupt::forget();
    }
    Ok(())
}

fn answer(chat: &mut Chat, said: &str, options: &GenerateOptions, tells: bool) -> Result<()> {
    let mut clock = Clock::start();
    let before = seen(chat);
    let mut closed = None;
    let answer = chat.ask(said, options, |piece| {
        clock.tick();
        if let Err(error) = out(piece) {
            closed = Some(error);
            return ControlFlow::Break(());
        }
        interrupt::flow()
    });
    if let Some(error) = closed {
        return Err(error);
    }
    out("\n")?;
    let generation = match answer {
        Ok(answer) => answer.generation,
        // said again in other words, it may go well
        Err(error) if tells => {
            eprintln!("hymba: {}", one_line(&error.into()));
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    if tells {
        // all are new where the template rewrites earlier messages
        let seen = seen(chat) + 1;
        let new = seen.checked_sub(before).unwrap_or(seen);
        let line = clock.line(new, generation.ids.len(), generation.finish);
        eprintln!("({line}; {} of state)", size(chat.state().num_bytes()));
    }
    Ok(())
}

/// Tokens in the state; none where it did not fit into memory.
fn seen(chat: &Chat) -> usize {
    chat.state().lengths().first().copied().unwrap_or_default()
}

/// The lines of the user: from an editor at a terminal, otherwise as they come.
enum Lines {
    Typed(Box<DefaultEditor>),
    Piped(io::Lines<io::StdinLock<'static>>),
}

impl Lines {
    fn new() -> Result<Self> {
        Ok(match io::stdin().is_terminal() {
            true => Lines::Typed(Box::new(DefaultEditor::new()?)),
            false => Lines::Piped(io::stdin().lock().lines()),
        })
    }

    fn asks(&self) -> bool {
        matches!(self, Lines::Typed(_))
    }

    fn next(&mut self) -> Result<Option<String>> {
        let editor = match self {
            Lines::Piped(lines) => return Ok(lines.next().transpose()?),
            Lines::Typed(editor) => editor,
        };
        loop {
            match editor.readline("\nyou> ") {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line);
                    return Ok(Some(line));
                }
                Err(ReadlineError::Interrupted) => eprintln!("({HELP})"),
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
