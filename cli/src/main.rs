//! The program `hymba`: language models and series models on the CPU, from the command line.

mod commands;
mod interrupt;
mod load;
mod output;
mod serve;

use std::process::ExitCode;

use clap::Parser;

use commands::Command;

/// Hybrid Mamba-attention models on the CPU: chat, complete, train, predict, serve.
#[derive(Parser)]
#[command(name = "hymba", version, arg_required_else_help = true)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

/// 0 where all went well, 1 for an error, 2 for arguments that cannot be used, which clap prints itself.
fn main() -> ExitCode {
    match Program::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hymba: {}", output::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
