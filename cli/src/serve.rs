//! `hymba serve`: a language model behind OpenAI's API, or a predictor of series behind JSON and WebSocket.

mod answer;
mod engine;
mod error;
mod http;
mod language;
mod metrics;
mod predictor;
mod prefix;
mod prompt;
mod request;
#[cfg(feature = "schema")]
mod schema;
mod tools;
mod vocabulary;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::sync::watch;

use crate::load::LoadArgs;

/// Serve a language model (a folder) or a trained predictor (a file) to programs.
#[derive(clap::Args)]
pub struct Args {
    /// A folder of a language model with its tokenizer, or a predictor's .safetensors file.
    model: PathBuf,
    /// Address to listen on; 0.0.0.0 is every address of this machine. Other machines can then connect: set a key.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Key that clients must send as `Authorization: Bearer KEY`.
    #[arg(long, env = "HYMBA_API_KEY", hide_env_values = true, value_name = "KEY")]
    api_key: Option<String>,
    /// Name of the model in the API; that of the folder or file by default.
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Limits")]
pub struct LimitArgs {
    /// Sequences generated, or streams open, at the same time.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = count::<1, PLACES>)]
    concurrent: usize,
    /// Sequences that may wait; more are refused with status 429.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = count::<0, PLACES>)]
    waiting: usize,
    /// Tokens of a prompt and its continuation together, or frames of a series; by default the model's positions, or 65536 frames.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,
    /// Tokens of a continuation at most.
    #[arg(long, default_value_t = 4096, value_name = "N", value_parser = at_least_one)]
    max_tokens: usize,
    /// Bytes of a request at most.
    #[arg(long, default_value_t = 2 << 20, value_name = "BYTES")]
    max_body: usize,
    /// Connections at the same time; more wait.
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = count::<1, PLACES>)]
    connections: usize,
    /// Seconds that a request may take, waiting included, or a stream may be silent.
    #[arg(long, default_value_t = 600, value_name = "S", value_parser = clap::value_parser!(u64).range(..=YEAR))]
    timeout: u64,
    /// Seconds that a client may take to send a request, or to read more of an answer.
    #[arg(long, default_value_t = 30, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=YEAR))]
    io_timeout: u64,
    /// Seconds that running requests get to finish when the server is told to stop.
    #[arg(long, default_value_t = 30, value_name = "S", value_parser = clap::value_parser!(u64).range(..=YEAR))]
    drain: u64,
    /// Megabytes for the prefix cache, the states after beginnings of prompts; 0 turns it off.
    #[arg(long, default_value_t = 512, value_name = "MB")]
    cache: usize,
    /// Tokens of prompts that are read per step, beside the sequences being generated.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = count::<1, 512>)]
    piece: usize,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "it takes a whole number of at least 1".into())
}

/// Requests or connections at a time, at most.
const PLACES: usize = 1_000_000;
/// In seconds.
const YEAR: u64 = 365 * 24 * 3600;

fn count<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    let given = text.parse().ok().filter(|n| (LEAST..=MOST).contains(n));
    given.ok_or_else(|| format!("it takes a whole number from {LEAST} to {MOST}"))
}

/// Limits that keep one client from starving the others.
#[derive(Debug, Clone)]
pub struct Limits {
    pub concurrent: usize,
    pub waiting: usize,
    pub context: Option<usize>,
    pub max_tokens: usize,
    pub max_body: usize,
    pub connections: usize,
    pub timeout: Duration,
    pub io_timeout: Duration,
    pub drain: Duration,
    pub cache_bytes: usize,
    pub piece: usize,
}

impl From<LimitArgs> for Limits {
    fn from(args: LimitArgs) -> Self {
        let LimitArgs { concurrent, waiting, context, max_tokens, max_body, connections, piece, .. } = args;
        Limits {
            concurrent,
            waiting,
            context,
            max_tokens,
            max_body,
            connections,
            timeout: Duration::from_secs(args.timeout),
            io_timeout: Duration::from_secs(args.io_timeout),
            drain: Duration::from_secs(args.drain),
            cache_bytes: args.cache.saturating_mul(1_000_000),
            piece,
        }
    }
}

pub fn run(args: Args) -> Result<()> {
    let limits = Limits::from(args.limits);
    ensure!(args.api_key.as_ref().is_none_or(|key| !key.is_empty()), "the API key is empty; leave it out for none");
    let named = args.model.file_stem().filter(|_| args.model.is_file()).or(args.model.file_name());
    let name = args.name.or_else(|| Some(named?.to_string_lossy().into_owned())).unwrap_or_else(|| "hymba".into());
    let metrics = Arc::<metrics::Metrics>::default();
    // connections and streams hold a receiver each
    let stop = watch::Sender::new(false);
    let service = if args.model.is_dir() {
        // the small files first: the weights take a while
        let tokenizer = hymba::lm::Tokenizer::from_dir(&args.model)?;
        let defaults = hymba::GenerateOptions::from_dir(&args.model)?;
        let lm = args.load.read(&args.model)?;
        language::service(lm, tokenizer, defaults, name, &limits, &metrics)?
    } else {
        args.load.start()?;
        let model = crate::series::Model::load(&args.model)?;
        predictor::service(model, name, &limits, &metrics, &stop)
    };
    let address = SocketAddr::new(args.host, args.port);
    let door = http::Door::new(args.api_key, args.host.is_loopback());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(4).enable_all().build()?;
    let ended = runtime.block_on(http::serve(address, service, door, limits, metrics, stop));
    // work that cannot be cut short, such as the prediction of a long series, is abandoned
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        limits: LimitArgs,
    }

    #[test]
    fn limits_have_limits() {
        let largest = u64::MAX.to_string();
        for (name, least) in [
            ("--concurrent", 1),
            ("--waiting", 0),
            ("--connections", 1),
            ("--timeout", 0),
            ("--io-timeout", 1),
            ("--drain", 0),
            ("--piece", 1),
        ] {
            assert!(Program::try_parse_from(["hymba", name, &largest]).is_err(), "{name}");
            assert!(Program::try_parse_from(["hymba", name, &format!("{least}")]).is_ok(), "{name}");
            assert_eq!(Program::try_parse_from(["hymba", name, "0"]).is_ok(), least == 0, "{name}");
        }
    }
}
