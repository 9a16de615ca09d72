//! What a training on many machines can be expected to gain: the tables of `docs/distributed.md`, from a model of cost.
//! `cargo run --release -p hymba-mpi --example scaling`; it needs no `mpirun`.
//!
//! A step of n ranks takes
//!
//! ```text
//! compute     the frames of the slowest rank · time of a frame, and for each batch of 32 a fixed time besides
//! optimizer   a fixed time, on every rank
//! flags       2·⌈log2 n⌉ messages: a sum of 13 numbers
//! gradient    the cheaper of    ring              2·(n − 1) messages,    2·(n − 1)/n · bytes / bandwidth
//!                               halving, doubling 2·⌈log2 n⌉ messages,   2·(n − 1)/n · bytes / bandwidth
//!             and parameters · time of a number: copied into one slice and back, and added
//! ```
//!
//! Lengths are drawn at random; a step is sorted by length and dealt out in turn, as `Trainer::fit_on` does.

/// Of the default encoder.
const PARAMETERS: f64 = 5.2e6;
/// One training step of 32 × 60 frames on one rank of 16 cores (docs/kernels.md): 253 ms, the optimiser's part of it taken for 20.
const FRAME: f64 = (0.253 - OPTIMIZER) / (32.0 * 60.0);
const OPTIMIZER: f64 = 0.020;
/// Of a batch, whatever is in it.
const BATCH: f64 = 0.002;
/// Of a number of the gradient.
const NUMBER: f64 = 3e-9;
/// Steps that are simulated.
const STEPS: usize = 200;

struct Network {
    name: &'static str,
    /// Bytes a second that a rank gets, 90 % of the wire.
    bandwidth: f64,
    /// Seconds of a message.
    latency: f64,
}

const NETWORKS: [Network; 3] = [
    Network { name: "1 Gbit/s", bandwidth: 0.9 * 1e9 / 8.0, latency: 50e-6 },
    Network { name: "25 Gbit/s", bandwidth: 0.9 * 25e9 / 8.0, latency: 20e-6 },
    Network { name: "InfiniBand 200 Gbit/s", bandwidth: 0.9 * 200e9 / 8.0, latency: 2e-6 },
];

impl Network {
    fn sums(&self, ranks: usize) -> f64 {
        if ranks == 1 {
            return 0.0;
        }
        let n = ranks as f64;
        let messages = 2.0 * n.log2().ceil();
        let bytes = 2.0 * (n - 1.0) / n * 4.0 * PARAMETERS;
        let gradient = messages.min(2.0 * (n - 1.0)) * self.latency + bytes / self.bandwidth + NUMBER * PARAMETERS;
        messages * self.latency + gradient
    }
}

fn main() {
    println!("A batch of 1,024 series in all, 30 to 90 frames each: times as fast as one rank (share of the ideal)\n");
    table(|_| 1024);
    println!(
        "\n32 series on each rank, so that the batch grows with the ranks: series per second, times one rank (share)\n"
    );
    table(|ranks| 32 * ranks);
    println!("\nOf a step of 32 series on each of 64 ranks, milliseconds:");
    for network in &NETWORKS {
        let (slowest, mean) = compute(64, 32 * 64);
        println!(
            "{:<22} compute {:.0}, waiting for the slowest {:.0}, optimizer {:.0}, sums {:.1}",
            network.name,
            1e3 * mean,
            1e3 * (slowest - mean),
            1e3 * OPTIMIZER,
            1e3 * network.sums(64)
        );
    }
}

fn table(batch: fn(usize) -> usize) {
    let names: Vec<_> = NETWORKS.iter().map(|network| network.name).collect();
    println!("| ranks | lengths alone | {} |\n|---|---|---|---|---|", names.join(" | "));
    let alone = batch(1) as f64 / (compute(1, batch(1)).0 + OPTIMIZER);
    for ranks in (1..=10).map(|power| 1 << power) {
        let (slowest, _) = compute(ranks, batch(ranks));
        let gain = |sums: f64| {
            let gain = batch(ranks) as f64 / (slowest + OPTIMIZER + sums) / alone;
            format!("{gain:.1} ({:.0} %)", 100.0 * gain / ranks as f64)
        };
        let of_networks: Vec<_> = NETWORKS.iter().map(|network| gain(network.sums(ranks))).collect();
        println!("| {ranks} | {} | {} |", gain(0.0), of_networks.join(" | "));
    }
}

/// Mean time of the slowest rank, and of all ranks, for steps of `batch` series.
fn compute(ranks: usize, batch: usize) -> (f64, f64) {
    let mut random = 1u64;
    let (mut slowest, mut all) = (0.0, 0.0);
    for _ in 0..STEPS {
        let mut lengths: Vec<u64> = (0..batch)
            .map(|_| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                30 + (random >> 33) % 61
            })
            .collect();
        lengths.sort_unstable();
        let times = (0..ranks).map(|rank| {
            let share: Vec<u64> = lengths.iter().skip(rank).step_by(ranks).copied().collect();
            // batches of at most 32, in which padding is not computed
            BATCH * share.len().div_ceil(32) as f64 + FRAME * share.iter().sum::<u64>() as f64
        });
        let times: Vec<f64> = times.collect();
        slowest += times.iter().copied().fold(0.0, f64::max);
        all += times.iter().sum::<f64>() / ranks as f64;
    }
    (slowest / STEPS as f64, all / STEPS as f64)
}
