//! Times steps of training a language model (forward, cross-entropy, backward, clipping, AdamW) and prints one JSON object, for
//! comparison with other programs (`benches/peers/lm_train_bench.py`) and with what this machine could do:
//!
//! ```text
//! RAYON_NUM_THREADS=2 cargo run --release --features lm,profile --example lm_step -- DIR TEXT 16 256 9
//! ```
//!
//! DIR holds a `config.json`, and weights. Where it has none yet, new ones from seed 0 are written there. The batch, the same for all
//! steps, is the first bytes of TEXT, here 16 rows of 256. `losses` are those of the first three steps; 9 more are timed.
//! A table on standard error says where the time of all threads went, in milliseconds per step.
//! `of_peak` is the share of this machine's multiply-adds per second, measured in registers on as many threads, that those of all
//! products and of attention come to.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use hymba::HymbaLm;
use hymba::lm::{HymbaLmConfig, LoadOptions};
use hymba::profile::{self, Limits};
use hymba::train::{AdamW, AdamWOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, text, numbers @ ..] = &arguments[..] else {
        return Err("usage: lm_step DIR TEXT ROWS LENGTH STEPS".into());
    };
    let [rows, length, steps] = numbers else { return Err("give ROWS, LENGTH and STEPS".into()) };
    let (rows, length, steps): (usize, usize, usize) = (rows.parse()?, length.parse()?, steps.parse()?);
    let threads = match std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok()) {
        Some(threads) if threads > 0 => threads,
        _ => std::thread::available_parallelism()?.get(),
    };

    let mut lm = read_or_build(Path::new(folder))?;
    let bytes: Vec<u32> = std::fs::read(text)?.into_iter().map(u32::from).collect();
    let batch: Vec<Vec<u32>> = bytes.chunks_exact(length).take(rows).map(<[u32]>::to_vec).collect();
    if batch.len() < rows || length < 2 {
        return Err(format!("the text has {} bytes: too few for {rows} rows of {length}", bytes.len()).into());
    }
    let options = AdamWOptions::default().learning_rate(1e-3).betas(0.9, 0.95).weight_decay(0.1).clip_norm(1.0);
    let mut optimizer = AdamW::new(&lm, options)?;
    let mut gradient = lm.zeros_like();
    let mut step = || {
        let loss = lm.accumulate(&batch, None, &mut gradient)?;
        optimizer.step_accumulated(&mut lm, &mut gradient, loss.tokens as f64)?;
        Ok::<f64, hymba::Error>(loss.mean())
    };
    let losses = [step()?, step()?, step()?];
    profile::reset();
    let mut times = Vec::new();
    for _ in 0..steps.max(1) {
        let start = Instant::now();
        step()?;
        times.push(start.elapsed().as_secs_f64());
    }
    let milliseconds = |seconds: f64| 1e3 * seconds / times.len() as f64;
    let mut left = times.iter().sum::<f64>() * threads as f64;
    for part in profile::report().iter().filter(|part| part.calls > 0) {
        eprintln!("{:21} {:9.2} ms", part.name, milliseconds(part.seconds));
        left -= part.seconds;
    }
    eprintln!("{:21} {:9.2} ms", "waiting and the rest", milliseconds(left));
    let multiply_adds: u64 = profile::report().iter().map(|part| part.work.multiply_adds).sum();
    let done = multiply_adds as f64 / times.iter().sum::<f64>() / threads as f64;
    let peak = peak(threads);
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        r#"{{"peer": "hymba", "threads": {threads}, "parameters": {}, "losses": {losses:?}, "ms_min": {:.2}, "ms_med": {:.2}, "ms_max": {:.2}, "tokens_per_s_per_thread": {:.1}, "gflops_per_thread": {:.1}, "peak_gflops_per_thread": {:.1}, "of_peak": {:.3}}}"#,
        lm.num_parameters(),
        times[0] * 1e3,
        median * 1e3,
        times[times.len() - 1] * 1e3,
        (rows * (length - 1)) as f64 / median / threads as f64,
        2e-9 * done,
        2e-9 * peak,
        done / peak,
    );
    Ok(())
}

/// The model of a folder; one that is new is written there.
fn read_or_build(folder: &Path) -> hymba::Result<HymbaLm> {
    if folder.join("model.safetensors").exists() {
        return HymbaLm::from_dir_with(folder, &LoadOptions::default().trainable(true), |_| {});
    }
    let lm = HymbaLm::build(HymbaLmConfig::from_file(folder.join("config.json"))?, 0)?;
    lm.save_dir(folder)?;
    Ok(lm)
}

/// Multiply-adds per second in registers, of the slowest of so many threads at a time.
fn peak(threads: usize) -> f64 {
    let measure = || {
        Limits::measure(); // the first milliseconds of wide vectors are slow
        Limits::measure().multiply_adds
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(measure)).collect();
        running.into_iter().map(|thread| thread.join().expect("measuring does not panic")).fold(f64::INFINITY, f64::min)
    })
}
