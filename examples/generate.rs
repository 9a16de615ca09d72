//! Runs NVIDIA's Hymba language model on the CPU: continues a text, holds a chat, or measures.
//!
//! ```sh
//! # a folder as the Hugging Face Hub has it: config.json, *.safetensors, tokenizer.json
//! cargo run --release --features tokenizer --example generate -- --model Hymba-1.5B-Base --prompt "The capital of France is"
//! cargo run --release --features tokenizer --example generate -- --model Hymba-1.5B-Instruct --chat
//! # the real sizes with random weights: speed and memory without the download
//! cargo run --release --features tokenizer --example generate -- --random
//! # a small one in a folder; with the tokenizer files of a real one beside it, --model takes it
//! cargo run --release --features tokenizer --example generate -- --random --hidden 100 --layers 3 --intermediate 64 --save small
//! ```
//!
//! At the end come tokens a second for the prompt and for decoding, the time to the first token, and the memory of weights and
//! state. Decoding reads every weight once a token, so that memory bandwidth is its limit: `--random` measures that, too, in turns
//! with the tokens, and prints the fraction of it that was reached.

use std::error::Error;
use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hymba::HymbaLm;
use hymba::lm::{Chat, FinishReason, GenerateOptions, HymbaLmConfig, LoadOptions, Quantization, Sampler, Tokenizer};
use hymba::ndarray::arr1;
use indicatif::{ProgressBar, ProgressStyle};

#[path = "support/arguments.rs"]
mod arguments;
#[path = "support/bandwidth.rs"]
mod bandwidth;
#[path = "support/load.rs"]
mod load;

use arguments::Arguments;

const USAGE: &str = "\
usage: generate --model DIR (--prompt TEXT | --chat [--system TEXT])
       generate --random [--layers N] [--hidden N] [--intermediate N] [--prompt-tokens N | --save DIR]

  --hidden N              a multiple of 50 from 100 on, 1600; with --layers (32) and --intermediate (5504) the sizes
  --save DIR              writes the model to a folder, in place of measuring
  --prompt-tokens N       512
  --max-tokens N          256, with --random 32
  --temperature X         0, which is greedy; 0.7 is usual
  --top-k N --top-p X --min-p X --repetition-penalty X --seed N
  --stop TEXT             ends the text there; may be given several times
  --threads N             all cores";

struct Settings {
    model: Option<PathBuf>,
    random: bool,
    chat: bool,
    prompt: Option<String>,
    system: Option<String>,
    prompt_tokens: usize,
    layers: Option<usize>,
    hidden: Option<usize>,
    intermediate: Option<usize>,
    save: Option<PathBuf>,
    threads: usize,
    load: LoadOptions,
    options: GenerateOptions,
}

fn settings() -> Result<Option<Settings>, String> {
    let mut arguments = Arguments::new();
    let mut settings = Settings {
        model: None,
        random: false,
        chat: false,
        prompt: None,
        system: None,
        prompt_tokens: 512,
        layers: None,
        hidden: None,
        intermediate: None,
        save: None,
        threads: 0,
        load: LoadOptions::default(),
        options: GenerateOptions::default(),
    };
    let mut max_tokens = None;
    let options = &mut settings.options;
    while let Some(name) = arguments.next() {
        match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--model" => settings.model = Some(arguments.value(&name)?),
            "--random" => settings.random = true,
            "--chat" => settings.chat = true,
            "--prompt" => settings.prompt = Some(arguments.value(&name)?),
            "--system" => settings.system = Some(arguments.value(&name)?),
            "--prompt-tokens" => settings.prompt_tokens = arguments.value(&name)?,
            "--layers" => settings.layers = Some(arguments.value(&name)?),
            "--hidden" => settings.hidden = Some(arguments.value(&name)?),
            "--intermediate" => settings.intermediate = Some(arguments.value(&name)?),
            "--save" => settings.save = Some(arguments.value(&name)?),
            "--threads" => settings.threads = arguments.value(&name)?,
            "--max-tokens" => max_tokens = Some(arguments.value(&name)?),
            "--temperature" => options.temperature = arguments.value(&name)?,
            "--top-k" => options.top_k = arguments.value(&name)?,
            "--top-p" => options.top_p = arguments.value(&name)?,
            "--min-p" => options.min_p = arguments.value(&name)?,
            "--repetition-penalty" => options.repetition_penalty = arguments.value(&name)?,
            "--seed" => options.seed = arguments.value(&name)?,
            "--stop" => options.stop_strings.push(arguments.value(&name)?),
            other if load::set(&mut settings.load, other, &mut arguments)? => {}
            other => return Err(format!("there is no argument {other:?}")),
        }
    }
    if settings.random == settings.model.is_some() {
        return Err("one of --model DIR and --random is needed".into());
    }
    if !settings.random && settings.save.is_some() {
        return Err("--save goes with --random".into());
    }
    if !settings.random && settings.chat == settings.prompt.is_some() {
        return Err("one of --prompt TEXT and --chat is needed".into());
    }
    settings.options.max_tokens = max_tokens.unwrap_or(if settings.random { 32 } else { 256 });
    Ok(Some(settings))
}

