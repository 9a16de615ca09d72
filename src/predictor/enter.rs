//! From the user's frames to what the encoder reads: form, normalisation, stem.

use ndarray::{Array2, Array3, ArrayRef, ArrayRef3, Axis, CowArray, Dimension, Ix2, Ix3};

use super::front::FormCache;
use super::reader::full;
use super::{Predictor, PredictorOptions};
use crate::encoder::{Keeps, check_lengths, fits, frames, padded};
use crate::kernels::team::{with_team, work};
use crate::layers::{Spans, StemCache};
use crate::{Error, Result};

/// What the encoder reads `[b, l, …]`, the lengths of its rows, and what the backward pass reads.
pub(super) type Entered<'a> = (CowArray<'a, f32, Ix3>, Option<Vec<usize>>, FrontCache);

/// What [`Predictor::enter_backward`] reads; nothing where the encoder reads frames as they are.
#[derive(Debug, Default)]
pub(super) struct FrontCache {
    form: Option<FormCache>,
    stem: Option<StemCache>,
    /// The lengths of the sequences, and of padded rows.
    frames: Option<(Vec<usize>, usize)>,
}

impl Predictor {
    /// Checks x `[b, l, embed_dim]` and its lengths, and turns frames into what the encoder reads, with the lengths of that.
    pub(super) fn enter<'a>(
        &self,
        x: &'a ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        keeps: Keeps,
    ) -> Result<Entered<'a>> {
        let (_, l, embed_dim) = x.dim();
        let outputs = 2 * self.task.outputs();
        let encoders = 1 + usize::from(self.reverse.is_some());
        let form = self.options.form();
        if self.stem.is_none() && form.is_plain() {
            // of a row or a frame: the normalised frames, and what the head makes of it
            let normalized = if keeps == Keeps::Last { embed_dim.saturating_mul(l) } else { embed_dim };
            let more = normalized.saturating_add(outputs).saturating_add(self.options.head_inputs());
            self.reader.encoder.check_batch_of(encoders, x, lengths, keeps, more)?;
            let lengths = lengths.map(<[usize]>::to_vec);
            return Ok((self.normalized(x), lengths, FrontCache::default()));
        }
        check_frames(x, lengths, self.options.encoder.embed_dim, &self.options)?;
        let lengths = full(x, lengths);
        let (x, form) = match form.is_plain() {
            true => (x.to_owned(), None),
            false => {
                let (x, cache) = form.apply(x, &lengths);
                (x, Some(cache))
            }
        };
        let mut x = CowArray::from(x);
        if let Some(input) = &self.input {
            input.apply(&mut x);
        }
        let (mut tokens, mut of_stem) = (lengths.clone(), None);
        if let Some(stem) = &self.stem {
            let (spans, rows) = (Spans::new(lengths.iter().copied()), frames(&x, &lengths));
            let after = stem.token_spans(&spans);
            let (y, cache) = with_team(work([after.rows(), self.options.token_numbers(), 32]), |team| match keeps {
                Keeps::Cache => {
                    let (y, cache) = stem.forward_train(team, &spans, rows);
                    (y, Some(cache))
                }
                _ => (stem.forward(team, &spans, rows.view()), None),
            });
            tokens = after.iter().map(|span| span.len()).collect();
            let longest = tokens.iter().copied().max().unwrap_or(0);
            x = CowArray::from(padded(&y, &after, longest));
            of_stem = cache;
        }
        self.reader.encoder.check_batch_of(
            encoders,
            &x,
            Some(&tokens),
            keeps,
            outputs.saturating_add(self.options.head_inputs()),
        )?;
        let cache = FrontCache { form, stem: of_stem, frames: Some((lengths, l)) };
        Ok((x, Some(tokens), cache))
    }

    /// The gradient of [`enter`](Self::enter): dx of what the encoder reads → that of the frames.
    pub(super) fn enter_backward(
        &self,
        cache: &FrontCache,
        mut dx: Array3<f32>,
        tokens: Option<&[usize]>,
        grads: &mut Predictor,
    ) -> Array3<f32> {
        if let (Some(stem), Some(of_stem), Some(grad), Some((lengths, l)), Some(tokens)) =
            (&self.stem, &cache.stem, &mut grads.stem, &cache.frames, tokens)
        {
            let (spans, dy) = (Spans::new(lengths.iter().copied()), frames(&dx, tokens));
            let work = work([dy.nrows(), self.options.token_numbers(), 64]);
            let dframes = with_team(work, |team| stem.backward(team, &spans, of_stem, dy, grad));
            dx = padded(&dframes, &spans, *l);
        }
        if let Some(input) = &self.input {
            input.apply_backward(&mut dx);
        }
        match (&cache.form, &cache.frames) {
            (Some(form), Some((lengths, _))) => {
                self.options.form().backward(form, dx, lengths, self.options.encoder.embed_dim)
            }
            _ => dx,
        }
    }

    /// A series in the form that an input normalization is fitted to: `[l, embed_dim]` → `[l, features]`.
    pub(crate) fn formed<'a>(&self, x: &'a Array2<f32>) -> CowArray<'a, f32, Ix2> {
        let form = self.options.form();
        if form.is_plain() {
            return x.view().into();
        }
        form.apply(&x.view().insert_axis(Axis(0)), &[x.nrows()]).0.index_axis_move(Axis(0), 0).into()
    }

    /// x after the input normalization. A width that is not the encoder's is left for the encoder to refuse.
    pub(super) fn normalized<'a, D: Dimension>(&self, x: &'a ArrayRef<f32, D>) -> CowArray<'a, f32, D> {
        let Some(input) = &self.input else { return x.view().into() };
        let mut x = x.to_owned();
        input.apply(&mut x);
        x.into()
    }
}

/// Checks frames and their lengths in front of a stem or a change of form, and that they fit into memory there.
fn check_frames(
    x: &ArrayRef3<f32>,
    lengths: Option<&[usize]>,
    embed_dim: usize,
    options: &PredictorOptions,
) -> Result<()> {
    let (batch, l, width) = x.dim();
    let wrong = |expected: String| Err(Error::Shape { argument: "x", expected, given: x.shape().to_vec() });
    if batch == 0 || l == 0 || width != embed_dim {
        return wrong(format!("[b, l, embed_dim] with b ≥ 1, l ≥ 1 and embed_dim = {embed_dim}"));
    }
    if let Some(lengths) = lengths {
        check_lengths(lengths, batch, l)?;
    }
    let tokens = options.stem.as_ref().map_or(0, |stem| work([batch, stem.tokens(l)]));
    let form = work([batch, l, options.features().saturating_mul(4)]);
    let bytes = form.saturating_add(work([tokens, options.token_numbers()])).saturating_mul(size_of::<f32>());
    match fits(bytes) {
        true => Ok(()),
        false => wrong(format!("a smaller batch or shorter sequences: this takes about {} MB of memory", bytes >> 20)),
    }
}
