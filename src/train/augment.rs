//! Augmentation of series: what a series could as well have been, drawn anew each time it is seen.

use ndarray::{Array2, Axis, s};
use rand::RngExt;
use rand_distr::{Beta, Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

use crate::layers::Rng;
use crate::{Error, Result, Task};

/// A random change of a series that keeps its class. A training with several of them applies each to every series, in the order of
/// the list, and `Mixup` (the first, if there are several) after all others; see
/// [`TrainerOptions::augmentations`](super::TrainerOptions::augmentations).
///
/// What is drawn follows from the seed of the training, the epoch and the place of the series in it, not from threads.
///
/// | augmentation | range | what it does |
/// |---|---|---|
/// | `Jitter { deviation }` | above 0, at most 10 | adds noise, in standard deviations of each feature of the series |
/// | `Scale { deviation }` | above 0, at most 10 | multiplies each feature by e^(deviation · normal) |
/// | `TimeWarp { strength }` | above 0, at most 1 | runs through the series now faster, now slower: up to 1 + strength times as fast |
/// | `Slice { fraction }` | above 0, below 1 | keeps this share of the frames, from a random place on |
/// | `Mixup { alpha }` | above 0, at most 10 | mixes two series of a batch, and their targets, in shares from Beta(alpha, alpha) |
///
/// `TimeWarp`, `Slice` and `Mixup` are for targets of whole series.
///
/// ```
/// use hymba::train::{Augmentation, TrainerOptions};
///
/// let options = TrainerOptions::default()
///     .augmentations([Augmentation::Slice { fraction: 0.9 }, Augmentation::Jitter { deviation: 0.05 }]);
/// assert!(options.validate().is_ok());
/// assert!(options.augmentations([Augmentation::Slice { fraction: 1.5 }]).validate().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Augmentation {
    /// Adds noise.
    Jitter {
        /// In standard deviations of each feature of the series.
        deviation: f32,
    },
    /// Multiplies each feature of a series by a number.
    Scale {
        /// Standard deviation of its logarithm.
        deviation: f32,
    },
    /// Runs through the series now faster, now slower.
    TimeWarp {
        /// By how much, at most, the speed differs from 1.
        strength: f32,
    },
    /// Keeps consecutive frames.
    Slice {
        /// Which share of them.
        fraction: f32,
    },
    /// Mixes two series of a batch, and their targets.
    Mixup {
        /// The smaller, the more one of both prevails.
        alpha: f32,
    },
}

impl Augmentation {
    /// Most augmentations of a training.
    pub(super) const MOST: usize = 16;

    pub(super) fn validate(&self) -> Result<()> {
        let (name, given, most) = match *self {
            Augmentation::Jitter { deviation } => ("deviation of Jitter", deviation, 10.0),
            Augmentation::Scale { deviation } => ("deviation of Scale", deviation, 10.0),
            Augmentation::TimeWarp { strength } => ("strength of TimeWarp", strength, 1.0),
            Augmentation::Slice { fraction } => ("fraction of Slice", fraction, 1.0 - f32::EPSILON),
            Augmentation::Mixup { alpha } => ("alpha of Mixup", alpha, 10.0),
        };
        // written so that NaN fails
        if given > 0.0 && given <= most {
            return Ok(());
        }
        Err(Error::Option {
            option: "augmentations",
            given: given.to_string(),
            allowed: format!(
                "the {name} must be above 0 and {}",
                if most < 1.0 { "below 1".into() } else { format!("at most {most}") }
            ),
        })
    }

    /// Whether it can be used where every frame has a target.
    pub(super) fn check(&self, task: &Task) -> Result<()> {
        match self {
            Augmentation::Jitter { .. } | Augmentation::Scale { .. } => Ok(()),
            _ if !task.is_frame_wise() => Ok(()),
            _ => Err(Error::Option {
                option: "augmentations",
                given: format!("{self:?} for a task of every frame"),
                allowed: "its targets would no longer match its frames; only Jitter and Scale can be used".into(),
            }),
        }
    }

    /// Changes a series `[l, width]`. Mixup is done to batches, see [`mix`].
    fn apply(&self, x: Array2<f32>, rng: &mut Rng) -> Array2<f32> {
        match *self {
            Augmentation::Jitter { deviation } => jitter(x, deviation, rng),
            Augmentation::Scale { deviation } => scale(x, deviation, rng),
            Augmentation::TimeWarp { strength } => warp(&x, strength, rng),
            Augmentation::Slice { fraction } => slice(&x, fraction, rng),
            Augmentation::Mixup { .. } => x,
        }
    }
}

/// A series after all augmentations.
pub(super) fn augmented(x: &Array2<f32>, augmentations: &[Augmentation], rng: &mut Rng) -> Array2<f32> {
    augmentations.iter().fold(x.clone(), |x, augmentation| augmentation.apply(x, rng))
}

/// The share that a series keeps of itself where series are mixed; `None` where they are not.
pub(super) fn share(augmentations: &[Augmentation], rng: &mut Rng) -> Option<f32> {
    let alpha = augmentations.iter().find_map(|augmentation| match augmentation {
        Augmentation::Mixup { alpha } => Some(*alpha),
        _ => None,
    })?;
    let share = Beta::new(alpha, alpha).expect("alpha is above 0").sample(rng);
    share.is_finite().then_some(share)
}

