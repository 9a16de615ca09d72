//! Streams frames at 60 per second, as a controller would, then 100,000 frames as fast as they go.
//!
//! ```sh
//! cargo run --release --example stream
//! cargo run --release --example stream -- --seconds 10 --frames 20000
//! ```
//!
//! It measures the time of a step, and checks that neither time nor memory grows with the length of the stream, and that
//! stepping gives what `forward` gives. The exit status is 1 if a check fails.

use std::error::Error;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use hymba::ndarray::{Array2, Array3, ArrayRef2, Axis, s};
use hymba::{Hymba, HymbaOptions};
use indicatif::{ProgressBar, ProgressStyle};

const EMBED_DIM: usize = 287;
const FRAMES_PER_SECOND: f64 = 60.0;
/// The first frames, which are compared with `forward`: twice the default window.
const COMPARED: usize = 2 * HymbaOptions::DEFAULT_WINDOW_SIZE;
/// Steps timed at the start and at the end of the long stream; more would only count other programs' noise.
const TIMED: usize = 500;
/// `step` and `forward` add in another order; beyond rounding they agree.
const TOLERANCE: f32 = 1e-5;
/// A step at the end may take this many times as long as one at the start. On a quiet machine the ratio is 1.
const SLOWER: f64 = 2.0;
/// What the process may grow by during the stream: allocator and thread noise.
const GROWTH: u64 = 1 << 20;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("stream: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every check holds.
fn run() -> Result<bool, Box<dyn Error>> {
    let (seconds, frames) = arguments()?;
    let model = Hymba::build(HymbaOptions::new(EMBED_DIM))?;
    println!("default model, frames of {EMBED_DIM} numbers, {} parameters", model.num_parameters());

    let mut checks = Checks { all_good: true };
    compare_with_forward(&model, &mut checks)?;
    paced(&model, seconds, &mut checks)?;
    flat_out(&model, frames, &mut checks)?;

    println!();
    println!("{}", if checks.all_good { "all checks hold" } else { "at least one check FAILED" });
    Ok(checks.all_good)
}

/// `[--seconds S] [--frames N]`
fn arguments() -> Result<(f64, usize), String> {
    const USAGE: &str = "usage: stream [--seconds S] [--frames N], with S from 0.1 to 3600 and N at least 1000";
    let (mut seconds, mut frames) = (3.0, 100_000);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--seconds" => seconds = value.parse().map_err(|_| USAGE)?,
            "--frames" => frames = value.parse().map_err(|_| USAGE)?,
            _ => return Err(USAGE.into()),
        }
    }
    if (0.1..=3600.0).contains(&seconds) && frames >= 1000 { Ok((seconds, frames)) } else { Err(USAGE.into()) }
}

/// Prints one line per check.
struct Checks {
    all_good: bool,
}

impl Checks {
    fn check(&mut self, good: bool, what: &str) {
        self.all_good &= good;
        println!("  {} {what}", if good { "ok    " } else { "FAILED" });
    }
}

/// Frame number `time` of an endless signal: slow and fast waves, other ones on every channel. `[1, EMBED_DIM]`
fn frame(time: usize) -> Array2<f32> {
    Array2::from_shape_fn((1, EMBED_DIM), |(_, channel)| {
        let seconds = time as f64 / FRAMES_PER_SECOND;
        let (pitch, phase) = (0.1 + 0.07 * channel as f64, 0.9 * channel as f64);
        ((pitch * seconds + phase).sin() + 0.3 * (7.0 * pitch * seconds - phase).cos()) as f32
    })
}

/// The first frames, stepped, against the same frames given to `forward` at once.
fn compare_with_forward(model: &Hymba, checks: &mut Checks) -> Result<(), Box<dyn Error>> {
    println!();
    println!("{COMPARED} frames, one at a time and at once");
    let mut frames = Array3::zeros((1, COMPARED, EMBED_DIM));
    for (time, mut row) in frames.axis_iter_mut(Axis(1)).enumerate() {
        row.assign(&frame(time));
    }

    let mut state = model.new_state(1);
    let mut halfway = state.clone();
    let mut stepped = Vec::with_capacity(COMPARED);
    for (time, frame) in frames.axis_iter(Axis(1)).enumerate() {
        if time == COMPARED / 2 {
            halfway = state.clone();
        }
        stepped.push(model.step(&frame, &mut state)?);
    }

    let at_once = model.forward_sequence(&frames)?;
    let mut largest = 0.0;
    for (step, position) in stepped.iter().zip(at_once.axis_iter(Axis(1))) {
        largest = larger(largest, difference(step, &position));
    }
    checks.check(
        largest <= TOLERANCE,
        &format!("every step is its row of forward_sequence (largest difference {largest:.0e})"),
    );

    let window = model.options().window_size;
    let mut largest = 0.0;
    for length in [1, 2, window - 1, window, window + 1, COMPARED] {
        let prefix = model.forward(&frames.slice(s![.., ..length, ..]))?;
        largest = larger(largest, difference(&stepped[length - 1], &prefix));
    }
    checks.check(
        largest <= TOLERANCE,
        &format!("and the forward of the frames so far (largest difference {largest:.0e})"),
    );

    let mut same = true;
    for (frame, step) in frames.axis_iter(Axis(1)).zip(&stepped).skip(COMPARED / 2) {
        same &= model.step(&frame, &mut halfway)? == *step;
    }
    checks.check(same, "a state cloned halfway gives the same second half, bit for bit");
    Ok(())
}

