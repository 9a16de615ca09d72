//! Compares the patterns of blocks (Hymba, Jamba, Zamba, Mamba alone, attention alone) at equal numbers of parameters, on tasks of
//! recall that are generated and on real series: a sweep of learning rates and seeds, with the spread.
//!
//! ```sh
//! cargo run --release --example compare -- --jobs 2                      # all trials, two at a time; then the table
//! cargo run --release --example compare -- --list                        # the models and the trials, and runs none
//! cargo run --release --example compare -- --trial 3/90                  # every 90th trial from the third on: for a Slurm array
//! parallel -j 16 target/release/examples/compare --trial {}/90 --out {}.jsonl ::: $(seq 90)     # or GNU parallel
//! cargo run --release --example compare -- --table *.jsonl               # merges what all have found
//! ```
//!
//! Each trial appends a line to the file of `--out`. Trials that are in there, by the same settings, are not run again: killed, it goes
//! on where it was. Which trials there are depends on the options, so give all processes the same ones.
//!
//! Every generated sequence is new, in training and in tests; the learning rate of a pattern is chosen by data of its own (`validation`),
//! never by the test. A frame is a one-hot token, the one before it, and sixteen numbers that tell its position, since attention here has
//! no positions. The token before stands for the short convolution that published comparisons put in front of every mixer, so that all
//! patterns see a key and its value together (`--shown 1` leaves it out).
//! `tasks.rs` says what the tasks are. Times are those of the machine while the trials run: with as many jobs as cores, on an
//! otherwise idle machine, they can be compared with each other.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

#[path = "../support/picture.rs"]
mod picture;
mod results;
mod table;
mod tasks;
mod trial;
#[path = "../support/trials.rs"]
mod trials;

use results::Record;
use trial::{PATTERNS, Settings, Trial, Work};

const USAGE: &str = "usage: compare [options]
  --tasks A,B,…       mqar-PAIRS-LENGTH[-VOCABULARY], copying-N-LENGTH, induction-LENGTH, or the name of a data set
                      (mqar-4-64,mqar-8-128,mqar-16-256,copying-16-128,JapaneseVowels)
  --data DIR          where NAME_TRAIN.ts and NAME_TEST.ts are, or NAME/NAME_TRAIN.ts (examples/data)
  --patterns A,B,…    (hymba,jamba,zamba,mamba,attention)
  --rates A,B,…       highest learning rates (0.001,0.003,0.01)
  --seeds N           seeds 0 to N − 1 (3)
  --parameters N      of each model, the head included; the width is fitted (100000)
  --layers N          blocks (2)
  --every N           attention_every of jamba and zamba (2)
  --heads N           (2)
  --steps N           of a generated task (1500)
  --frames N          in a step of a generated task (2048)
  --shown N           tokens that a frame of a generated task shows, its own the first (2)
  --trial K/N         only every Nth trial, from the Kth on, counted from 1
  --jobs N            processes of one thread each (1, with all threads)
  --out FILE          results, to which lines are added (target/compare/results.jsonl)
  --note TEXT         kept with each result, such as commit and CPU
  --list              says what would be run
  --table FILE…       only prints the table of these results, and with --svg draws it
  --svg FILE          where to draw (beside --out)";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    tasks: Vec<String>,
    data: PathBuf,
    patterns: Vec<String>,
    rates: Vec<f32>,
    seeds: u64,
    settings: Settings,
    trial: Option<(usize, usize)>,
    jobs: usize,
    out: PathBuf,
    note: String,
    list: bool,
    table: Option<Vec<PathBuf>>,
    svg: Option<PathBuf>,
}

fn run() -> Result<(), Box<dyn Error>> {
    let Some(arguments) = Arguments::parse(std::env::args().skip(1))? else {
        println!("{USAGE}");
        return Ok(());
    };
    if let Some(files) = &arguments.table {
        return report(files, arguments.svg.as_deref());
    }
    let works = arguments.tasks.iter().map(|task| Work::read(task, &arguments.data)).collect::<Result<Vec<_>, _>>()?;
    if arguments.trial.is_none() {
        arguments.print_models(&works)?;
    }
    let trials = arguments.trials();
    if arguments.list {
        trials.iter().enumerate().for_each(|(i, trial)| println!("{:4} {}", i + 1, describe(trial)));
        return Ok(());
    }
    if let Some(folder) = arguments.out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    if arguments.jobs > 1 {
        in_processes(arguments.jobs)?;
    } else {
        arguments.run(&works, &trials)?;
    }
    match arguments.trial {
        Some(_) => Ok(()),
        None => report(std::slice::from_ref(&arguments.out), Some(&arguments.out.with_extension("svg"))),
    }
}

