//! A convolutional stem: strided convolutions of several widths side by side, which make few tokens of many frames.
//!
//! ```text
//! token t of width K looks at the K frames around the middle of frames t·stride … (t+1)·stride − 1, zeros past the ends
//! y_t = [gelu(W_1·patch_1(t) + b_1) ; gelu(W_2·patch_2(t) + b_2) ; …]        W_i [channels, K_i·width]
//! ```
//!
//! A sequence of l frames becomes ⌈l / stride⌉ tokens. Patches are laid out as rows (im2col), so that each width is one product.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};
use serde::{Deserialize, Serialize};

use super::batch::Spans;
use super::{Buffer, Linear, Rng, flat, flat_mut};
use crate::kernels::math::{Gelu, map, map_backward};
use crate::kernels::team::Team;
use crate::parameters::{Visitor, VisitorMut, join};
use crate::{Error, Result};

/// Strided convolutions of several widths side by side in front of an encoder: long series become few tokens, each of
/// which covers a stretch of the series.
///
/// | option | default | range | meaning |
/// |---|---|---|---|
/// | `stride` | required | 1 to 4096 | frames per token: l frames become ⌈l / stride⌉ tokens |
/// | `widths` | stride, 3·stride | 1 to 16 of them, each 1 to 4096 | frames that the convolutions look at, around the token's own |
/// | `channels` | 32 | 1 to 4096 | features of each convolution; a token has this many for each width |
///
/// ```
/// use hymba::{HymbaOptions, Predictor, PredictorOptions, Stem, Task};
/// use hymba::ndarray::Array3;
///
/// let stem = Stem::new(8).widths([8, 16, 32]).channels(16);
/// assert_eq!((stem.tokens(427), stem.width()), (54, 48));
/// let options = PredictorOptions::new(HymbaOptions::new(1).hidden_size(32).num_layers(1)).stem(stem);
/// let predictor = Predictor::build(options, Task::classify(["maple", "oak"]))?;
/// assert_eq!(predictor.predict(&Array3::ones((1, 427, 1)), None)?.dim(), (1, 2));
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Stem {
    /// Frames per token.
    pub stride: usize,
    /// Frames that the convolutions look at.
    pub widths: Vec<usize>,
    /// Features of each convolution.
    pub channels: usize,
}

impl Stem {
    /// The largest stride, width and number of channels.
    pub const MAX_SIZE: usize = 4096;
    /// The largest number of widths.
    pub const MAX_WIDTHS: usize = 16;

    /// The documented defaults for `stride` frames per token. Above a stride of 1365, [set the widths](Self::widths):
    /// the default 3·stride is out of range.
    pub fn new(stride: usize) -> Self {
        Stem { stride, widths: vec![stride, stride.saturating_mul(3)], channels: 32 }
    }

    /// Sets how many frames the convolutions look at.
    pub fn widths(mut self, widths: impl Into<Vec<usize>>) -> Self {
        self.widths = widths.into();
        self
    }

    /// Sets the features of each convolution.
    pub fn channels(mut self, channels: usize) -> Self {
        self.channels = channels;
        self
    }

    /// The number of tokens of a sequence of `frames` frames.
    pub fn tokens(&self, frames: usize) -> usize {
        frames.div_ceil(self.stride.max(1))
    }

    /// The width of a token.
    pub fn width(&self) -> usize {
        self.channels.saturating_mul(self.widths.len())
    }

    /// Checks every option.
    ///
    /// # Errors
    ///
    /// [`Error::Option`] names the first one outside its range (see the table above).
    pub fn validate(&self) -> Result<()> {
        let bad = |given: String, allowed: String| Err(Error::Option { option: "stem", given, allowed });
        let sizes = [("stride", self.stride), ("channels", self.channels)];
        for (name, size) in sizes.into_iter().chain(self.widths.iter().map(|&width| ("each width", width))) {
            if !(1..=Self::MAX_SIZE).contains(&size) {
                return bad(size.to_string(), format!("{name} must be from 1 to {}", Self::MAX_SIZE));
            }
        }
        match self.widths.len() {
            1..=Self::MAX_WIDTHS => Ok(()),
            count => bad(format!("{count} widths"), format!("there must be 1 to {} of them", Self::MAX_WIDTHS)),
        }
    }

