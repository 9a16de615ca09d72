//! How far the logits of two models are apart.

use hymba::HymbaLm;
use hymba::ndarray::{ArrayView1, Axis, aview1};
use serde_json::{Value, json};

#[derive(Default)]
pub struct Comparison {
    tokens: usize,
    same_choice: usize,
    logits: usize,
    largest: f64,
    squares: f64,
    /// Kullback–Leibler divergence D(second ‖ first) of the next-token distributions, the sum over the tokens, in nats.
    divergence: f64,
}

impl Comparison {
    pub fn add(&mut self, lm: &HymbaLm, other: &HymbaLm, ids: &[u32]) -> hymba::Result<()> {
        let ids = aview1(ids).insert_axis(Axis(0)).to_owned();
        let (a, b) = (lm.forward(&ids)?, other.forward(&ids)?);
        for (a, b) in a.index_axis(Axis(0), 0).rows().into_iter().zip(b.index_axis(Axis(0), 0).rows()) {
            self.tokens += 1;
            self.same_choice += usize::from(greedy(a) == greedy(b));
            self.logits += a.len();
            let (log_a, log_b) = (log_sum(a), log_sum(b));
            for (&a, &b) in a.iter().zip(b) {
                let (a, b) = (f64::from(a), f64::from(b));
                self.largest = self.largest.max((a - b).abs());
                self.squares += (a - b) * (a - b);
                self.divergence += (b - log_b).exp() * ((b - log_b) - (a - log_a));
            }
        }
        Ok(())
    }

    fn same_choice(&self) -> f64 {
        self.same_choice as f64 / self.tokens as f64
    }

    fn rms(&self) -> f64 {
        (self.squares / self.logits as f64).sqrt()
    }

    fn divergence(&self) -> f64 {
        self.divergence / self.tokens as f64
    }

    pub fn json(&self) -> Value {
        json!({"same_choice": self.same_choice(), "logits_rms": self.rms(), "logits_largest": self.largest,
            "divergence_per_token": self.divergence()})
    }

    pub fn words(&self) -> String {
        format!(
            "against the other: {:.2} % of the greedy choices are the same; logits differ by {:.4} (root of the mean square), at \
             most {:.3}; divergence {:.6} nats per token\n",
            100.0 * self.same_choice(),
            self.rms(),
            self.largest,
            self.divergence()
        )
    }
}

fn greedy(logits: ArrayView1<f32>) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

fn log_sum(logits: ArrayView1<f32>) -> f64 {
    let largest = logits.fold(f32::NEG_INFINITY, |largest, x| largest.max(*x));
    f64::from(largest) + logits.iter().map(|x| f64::from(x - largest).exp()).sum::<f64>().ln()
}
