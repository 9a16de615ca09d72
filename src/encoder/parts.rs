//! The layers that blocks of all kinds are made of, and how many parameters a block has.

use super::options::{HymbaOptions, sum};
use super::pattern::BlockKind;
use super::variant::Differences;
use crate::kernels::matmul::Storage;
use crate::layers::{
    Activation, AttentionConfig, Gate, KvShape, LayerNorm, Linear, MambaBranch, MambaConfig, MetaTokenAttention, Mlp,
};

impl HymbaOptions {
    pub(super) fn new_norm(&self, width: usize) -> LayerNorm {
        LayerNorm::zeros(width, self.variant.differences().small_variance)
    }

    pub(super) fn new_mamba(&self, storage: Option<Storage>) -> MambaBranch {
        let (h, d, n, r) = (self.hidden_size, self.inner_size(), self.state_size, self.dt_rank());
        let bias = self.variant.differences().projection_bias;
        let outer = [Linear::zeros_as(h, 2 * d, bias, storage), Linear::zeros_as(d, h, bias, storage)];
        MambaBranch::new(&self.mamba(), Some(outer), Linear::zeros(d, r + 2 * n, bias), Linear::zeros(r, d, true))
    }

    /// Attention with heads of width p = h/a and scores times 1/√p.
    pub(super) fn new_attention(&self, storage: Option<Storage>) -> MetaTokenAttention {
        let h = self.hidden_size;
        MetaTokenAttention::zeros(self.attention(h), [h, h], 1.0, self.variant.differences().own_meta, storage)
    }

    /// Attention of the shared block, `[rows, 2h]` → `[rows, h]`, with heads of width P = 2h/a and scores times 1/√(P/2).
    pub(super) fn new_shared_attention(&self, storage: Option<Storage>) -> MetaTokenAttention {
        let h = self.hidden_size;
        MetaTokenAttention::zeros(self.attention(2 * h), [2 * h, h], std::f32::consts::SQRT_2, false, storage)
    }

    pub(super) fn new_ffn(&self, storage: Option<Storage>) -> Mlp {
        let h = self.hidden_size;
        let linear = |inputs, outputs| Linear::zeros_as(inputs, outputs, true, storage);
        Mlp::new(Activation::Gelu, None, linear(h, 4 * h), linear(4 * h, h))
    }

    /// The sizes of the Mamba branch.
    fn mamba(&self) -> MambaConfig {
        let Differences { learned_decay, time_step, .. } = self.variant.differences();
        MambaConfig {
            inner: self.inner_size(),
            states: self.state_size,
            taps: 4,
            conv_bias: true,
            learned_decay,
            time_step,
            inner_norms: None,
        }
    }

    /// The sizes of attention whose heads are so wide together.
    fn attention(&self, inner: usize) -> AttentionConfig {
        let width = inner / self.num_heads;
        AttentionConfig {
            query_heads: self.num_heads,
            kv: KvShape {
                heads: self.num_heads,
                key_width: width,
                value_width: width,
                meta: self.num_meta_tokens,
                window: self.window(),
            },
        }
    }

    /// Parameters of a block of this kind, of which the shared block is no part; `None` where they cannot be counted.
    pub(super) fn block_parameters(&self, kind: BlockKind) -> Option<usize> {
        let (h, k) = (self.hidden_size, self.num_meta_tokens);
        let Differences { projection_bias, own_meta, .. } = self.variant.differences();
        let norm = LayerNorm::count(h);
        let mamba = MambaBranch::count(&self.mamba(), h, self.dt_rank(), projection_bias);
        let attention = MetaTokenAttention::count(h, h, h, own_meta.then_some(k));
        let ffn = sum(&[norm, self.ffn_parameters()]);
        match kind {
            BlockKind::Parallel => sum(&[norm, mamba, attention, Gate::count(h), ffn]),
            BlockKind::Mamba => sum(&[norm, mamba, ffn]),
            BlockKind::Attention => sum(&[norm, attention, ffn]),
            BlockKind::Fed { by_shared: false } => sum(&[norm, mamba]),
            BlockKind::Fed { by_shared: true } => sum(&[Linear::count(h, h, false), norm, mamba]),
        }
    }

    /// Parameters of the shared block.
    pub(super) fn shared_parameters(&self) -> Option<usize> {
        let h = self.hidden_size;
        let attention = MetaTokenAttention::count(2 * h, 2 * h, h, None);
        sum(&[LayerNorm::count(2 * h), attention, LayerNorm::count(h), self.ffn_parameters()])
    }

    fn ffn_parameters(&self) -> Option<usize> {
        let h = self.hidden_size;
        sum(&[Linear::count(h, 4 * h, true), Linear::count(4 * h, h, true)])
    }

    /// Outputs and inputs of the matrices of such a block that may be stored narrow: see
    /// [`Hymba::store_as`](crate::Hymba::store_as).
    pub(super) fn large_matrices(&self, kind: BlockKind) -> Vec<[usize; 2]> {
        let (h, d) = (self.hidden_size, self.inner_size());
        let mamba = [[2 * d, h], [h, d]];
        let ffn = [[4 * h, h], [h, 4 * h]];
        match kind {
            BlockKind::Parallel => [&[[h, h]; 5][..], &mamba, &ffn].concat(),
            BlockKind::Mamba => [mamba, ffn].concat(),
            BlockKind::Attention => [&[[h, h]; 4][..], &ffn].concat(),
            BlockKind::Fed { by_shared: false } => mamba.to_vec(),
            BlockKind::Fed { by_shared: true } => [&[[h, h]][..], &mamba].concat(),
        }
    }

    /// Those of the shared block.
    pub(super) fn large_shared_matrices(&self) -> Vec<[usize; 2]> {
        let h = self.hidden_size;
        [&[[2 * h, 2 * h]; 3][..], &[[h, 2 * h], [4 * h, h], [h, 4 * h]]].concat()
    }

    /// Tensors that a block has in a file of this crate, at least.
    pub(super) fn tensors_per_block(&self) -> usize {
        let of_kind = |kind| match kind {
            // norms 4, Mamba branch 9 or 10, attention 8 or 10, gate 2, feed-forward network 4
            BlockKind::Parallel if self.variant.differences().own_meta => 30,
            BlockKind::Parallel => 27,
            BlockKind::Mamba => 17,
            BlockKind::Attention => 16,
            BlockKind::Fed { by_shared } => 11 + usize::from(by_shared),
        };
        self.pattern.kinds(self.num_layers).map(|(kind, _)| of_kind(kind)).min().unwrap_or(1)
    }
}
