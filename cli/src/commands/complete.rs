//! `hymba complete DIR`: continues a text.

use std::io::{self, IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::interrupt::{self, Interrupted};
use crate::load::LoadArgs;
use crate::output::{self, out};
use crate::sampling::{Clock, SamplingArgs, finish};
use crate::text::Text;

#[derive(clap::Args)]
pub struct Args {
    /// Folder of the model: config.json, *.safetensors, tokenizer.json.
    dir: PathBuf,
    /// The text to continue; read from the standard input if left out.
    prompt: Option<String>,
    /// Print one JSON object at the end instead of the text as it is generated.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    load: LoadArgs,
}

pub fn run(args: Args) -> Result<()> {
    let options = args.sampling.options(&args.dir)?.log_probs(args.json);
    let prompt = match args.prompt {
        Some(prompt) => prompt,
        None if io::stdin().is_terminal() => bail!("no prompt: give one as an argument, or pipe it in"),
        None => {
            let mut prompt = String::new();
            io::stdin().read_to_string(&mut prompt).context("the standard input")?;
            prompt
        }
    };
    let lm = args.load.read(&args.dir)?;
    let text = Text::of(&args.dir, &lm)?;
    let ids = text.encode(&prompt)?;
    if ids.is_empty() {
        bail!("the prompt is empty, and the model has no token to begin a text with");
    }
    interrupt::listen()?;
    if !args.json {
        out(&prompt)?;
    }
    let mut clock = Clock::start();
    let mut closed = None;
    let (written, generation) = text.generate(&lm, &ids, &options, |piece| {
        clock.tick();
        if !args.json
            && let Err(error) = out(piece)
        {
            closed = Some(error);
            return ControlFlow::Break(());
        }
        interrupt::flow()
    })?;
    if let Some(error) = closed {
        return Err(error);
    }
    let tokens = generation.ids.len();
    if args.json {
        output::json(&json!({
            "prompt": prompt,
            "text": written,
            "finish": finish(generation.finish),
            "prompt_tokens": ids.len(),
            "tokens": generation.ids,
            "log_probs": generation.log_probs,
            "first_token_s": clock.first(),
            "tokens_per_s": clock.rate(tokens),
        }))?;
    } else {
        out("\n")?;
        if io::stderr().is_terminal() {
            eprintln!("({})", clock.line(ids.len(), tokens, generation.finish));
        }
    }
    if interrupt::asked() { Err(Interrupted("the text ends here").into()) } else { Ok(()) }
}
