//! Rows of tokens to be learned.

use std::ops::Range;

use crate::train::{Hash, Ranks};
use crate::{Error, Result};

/// Rows of token ids, and which of their tokens are to be predicted.
///
/// ```
/// use hymba::train::TokenRows;
///
/// let stream: Vec<u32> = (0..100).collect();
/// let rows = TokenRows::packed(&stream, 40)?;
/// assert_eq!((rows.len(), rows.predicted()), (3, 99)); // every token but the first, once
/// # Ok::<(), hymba::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRows {
    pub(super) rows: Vec<Vec<u32>>,
    pub(super) masks: Option<Vec<Vec<bool>>>,
    pub(super) bytes: Option<usize>,
}

impl TokenRows {
    /// One stream of tokens, such as documents one after the other with an end-of-text token between them, in rows of `length`
    /// tokens. A row begins with the last token of the one before, so that every token but the first is predicted once.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if there are fewer than two tokens, or `length` is below 2.
    pub fn packed(stream: &[u32], length: usize) -> Result<Self> {
        if stream.len() < 2 || length < 2 {
            let reason = format!("{} tokens in rows of {length}; there must be at least 2 of both", stream.len());
            return Err(Error::Data(reason));
        }
        let rows = (0..stream.len() - 1).step_by(length - 1).map(|first| {
            let end = stream.len().min(first + length);
            stream[first..end].to_vec()
        });
        Ok(TokenRows { rows: rows.collect(), masks: None, bytes: None })
    }

    /// Independent documents, one per row. `masks` has a mark for every token of every row; only those that are marked `true` are
    /// predicted.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] if nothing is predicted, a row is empty, or masks do not go with the rows.
    pub fn new(rows: Vec<Vec<u32>>, masks: Option<Vec<Vec<bool>>>) -> Result<Self> {
        if let Some(row) = rows.iter().position(Vec::is_empty) {
            return Err(Error::Data(format!("row {row} has no tokens; leave it out")));
        }
        if let Some(masks) = &masks {
            let fits = |(row, mask): (&Vec<u32>, &Vec<bool>)| row.len() == mask.len();
            if masks.len() != rows.len() || !rows.iter().zip(masks).all(fits) {
                return Err(Error::Data("masks must have a mark for every token of every row".into()));
            }
        }
        let all = TokenRows { rows, masks, bytes: None };
        if all.predicted() == 0 {
            return Err(Error::Data("there is nothing to predict: no row has a second token that is marked".into()));
        }
        Ok(all)
    }

    /// Says how many bytes of text the predicted tokens are, for [`LmEpoch::bits_per_byte`](super::LmEpoch::bits_per_byte).
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = Some(bytes);
        self
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows: always `false`, as [`new`](Self::new) and [`packed`](Self::packed) refuse that.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Tokens that are predicted.
    pub fn predicted(&self) -> usize {
        let marked = |i: usize| match &self.masks {
            Some(masks) => masks[i].iter().skip(1).filter(|mark| **mark).count(),
            None => self.rows[i].len().saturating_sub(1),
        };
        (0..self.rows.len()).map(marked).sum()
    }

    /// Some of the rows, and their masks.
    pub(super) fn select(&self, indices: &[usize]) -> (Vec<&[u32]>, Option<Vec<Vec<bool>>>) {
        let rows = indices.iter().map(|&i| &self.rows[i][..]).collect();
        (rows, self.masks.as_ref().map(|masks| indices.iter().map(|&i| masks[i].clone()).collect()))
    }

    /// A number that other rows, of all ranks together, do not have.
    pub(super) fn fingerprint_of_all(&self, ranks: &mut Ranks) -> Result<u64> {
        let masks = |range: Range<usize>| self.masks.as_ref().map_or(&[][..], |masks| &masks[range]);
        let each = |i: usize| fingerprint(&self.rows[i..=i], masks(i..i + 1));
        let parts = || (0..self.len()).map(each).fold(0, u64::wrapping_add);
        ranks.fingerprint("the rows", || fingerprint(&self.rows, masks(0..self.len())), parts)
    }
}

fn fingerprint(rows: &[Vec<u32>], masks: &[Vec<bool>]) -> u64 {
    let mut hash = Hash::new();
    for row in rows {
        hash.add(row.len() as u64);
        row.iter().for_each(|&id| hash.add(u64::from(id)));
    }
    masks.iter().flatten().for_each(|&mark| hash.add(u64::from(mark)));
    hash.finish()
}
