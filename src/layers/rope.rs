//! Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split form of GPT-NeoX.

/// Rotates queries and keys by angles that grow with their position.
#[derive(Debug, Clone)]
pub(crate) struct Rotary {
    /// f_j = base^(−2j/p) `[p/2]`. In f32, as are the angles: the model was trained with them, and at position 8,000 their
    /// rounding moves a cosine by 5e-4.
    frequencies: Vec<f32>,
}

impl Rotary {
    /// For heads of an even width p.
    pub(crate) fn new(width: usize, base: f64) -> Self {
        let exponent = |j: usize| (2 * j) as f32 / width as f32;
        Rotary { frequencies: (0..width / 2).map(|j| 1.0 / (base as f32).powf(exponent(j))).collect() }
    }

    /// The angles at a position.
    pub(crate) fn angles(&self, position: usize) -> Angles {
        self.frequencies
            .iter()
            .map(|frequency| {
                let angle = position as f32 * frequency;
                (angle.cos(), angle.sin())
            })
            .unzip()
    }
}

/// Cosines and sines `[p/2]` of one position.
pub(crate) type Angles = (Vec<f32>, Vec<f32>);

/// Rotates every head in `heads` `[·, p]`: (x_j, x_{j+p/2}) as one point of the plane, for each j < p/2.
pub(crate) fn apply_rope(heads: &mut [f32], angles: &Angles) {
    rotate::<1>(heads, angles);
}

/// The gradient of [`apply_rope`]: the rotation by −angle.
pub(crate) fn apply_rope_backward(heads: &mut [f32], angles: &Angles) {
    rotate::<-1>(heads, angles);
}

fn rotate<const SIGN: i8>(heads: &mut [f32], (cos, sin): &Angles) {
    let half = cos.len();
    for head in heads.chunks_exact_mut(2 * half) {
        let (left, right) = head.split_at_mut(half);
        for ((x, y), (cos, sin)) in left.iter_mut().zip(right).zip(cos.iter().zip(sin)) {
            let sin = f32::from(SIGN) * sin;
            (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_those_of_the_released_model() {
        let frequencies = Rotary::new(64, 10000.0 * 7f64.powf(64.0 / 62.0)).frequencies;
        for (j, want) in [(0, 1.0), (1, 0.704_269_3), (2, 0.495_995_3), (16, 0.003_662_860_3), (31, 1.905_030_7e-5)] {
            approx::assert_relative_eq!(frequencies[j], want, max_relative = 1e-6);
        }
    }

    #[test]
    fn a_quarter_turn_swaps_the_halves() {
        let mut heads = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        apply_rope(&mut heads, &(vec![0.0; 2], vec![1.0; 2]));
        assert_eq!(heads, [-3.0, -4.0, 1.0, 2.0, -7.0, -8.0, 5.0, 6.0]);
    }

    #[test]
    fn the_gradient_turns_back() {
        let angles = Rotary::new(4, 100.0).angles(7);
        let mut heads = [0.3, -1.0, 0.5, 2.0];
        apply_rope(&mut heads, &angles);
        apply_rope_backward(&mut heads, &angles);
        for (got, want) in heads.into_iter().zip([0.3, -1.0, 0.5, 2.0]) {
            approx::assert_relative_eq!(got, want, max_relative = 1e-6);
        }
    }

    #[test]
    fn products_depend_on_the_distance_only() {
        let rotary = Rotary::new(8, 10000.0);
        let dot = |q: usize, k: usize| -> f32 {
            let [mut query, mut key] = [[0.3, -1.0, 0.5, 2.0, 1.0, 0.1, -0.7, 0.4], [1.0; 8]];
            apply_rope(&mut query, &rotary.angles(q));
            apply_rope(&mut key, &rotary.angles(k));
            query.iter().zip(key).map(|(q, k)| q * k).sum()
        };
        approx::assert_relative_eq!(dot(9, 4), dot(25, 20), max_relative = 1e-5);
    }
}