impl Arguments {
    /// `None` if help is asked for.
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Self>, String> {
        let list = |text: &str| text.split(',').map(str::to_string).collect::<Vec<_>>();
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/compare/results.jsonl");
        let mut parsed = Arguments {
            tasks: list("mqar-4-64,mqar-8-128,mqar-16-256,copying-16-128,JapaneseVowels"),
            data: PathBuf::from("."),
            patterns: PATTERNS.map(String::from).to_vec(),
            rates: vec![1e-3, 3e-3, 1e-2],
            seeds: 3,
            settings: Settings {
                parameters: 100_000,
                layers: 2,
                every: 2,
                heads: 2,
                steps: 1500,
                frames: 2048,
                shown: 2,
            },
            trial: None,
            jobs: 1,
            out: target,
            note: String::new(),
            list: false,
            table: None,
            svg: None,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            let settings = &mut parsed.settings;
            match argument.as_str() {
                "--help" | "-h" => return Ok(None),
                "--list" => parsed.list = true,
                "--tasks" => parsed.tasks = list(&value()?),
                "--data" => parsed.data = value()?.into(),
                "--patterns" => parsed.patterns = list(&value()?),
                "--rates" => {
                    let rates = list(&value()?);
                    parsed.rates = rates.iter().map(|rate| number(&argument, rate)).collect::<Result<_, _>>()?;
                }
                "--seeds" => parsed.seeds = number(&argument, &value()?)?,
                "--parameters" => settings.parameters = number(&argument, &value()?)?,
                "--layers" => settings.layers = number(&argument, &value()?)?,
                "--every" => settings.every = number(&argument, &value()?)?,
                "--heads" => settings.heads = number::<usize>(&argument, &value()?)?.max(1),
                "--steps" => settings.steps = number(&argument, &value()?)?,
                "--frames" => settings.frames = number(&argument, &value()?)?,
                "--shown" => settings.shown = number::<usize>(&argument, &value()?)?.max(1),
                "--trial" => parsed.trial = Some(trials::share(&value()?)?),
                "--jobs" => parsed.jobs = number(&argument, &value()?)?,
                "--out" => parsed.out = value()?.into(),
                "--note" => parsed.note = value()?,
                "--svg" => parsed.svg = Some(value()?.into()),
                "--table" => parsed.table = Some(Vec::new()),
                _ => match &mut parsed.table {
                    Some(files) if !argument.starts_with('-') => files.push(argument.into()),
                    _ => return Err(format!("unknown option {argument}\n{USAGE}")),
                },
            }
        }
        for name in &parsed.patterns {
            trial::pattern(name, 1)?;
        }
        match parsed.trial {
            Some(_) => Ok(Some(Arguments { jobs: 1, ..parsed })),
            None => Ok(Some(parsed)),
        }
    }

    /// All trials, or those of `--trial`. The seeds come last, so that what is there after half the time is all tasks with fewer seeds.
    fn trials(&self) -> Vec<Trial> {
        let mut all = Vec::new();
        for seed in 0..self.seeds {
            for &rate in &self.rates {
                for task in &self.tasks {
                    let of = |pattern: &String| Trial { task: task.clone(), pattern: pattern.clone(), rate, seed };
                    all.extend(self.patterns.iter().map(of));
                }
            }
        }
        match self.trial {
            Some((k, n)) => all.into_iter().skip(k - 1).step_by(n).collect(),
            None => all,
        }
    }

