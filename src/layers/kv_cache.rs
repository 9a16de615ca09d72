//! Keys and values of the tokens that can still be seen.

use std::borrow::Cow;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use ndarray::Array3;

use crate::Result;
use crate::kernels::attention::{KvElement, KvRows, attend_step};
use crate::kernels::rows::Rows;

/// The type in which a state keeps keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvStorage {
    /// 32 bits, as they are computed.
    #[default]
    F32,
    /// 16 bits: half the memory. Keys and values are rounded as soon as they are computed, in prompts and in decoding
    /// alike, but not in training.
    Bf16,
}

/// A number in which keys and values are kept.
pub(crate) trait CacheElement: KvElement + Send + 'static {
    fn narrow(wide: &[f32], kept: &mut [Self]);
    fn widen(kept: &[Self], wide: &mut Vec<f32>);
    fn wide(kept: &[Self]) -> Cow<'_, [f32]>;
    const ZERO: Self;
}

impl CacheElement for f32 {
    const ZERO: Self = 0.0;

    fn narrow(wide: &[f32], kept: &mut [f32]) {
        kept.copy_from_slice(wide);
    }

    fn widen(kept: &[f32], wide: &mut Vec<f32>) {
        wide.extend_from_slice(kept);
    }

    fn wide(kept: &[f32]) -> Cow<'_, [f32]> {
        Cow::Borrowed(kept)
    }
}

impl CacheElement for bf16 {
    const ZERO: Self = bf16::ZERO;

    fn narrow(wide: &[f32], kept: &mut [bf16]) {
        kept.convert_from_f32_slice(wide);
    }

    fn widen(kept: &[bf16], wide: &mut Vec<f32>) {
        wide.extend(kept.iter().map(|x| x.to_f32()));
    }

    fn wide(kept: &[bf16]) -> Cow<'_, [f32]> {
        Cow::Owned(kept.iter().map(|x| x.to_f32()).collect())
    }
}

/// The sizes of a layer's keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvShape {
    pub heads: usize,
    pub key_width: usize,
    pub value_width: usize,
    /// Meta tokens, which every token sees.
    pub meta: usize,
    /// Other rows a row sees, itself included; `None` is all.
    pub window: Option<usize>,
}

impl KvShape {
    /// Where the row of a position is.
    fn slot(&self, position: usize) -> usize {
        match (self.window, position.checked_sub(self.meta)) {
            (Some(window), Some(token)) => self.meta + token % window,
            _ => position,
        }
    }
}

/// Rows of keys and values: those of the meta tokens, and then a ring of as many as the window holds, or all. Each head has its
/// own rows, so that a query reads memory from one end to the other.
#[derive(Clone)]
pub(crate) struct Cache<T> {
    shape: KvShape,
    keys: Vec<Vec<T>>,
    values: Vec<Vec<T>>,
    /// Tokens pushed so far, meta tokens included.
    length: usize,
}

impl<T: CacheElement> Cache<T> {
    /// Rows for which room is made at a time.
    const STEP: usize = 64;

    pub(crate) fn new(shape: KvShape) -> Self {
        let heads = || vec![Vec::new(); shape.heads];
        Cache { shape, keys: heads(), values: heads(), length: 0 }
    }

    /// Rows that are held.
    fn rows(&self) -> usize {
        let KvShape { meta, window, .. } = self.shape;
        window.map_or(self.length, |window| self.length.min(meta.saturating_add(window)))
    }

    /// The positions other than meta tokens that the token at `position` sees, itself not included.
    fn seen_before(&self, position: usize) -> std::ops::Range<usize> {
        let KvShape { meta, window, .. } = self.shape;
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        first.max(meta).min(position)..position
    }

    /// The keys and values of the next tokens, the heads side by side.
    pub(crate) fn push(&mut self, keys: Rows, values: Rows, count: usize) {
        let KvShape { heads, key_width, value_width, meta, window } = self.shape;
        let first = self.length;
        self.length += count;
        let rows = self.rows();
        let room =
            rows.next_multiple_of(Self::STEP).min(window.map_or(usize::MAX, |window| meta.saturating_add(window)));
        for (kept, width, new) in [(&mut self.keys, key_width, keys), (&mut self.values, value_width, values)] {
            for kept in kept.iter_mut() {
                grow(kept, rows * width, room * width);
            }
            for i in 0..count {
                let slot = self.shape.slot(first + i);
                for (kept, new) in kept.iter_mut().zip(new.row(i, heads * width).chunks_exact(width)) {
                    T::narrow(new, &mut kept[slot * width..][..width]);
                }
            }
        }
    }

