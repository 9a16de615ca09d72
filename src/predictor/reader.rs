//! One way through the frames: an encoder, and the pooling of what it says at each frame.

use ndarray::{Array2, Array3, ArrayRef3, ArrayView2};

use crate::encoder::{frames, padded, sequences};
use crate::kernels::matmul::Storage;
use crate::layers::{Pool, PoolCache, Spans};
use crate::parameters::{Parameter, ParameterMut, Visitor, VisitorMut, join};
use crate::{Hymba, HymbaOptions, Pooling, Result, TrainCache};

#[derive(Clone)]
pub(super) struct Reader {
    pub encoder: Hymba,
    pub pooling: Pooling,
    pub pool: Pool,
}

/// What [`Reader::backward`] reads.
#[derive(Debug)]
pub(super) struct ReaderCache {
    encoder: TrainCache,
    kind: Kind,
}

/// The kind of pass, and what pooling needs of it.
#[derive(Debug)]
enum Kind {
    /// The last frames.
    Last,
    /// Every frame, of so many sequences.
    Frames(usize),
    /// The pooled frames of sequences that were padded to so many.
    Pooled { spans: Spans, l: usize, cache: Box<PoolCache> },
}

impl Reader {
    pub fn zeros(options: HymbaOptions, storage: Option<Storage>, pooling: Pooling) -> Self {
        let pool = Pool::zeros(pooling, options.hidden_size);
        Reader { encoder: Hymba::zeros(options, storage), pooling, pool }
    }

    /// A gradient of this reader, zero.
    pub fn zeros_like(&self) -> Self {
        let pool = Pool::zeros(self.pooling, self.encoder.options().hidden_size);
        Reader { encoder: self.encoder.zeros_like(), pooling: self.pooling, pool }
    }

    /// For gradients of what inference computes.
    pub fn without_dropout(self) -> Self {
        Reader { encoder: self.encoder.without_dropout(), ..self }
    }

    /// x `[b, l, embed_dim]` → `[b, p]`. For callers that have checked x and the lengths.
    pub fn read(&self, x: &ArrayRef3<f32>, lengths: Option<&[usize]>) -> Result<Array2<f32>> {
        match (self.pooling, lengths) {
            (Pooling::Last, Some(lengths)) => self.encoder.forward_ragged(x, lengths),
            (Pooling::Last, None) => self.encoder.forward(x),
            _ => {
                let lengths = full(x, lengths);
                let hidden = self.encoder.encode_frames(x, &lengths);
                Ok(self.pool.forward(&Spans::new(lengths), hidden.view()))
            }
        }
    }

    /// As [`read`](Self::read) at every frame, from the frames up to it: `[b·l, p]`
    pub fn read_frames(&self, x: &ArrayRef3<f32>) -> Array2<f32> {
        let lengths = full(x, None);
        let hidden = self.encoder.encode_frames(x, &lengths);
        match self.pooling {
            Pooling::Last => hidden,
            _ => self.pool.forward_frames(&Spans::new(lengths), hidden.view()),
        }
    }

    /// As [`read`](Self::read), or `frame_wise` as [`read_frames`](Self::read_frames), which goes with the last frame as pooling
    /// alone. Returns also what [`backward`](Self::backward) reads.
    pub fn read_train(
        &self,
        x: &ArrayRef3<f32>,
        lengths: Option<&[usize]>,
        seed: u64,
        frame_wise: bool,
    ) -> Result<(Array2<f32>, ReaderCache)> {
        if self.pooling == Pooling::Last && !frame_wise {
            let (last, encoder) = self.encoder.forward_train(x, lengths, seed)?;
            return Ok((last, ReaderCache { encoder, kind: Kind::Last }));
        }
        let (hidden, encoder) = self.encoder.forward_sequence_train(x, lengths, seed)?;
        let (batch, l, h) = hidden.dim();
        if frame_wise {
            let hidden = hidden.into_shape_with_order((batch * l, h)).expect("a new array");
            return Ok((hidden, ReaderCache { encoder, kind: Kind::Frames(batch) }));
        }
        let lengths = full(x, lengths);
        let (hidden, spans) = (frames(&hidden, &lengths), Spans::new(lengths));
        let (pooled, cache) = self.pool.forward_train(&spans, hidden);
        Ok((pooled, ReaderCache { encoder, kind: Kind::Pooled { spans, l, cache: Box::new(cache) } }))
    }

    /// The gradient of [`read_train`](Self::read_train): dpooled `[b, p]` or `[b·l, h]` → `[b, l, embed_dim]`. Nothing is added
    /// to `grads` where it is refused.
    pub fn backward(&self, cache: &ReaderCache, dpooled: ArrayView2<f32>, grads: &mut Reader) -> Result<Array3<f32>> {
        self.encoder.check_cache(&cache.encoder)?;
        match &cache.kind {
            Kind::Last => self.encoder.backward(&cache.encoder, &dpooled, &mut grads.encoder),
            Kind::Frames(batch) => {
                let dhidden = sequences(dpooled.to_owned(), *batch);
                self.encoder.backward_sequence(&cache.encoder, &dhidden, &mut grads.encoder)
            }
            Kind::Pooled { spans, l, cache: pooled } => {
                let mut dpool = grads.pool.clone();
                let dhidden = padded(&self.pool.backward(spans, pooled, dpooled, &mut dpool), spans, *l);
                let dx = self.encoder.backward_sequence(&cache.encoder, &dhidden, &mut grads.encoder)?;
                grads.pool = dpool;
                Ok(dx)
            }
        }
    }

    pub fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        self.encoder.visit_parameters(&mut |inner, parameter: Parameter<'a>| f(&join(name, inner), parameter));
        self.pool.visit(&join(name, "pooling"), f);
    }

    pub fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.encoder.visit_parameters_mut(&mut |inner, parameter: ParameterMut<'a>| f(&join(name, inner), parameter));
        self.pool.visit_mut(&join(name, "pooling"), f);
    }
}

/// The lengths, or those of rows without padding.
pub(super) fn full(x: &ArrayRef3<f32>, lengths: Option<&[usize]>) -> Vec<usize> {
    lengths.map_or_else(|| vec![x.dim().1; x.dim().0], <[usize]>::to_vec)
}
