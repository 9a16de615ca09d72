//! Times the default model (frames of width 287) and prints one JSON object a case, for comparison with other programs:
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release --example throughput -- 5
//! RAYON_NUM_THREADS=1 cargo run --release --example throughput -- f1 step
//! ```
//!
//! Arguments: the number of rounds (3 unless given), and the cases (all unless some are named). A round calls a case for at least 0.3 s after a warm-up and takes
//! the median call. Cases: `f1` batch 1 × length 60, `f32` 32 × 60, `f1k` 1 × 1024 and `f8k` 1 × 8192 with a window as
//! long as the sequence, `step` one frame of one stream past 70 frames, `train` forward, mean squared error, backward and
//! AdamW on 32 × 60, `small` the same on 16 × 16.

use std::error::Error;
use std::time::{Duration, Instant};

use cases::{CASES, prepare};

#[allow(dead_code)] // the other examples use more of it
#[path = "support/cases.rs"]
mod cases;

const ROUND: Duration = Duration::from_millis(300);

fn main() -> Result<(), Box<dyn Error>> {
    let (mut rounds, mut cases) = (3, Vec::new());
    for argument in std::env::args().skip(1) {
        match argument.parse() {
            Ok(number) => rounds = number,
            Err(_) if CASES.contains(&&*argument) => cases.push(argument),
            Err(_) => return Err(format!("{argument:?} is neither a number of rounds nor one of {CASES:?}").into()),
        }
    }
    if cases.is_empty() {
        cases = CASES.map(String::from).into();
    }
    let threads = match std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok()) {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?.get(),
    };
    for case in &cases {
        report(case, threads, rounds, prepare(case)?)?;
    }
    Ok(())
}

fn report(case: &str, threads: usize, rounds: usize, mut call: impl FnMut() -> hymba::Result<()>) -> hymba::Result<()> {
    let mut medians = Vec::new();
    for _ in 0..=rounds {
        let (mut calls, start) = (Vec::new(), Instant::now());
        while start.elapsed() < ROUND || calls.len() < 3 {
            let start = Instant::now();
            call()?;
            calls.push(start.elapsed().as_secs_f64() * 1e3);
        }
        medians.push(median(&mut calls));
    }
    medians.remove(0); // the warm-up
    let median = median(&mut medians);
    println!(
        r#"{{"peer": "hymba", "case": "{case}", "threads": {threads}, "ms_min": {:.4}, "ms_med": {median:.4}, "ms_max": {:.4}}}"#,
        medians[0],
        medians[medians.len() - 1],
    );
    Ok(())
}

/// Sorts the times, too.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}