    /// What the next rows may see of those before, for one head: meta tokens, and then the others in order.
    fn past(&self, head: usize) -> KvView<'_> {
        let KvShape { key_width, value_width, meta, window, .. } = self.shape;
        let pushed = self.length.saturating_sub(meta);
        let in_order = window.is_none_or(|window| pushed <= window || pushed.is_multiple_of(window));
        let positions: Vec<usize> = match in_order {
            true => Vec::new(),
            false => (0..meta.min(self.length)).chain(self.seen_before(self.length)).collect(),
        };
        let (keys, values) = match in_order {
            true => (T::wide(&self.keys[head]), T::wide(&self.values[head])),
            false => {
                let rows = |kept: &[T], width: usize| {
                    let mut wide = Vec::with_capacity(positions.len() * width);
                    positions.iter().for_each(|&position| {
                        T::widen(&kept[self.shape.slot(position) * width..][..width], &mut wide);
                    });
                    Cow::Owned(wide)
                };
                (rows(&self.keys[head], key_width), rows(&self.values[head], value_width))
            }
        };
        KvView { rows: keys.len() / key_width, meta: meta.min(self.length), keys, values }
    }

    /// What the last token pushed sees, itself included: everything that is held.
    fn seen(&self, head: usize) -> KvRows<'_, T> {
        let strides = (self.shape.key_width, self.shape.value_width);
        KvRows { keys: &self.keys[head], values: &self.values[head], strides, rows: self.rows() }
    }

    fn dim_at(&self, length: usize) -> (usize, usize, usize, usize) {
        let rows = Cache::<T> { length, ..Self::new(self.shape) }.rows();
        (self.shape.heads, rows, self.shape.key_width, self.shape.value_width)
    }

    /// Keys `[heads, rows, p]` and values `[heads, rows, ·]`, in the order of their positions.
    fn arrays(&self) -> (Array3<f32>, Array3<f32>) {
        let KvShape { heads, meta, .. } = self.shape;
        let lost = self.length - self.rows();
        let positions: Vec<_> = (0..meta.min(self.length)).chain((meta + lost).min(self.length)..self.length).collect();
        let array = |kept: &[Vec<T>], width: usize| {
            Array3::from_shape_fn((heads, positions.len(), width), |(head, i, j)| {
                let mut wide = Vec::with_capacity(1);
                T::widen(&kept[head][self.shape.slot(positions[i]) * width + j..][..1], &mut wide);
                wide[0]
            })
        };
        (array(&self.keys, self.shape.key_width), array(&self.values, self.shape.value_width))
    }
}

/// Grows `numbers` to `length`, reserving exactly `room` if it has too little: doubling would take more than a state is said to.
fn grow<T: CacheElement>(numbers: &mut Vec<T>, length: usize, room: usize) {
    if length > numbers.capacity() {
        numbers.reserve_exact(room - numbers.len());
    }
    if length > numbers.len() {
        numbers.resize(length, T::ZERO);
    }
}

/// Keys and values of one head as f32: `meta` rows of meta tokens, then others in the order of their positions. Some may be too
/// old to be seen.
pub(crate) struct KvView<'a> {
    pub rows: usize,
    pub meta: usize,
    /// `[rows, p]`
    pub keys: Cow<'a, [f32]>,
    /// `[rows, value_width]`
    pub values: Cow<'a, [f32]>,
}

/// Reads what has this name and hands on its numbers, in order and in pieces.
pub(crate) type ReadNumbers<'a> = dyn FnMut(&str, &mut dyn FnMut(&[f32])) -> Result<()> + 'a;

/// The keys and values of one layer.
#[derive(Clone)]
pub(crate) enum KvCache {
    F32(Cache<f32>),
    Bf16(Cache<bf16>),
}

/// The same for both types.
macro_rules! either {
    ($cache:expr, $it:ident => $body:expr) => {
        match $cache {
            KvCache::F32($it) => $body,
            KvCache::Bf16($it) => $body,
        }
    };
}