fn main() {
    let settings = match settings() {
        Ok(Some(settings)) => settings,
        Ok(None) => {
            println!("{USAGE}\n{}", load::USAGE);
            return;
        }
        Err(error) => {
            eprintln!("generate: {error}\n{USAGE}\n{}", load::USAGE);
            std::process::exit(2);
        }
    };
    if let Err(error) = run(&settings) {
        eprintln!("generate: {error}");
        std::process::exit(1);
    }
}

fn run(settings: &Settings) -> Result<(), Box<dyn Error>> {
    if settings.threads > 0 {
        rayon::ThreadPoolBuilder::new().num_threads(settings.threads).build_global()?;
    }
    match &settings.model {
        None => random(settings),
        Some(folder) => {
            let tokenizer = Tokenizer::from_dir(folder)?;
            let start = Instant::now();
            let lm = read(folder, &settings.load)?;
            eprintln!("read in {:.1} s: {}", start.elapsed().as_secs_f64(), weights(&lm));
            match &settings.prompt {
                Some(prompt) => complete(&lm, &tokenizer, prompt, settings),
                None => chat(&lm, &tokenizer, settings),
            }
        }
    }
}

fn read(folder: &PathBuf, options: &LoadOptions) -> hymba::Result<HymbaLm> {
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("reading {wide_bar} {percent} %").unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let lm = HymbaLm::from_dir_with(folder, options, |loading| {
        bar.set_length(loading.of);
        bar.set_position(loading.parameters);
    });
    bar.finish_and_clear();
    lm
}

fn weights(lm: &HymbaLm) -> String {
    format!("{:.0} M parameters, {} of weights", lm.num_parameters() as f64 / 1e6, size(lm.num_bytes()))
}

fn size(bytes: usize) -> String {
    if bytes >= 100_000_000 { format!("{:.2} GB", bytes as f64 / 1e9) } else { format!("{:.1} MB", bytes as f64 / 1e6) }
}

/// When the first token came, and how many there were.
struct Clock {
    start: Instant,
    first: Option<Duration>,
    tokens: usize,
}

impl Clock {
    fn start() -> Self {
        Clock { start: Instant::now(), first: None, tokens: 0 }
    }

    fn tick(&mut self) {
        self.first.get_or_insert(self.start.elapsed());
        self.tokens += 1;
    }

    /// Decoded tokens a second, the first not counted: it comes with the prompt.
    fn decoding(&self) -> Option<f64> {
        let decoding = self.start.elapsed() - self.first?;
        (self.tokens > 1).then(|| (self.tokens - 1) as f64 / decoding.as_secs_f64())
    }

    /// The same in one line.
    fn turn(&self, prompt: usize, reason: FinishReason) -> String {
        let first = self.first.map_or(String::new(), |first| format!(", the first after {:.2} s", first.as_secs_f64()));
        let rate = self.decoding().map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
        let end = match reason {
            FinishReason::StopToken | FinishReason::StopString => String::new(),
            reason => format!("; ended {}", finish(reason)),
        };
        format!("{prompt} tokens read, {} written{first}{rate}{end}", self.tokens)
    }

    fn report(&self, prompt: usize) {
        if let Some(first) = self.first {
            let seconds = first.as_secs_f64();
            eprintln!(
                "prompt    {prompt} tokens, {:.1} tokens/s; first token after {seconds:.2} s",
                prompt as f64 / seconds
            );
        }
        if let Some(rate) = self.decoding() {
            eprintln!("decoding  {} tokens, {rate:.2} tokens/s", self.tokens - 1);
        }
    }
}

fn write(text: &str) -> ControlFlow<()> {
    print!("{text}");
    // whoever closed the other end wants no more
    if io::stdout().flush().is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

fn complete(lm: &HymbaLm, tokenizer: &Tokenizer, prompt: &str, settings: &Settings) -> Result<(), Box<dyn Error>> {
    let ids = tokenizer.encode(prompt)?;
    let mut state = lm.new_state(1);
    let _ = write(prompt);
    let mut clock = Clock::start();
    let written = lm.generate_text_with(&mut state, tokenizer, &ids, &settings.options, |text| {
        clock.tick();
        write(text)
    })?;
    // pieces of text are not tokens: some come together
    clock.tokens = written.generation.ids.len();
    println!();
    eprintln!();
    clock.report(ids.len());
    eprintln!("memory    {} of weights, {} of state", size(lm.num_bytes()), size(state.num_bytes()));
    if let Some(peak) = bandwidth::peak_memory() {
        eprintln!("          {} at most, of the whole process", size(peak));
    }
    eprintln!("ended     {}", finish(written.generation.finish));
    Ok(())
}

fn finish(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::StopToken => "with a stop token",
        FinishReason::StopString => "at a stop string",
        FinishReason::MaxTokens => "at --max-tokens",
        _ => "by the reader",
    }
}

