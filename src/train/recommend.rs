//! Options that suit a data set: the defaults of the example `classify`.

use super::{Augmentation, Dataset, TrainerOptions};
use crate::{HymbaOptions, Pooling, PredictorOptions, Stem};

/// Frames or tokens that an encoder reads of the longest series, at most.
const TOKENS: usize = 64;
/// The widest attention window.
const WINDOW: usize = 256;
/// Fewer features than this say little in a single frame: shapes have to be seen.
const FEW_FEATURES: usize = 4;
/// Steps of the optimiser, and epochs that they are kept within.
const STEPS: usize = 800;
const FEWEST_EPOCHS: usize = 20;
const MOST_EPOCHS: usize = 300;
/// Tokens that are learned from in all, at most: it is enough then.
const MOST_TOKENS: usize = 2_000_000;
/// Series of a step: more than any machine takes at once.
const MOST_SERIES: usize = 1 << 24;
/// Tokens of a batch, padding included. Larger batches are computed in pieces.
const BATCH_TOKENS: usize = 8192;

impl PredictorOptions {
    /// Options that suit a data set, by its number of series, their lengths and widths:
    ///
    /// | of | rule |
    /// |---|---|
    /// | targets of whole series, with fewer than 4 features or more than 64 frames | a [`Stem`] of stride ⌈longest / 64⌉ with three widths: 1, 3 and 7 strides, at least 3, 9 and 21 frames; 24 channels |
    /// | any | hidden size 64, 2 blocks, 4 heads, states of 8, dropout 0.2; 1 block below 50 series |
    /// | any | a window of all tokens, at most 256 |
    /// | targets of whole series | attention pooling of 4 queries |
    /// | targets of every frame | the encoder alone: the last frame, no stem |
    ///
    /// So 18,000 frames ask for a stride of 282 and a window of 64 tokens.
    ///
    /// It was chosen by cross-validation on training files (`classify --folds`). A second direction, for example, took twice as
    /// long and gave 0.775 on halves of the training series of OSULeaf, where one gives 0.810.
    ///
    /// ```
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Dataset, Targets, TrainerOptions};
    /// use hymba::{Predictor, PredictorOptions, Task};
    ///
    /// let task = Task::classify(["maple", "oak"]);
    /// let data = Dataset::new(&task, vec![Array2::ones((427, 1)); 20], Targets::Classes((0..20).map(|i| i % 2).collect()))?;
    /// let options = PredictorOptions::recommended_for(&data);
    /// assert_eq!(options.stem.as_ref().unwrap().tokens(427), 61);
    /// let trainer = hymba::train::Trainer::new(Predictor::build(options, task)?, TrainerOptions::recommended_for(&data))?;
    /// assert!(trainer.options().epochs >= 20);
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn recommended_for(data: &Dataset) -> Self {
        let (longest, features) = (data.longest(), data.width());
        let whole = !data.task().is_frame_wise();
        let few = features < FEW_FEATURES;
        let stride = longest.div_ceil(TOKENS).min(Stem::MAX_SIZE);
        let stem = (whole && (few || stride > 1)).then(|| {
            let widths = [1, 3, 7].map(|strides| (strides * stride).max(3 * strides).min(Stem::MAX_SIZE));
            Stem::new(stride).widths(widths).channels(24)
        });
        let tokens = stem.as_ref().map_or(longest, |stem| stem.tokens(longest));
        let encoder = HymbaOptions::new(features)
            .hidden_size(64)
            .num_layers(if data.num_series() < 50 { 1 } else { 2 })
            .state_size(8)
            .dropout(0.2)
            .window_size(tokens.clamp(1, WINDOW));
        let options = PredictorOptions::new(encoder);
        if !whole {
            return options;
        }
        options.stem(stem).pooling(Pooling::Attention { queries: 4 })
    }
}

