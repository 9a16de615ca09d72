//! The states of models between calls.

use ndarray::Array2;

use super::kv_cache::KvCache;
use crate::kernels::conv::TAPS;

/// The state of a model for one sequence.
#[derive(Clone)]
pub(crate) struct SequenceState {
    /// Rows seen so far, meta tokens included.
    pub position: usize,
    pub layers: Vec<LayerState>,
}

/// The state of one layer for one sequence.
#[derive(Clone)]
pub(crate) struct LayerState {
    /// Without numbers where there is no Mamba branch.
    pub mamba: MambaState,
    /// Absent where there is no attention, or where the layer uses another's keys and values.
    pub kv: Option<KvCache>,
}

/// The state of the Mamba branch for one sequence.
#[derive(Clone)]
pub(crate) struct MambaState {
    /// The last inputs of the convolution `[3, d]`, oldest first.
    pub conv: Array2<f32>,
    /// Sᵀ `[n, d]`
    pub scan: Array2<f32>,
}

impl SequenceState {
    /// Bytes of what is remembered.
    pub(crate) fn num_bytes(&self) -> usize {
        self.layers.iter().map(LayerState::num_bytes).sum::<usize>()
    }

    /// As [`num_bytes`](Self::num_bytes), without room that is not used yet.
    pub(crate) fn num_used_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.mamba_bytes() + layer.kv.as_ref().map_or(0, KvCache::num_used_bytes)).sum()
    }

    /// Bytes that a clone takes from the system, more than [`num_bytes`](Self::num_bytes) where the numbers are few: the places
    /// of the vectors, and what the allocator adds to each.
    pub(crate) fn footprint(&self) -> usize {
        const ADDED: usize = 32;
        let vectors = |layer: &LayerState| 4 + layer.kv.as_ref().map_or(0, KvCache::num_vectors);
        let vectors: usize = self.layers.iter().map(vectors).sum();
        let places = size_of::<SequenceState>() + self.layers.len() * size_of::<LayerState>();
        self.num_bytes() + places + vectors * (size_of::<Vec<f32>>() + ADDED) + ADDED
    }
}

impl LayerState {
    /// Of a layer without attention.
    pub(crate) fn of_mamba(mamba: MambaState) -> Self {
        LayerState { mamba, kv: None }
    }

    /// Of a layer without a Mamba branch.
    pub(crate) fn of_attention(kv: KvCache) -> Self {
        LayerState { mamba: MambaState::zeros(0, 0), kv: Some(kv) }
    }

    fn num_bytes(&self) -> usize {
        self.mamba_bytes() + self.kv.as_ref().map_or(0, KvCache::num_bytes)
    }

    fn mamba_bytes(&self) -> usize {
        (self.mamba.conv.len() + self.mamba.scan.len()) * size_of::<f32>()
    }
}

impl MambaState {
    /// Its arrays with their names in files; none where there is no Mamba branch.
    pub(crate) fn arrays(&self) -> impl Iterator<Item = (&'static str, &Array2<f32>)> {
        [("conv", &self.conv), ("scan", &self.scan)].into_iter().filter(|(_, array)| !array.is_empty())
    }

    /// As [`arrays`](Self::arrays), to be filled.
    pub(crate) fn arrays_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Array2<f32>)> {
        [("conv", &mut self.conv), ("scan", &mut self.scan)].into_iter().filter(|(_, array)| !array.is_empty())
    }

    /// Nothing seen yet, for d channels with n states each.
    pub(crate) fn zeros(d: usize, n: usize) -> Self {
        MambaState { conv: Array2::zeros((TAPS - 1, d)), scan: Array2::zeros((n, d)) }
    }
}

/// The gradient of the state of one layer in front of the rows of a batch, which all sequences start from.
#[derive(Clone)]
pub(crate) struct StateGradient {
    pub mamba: MambaState,
    /// Of the meta tokens' keys and values `[k, heads · width]`.
    pub keys: Array2<f32>,
    pub values: Array2<f32>,
}

impl StateGradient {
    pub(crate) fn zeros(state: &LayerState) -> Self {
        let (n, d) = state.mamba.scan.dim();
        let rows = |width| Array2::zeros((state.kv.as_ref().map_or(0, KvCache::rows), width));
        let (key, value) = state.kv.as_ref().map_or((0, 0), KvCache::row_widths);
        StateGradient { mamba: MambaState::zeros(d, n), keys: rows(key), values: rows(value) }
    }
}
