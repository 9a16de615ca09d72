//! The memory that calls take, asked for before they begin: an allocation that fails later would end the process.

use ndarray::ArrayRef3;

use super::model::Hymba;
use super::options::HymbaOptions;
use super::pattern::{BlockKind, Pattern};
use super::size::{GROUP, Keeps, PIECE, check_lengths, fits};
use crate::kernels::team::{threads, work};
use crate::{Error, Result};

impl Hymba {
    /// Checks x `[b, l, embed_dim]` and the lengths of its rows, and that the call fits into memory together with
    /// `more` numbers per row or, where every output is kept, per frame. Returns b and l.
    pub(crate) fn check_batch(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        keeps: Keeps,
        more: usize,
    ) -> Result<(usize, usize)> {
        self.check_batch_of(1, x, lengths, keeps, more)
    }

    /// As [`check_batch`](Self::check_batch), for so many encoders of this size one after the other, whose caches are kept together.
    pub(crate) fn check_batch_of(
        &self,
        encoders: usize,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        keeps: Keeps,
        more: usize,
    ) -> Result<(usize, usize)> {
        let (batch, l, width) = x.dim();
        if batch == 0 || l == 0 || width != self.options.embed_dim {
            return Err(Error::Shape {
                argument: "x",
                expected: format!("[b, l, embed_dim] with b ≥ 1, l ≥ 1 and embed_dim = {}", self.options.embed_dim),
                given: x.shape().to_vec(),
            });
        }
        if let Some(lengths) = lengths {
            check_lengths(lengths, batch, l)?;
        }
        let mut numbers = self.batch_numbers(encoders, (batch, l), lengths, keeps, more);
        // a view that repeats itself takes no memory, and can be too long to compute
        if x.shape().iter().zip(x.strides()).any(|(length, stride)| *length > 1 && *stride == 0) {
            let frames = lengths
                .map_or(work([batch, l]), |lengths| lengths.iter().fold(0, |sum: usize, l| sum.saturating_add(*l)));
            numbers = numbers.saturating_add(work([frames, width]));
        }
        let bytes = work([numbers, size_of::<f32>()]);
        if !fits(bytes) {
            return Err(Error::Shape {
                argument: "x",
                expected: format!(
                    "a smaller batch or shorter sequences: this takes about {} MB of memory, more than there is",
                    bytes >> 20
                ),
                given: x.shape().to_vec(),
            });
        }
        Ok((batch, l))
    }

    /// Numbers that a call takes, at most.
    fn batch_numbers(
        &self,
        encoders: usize,
        (batch, l): (usize, usize),
        lengths: Option<&[usize]>,
        keeps: Keeps,
        more: usize,
    ) -> usize {
        /// Of the lists of sequences and groups, in numbers.
        const LISTS: usize = 64;
        let HymbaOptions { embed_dim, hidden_size: h, num_layers, num_heads, num_meta_tokens: k, .. } = self.options;
        let padded = work([batch, l]);
        let frames = match lengths {
            Some(lengths) if keeps == Keeps::Last => lengths.iter().fold(0, |sum: usize, l| sum.saturating_add(*l)),
            _ => padded,
        };
        // a group for each thread, or a piece of a long sequence
        let at_work = match keeps {
            Keeps::Last | Keeps::Outputs => frames.min(PIECE.max(work([threads(), 2 * GROUP]))),
            Keeps::Cache | Keeps::Inspection => frames,
        };
        let lists = work([batch, LISTS]);
        let passing = work([at_work, self.frame_numbers()]);
        let kept = match keeps {
            Keeps::Last => work([batch, (2 * h).saturating_add(more)]),
            Keeps::Outputs => work([padded, (2 * h).saturating_add(more)]),
            Keeps::Cache => {
                // of each further encoder its input and its outputs, too
                let further = work([encoders - 1, embed_dim + 2 * h]);
                let per_frame = work([encoders, self.cache_numbers()]).saturating_add(2 * self.frame_numbers());
                let per_frame = per_frame.saturating_add(further);
                work([padded, per_frame.saturating_add(more)])
            }
            Keeps::Inspection => {
                let per_block = work([num_heads, k.saturating_add(l)]).saturating_add(5 * h);
                work([padded, work([num_layers, per_block]).saturating_add(self.frame_numbers())])
            }
        };
        let states = match keeps {
            // one for each sequence
            Keeps::Cache => work([encoders, work([batch, self.state_numbers(0)])]),
            // pieces of a long sequence read the keys and values of those before them, of one layer at a time in copies
            Keeps::Last | Keeps::Outputs if l > PIECE => {
                self.state_numbers(l).saturating_add(work([4 * h, self.seen_rows(l)]))
            }
            _ => 0,
        };
        [lists, passing, kept, states].into_iter().fold(0, usize::saturating_add)
    }

