//! Where the time goes: the cases of the example `throughput`, part by part, each beside what this machine could do.
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release --features profile --example profile
//! cargo run --release --features profile --example profile -- f1 step 5
//! ```
//!
//! Arguments: the cases (`f1`, `f32`, `f1k`, `f8k`, `step`, `train`, `small`; `growth` and `cores`, see below; all but `cores` unless some are
//! named), and the number of rounds of 0.3 s per case (3 unless given), of which the fastest is shown. The columns of a table:
//!
//! | column | |
//! |---|---|
//! | time | of all threads together, for one call |
//! | share | of threads × the time of a call |
//! | rate | what the part gets done per second and thread |
//! | limit | what a thread could get done per second if it did nothing else, measured beforehand |
//! | of it | the limit's time over the time: 100 % is as fast as this machine can do this amount of work |
//!
//! The limits: products, multiply-adds in registers (for 8 frames and fewer, reading 20 MB of weights); scan, the vectorised exp on
//! numbers in the first cache; attention, its multiply-adds and then its exps; element-wise and packing, reading and
//! overwriting what lies in the second cache; optimiser, reading and overwriting what no cache holds. What the parts leave of
//! the threads' time is waiting, handing work over, copying, and memory management.
//!
//! `cores` simulates more threads than there are: how often work is shared, into how many tasks, what part of the work one thread
//! does alone, and how many times faster than one thread all is if every thread works at its limits and handing over costs nothing.
//!
//! `growth` shows what does not grow: time with the length of a sequence past the window, a step with the frames before it,
//! memory with calls. Resident memory is read from `/proc` and so left out elsewhere than on Linux.

use std::error::Error;
use std::process::Command;
use std::time::{Duration, Instant};

use allocations::allocations;
use cases::{CASES, Call, WIDTH, forward, frame, prepare};
use hymba::profile::{self, Limits, StageReport};
use hymba::{Hymba, HymbaOptions};

#[path = "support/allocations.rs"]
mod allocations;
#[path = "support/cases.rs"]
mod cases;

const ROUND: Duration = Duration::from_millis(300);
/// Of the sequence whose memory is looked at.
const LONG: usize = 8192;

fn main() -> Result<(), Box<dyn Error>> {
    let (mut names, mut rounds) = (Vec::new(), 3);
    for argument in std::env::args().skip(1) {
        if let Some(window) = argument.strip_prefix("memory-").and_then(|window| window.parse().ok()) {
            return print_memory(window);
        } else if let Ok(number) = argument.parse() {
            rounds = usize::max(number, 1);
        } else if CASES.contains(&&*argument) || ["growth", "cores"].contains(&&*argument) {
            names.push(argument);
        } else {
            return Err(format!(
                "{argument:?} is neither a number of rounds nor one of {CASES:?}, \"growth\" and \"cores\""
            )
            .into());
        }
    }
    if names.is_empty() {
        names = CASES.iter().chain(&["growth"]).map(|name| name.to_string()).collect();
    }

    let threads = match std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok()) {
        Some(threads) if threads > 0 => threads,
        _ => std::thread::available_parallelism()?.get(),
    };
    println!("{threads} threads, {}", hymba::simd_level());
    Limits::measure(); // the first milliseconds of wide vectors are slow
    let alone = Limits::measure();
    let together = if threads > 1 { measure_together(threads) } else { alone };
    print_limits(&alone, &together, threads);
    for name in &names {
        match name.as_str() {
            "growth" => growth()?,
            "cores" => cores(&alone)?,
            // a stream is stepped on one thread
            case => print_case(case, rounds, threads, if case == "step" { &alone } else { &together })?,
        }
    }
    Ok(())
}

/// What each of so many threads can do while the others do the same.
fn measure_together(threads: usize) -> Limits {
    let all: Vec<Limits> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(Limits::measure)).collect();
        running.into_iter().map(|thread| thread.join().expect("measuring does not panic")).collect()
    });
    let mut mean = all[0];
    let fields: [fn(&mut Limits) -> &mut f64; 5] = [
        |limits| &mut limits.multiply_adds,
        |limits| &mut limits.exps,
        |limits| &mut limits.cached_bytes,
        |limits| &mut limits.weight_bytes,
        |limits| &mut limits.memory_bytes,
    ];
    for field in fields {
        *field(&mut mean) = all.iter().map(|limits| *field(&mut limits.clone())).sum::<f64>() / threads as f64;
    }
    mean
}