/// The largest absolute difference of two arrays of one shape; NaN if there is one.
fn difference(one: &ArrayRef2<f32>, other: &ArrayRef2<f32>) -> f32 {
    one.iter().zip(other).fold(0.0, |largest, (a, b)| larger(largest, (a - b).abs()))
}

/// The larger number, NaN being the largest of all (`f32::max` would drop it).
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// One frame every sixtieth of a second.
fn paced(model: &Hymba, seconds: f64, checks: &mut Checks) -> Result<(), Box<dyn Error>> {
    let count = (seconds * FRAMES_PER_SECOND).ceil() as usize;
    let budget = Duration::from_secs_f64(1.0 / FRAMES_PER_SECOND);
    println!();
    println!("{count} frames at {FRAMES_PER_SECOND} a second");

    let mut state = model.new_state(1);
    let mut times = Vec::with_capacity(count);
    let bar = progress(count);
    let start = Instant::now();
    for time in 0..count {
        let due = start + Duration::from_secs_f64(time as f64 / FRAMES_PER_SECOND);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let frame = frame(time);
        let arrived = Instant::now();
        model.step(&frame, &mut state)?;
        times.push(arrived.elapsed());
        bar.inc(1);
    }
    bar.finish_and_clear();

    times.sort();
    println!("  a step takes, of the {:.1} ms between frames:", milliseconds(budget));
    for (name, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
        let time = percentile(&times, share);
        println!(
            "    {name} {:7.3} ms  {:5.1} %",
            milliseconds(time),
            100.0 * time.as_secs_f64() / budget.as_secs_f64()
        );
    }
    let late = times.iter().filter(|&&time| time > budget).count();
    checks.check(
        percentile(&times, 0.99) <= budget,
        &format!("99 of 100 steps end before the next frame ({late} of {count} did not)"),
    );
    Ok(())
}

/// As many frames as asked for, without a pause.
fn flat_out(model: &Hymba, count: usize, checks: &mut Checks) -> Result<(), Box<dyn Error>> {
    const FIRST_TIMED: usize = 10;
    const MEASURED_AT: usize = 999;
    println!();
    println!("{count} frames without a pause");

    let timed = TIMED.min(count / 4);
    let (mut early, mut late) = (Vec::with_capacity(timed), Vec::with_capacity(timed));
    let mut state = model.new_state(1);
    let mut memory_before = None;
    let mut state_before = 0;
    let mut finite = true;
    let bar = progress(count);
    let start = Instant::now();
    for time in 0..count {
        let frame = frame(time);
        let arrived = Instant::now();
        let output = model.step(&frame, &mut state)?;
        let spent = arrived.elapsed();
        finite &= output.iter().all(|value| value.is_finite());
        if (FIRST_TIMED..FIRST_TIMED + timed).contains(&time) {
            early.push(spent);
        } else if time >= count - timed {
            late.push(spent);
        }
        if time == MEASURED_AT {
            memory_before = resident_bytes();
            state_before = state.num_bytes();
        }
        bar.inc(1);
    }
    let total = start.elapsed();
    let (memory_after, state_after) = (resident_bytes(), state.num_bytes());
    bar.finish_and_clear();

    println!("  {:.1} s, {:.0} frames/s", total.as_secs_f64(), count as f64 / total.as_secs_f64());
    checks.check(finite, "every output is finite");
    early.sort();
    late.sort();
    let (before, after) = (percentile(&early, 0.5), percentile(&late, 0.5));
    checks.check(
        after.as_secs_f64() <= SLOWER * before.as_secs_f64(),
        &format!(
            "a step takes {:.3} ms at frame {FIRST_TIMED} and {:.3} ms at frame {count} (medians of {timed})",
            milliseconds(before),
            milliseconds(after)
        ),
    );
    checks.check(
        state_after == state_before,
        &format!(
            "the state holds {state_before} bytes at frame {} and {state_after} at frame {count}",
            MEASURED_AT + 1
        ),
    );
    match (memory_before, memory_after) {
        (Some(before), Some(after)) => checks.check(
            after <= before + GROWTH,
            &format!(
                "the process holds {:.1} MiB at frame {} and {:.1} MiB at frame {count}",
                mebibytes(before),
                MEASURED_AT + 1,
                mebibytes(after)
            ),
        ),
        _ => println!("  (the memory of the process is not measured on this system)"),
    }
    Ok(())
}

/// The memory of this process that is in use, where Linux tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// The time that a `share` of the sorted times does not pass.
fn percentile(sorted: &[Duration], share: f64) -> Duration {
    let place = (share * sorted.len() as f64).ceil() as usize;
    sorted[place.clamp(1, sorted.len()) - 1]
}

fn milliseconds(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A bar on the error stream, which shows itself on a terminal only.
fn progress(count: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("  {wide_bar} {pos}/{len}, {eta} left");
    ProgressBar::new(count as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