/// Mixes series i with series `others[i]`, as far as that goes: x_i · share + x_j · (1 − share).
pub(super) fn mix(series: &[Array2<f32>], others: &[usize], share: f32) -> Vec<Array2<f32>> {
    let mixed = series.iter().zip(others).map(|(x, &other)| {
        let mut mixed = x.clone();
        let l = x.nrows().min(series[other].nrows());
        let other = series[other].slice(s![..l, ..]);
        mixed.slice_mut(s![..l, ..]).zip_mut_with(&other, |x, other| *x = *x * share + other * (1.0 - share));
        mixed
    });
    mixed.collect()
}

fn jitter(mut x: Array2<f32>, deviation: f32, rng: &mut Rng) -> Array2<f32> {
    // in f64: the square of a large number may be none of f32
    let scales = x.mapv(f64::from).std_axis(Axis(0), 0.0).mapv(|std| (std * f64::from(deviation)) as f32);
    for mut frame in x.rows_mut() {
        for (x, scale) in frame.iter_mut().zip(&scales) {
            let noise: f32 = StandardNormal.sample(rng);
            *x += scale * noise;
        }
    }
    x
}

fn scale(mut x: Array2<f32>, deviation: f32, rng: &mut Rng) -> Array2<f32> {
    for mut feature in x.columns_mut() {
        let log: f32 = StandardNormal.sample(rng);
        feature *= (deviation * log).exp();
    }
    x
}

fn slice(x: &Array2<f32>, fraction: f32, rng: &mut Rng) -> Array2<f32> {
    let kept = ((f64::from(fraction) * x.nrows() as f64).ceil() as usize).clamp(1, x.nrows());
    let first = rng.random_range(0..=x.nrows() - kept);
    x.slice(s![first..first + kept, ..]).to_owned()
}

/// Reads x at the times τ(t) = t + a·sin(2π·n·t/l + φ) − a·sin φ, whose speed is 1 + a·2πn/l·cos(…), between frames in a straight line.
fn warp(x: &Array2<f32>, strength: f32, rng: &mut Rng) -> Array2<f32> {
    use std::f64::consts::TAU;
    let last = x.nrows() - 1;
    let (waves, phase) = (f64::from(rng.random_range(1..=3u32)), rng.random_range(0.0..TAU));
    let speed = f64::from(strength) * rng.random_range(0.0..1.0);
    if last == 0 {
        return x.clone();
    }
    let turn = TAU * waves / last as f64;
    let mut y = x.clone();
    for (t, mut y) in y.rows_mut().into_iter().enumerate() {
        let time = t as f64 + speed / turn * ((turn * t as f64 + phase).sin() - phase.sin());
        let time = time.clamp(0.0, last as f64);
        let (before, part) = (time.floor() as usize, time.fract() as f32);
        let after = (before + 1).min(last);
        for ((y, a), b) in y.iter_mut().zip(x.row(before)).zip(x.row(after)) {
            *y = a + part * (b - a);
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn wave() -> Array2<f32> {
        Array2::from_shape_fn((50, 2), |(t, i)| (0.2 * t as f32).sin() + 3.0 * i as f32)
    }

    #[test]
    fn each_does_what_it_says() {
        let (x, mut rng) = (wave(), Rng::seed_from_u64(1));
        let noisy = Augmentation::Jitter { deviation: 0.1 }.apply(x.clone(), &mut rng);
        let noise = (&noisy - &x).std(0.0) / x.column(0).std(0.0);
        assert!((0.08..0.12).contains(&noise), "{noise}");

        let scaled = Augmentation::Scale { deviation: 0.5 }.apply(x.clone(), &mut rng);
        let factors = &scaled / &x;
        assert!(factors.column(1).iter().all(|factor| (factor - factors[[0, 1]]).abs() < 1e-5));
        assert!((factors[[0, 1]] - 1.0).abs() > 1e-3);

        let part = Augmentation::Slice { fraction: 0.5 }.apply(x.clone(), &mut rng);
        assert_eq!(part.nrows(), 25);
        assert!(x.axis_windows(Axis(0), 25).into_iter().any(|window| window == part));

        let warped = Augmentation::TimeWarp { strength: 0.5 }.apply(x.clone(), &mut rng);
        assert_eq!((warped.dim(), warped.row(0)), (x.dim(), x.row(0)));
        assert!((&warped - &x).iter().any(|d| d.abs() > 1e-2));
        assert!(warped.iter().all(|y| *y >= x.iter().copied().fold(f32::MAX, f32::min)));
        // of one frame there is nothing to warp
        let one = x.slice(s![..1, ..]).to_owned();
        assert_eq!(Augmentation::TimeWarp { strength: 1.0 }.apply(one.clone(), &mut rng), one);

        let mixed = mix(&[x.clone(), part.clone()], &[1, 0], 0.25);
        assert_eq!((mixed[0].row(30), mixed[1].nrows()), (x.row(30), 25));
        assert!((mixed[0][[3, 0]] - (0.25 * x[[3, 0]] + 0.75 * part[[3, 0]])).abs() < 1e-6);
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let all = [
            Augmentation::TimeWarp { strength: 0.3 },
            Augmentation::Slice { fraction: 0.8 },
            Augmentation::Scale { deviation: 0.1 },
            Augmentation::Jitter { deviation: 0.1 },
        ];
        let draw = |seed| augmented(&wave(), &all, &mut Rng::seed_from_u64(seed));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