fn print_limits(alone: &Limits, together: &Limits, threads: usize) {
    println!("\n{:28} {:>14} {:>12}", "limits of one thread", "alone", format!("{threads} at a time"));
    for (name, unit, limit) in [
        ("multiply-adds in registers", "GFLOP/s", (|limits| 2.0 * limits.multiply_adds) as fn(&Limits) -> f64),
        ("exp in the first cache", "Gexp/s", |limits| limits.exps),
        ("overwriting the second cache", "GB/s", |limits| limits.cached_bytes),
        ("reading 20 MB of weights", "GB/s", |limits| limits.weight_bytes),
        ("overwriting 80 MB of memory", "GB/s", |limits| limits.memory_bytes),
    ] {
        println!("{name:28} {:14.1} {:12.1} {unit}", limit(alone) / 1e9, limit(together) / 1e9);
    }
}

fn print_case(case: &str, rounds: usize, threads: usize, limits: &Limits) -> hymba::Result<()> {
    let mut call = prepare(case)?;
    run_round(&mut call)?;
    let mut fastest: Option<(f64, f64, Vec<StageReport>)> = None;
    for _ in 0..rounds {
        profile::reset();
        let (seconds, calls) = run_round(&mut call)?;
        if fastest.as_ref().is_none_or(|(fastest, ..)| seconds < *fastest) {
            fastest = Some((seconds, calls, profile::report()));
        }
    }
    let Some((seconds, calls, parts)) = fastest else { return Ok(()) };
    let all = threads as f64 * seconds;
    println!("\n{case}: {:.3} ms a call", seconds * 1e3);
    println!(
        "{:21} {:>9} {:>12} {:>10} {:>10} {:8} {:>6} {:>9}",
        "part", "time", "share", "rate", "limit", "", "of it", "calls"
    );
    let mut left = all;
    for part in parts.iter().filter(|part| part.calls > 0) {
        let time = part.seconds / calls;
        let at_limits = limits.seconds(&part.work);
        let (amount, unit) = amount(part);
        println!(
            "{:21} {:9.3} ms {:7.1} % {:10.1} {:10.1} {unit:8} {:4.0} % {:9.0}",
            part.name,
            time * 1e3,
            100.0 * time / all,
            amount / part.seconds / 1e9,
            amount / at_limits / 1e9,
            100.0 * at_limits / part.seconds,
            part.calls as f64 / calls,
        );
        left -= time;
    }
    println!("waiting and the rest  {:9.3} ms {:7.1} %", left * 1e3, 100.0 * left / all);
    Ok(())
}

/// The work of a part in the unit it is usually given in.
fn amount(part: &StageReport) -> (f64, &'static str) {
    let work = &part.work;
    if work.multiply_adds > 0 {
        (2.0 * work.multiply_adds as f64, "GFLOP/s")
    } else if work.exps > 0 {
        (work.exps as f64, "Gexp/s")
    } else {
        ((work.cached_bytes + work.weight_bytes + work.memory_bytes) as f64, "GB/s")
    }
}

/// Seconds a call, on average, and the number of calls.
fn run_round(call: &mut Call) -> hymba::Result<(f64, f64)> {
    let (mut calls, start) = (0, Instant::now());
    while calls < 3 || start.elapsed() < ROUND {
        call()?;
        calls += 1;
    }
    Ok((start.elapsed().as_secs_f64() / f64::from(calls), f64::from(calls)))
}

fn cores(limits: &Limits) -> hymba::Result<()> {
    println!(
        "\n{:6} {:>7} {:>7} {:>7} {:>10} {:>8} {:>7}",
        "cores", "threads", "shared", "tasks", "largest", "alone", "faster"
    );
    for case in CASES.into_iter().filter(|case| *case != "f8k") {
        let mut call = prepare(case)?;
        call()?; // packs weights
        for threads in [2, 4, 8, 16, 64] {
            let (result, simulation) = profile::simulate(threads, &mut call);
            result?;
            let (together, one) = simulation.seconds(|cost| limits.seconds(cost));
            let largest = simulation.shared.iter().flatten().map(|task| limits.seconds(task)).fold(0.0, f64::max);
            println!(
                "{case:6} {threads:7} {:7} {:7} {:7.1} µs {:6.2} % {:7.1}",
                simulation.shared.len(),
                simulation.shared.iter().map(Vec::len).sum::<usize>(),
                largest * 1e6,
                100.0 * limits.seconds(&simulation.alone) / one,
                one / together,
            );
        }
    }
    Ok(())
}

