//! How long a step takes with weights that come from memory, by the type they are stored in.
//!
//! ```text
//! cargo run --release --example cold_step [HIDDEN_SIZE [NUM_LAYERS]]
//! ```
//!
//! Between two steps a large array is written, so that nothing of the model is left in the CPU's caches; the types take turns, and
//! the median of many steps counts.

use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

use hymba::ndarray::Array2;
use hymba::{Hymba, HymbaOptions, HymbaState, Storage};

/// Larger than any cache.
const EVICTED: usize = 512 << 20;
const STEPS: usize = 41;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse());
    let hidden_size = arguments.next().transpose()?.unwrap_or(512);
    let num_layers = arguments.next().transpose()?.unwrap_or(4);
    let options = HymbaOptions::new(32).hidden_size(hidden_size).num_layers(num_layers).num_heads(8);
    let trainable = Hymba::build(options)?;

    let mut rows: Vec<(String, Hymba, HymbaState, Vec<Duration>)> = Vec::new();
    for storage in [None, Some(Storage::F32), Some(Storage::Bf16), Some(Storage::Q8), Some(Storage::Q4)] {
        let mut model = trainable.clone();
        if let Some(storage) = storage {
            model.store_as(storage)?;
        }
        let name = storage.map_or("f32, trainable".to_string(), |storage| format!("{storage:?}"));
        let state = model.new_state(1);
        rows.push((name, model, state, Vec::new()));
    }
    let frame = Array2::from_shape_fn((1, 32), |(_, i)| (i as f32 * 0.7).sin());
    let mut evicted = vec![0u8; EVICTED];
    for round in 0..STEPS {
        for (_, model, state, times) in &mut rows {
            evicted.iter_mut().step_by(64).for_each(|byte| *byte = byte.wrapping_add(round as u8));
            black_box(&evicted);
            let start = Instant::now();
            black_box(model.step(&frame, state)?);
            times.push(start.elapsed());
        }
    }
    println!("{} parameters, {}, median of {STEPS} steps", trainable.num_parameters(), hymba::simd_level());
    let median = |times: &[Duration]| {
        let mut times = times.to_vec();
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e3
    };
    let first = median(&rows[0].3);
    println!("{:16} {:>8} {:>10} {:>8}", "stored", "MB", "ms / step", "faster");
    for (name, model, _, times) in &rows {
        let (megabytes, time) = (model.num_bytes() as f64 / 1e6, median(times));
        println!("{name:16} {megabytes:8.1} {time:10.3} {:8.2}", first / time);
    }
    Ok(())
}
