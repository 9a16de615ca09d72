//! A hash that tells one set of weights from another, in any process.

use super::model::Hymba;
use super::pattern::Pattern;
use crate::parameters::Parameter;

impl Hymba {
    /// A hash of the weights and of those options that change what they compute.
    pub(super) fn fingerprint(&self) -> u64 {
        *self.cached.fingerprint.get(|| {
            let mut hash = Fingerprint::default();
            let options = &self.options;
            for size in [options.num_heads, options.window_size, options.num_meta_tokens, options.variant as usize] {
                hash.add(size as u64);
            }
            if options.pattern != Pattern::Parallel {
                options.pattern.kind().bytes().for_each(|byte| hash.add(u64::from(byte)));
                hash.add(options.pattern.attention_every().unwrap_or(0) as u64);
            }
            hash.add(self.salt);
            if let Some((_, options)) = self.adapters.active() {
                hash.add(u64::from(options.scale().to_bits()));
            }
            let mut numbers = Vec::new();
            self.visit_parameters(&mut |_, parameter| match parameter {
                Parameter::Array(array) => array.iter().for_each(|x| hash.add(u64::from(x.to_bits()))),
                Parameter::Stored(matrix) => {
                    let [outputs, inputs] = matrix.shape();
                    numbers.resize(inputs, 0.0);
                    hash.add(matrix.bits() as u64);
                    for output in 0..outputs {
                        matrix.0.row(output, &mut numbers);
                        numbers.iter().for_each(|x| hash.add(u64::from(x.to_bits())));
                    }
                }
            });
            hash.finish()
        })
    }
}

/// A hash of some numbers.
pub(crate) fn of_numbers<'a>(numbers: impl Iterator<Item = &'a f32>) -> u64 {
    let mut hash = Fingerprint::default();
    numbers.for_each(|x| hash.add(u64::from(x.to_bits())));
    hash.finish()
}

/// FNV-1a over words, in eight lanes so that they do not wait for each other.
struct Fingerprint {
    lanes: [u64; 8],
    next: usize,
}

impl Default for Fingerprint {
    fn default() -> Self {
        Fingerprint { lanes: std::array::from_fn(|lane| 0xcbf2_9ce4_8422_2325 ^ lane as u64), next: 0 }
    }
}

impl Fingerprint {
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    fn add(&mut self, word: u64) {
        let lane = &mut self.lanes[self.next];
        *lane = (*lane ^ word).wrapping_mul(Self::PRIME);
        *lane ^= *lane >> 29;
        self.next = (self.next + 1) % self.lanes.len();
    }

    fn finish(self) -> u64 {
        self.lanes.into_iter().fold(0, |hash, lane| (hash ^ lane).wrapping_mul(Self::PRIME).rotate_left(31))
    }
}
