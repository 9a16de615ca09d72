//! What the memory of this machine gives.

use std::hint::black_box;
use std::time::Instant;

/// Bytes a second that all threads of the pool together read from memory, at best.
pub fn read() -> f64 {
    const BYTES: usize = 1 << 30;
    const PIECE: usize = 1 << 18;
    let numbers = vec![1u64; BYTES / 8];
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        let start = Instant::now();
        rayon::broadcast(|thread| {
            // each thread reads a run of its own, as the products do
            let share = numbers.len().div_ceil(thread.num_threads());
            for piece in numbers.chunks(share).nth(thread.index()).unwrap_or_default().chunks(PIECE) {
                let mut sums = [0u64; 32];
                for piece in piece.chunks_exact(32) {
                    sums.iter_mut().zip(piece).for_each(|(sum, number)| *sum = sum.wrapping_add(*number));
                }
                black_box(sums);
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    BYTES as f64 / best
}

/// The most memory this process ever held, in bytes, where the system says so.
pub fn peak_memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kilobytes| kilobytes * 1024)
}