    fn run(&self, works: &[Work], trials: &[Trial]) -> Result<(), Box<dyn Error>> {
        for (i, trial) in trials.iter().enumerate() {
            let (done, _) = results::load(&self.out).map_err(|error| format!("{}: {error}", self.out.display()))?;
            if results::is_done(&done, trial, &self.settings) {
                continue;
            }
            let work = self.tasks.iter().position(|task| *task == trial.task).map(|place| &works[place]);
            let start = Instant::now();
            let outcome = work.ok_or("a trial of no task")?.run(trial, &self.settings)?;
            let seconds = start.elapsed().as_secs_f64();
            let scores: Vec<String> =
                outcome.scores.iter().map(|(length, score)| format!("{score:.3} at {length}")).collect();
            println!(
                "{} of {}: {}: {} ({} steps, {seconds:.0} s)",
                i + 1,
                trials.len(),
                describe(trial),
                scores.join(", "),
                outcome.steps
            );
            let (settings, simd, note) = (self.settings.clone(), hymba::simd_level().into(), self.note.clone());
            let record = Record { trial: trial.clone(), settings, outcome, seconds, simd, note };
            results::append(&self.out, &record).map_err(|error| format!("{}: {error}", self.out.display()))?;
        }
        Ok(())
    }

    /// The width of each model, and how many parameters it has.
    fn print_models(&self, works: &[Work]) -> Result<(), Box<dyn Error>> {
        println!("models of {} parameters:", self.settings.parameters);
        for (task, work) in self.tasks.iter().zip(works) {
            for name in &self.patterns {
                let (options, count) = work.fitted(trial::pattern(name, self.settings.every)?, &self.settings)?;
                println!("  {task:20} {name:10} hidden_size {:4}  {count} parameters", options.hidden_size);
            }
        }
        Ok(())
    }
}

/// This program so many times, each with its share of the trials and one thread.
fn in_processes(jobs: usize) -> Result<(), Box<dyn Error>> {
    let program = std::env::current_exe()?;
    let child = |k: usize| {
        let arguments = std::env::args().skip(1).chain(["--trial".into(), format!("{k}/{jobs}")]);
        Command::new(&program).args(arguments).env("RAYON_NUM_THREADS", "1").spawn()
    };
    let children = (1..=jobs).map(child).collect::<Result<Vec<_>, _>>()?;
    let mut failed = 0;
    for mut child in children {
        failed += usize::from(!child.wait()?.success());
    }
    if failed > 0 { Err(format!("{failed} of {jobs} processes failed; run it again to go on").into()) } else { Ok(()) }
}

/// Prints the table of some files of results, and draws it.
fn report(files: &[PathBuf], svg: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let mut records: Vec<Record> = Vec::new();
    for file in files {
        let (more, none) = results::load(file).map_err(|error| format!("{}: {error}", file.display()))?;
        if none > 0 {
            println!("{}: {none} lines are no results, and are left out", file.display());
        }
        records.extend(more);
    }
    let Some(first) = records.first() else { return Err("there are no results; give the files after --table".into()) };
    if records.iter().any(|record| record.settings != first.settings) {
        return Err(
            "the results are of different settings, which cannot be compared: give files of one comparison".into()
        );
    }
    let diverged = records.iter().filter(|record| record.outcome.diverged).count();
    let s = &first.settings;
    println!(
        "\n{} trials; {} parameters, {} blocks, attention_every {}, {} heads; generated tasks: {} steps of {} frames that show {} tokens\n",
        records.len(),
        s.parameters,
        s.layers,
        s.every,
        s.heads,
        s.steps,
        s.frames,
        s.shown
    );
    println!("{}", table::table(&records));
    if diverged > 0 {
        println!("{diverged} trials ended with a loss that is not finite");
    }
    let notes: std::collections::BTreeSet<_> =
        records.iter().map(|record| format!("{} ({})", record.note, record.simd)).collect();
    println!("measured on: {}", notes.into_iter().collect::<Vec<_>>().join("; "));
    if let Some(path) = svg {
        table::draw(&records, path)?;
        println!("drawn in {}", path.display());
    }
    Ok(())
}

fn describe(trial: &Trial) -> String {
    format!("{} {}, rate {}, seed {}", trial.task, trial.pattern, trial.rate, trial.seed)
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{option} needs a number, found {text:?}\n{USAGE}"))
}
