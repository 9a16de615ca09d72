//! Next-token cross-entropy: the final norm, the head, and the loss, some tokens at a time.

use ndarray::Array2;

use super::model::HymbaLm;
use crate::kernels::cross_entropy::{log_sum_exp, softmax};
use crate::kernels::team::Team;
use crate::layers::{Across, Buffer, flat_mut};

/// The cross-entropy of some tokens: −ln of the probability that the model gave to each, given those before it.
///
/// The losses of several batches can be added: [`mean`](Self::mean) is then that over all their tokens.
///
/// ```
/// use hymba::lm::LmLoss;
///
/// let mut loss = LmLoss::default();
/// loss += LmLoss::new(6.0, 3);
/// loss += LmLoss::new(1.0, 1);
/// assert_eq!((loss.mean(), loss.tokens), (1.75, 4));
/// assert_eq!(loss.perplexity(), 1.75f64.exp());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LmLoss {
    /// The sum over the tokens, in nats.
    pub sum: f64,
    /// How many tokens were predicted.
    pub tokens: usize,
}

impl LmLoss {
    /// A loss of `sum` nats over `tokens` tokens.
    pub fn new(sum: f64, tokens: usize) -> Self {
        LmLoss { sum, tokens }
    }

    /// The mean over the tokens, in nats; 0 if there are none.
    pub fn mean(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.sum / self.tokens as f64 }
    }

    /// exp of the mean.
    pub fn perplexity(&self) -> f64 {
        self.mean().exp()
    }

    /// Bits per byte, where these tokens are a text of `bytes` bytes.
    pub fn bits_per_byte(&self, bytes: usize) -> f64 {
        self.sum / (bytes.max(1) as f64 * std::f64::consts::LN_2)
    }
}

impl std::ops::AddAssign for LmLoss {
    fn add_assign(&mut self, other: LmLoss) {
        self.sum += other.sum;
        self.tokens += other.tokens;
    }
}

/// Where gradients of the head go.
pub(super) struct HeadGradient<'a> {
    /// The factor of the gradient of the sum.
    pub scale: f32,
    pub grads: &'a mut HymbaLm,
    /// Of the output of the last layer `[tokens, H]`, zero before.
    pub dx: &'a mut Array2<f32>,
}

impl HymbaLm {
    /// The loss of `targets`, each the row of the last layer's output x `[tokens, H]` that predicts it and its id; and its
    /// gradients, if there is a place for them. `row_seeds` are those of x.
    ///
    /// Logits exist for a few tokens at a time. Their gradient then costs an exp: nothing is computed twice where loss
    /// and gradient are wanted together.
    pub(super) fn head_loss(
        &self,
        team: &Team,
        x: &Buffer,
        targets: &[(usize, u32)],
        row_seeds: Option<&[u64]>,
        mut gradient: Option<HeadGradient>,
    ) -> f64 {
        /// Logits that exist at a time, at most: 32 MB,
        const LOGITS: usize = 8 << 20;
        /// but of no fewer tokens than are worth reading the head for.
        const FEWEST: usize = 24;
        let across: Option<Across> = gradient.as_ref().map(|_| match &self.head {
            Some(head) => head.across(team),
            None => self.embedding.across(team),
        });
        let mut sum = 0.0;
        for targets in targets.chunks((LOGITS / self.config().vocab_size).max(FEWEST)) {
            let places: Vec<usize> = targets.iter().map(|(row, _)| *row).collect();
            let seeds = row_seeds.map(|seeds| places.iter().map(|row| seeds[*row]).collect());
            let _seeded = team.seeded(seeds);
            let x = x.rows_at(&places);
            let normal = self.final_norm.apply(team, x.view());
            let mut logits = self.head_logits(team, normal.view());
            let scale = gradient.as_ref().map(|gradient| gradient.scale);
            sum += row_losses(team, &mut logits, targets, scale).into_iter().sum::<f64>();
            let (Some(HeadGradient { grads, dx, .. }), Some(across)) = (&mut gradient, &across) else { continue };
            let (normal, logits) = (normal.view(), logits.view());
            let mut dnormal = match (&self.head, &mut grads.head) {
                (Some(head), Some(grad)) => head.backward_by(team, normal, logits, across, grad),
                _ => self.embedding.logits_backward(team, normal, logits, across, &mut grads.embedding),
            };
            self.final_norm.backward(team, x.view(), 1.0, &mut dnormal, &mut grads.final_norm);
            for (place, dnormal) in places.into_iter().zip(dnormal.rows()) {
                dx.row_mut(place).assign(&dnormal);
            }
        }
        sum
    }
}

/// −ln softmax(logits)\[target\] of each row. With a scale, logits become scale times the gradient by them:
/// scale · (softmax(logits) − onehot(target)).
fn row_losses(team: &Team, logits: &mut Array2<f32>, targets: &[(usize, u32)], scale: Option<f32>) -> Vec<f64> {
    let width = logits.ncols();
    let rows = flat_mut(logits).chunks_exact_mut(width).zip(targets);
    team.map(rows.collect(), |(logits, (_, target))| {
        let target = *target as usize;
        let log_sum = log_sum_exp(logits);
        let loss = f64::from(log_sum) - f64::from(logits[target]);
        if let Some(scale) = scale {
            softmax(logits, log_sum, scale);
            logits[target] -= scale;
        }
        loss
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lose_what_the_definition_says() {
        let mut logits = Array2::from_shape_fn((3, 5), |(i, j)| (i as f32 - 1.0) * j as f32);
        let before = logits.clone();
        let targets = [(0, 4), (1, 2), (2, 0)];
        let losses = row_losses(&Team::alone(), &mut logits, &targets, Some(0.5));
        for (i, (_, target)) in targets.iter().enumerate() {
            let sum: f32 = before.row(i).iter().map(|x| x.exp()).sum();
            let probability = |j: usize| before[[i, j]].exp() / sum;
            assert!((losses[i] + f64::from(probability(*target as usize).ln())).abs() < 1e-5);
            for j in 0..5 {
                let want = 0.5 * (probability(j) - f32::from(j == *target as usize));
                assert!((logits[[i, j]] - want).abs() < 1e-6);
            }
        }
    }
}