    /// Numbers that a frame takes on its way through a block: the residual stream and its norm, four projections in
    /// attention and what they become, six widths in the Mamba branch and what comes of it, and the gate. In the shared block
    /// all in attention is twice as wide.
    pub(crate) fn frame_numbers(&self) -> usize {
        /// Values are packed for products in whole panels of each head.
        const PANEL: usize = crate::kernels::matmul::PANEL;
        let HymbaOptions { embed_dim, hidden_size: h, num_heads, .. } = self.options;
        let n = self.state_size();
        let (widths, inner) = if self.options.pattern.shares() { (24, 2 * h) } else { (20, h) };
        let values = num_heads * (inner / num_heads).next_multiple_of(PANEL);
        embed_dim + widths * h + values + 2 * n + self.options.dt_rank()
    }

    /// Numbers that a state of one sequence takes when so many frames are in its window.
    pub(super) fn state_numbers(&self, frames: usize) -> usize {
        let HymbaOptions { hidden_size: h, state_size: n, num_heads, .. } = self.options;
        /// Of a list of keys or values, and its place: in numbers.
        const LIST: usize = 16;
        let mamba = work([2 * h, n.saturating_add(3)]).saturating_add(4 * LIST);
        let rows = self.seen_rows(frames);
        let kv = |width| work([2 * width, rows]).saturating_add(work([LIST, 2 * num_heads]));
        self.at_all_depths(|kind| match kind {
            BlockKind::Parallel => mamba.saturating_add(kv(h)),
            BlockKind::Mamba | BlockKind::Fed { by_shared: false } => mamba,
            BlockKind::Attention => kv(h).saturating_add(4 * LIST),
            BlockKind::Fed { by_shared: true } => mamba.saturating_add(kv(2 * h)),
        })
    }

    /// Meta tokens and frames whose keys and values are kept after so many frames.
    fn seen_rows(&self, frames: usize) -> usize {
        let window = self.options.window().map_or(frames, |window| window.min(frames));
        self.options.num_meta_tokens.saturating_add(window)
    }

    /// Numbers that all blocks keep of a frame for the backward pass.
    fn cache_numbers(&self) -> usize {
        let HymbaOptions { hidden_size: h, num_heads: a, .. } = self.options;
        let n = self.state_size();
        // beside the residual stream, its norm, and so on
        let mamba = 2 * n + self.options.dt_rank() + work([n, h]).div_ceil(8);
        self.at_all_depths(|kind| match kind {
            BlockKind::Parallel => 25 * h + mamba + a,
            BlockKind::Mamba => 18 * h + mamba,
            BlockKind::Attention => 12 * h + a,
            BlockKind::Fed { by_shared: false } => 12 * h + mamba,
            BlockKind::Fed { by_shared: true } => 31 * h + mamba + a,
        })
    }

    /// n, which may be any number where no block has a state.
    fn state_size(&self) -> usize {
        if self.options.pattern == Pattern::Attention { 0 } else { self.options.state_size }
    }

    /// The sum over all depths of what each kind of block takes.
    fn at_all_depths(&self, numbers: impl Fn(BlockKind) -> usize) -> usize {
        let kinds = self.options.pattern.kinds(self.options.num_layers);
        kinds.fold(0, |sum: usize, (kind, count)| sum.saturating_add(work([count, numbers(kind)])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caches_of_all_encoders_are_counted() {
        let model = Hymba::build(HymbaOptions::new(3).hidden_size(16).num_layers(2)).unwrap();
        let numbers = |encoders, keeps| model.batch_numbers(encoders, (4, 100), None, keeps, 0);
        let more = numbers(2, Keeps::Cache) - numbers(1, Keeps::Cache);
        assert!(more >= 400 * model.cache_numbers() + 4 * model.state_numbers(0), "{more}");
        assert_eq!(numbers(2, Keeps::Outputs), numbers(1, Keeps::Outputs));
    }
}