    /// Parameters for frames of so many features, or `None` where they cannot be counted.
    pub(crate) fn count(&self, features: usize) -> Option<usize> {
        self.widths.iter().try_fold(0usize, |sum, width| {
            sum.checked_add(Linear::count(width.checked_mul(features)?, self.channels, true)?)
        })
    }

    /// Numbers that a token takes on its way.
    pub(crate) fn token_numbers(&self, features: usize) -> usize {
        self.widths.iter().fold(4 * self.width(), |sum, width| sum.saturating_add(width.saturating_mul(features)))
    }

    /// The first frame of a patch; it may lie in front of the sequence.
    fn first(&self, token: usize, width: usize) -> isize {
        (token * self.stride + self.stride / 2) as isize - (width / 2) as isize
    }
}

/// The layer: a convolution for each width.
#[derive(Clone)]
pub(crate) struct StridedConv {
    options: Stem,
    features: usize,
    convs: Vec<Linear>,
}

/// What [`StridedConv::backward`] reads: the frames `[rows, features]`, and what comes before gelu `[tokens, width]`.
#[derive(Debug)]
pub(crate) struct StemCache {
    x: Array2<f32>,
    before: Array2<f32>,
}

impl StridedConv {
    pub(crate) fn zeros(options: &Stem, features: usize) -> Self {
        let convs = options.widths.iter().map(|width| Linear::zeros(width * features, options.channels, true));
        StridedConv { convs: convs.collect(), options: options.clone(), features }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.convs.iter_mut().for_each(|conv| conv.init(rng));
    }

    /// The tokens of the sequences of `spans`.
    pub(crate) fn token_spans(&self, spans: &Spans) -> Spans {
        Spans::new(spans.iter().map(|span| self.options.tokens(span.len())))
    }

    /// Frames x `[rows, features]` of several sequences → tokens `[tokens, width]`
    pub(crate) fn forward(&self, team: &Team, spans: &Spans, x: ArrayView2<f32>) -> Buffer {
        let mut y = self.convolve(team, spans, x);
        map::<Gelu>(flat_mut(&mut y));
        y
    }

