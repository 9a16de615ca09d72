//! One file for each subcommand, with its arguments and `run`.

use anyhow::Result;
use clap::Subcommand;

use crate::serve;

mod bench;
mod chat;
mod complete;
mod completions;
mod evaluate;
mod finetune;
mod info;
mod man;
mod perplexity;
mod predict;
mod quantize;
mod train;
mod train_lm;

#[derive(Subcommand)]
pub enum Command {
    /// Hold a conversation with a language model.
    Chat(chat::Args),
    /// Continue a text with a language model.
    Complete(complete::Args),
    /// Measure how well a language model predicts a text.
    Perplexity(perplexity::Args),
    /// Write a copy of a language model with fewer bits per weight.
    Quantize(quantize::Args),
    /// Measure how fast a language model runs on this machine.
    Bench(bench::Args),
    /// Show what is in a file or folder, and what is wrong with it.
    Info(info::Args),
    /// Train a predictor on series with classes or numbers.
    Train(train::Args),
    /// Predict the class or the numbers of series, as CSV.
    Predict(predict::Args),
    /// Measure a trained model on series whose classes or numbers are known.
    Evaluate(evaluate::Args),
    /// Train a language model on a text, from scratch.
    TrainLm(train_lm::Args),
    /// Fine-tune a language model with a low-rank adapter.
    Finetune(finetune::Args),
    /// Serve a model to programs: OpenAI's API for a language model, JSON and WebSocket for a predictor.
    Serve(serve::Args),
    /// Print a script that completes the arguments in a shell.
    #[command(hide = true)]
    Completions(completions::Args),
    /// Print the manual page.
    #[command(hide = true)]
    Man(man::Args),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Command::Chat(args) => chat::run(args),
            Command::Complete(args) => complete::run(args),
            Command::Perplexity(args) => perplexity::run(args),
            Command::Quantize(args) => quantize::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Info(args) => info::run(args),
            Command::Train(args) => train::run(args),
            Command::Predict(args) => predict::run(args),
            Command::Evaluate(args) => evaluate::run(args),
            Command::TrainLm(args) => train_lm::run(args),
            Command::Finetune(args) => finetune::run(args),
            Command::Serve(args) => serve::run(args),
            Command::Completions(args) => completions::run(args),
            Command::Man(args) => man::run(args),
        }
    }
}
