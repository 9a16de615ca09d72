//! Keys and values that several layers read.

use super::kv_cache::KvCache;
use super::{Buffer, all_rows};
use crate::kernels::attention::PackedHead;
use crate::kernels::rows::Rows;

/// Keys and values of a pass that later layers use.
pub(crate) struct SharedKv {
    /// `[rows, heads · p]` and `[rows, heads · value_width]`
    pub keys: Buffer,
    pub values: Buffer,
    /// Per sequence and head of keys, in the order in which products read them; `None` for those that read the cache. Empty until
    /// they are packed.
    pub packed: Vec<Vec<Option<PackedHead>>>,
    /// Per sequence, the cache as it was before these rows, where they are [`one_by_one`](super::Batch::one_by_one).
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub before: Vec<KvCache>,
}

#[cfg_attr(not(feature = "lm"), allow(dead_code))]
impl SharedKv {
    /// Drops what products read, when all layers are through.
    pub(crate) fn unpack(&mut self) {
        self.packed = Vec::new();
    }

    /// The same, not packed.
    pub(crate) fn copy(&self) -> Self {
        let (keys, values) = (Buffer::copy_of(&self.keys), Buffer::copy_of(&self.values));
        SharedKv { keys, values, packed: Vec::new(), before: Vec::new() }
    }

    pub(crate) fn rows(&self) -> [Rows<'_>; 2] {
        [all_rows(&self.keys), all_rows(&self.values)]
    }
}