impl KvCache {
    pub(crate) fn new(shape: KvShape, storage: KvStorage) -> Self {
        match storage {
            KvStorage::F32 => KvCache::F32(Cache::new(shape)),
            KvStorage::Bf16 => KvCache::Bf16(Cache::new(shape)),
        }
    }

    /// Rounds numbers to those that can be kept.
    pub(crate) fn round(&self, numbers: &mut [f32]) {
        if let KvCache::Bf16(_) = self {
            numbers.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
    }

    pub(crate) fn push(&mut self, keys: Rows, values: Rows, count: usize) {
        either!(self, cache => cache.push(keys, values, count));
    }

    /// What the next rows may see of those before, for one head.
    pub(crate) fn past(&self, head: usize) -> KvView<'_> {
        either!(self, cache => cache.past(head))
    }

    /// Rows that are held.
    pub(crate) fn rows(&self) -> usize {
        either!(self, cache => cache.rows())
    }

    /// The numbers of a row of keys, and of one of values, of all heads together.
    pub(crate) fn row_widths(&self) -> (usize, usize) {
        let KvShape { heads, key_width, value_width, .. } = either!(self, cache => cache.shape);
        (heads * key_width, heads * value_width)
    }

    /// Rows that each of the next rows sees, itself included; `None` is the whole past, which meta tokens see.
    pub(crate) fn window(&self) -> Option<usize> {
        if self.expects_meta() { None } else { either!(self, cache => cache.shape.window) }
    }

    /// Whether the next row is one of the meta tokens, which see all that precede them.
    pub(crate) fn expects_meta(&self) -> bool {
        either!(self, cache => cache.length < cache.shape.meta)
    }

    /// Attention of the last token's queries `[g · p]` over one head of keys and values, meta tokens included → out.
    pub(crate) fn attend(&self, head: usize, group: usize, query: &[f32], out: &mut [f32]) {
        either!(self, cache => attend_step(query, &[cache.seen(head)], 1, group, out));
    }

    pub(crate) fn arrays(&self) -> (Array3<f32>, Array3<f32>) {
        either!(self, cache => cache.arrays())
    }

    pub(crate) fn storage(&self) -> KvStorage {
        match self {
            KvCache::F32(_) => KvStorage::F32,
            KvCache::Bf16(_) => KvStorage::Bf16,
        }
    }

    /// Hands out the numbers of the `keys` or the `values` `[heads, rows, width]` as they lie in memory, in order and in pieces.
    pub(crate) fn write(&self, what: &str, take: &mut dyn FnMut(&[f32])) {
        fn pieces<T: CacheElement>(kept: &[Vec<T>], take: &mut dyn FnMut(&[f32])) {
            const PIECE: usize = 1 << 14;
            let mut wide = Vec::new();
            for piece in kept.iter().flat_map(|kept| kept.chunks(PIECE)) {
                wide.clear();
                T::widen(piece, &mut wide);
                take(&wide);
            }
        }
        either!(self, cache => pieces(if what == "keys" { &cache.keys } else { &cache.values }, take));
    }

    /// The size of what [`write`](Self::write) hands out after `length` tokens: heads, rows, widths of keys and values.
    pub(crate) fn dim_at(&self, length: usize) -> (usize, usize, usize, usize) {
        either!(self, cache => cache.dim_at(length))
    }

    /// Restores what [`write`](Self::write) handed out after `length` tokens. `read` hands out the numbers of the
    /// `keys` or the `values`, in order and in pieces, so that there is no second copy of them.
    pub(crate) fn restore(&mut self, length: usize, read: &mut ReadNumbers) -> Result<()> {
        fn fill<T: CacheElement>(cache: &mut Cache<T>, length: usize, read: &mut ReadNumbers) -> Result<()> {
            cache.length = length;
            let (_, rows, key, value) = cache.dim_at(length);
            for (what, kept, width) in [("keys", &mut cache.keys, key), ("values", &mut cache.values, value)] {
                kept.iter_mut().for_each(|kept| *kept = vec![T::ZERO; rows * width]);
                let mut places = kept.iter_mut();
                let mut place: &mut [T] = &mut [];
                read(what, &mut |mut numbers| {
                    while !numbers.is_empty() {
                        if place.is_empty() {
                            let Some(next) = places.next() else { return };
                            place = next;
                        }
                        let count = numbers.len().min(place.len());
                        let (now, later) = std::mem::take(&mut place).split_at_mut(count);
                        T::narrow(&numbers[..count], now);
                        (place, numbers) = (later, &numbers[count..]);
                    }
                })?;
            }
            Ok(())
        }
        either!(self, cache => fill(cache, length, read))
    }

