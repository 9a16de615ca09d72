//! `hymba info PATH`: what a file or folder is, how it is set up, how large it is, and what is wrong with it.

mod kinds;

use std::path::PathBuf;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use crate::output::{self, out, size};

#[derive(clap::Args)]
pub struct Args {
    /// A model, an adapter, a checkpoint, a state, or a file of series.
    path: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What was found out.
#[derive(Default)]
pub struct Facts {
    kind: &'static str,
    /// What it says of itself: in words of its own options.
    options: Map<String, Value>,
    parameters: Option<usize>,
    /// Of the files.
    bytes: u64,
    /// Of the parameters, once they are read.
    memory: Option<usize>,
    /// Why it cannot be used.
    problem: Option<String>,
}

pub fn run(args: Args) -> Result<()> {
    let facts = kinds::look(&args.path)?;
    if args.json {
        output::json(&serde_json::json!({
            "path": args.path.display().to_string(),
            "kind": facts.kind,
            "bytes": facts.bytes,
            "parameters": facts.parameters,
            "memory_bytes": facts.memory,
            "options": facts.options,
            "problem": facts.problem,
        }))?;
    } else {
        out(words(&facts))?;
    }
    match facts.problem {
        Some(problem) => bail!("{problem}"),
        None => Ok(()),
    }
}

fn words(facts: &Facts) -> String {
    let mut lines = vec![("kind".to_string(), facts.kind.to_string())];
    if let Some(parameters) = facts.parameters {
        lines.push(("parameters".into(), format!("{:.2} M", parameters as f64 / 1e6)));
    }
    let memory = facts.memory.map_or(String::new(), |memory| format!(", {} in memory", size(memory)));
    lines.push(("size".into(), format!("{}{memory}", size(facts.bytes as usize))));
    flatten("", &Value::Object(facts.options.clone()), &mut lines);
    let widest = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    lines.iter().map(|(name, value)| format!("{name:widest$}  {value}\n")).collect()
}

/// Options inside options get names with dots.
fn flatten(name: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                flatten(&if name.is_empty() { key.clone() } else { format!("{name}.{key}") }, value, lines);
            }
        }
        Value::Null => {}
        // what a file says is shown, never obeyed: no control characters reach the terminal
        Value::String(text) => lines.push((name.into(), text.escape_debug().to_string())),
        value => lines.push((name.into(), value.to_string())),
    }
}
