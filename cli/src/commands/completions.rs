//! `hymba completions SHELL`.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::output::out;

#[derive(clap::Args)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: Args) -> Result<()> {
    // the generator panics when it cannot write
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Program::command(), "hymba", &mut script);
    out(&script)
}