fn growth() -> Result<(), Box<dyn Error>> {
    println!("\ngrowth, window 60");
    let (mut short, mut long) = (forward(1, 1024, 60)?, forward(1, LONG, 60)?);
    let [short, long] = [seconds(20, &mut short)?, seconds(5, &mut long)?];
    println!(
        "forward, length {LONG} / 1024: {:.1} ms / {:.1} ms = {:.2} (8 in proportion)",
        long * 1e3,
        short * 1e3,
        long / short
    );

    let model = Hymba::build(HymbaOptions::new(WIDTH))?;
    let frame = frame();
    let mut first = Vec::new();
    for _ in 0..200 {
        let mut state = model.new_state(1);
        for _ in 1..10 {
            model.step(&frame, &mut state)?;
        }
        let start = Instant::now();
        model.step(&frame, &mut state)?;
        first.push(start.elapsed().as_secs_f64());
    }
    let mut state = model.new_state(1);
    let mut step = || model.step(&frame, &mut state).map(drop);
    let mut frames = 1000;
    for _ in 0..frames {
        step()?;
    }
    let filled = seconds(200, &mut step)?;
    let (resident, (count, bytes)) = (resident("VmRSS"), allocations());
    frames += 200;
    let begin = frames;
    while frames < 100_000 {
        step()?;
        frames += 1;
    }
    print_memory_use("step", frames - begin, resident, (count, bytes));
    let last = seconds(200, &mut step)?;
    let first = median(&mut first);
    let [first, filled, last] = [first, filled, last].map(|seconds| seconds * 1e3);
    println!(
        "step at frame 10 / 1,000 / 100,000: {first:.3} / {filled:.3} / {last:.3} ms, last / first = {:.2}",
        last / first
    );

    let mut call = prepare("f1")?;
    for _ in 0..100 {
        call()?;
    }
    let before = (self::resident("VmRSS"), allocations());
    for _ in 0..200 {
        call()?;
    }
    print_memory_use("forward, 1 × 60", 200, before.0, before.1);

    let mut call = prepare("small")?;
    for _ in 0..5 {
        call()?;
    }
    let before = (self::resident("VmRSS"), allocations());
    for _ in 0..20 {
        call()?;
    }
    print_memory_use("training step, 16 × 16", 20, before.0, before.1);

    if resident.is_none() {
        println!("peak of resident memory: only Linux tells");
        return Ok(());
    }
    for window in [60, LONG] {
        let output = Command::new(std::env::current_exe()?).arg(format!("memory-{window}")).output()?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
    }
    Ok(())
}

/// What `calls` calls have allocated since, and by how much the process has grown.
fn print_memory_use(what: &str, calls: usize, resident_before: Option<u64>, before: (u64, u64)) {
    let (count, bytes) = allocations();
    let (count, bytes) = ((count - before.0) as f64 / calls as f64, (bytes - before.1) as f64 / calls as f64);
    let growth = match (resident("VmRSS"), resident_before) {
        (Some(now), Some(before)) => format!("resident memory grew by {} kB", now as i64 - before as i64),
        _ => "only Linux tells how resident memory grew".into(),
    };
    println!("{what}: {count:.1} allocations of {bytes:.0} bytes in all a call; in {calls} calls {growth}");
}

/// The job of a process of its own, because the peak of a process never falls.
fn print_memory(window: usize) -> Result<(), Box<dyn Error>> {
    let mut call = forward(1, LONG, window)?;
    let before = resident("VmHWM").ok_or("only Linux tells the peak of resident memory")?;
    call()?;
    let peak = resident("VmHWM").unwrap_or(before);
    println!(
        "peak of resident memory, forward of length {LONG}, window {window}: {:.0} MB, of which model and input {:.0} MB",
        peak as f64 / 1e3,
        before as f64 / 1e3
    );
    Ok(())
}

/// A line of `/proc/self/status`, in kB.
fn resident(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// The median of `calls` calls, after two that are not counted.
fn seconds(calls: usize, mut call: impl FnMut() -> hymba::Result<()>) -> hymba::Result<f64> {
    let mut times = Vec::new();
    for _ in 0..calls + 2 {
        let start = Instant::now();
        call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(median(&mut times[2..]))
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
