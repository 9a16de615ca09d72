//! The program `hymba`: language models and series models on the CPU, from the command line.

// without schemas, requests for one are parsed and refused
#![cfg_attr(not(feature = "schema"), allow(dead_code))]

mod bandwidth;
mod checkpoint;
mod commands;
mod curve;
mod header;
mod interrupt;
mod load;
mod output;
mod sampling;
mod series;
mod serve;
mod text;

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

/// 0 where all went well, 1 for an error, 2 for arguments that cannot be used, which clap prints itself, 130 after Ctrl-C.
fn main() -> ExitCode {
    match Program::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hymba: {}", output::one_line(&error));
            if error.is::<interrupt::Interrupted>() { interrupt::EXIT_CODE.into() } else { ExitCode::FAILURE }
        }
    }
}