    /// As [`forward`](Self::forward). Returns also what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(&self, team: &Team, spans: &Spans, x: Buffer) -> (Buffer, StemCache) {
        let before = self.convolve(team, spans, x.view());
        let mut y = Buffer::copy_of(&before);
        map::<Gelu>(flat_mut(&mut y));
        (y, StemCache { x: x.into_array(), before: before.into_array() })
    }

    /// Before gelu.
    fn convolve(&self, team: &Team, spans: &Spans, x: ArrayView2<f32>) -> Buffer {
        let channels = self.options.channels;
        let mut y = Buffer::uninit((self.token_spans(spans).rows(), self.options.width()));
        for (i, (conv, &width)) in self.convs.iter().zip(&self.options.widths).enumerate() {
            let of_width = conv.forward(team, self.patches(spans, x, width).view());
            y.slice_mut(s![.., i * channels..(i + 1) * channels]).assign(&*of_width);
        }
        y
    }

    /// The gradient of [`forward_train`](Self::forward_train): dy `[tokens, width]` → dx `[rows, features]`.
    pub(crate) fn backward(
        &self,
        team: &Team,
        spans: &Spans,
        cache: &StemCache,
        mut dy: Buffer,
        grad: &mut StridedConv,
    ) -> Buffer {
        let channels = self.options.channels;
        map_backward::<Gelu>(flat(&cache.before), flat_mut(&mut dy));
        let mut dx = Buffer::zeros(cache.x.dim());
        for (i, (conv, &width)) in self.convs.iter().zip(&self.options.widths).enumerate() {
            let dy = dy.slice(s![.., i * channels..(i + 1) * channels]).as_standard_layout().into_owned();
            let patches = self.patches(spans, cache.x.view(), width);
            let dpatches = conv.backward(team, patches.view(), dy.view(), &mut grad.convs[i]);
            self.add_patches(spans, dpatches.view(), width, dx.view_mut());
        }
        dx
    }

    /// Every patch as a row: `[tokens, width·features]`.
    fn patches(&self, spans: &Spans, x: ArrayView2<f32>, width: usize) -> Buffer {
        let mut patches = Buffer::zeros((self.token_spans(spans).rows(), width * self.features));
        self.each(spans, width, |row, here, frames| {
            let mut patch = patches.row_mut(row);
            let patch = &mut patch.as_slice_mut().expect("a row of a buffer")[here];
            patch.copy_from_slice(&flat(&x)[frames]);
        });
        patches
    }

    /// Adds patches to the frames they lie on.
    fn add_patches(&self, spans: &Spans, patches: ArrayView2<f32>, width: usize, mut x: ArrayViewMut2<f32>) {
        let x = x.as_slice_mut().expect("a buffer");
        self.each(spans, width, |row, here, frames| {
            x[frames].iter_mut().zip(&flat(&patches.row(row))[here]).for_each(|(x, patch)| *x += patch);
        });
    }

    /// Calls `f` with each token's row, the numbers of its patch that lie in the sequence, and where these are among all frames.
    fn each(
        &self,
        spans: &Spans,
        width: usize,
        mut f: impl FnMut(usize, std::ops::Range<usize>, std::ops::Range<usize>),
    ) {
        let mut row = 0;
        for span in spans.iter() {
            for token in 0..self.options.tokens(span.len()) {
                let first = self.options.first(token, width);
                let (from, to) = (first.max(0), (first + width as isize).min(span.len() as isize));
                if from < to {
                    let count = (to - from) as usize * self.features;
                    let here = (from - first) as usize * self.features;
                    let frames = (span.start + from as usize) * self.features;
                    f(row, here..here + count, frames..frames + count);
                }
                row += 1;
            }
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.convs.iter().enumerate().for_each(|(i, conv)| conv.visit(&join(name, &i.to_string()), f));
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.convs.iter_mut().enumerate().for_each(|(i, conv)| conv.visit_mut(&join(name, &i.to_string()), f));
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Every token is the convolution that it says it is, and no sequence sees another.
    #[test]
    fn tokens_are_convolutions() {
        let options = Stem::new(3).widths([3, 4, 7]).channels(2);
        let mut stem = StridedConv::zeros(&options, 2);
        stem.init(&mut Rng::seed_from_u64(1));
        let spans = Spans::new([1, 8, 3]);
        let x = Array2::from_shape_fn((12, 2), |(t, i)| (0.9 * t as f32 + i as f32).sin());
        let y = stem.convolve(&Team::alone(), &spans, x.view());
        assert_eq!(y.dim(), (1 + 3 + 1, 6));
        let mut row = 0;
        for span in spans.iter() {
            for token in 0..options.tokens(span.len()) {
                for (i, &width) in options.widths.iter().enumerate() {
                    let mut patch = Array2::zeros((1, 2 * width));
                    for k in 0..width {
                        let frame = (3 * token + 1 + k) as isize - (width / 2) as isize;
                        if (0..span.len() as isize).contains(&frame) {
                            let frame = span.start + frame as usize;
                            patch.slice_mut(s![0, 2 * k..2 * k + 2]).assign(&x.row(frame));
                        }
                    }
                    let want = stem.convs[i].forward(&Team::alone(), patch.view());
                    let got = y.slice(s![row..row + 1, 2 * i..2 * i + 2]);
                    assert!((&got - &*want).iter().all(|d| d.abs() < 1e-6), "token {token} width {width}");
                }
                row += 1;
            }
        }
    }
}
