//! Dropout between blocks, in training.

use ndarray::Array2;
use rand::{RngExt, SeedableRng};

use super::Rng;

/// Sets each number of x to 0 with probability `rate` and divides the others by 1 − rate. Which ones follows from `seed` and
/// `layer` alone; so the same call on a gradient is the backward pass, and nothing is kept.
pub(crate) fn dropout(x: &mut Array2<f32>, rate: f32, seed: u64, layer: usize) {
    if rate == 0.0 {
        return;
    }
    let mut rng = Rng::seed_from_u64(seed);
    rng.set_stream(layer as u64);
    let kept = 1.0 - rate;
    x.mapv_inplace(|x| if rng.random::<f32>() < kept { x / kept } else { 0.0 });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_share_and_the_mean_and_repeats_itself() {
        let mask = |seed, layer| {
            let mut x = Array2::ones((200, 100));
            dropout(&mut x, 0.3, seed, layer);
            x
        };
        let x = mask(5, 1);
        let dropped = x.iter().filter(|x| **x == 0.0).count() as f32 / 20_000.0;
        assert!((dropped - 0.3).abs() < 0.02, "{dropped}");
        assert!((x.mean().unwrap() - 1.0).abs() < 0.02);
        assert_eq!(x, mask(5, 1));
        assert_ne!(x, mask(5, 2));
        assert_ne!(x, mask(6, 1));
    }
}