impl TrainerOptions {
    /// Options that suit a data set and the predictor of [`PredictorOptions::recommended_for`]:
    ///
    /// | option | rule |
    /// |---|---|
    /// | `batch_size` · `accumulation` | 16, or half the series where that is less, in pieces of at most 8192 tokens (but one series at least) |
    /// | `epochs` | those of 800 steps, 20 to 300, and fewer where that is more than 2 million tokens |
    /// | `learning_rate`, `weight_decay` | 0.002, 0.05 |
    /// | `average` | 0.98 |
    /// | `augmentations` | slices of 0.9 and jitter of 0.05 for targets of whole series of 20 frames or more |
    pub fn recommended_for(data: &Dataset) -> Self {
        let usual = TrainerOptions::default();
        Self::recommended_for_steps_of(usual.batch_size.min(data.num_series().div_ceil(2)), data)
    }

    /// As [`recommended_for`](Self::recommended_for), with `batch` series per step (from 1 to 2²⁴; others are brought into this range):
    /// `accumulation` pieces of `batch_size`, and epochs for that many steps. As pieces have one size, a step may have more series
    /// than asked for, by less than the number of pieces.
    ///
    /// ```
    /// use hymba::Task;
    /// use hymba::ndarray::Array2;
    /// use hymba::train::{Dataset, Targets, TrainerOptions};
    ///
    /// let task = Task::classify(["maple", "oak"]);
    /// let targets = Targets::Classes((0..600).map(|i| i % 2).collect());
    /// let data = Dataset::new(&task, vec![Array2::ones((60, 1)); 600], targets)?;
    /// let options = TrainerOptions::recommended_for_steps_of(200, &data);
    /// assert_eq!((options.batch_size, options.accumulation), (100, 2)); // 100 · 60 tokens are no more than 8192
    /// # Ok::<(), hymba::Error>(())
    /// ```
    pub fn recommended_for_steps_of(batch: usize, data: &Dataset) -> Self {
        let model = PredictorOptions::recommended_for(data);
        let tokens = |frames: usize| model.stem.as_ref().map_or(frames, |stem| stem.tokens(frames));
        let batch = batch.clamp(1, MOST_SERIES);
        let fitting = (BATCH_TOKENS / tokens(data.longest())).max(1);
        let pieces = batch.div_ceil(fitting);
        let batch_size = batch.div_ceil(pieces);
        let steps = data.num_series().div_ceil(batch_size * pieces);
        let all: usize = data.series().iter().map(|series| tokens(series.nrows())).sum();
        let epochs = STEPS.div_ceil(steps).clamp(FEWEST_EPOCHS, MOST_EPOCHS).min((MOST_TOKENS / all).max(1));
        let long = data.series().iter().all(|series| series.nrows() >= 20) && !data.task().is_frame_wise();
        let augmentations = match long {
            true => vec![Augmentation::Slice { fraction: 0.9 }, Augmentation::Jitter { deviation: 0.05 }],
            false => Vec::new(),
        };
        TrainerOptions::default()
            .epochs(epochs)
            .batch_size(batch_size)
            .accumulation(pieces)
            .learning_rate(2e-3)
            .weight_decay(0.05)
            .average(0.98)
            .augmentations(augmentations)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::Task;
    use crate::train::Targets;

    #[test]
    fn steps_of_any_number_of_series_are_cut_into_few_pieces() {
        let targets = Targets::Classes((0..40).map(|i| i % 2).collect());
        let data = Dataset::new(&Task::classify(["a", "b"]), vec![Array2::ones((60, 1)); 40], targets).unwrap();
        let fitting = BATCH_TOKENS / 60;
        for batch in [0, 1, 7, 136, 137, 200, 1009, 7919, usize::MAX] {
            let options = TrainerOptions::recommended_for_steps_of(batch, &data);
            let (size, pieces) = (options.batch_size, options.accumulation);
            let wanted = batch.clamp(1, MOST_SERIES);
            assert_eq!(pieces, wanted.div_ceil(fitting), "{batch}");
            assert!(
                size <= fitting && (wanted..wanted + pieces).contains(&(size * pieces)),
                "{batch}: {size} {pieces}"
            );
            assert!(options.validate().is_ok());
        }
    }
}