fn chat(lm: &HymbaLm, tokenizer: &Tokenizer, settings: &Settings) -> Result<(), Box<dyn Error>> {
    let mut chat = Chat::new(lm, tokenizer);
    if let Some(system) = &settings.system {
        chat = chat.system(system.as_str());
    }
    // lines of a file or a pipe need nobody to ask for them
    let asks = io::stdin().is_terminal();
    if asks {
        eprintln!("Say something. /clear forgets what was said, /quit or the end of the input ends the chat.");
    }
    let mut lines = io::stdin().lock().lines();
    loop {
        if asks {
            eprint!("\nyou> ");
        }
        let line = match lines.next() {
            Some(line) => line?,
            None => return Ok(()),
        };
        match line.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/clear" => {
                chat.clear();
                eprintln!("(forgotten)");
            }
            said => {
                let mut clock = Clock::start();
                let before = chat.state().lengths()[0];
                let answer = chat.ask(said, &settings.options, |text| {
                    clock.tick();
                    write(text)
                });
                println!();
                match answer {
                    Ok(answer) => {
                        clock.tokens = answer.generation.ids.len();
                        // all are new where the template writes down otherwise what was said
                        let seen = chat.state().lengths()[0] + 1;
                        let new = seen.checked_sub(before).unwrap_or(seen);
                        eprintln!(
                            "({}; {} of state)",
                            clock.turn(new, answer.generation.finish),
                            size(chat.state().num_bytes())
                        );
                    }
                    Err(error) => eprintln!("generate: {error}"),
                }
            }
        }
    }
}

/// The real sizes or others, random weights, and a random prompt.
fn random(settings: &Settings) -> Result<(), Box<dyn Error>> {
    let mut config = HymbaLmConfig::hymba_1_5b();
    if let Some(layers) = settings.layers {
        config.num_hidden_layers = layers;
        config.global_attn_idx = Some(vec![0]);
        config.kv_reuse_group = None;
    }
    if let Some(hidden) = settings.hidden {
        config.hidden_size = hidden;
        config.mamba_dt_rank = None;
    }
    config.intermediate_size = settings.intermediate.unwrap_or(config.intermediate_size);
    let start = Instant::now();
    let lm = HymbaLm::random(config, settings.options.seed, &settings.load)?;
    println!("made in {:.1} s: {}", start.elapsed().as_secs_f64(), weights(&lm));
    if let Some(folder) = &settings.save {
        lm.save_dir(folder)?;
        println!(
            "saved in {}; --model also wants a tokenizer there: tokenizer.json, tokenizer_config.json",
            folder.display()
        );
        return Ok(());
    }

    let ids: Vec<u32> = (0..settings.prompt_tokens as u32).map(|i| i * 7919 % 32_000).collect();
    let mut state = lm.new_state(1); // the meta tokens pass through here, once a model
    let mut sampler = Sampler::new(&settings.options)?;
    let start = Instant::now();
    let mut logits = lm.prefill_ragged(&[&ids], &mut state)?;
    let first = start.elapsed().as_secs_f64();
    // tokens and reading in turns: what a machine gives changes from one second to the next
    let memory = bandwidth::Memory::new();
    let (mut tokens, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..settings.options.max_tokens {
        reads.push(memory.read());
        let start = Instant::now();
        let id = sampler.pick(logits.row(0).as_slice().unwrap_or_default())?.id;
        logits = lm.step(&arr1(&[id]), &mut state)?;
        tokens.push(start.elapsed().as_secs_f64());
    }
    let level = match settings.load.quantize {
        Quantization::None => settings.load.arithmetic.simd_level(),
        _ => hymba::simd_level(),
    };
    println!("threads   {} ({level})", rayon::current_num_threads());
    println!(
        "prompt    {} tokens, {:.1} tokens/s; first token after {first:.2} s",
        ids.len(),
        ids.len() as f64 / first
    );
    println!("memory    {} of weights, {} of state", size(lm.num_bytes()), size(state.num_bytes()));
    if let Some(peak) = bandwidth::peak_memory() {
        println!("          {} at most, of the whole process with {} for reading", size(peak), size(bandwidth::BYTES));
    }
    let (token, read) = (Spread::of(tokens), Spread::of(reads));
    println!("decoding  {}", token.rates(1.0, "tokens/s"));
    println!("reading   {}", read.rates(bandwidth::BYTES as f64 / 1e9, "GB/s"));
    let limit = bandwidth::BYTES as f64 / read.median / lm.num_bytes() as f64;
    println!("limit     {limit:.2} tokens/s at that rate, of which {:.0} % were reached", 100.0 / token.median / limit);
    Ok(())
}

/// Seconds of many calls.
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        let at = |i: usize| seconds.get(i).copied().unwrap_or(f64::NAN);
        Spread { least: at(0), median: at(seconds.len() / 2), most: at(seconds.len().saturating_sub(1)) }
    }

    /// So much in each call.
    fn rates(&self, amount: f64, unit: &str) -> String {
        let [median, best, worst] = [self.median, self.least, self.most].map(|seconds| amount / seconds);
        format!("{median:.2} {unit} (median; {worst:.2} to {best:.2})")
    }
}