    /// Keys of the meta tokens, head by head.
    pub(crate) fn meta_keys(&self) -> Vec<f32> {
        fn keys<T: CacheElement>(cache: &Cache<T>) -> Vec<f32> {
            let mut wide = Vec::new();
            let count = cache.shape.meta.min(cache.length) * cache.shape.key_width;
            cache.keys.iter().for_each(|kept| T::widen(&kept[..count], &mut wide));
            wide
        }
        either!(self, cache => keys(cache))
    }

    /// Separate pieces of memory, one for each head of keys and values.
    pub(crate) fn num_vectors(&self) -> usize {
        either!(self, cache => cache.keys.len() + cache.values.len())
    }

    /// Bytes of the rows that are held.
    pub(crate) fn num_used_bytes(&self) -> usize {
        fn bytes<T>(cache: &Cache<T>) -> usize {
            cache.keys.iter().chain(&cache.values).map(|kept| size_of_val(kept.as_slice())).sum()
        }
        either!(self, cache => bytes(cache))
    }

    /// Bytes of memory taken.
    pub(crate) fn num_bytes(&self) -> usize {
        fn bytes<T>(cache: &Cache<T>) -> usize {
            cache.keys.iter().chain(&cache.values).map(|kept| kept.capacity() * size_of::<T>()).sum()
        }
        either!(self, cache => bytes(cache))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(meta: usize, window: Option<usize>) -> KvShape {
        KvShape { heads: 1, key_width: 1, value_width: 2, meta, window }
    }

    /// Pushes rows that are named after their positions.
    fn push(cache: &mut Cache<f32>, count: usize) {
        let keys: Vec<f32> = (cache.length..cache.length + count).map(|position| position as f32).collect();
        let values: Vec<f32> = keys.iter().flat_map(|key| [*key, -key]).collect();
        cache.push(Rows { data: &keys, stride: 1 }, Rows { data: &values, stride: 2 }, count);
    }

    #[test]
    fn a_window_keeps_the_meta_tokens_and_the_last_others() {
        for pieces in [1, 2, 3, 7, 20] {
            for (meta, window) in [(3, 4), (0, 5), (6, 2), (2, 1)] {
                let mut cache = Cache::new(shape(meta, Some(window)));
                push(&mut cache, meta);
                while cache.length < 30 {
                    push(&mut cache, pieces);
                    let mut seen = cache.seen(0).keys.to_vec();
                    seen.sort_by(f32::total_cmp);
                    let first = cache.length.saturating_sub(window).max(meta);
                    let want: Vec<_> = (0..meta).chain(first..cache.length).map(|i| i as f32).collect();
                    assert_eq!(seen, want);
                    assert_eq!(cache.arrays().0.iter().copied().collect::<Vec<_>>(), want);
                    // the next token is itself one of the window
                    let first = (cache.length + 1).saturating_sub(window).max(meta);
                    let want: Vec<_> = (0..meta).chain(first..cache.length).map(|i| i as f32).collect();
                    let past = cache.past(0);
                    let visible = past.keys[..meta].iter().chain(&past.keys[past.rows - (want.len() - meta)..]);
                    assert_eq!(visible.copied().collect::<Vec<_>>(), want);
                    assert_eq!((past.meta, past.values.len()), (meta, 2 * past.rows));
                }
                assert_eq!(cache.keys[0].capacity(), meta + window);
            }
        }
    }

    #[test]
    fn without_a_window_room_is_made_in_steps() {
        let mut cache = Cache::new(shape(2, None));
        for length in 1..1000usize {
            push(&mut cache, 1);
            assert_eq!(cache.seen(0).keys.len(), length);
            assert_eq!(cache.keys[0].capacity(), length.next_multiple_of(64));
        }
    }
}
