//! `hymba man`: the pages of the program and of all its subcommands, one after the other.

use anyhow::Result;
use clap::CommandFactory;
use clap_mangen::Man;

use crate::output::out;

#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    let mut program = crate::Program::command();
    program.build();
    let mut page = Vec::new();
    Man::new(program.clone()).render(&mut page)?;
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        Man::new(command.clone()).render(&mut page)?;
    }
    out(&page)
}
