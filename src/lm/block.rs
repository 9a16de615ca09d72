//! One layer: attention and Mamba side by side between two shared projections, and an MLP.

use ndarray::Array1;

use super::attention::Attention;
use super::cache::KvStorage;
use super::config::{HymbaLmConfig, MlpActivation};
use super::mamba::MambaHead;
use super::parameters::{Parameter, ParameterMut, Visitor, VisitorMut};
use super::pass::{Pass, row_blocks};
use super::state::LayerState;
use crate::kernels::math::{self, Silu, SquaredRelu};
use crate::kernels::matmul::{Out, Rows};
use crate::kernels::matrix::{Matrix, Storage};
use crate::kernels::norm::rms_norm;
use crate::layers::{Buffer, flat, flat_mut, join};

/// weight ⊙ x / √(mean(x²) + ε), weight `[h]`.
pub(super) struct RmsNorm {
    pub weight: Array1<f32>,
    pub epsilon: f32,
}

impl RmsNorm {
    pub(super) fn zeros(h: usize, config: &HymbaLmConfig) -> Self {
        RmsNorm { weight: Array1::zeros(h), epsilon: config.rms_norm_eps as f32 }
    }

    /// out (+)= scale · norm(x), for x `[tokens, h]`
    pub(super) fn forward(&self, pass: &Pass, x: &[f32], scale: f32, out: &mut [f32], mode: Out) {
        let h = self.weight.len();
        pass.team.for_each(row_blocks(out, h), |(first, out)| self.rows(&x[first * h..], scale, out, mode));
    }

    /// As [`forward`](Self::forward), on this thread.
    pub(super) fn rows(&self, x: &[f32], scale: f32, out: &mut [f32], mode: Out) {
        let x = Rows { data: x, stride: self.weight.len() };
        rms_norm(x, flat(&self.weight), self.epsilon, scale, out, mode);
    }
}

/// x·Wᵀ + bias, with the weights `[out, in]` in the type they are stored in.
struct Projection {
    weight: Matrix,
    bias: Option<Array1<f32>>,
}

impl Projection {
    /// out (+)= x·Wᵀ + bias, for x `[tokens, in]`
    fn forward(&self, pass: &Pass, x: &[f32], out: &mut [f32], mode: Out) {
        let (n, k) = self.weight.dim();
        let mut mode = mode;
        if let Some(bias) = &self.bias {
            let add = |out: &mut f32, bias: &f32| *out = if mode == Out::Add { *out + bias } else { *bias };
            out.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(out, bias)| add(out, bias)));
            mode = Out::Add;
        }
        self.weight.multiply(pass.team, Rows { data: x, stride: k }, pass.tokens, out, mode);
    }
}

/// The MLP, absent where `intermediate_size` is 0.
struct Mlp {
    norm: RmsNorm,
    /// Only with silu.
    gate: Option<Matrix>,
    up: Matrix,
    down: Matrix,
}

/// One layer.
pub(super) struct Block {
    layer: usize,
    norm: RmsNorm,
    in_proj: Projection,
    attention: Attention,
    mamba: MambaHead,
    attention_norm: RmsNorm,
    mamba_norm: RmsNorm,
    out_proj: Projection,
    mlp: Option<Mlp>,
}

/// The name of a layer in files.
fn prefix(layer: usize) -> String {
    format!("model.layers.{layer}")
}

impl Block {
    pub(super) fn zeros(config: &HymbaLmConfig, layer: usize, storage: &dyn Fn(&str) -> Storage) -> Self {
        let (h, e, f) = (config.hidden_size, config.inner_size(), config.intermediate_size);
        let name = prefix(layer);
        let matrix = |rows, columns, tensor: &str| Matrix::zeros(rows, columns, storage(&join(&name, tensor)));
        let projection = |rows, columns, tensor: &str| Projection {
            weight: matrix(rows, columns, tensor),
            bias: config.mamba_proj_bias.then(|| Array1::zeros(rows)),
        };
        let gated = config.mlp_hidden_act == MlpActivation::Silu;
        Block {
            layer,
            norm: RmsNorm::zeros(h, config),
            in_proj: projection(config.in_proj_rows(layer), h, "mamba.in_proj.weight"),
            attention: Attention::new(config, layer),
            mamba: MambaHead::zeros(config, &join(&name, "mamba"), storage),
            attention_norm: RmsNorm::zeros(e, config),
            mamba_norm: RmsNorm::zeros(e, config),
            out_proj: projection(h, e, "mamba.out_proj.weight"),
            mlp: (f > 0).then(|| Mlp {
                norm: RmsNorm::zeros(h, config),
                gate: gated.then(|| matrix(f, h, "moe.experts.0.gate_proj.weight")),
                up: matrix(f, h, "moe.experts.0.up_proj.weight"),
                down: matrix(h, f, "moe.experts.0.down_proj.weight"),
            }),
        }
    }

    pub(super) fn new_state(&self, storage: KvStorage) -> LayerState {
        LayerState { mamba: self.mamba.new_state(), kv: self.attention.new_cache(storage) }
    }

    /// x `[tokens, H]` → x `[tokens, H]`, in place:
    ///
    /// ```text
    /// [q | k | v | u | z] = norm(x)·W_inᵀ
    /// x += (norm₁(Attention(q, k, v)) + norm₂(Mamba(u, z)))/2 · W_outᵀ
    /// x += MLP(norm(x))
    /// ```
    pub(super) fn forward(&self, pass: &mut Pass, x: &mut [f32]) {
        let (width, h) = self.in_proj.weight.dim();
        let (_, e) = self.out_proj.weight.dim();
        let tokens = pass.tokens;

        let mut normal = Buffer::any((tokens, h));
        self.norm.forward(pass, x, 1.0, flat_mut(&mut normal), Out::Set);
        let mut projected = Buffer::any((tokens, width));
        self.in_proj.forward(pass, flat(&normal), flat_mut(&mut projected), Out::Set);
        let [mut attention, mut mamba, mut mean] = [(); 3].map(|()| Buffer::any((tokens, e)));
        self.attention.forward(pass, flat_mut(&mut projected), width, flat_mut(&mut attention));
        self.mamba.forward(pass, self.layer, flat(&projected), width, flat_mut(&mut mamba));
        self.attention_norm.forward(pass, flat(&attention), 0.5, flat_mut(&mut mean), Out::Set);
        self.mamba_norm.forward(pass, flat(&mamba), 0.5, flat_mut(&mut mean), Out::Add);
        self.out_proj.forward(pass, flat(&mean), x, Out::Add);

        if let Some(mlp) = &self.mlp {
            mlp.norm.forward(pass, x, 1.0, flat_mut(&mut normal), Out::Set);
            mlp.forward(pass, flat(&normal), x);
        }
    }

    pub(super) fn visit<'a>(&'a self, f: &mut Visitor<'_, 'a>) {
        let name = prefix(self.layer);
        let mamba = join(&name, "mamba");
        let array = |array: &'a Array1<f32>| Parameter::Numbers(array.view().into_dyn());
        f(&join(&name, "input_layernorm.weight"), array(&self.norm.weight));
        for (tensor, projection) in [("in_proj", &self.in_proj), ("out_proj", &self.out_proj)] {
            let tensor = join(&mamba, tensor);
            f(&join(&tensor, "weight"), Parameter::Matrix(&projection.weight));
            if let Some(bias) = &projection.bias {
                f(&join(&tensor, "bias"), array(bias));
            }
        }
        self.attention.visit(&join(&mamba, "self_attn"), f);
        self.mamba.visit(&mamba, f);
        f(&join(&mamba, "pre_avg_layernorm1.weight"), array(&self.attention_norm.weight));
        f(&join(&mamba, "pre_avg_layernorm2.weight"), array(&self.mamba_norm.weight));
        if let Some(mlp) = &self.mlp {
            let expert = join(&name, "moe.experts.0");
            f(&join(&name, "pre_moe_layernorm.weight"), array(&mlp.norm.weight));
            if let Some(gate) = &mlp.gate {
                f(&join(&expert, "gate_proj.weight"), Parameter::Matrix(gate));
            }
            f(&join(&expert, "up_proj.weight"), Parameter::Matrix(&mlp.up));
            f(&join(&expert, "down_proj.weight"), Parameter::Matrix(&mlp.down));
        }
    }

    pub(super) fn visit_mut<'a>(&'a mut self, f: &mut VisitorMut<'_, 'a>) {
        let name = prefix(self.layer);
        let mamba = join(&name, "mamba");
        let array = |array: &'a mut Array1<f32>| ParameterMut::Numbers(array.view_mut().into_dyn());
        f(&join(&name, "input_layernorm.weight"), array(&mut self.norm.weight));
        for (tensor, projection) in [("in_proj", &mut self.in_proj), ("out_proj", &mut self.out_proj)] {
            let tensor = join(&mamba, tensor);
            f(&join(&tensor, "weight"), ParameterMut::Matrix(&mut projection.weight));
            if let Some(bias) = &mut projection.bias {
                f(&join(&tensor, "bias"), array(bias));
            }
        }
        self.attention.visit_mut(&join(&mamba, "self_attn"), f);
        self.mamba.visit_mut(&mamba, f);
        f(&join(&mamba, "pre_avg_layernorm1.weight"), array(&mut self.attention_norm.weight));
        f(&join(&mamba, "pre_avg_layernorm2.weight"), array(&mut self.mamba_norm.weight));
        if let Some(mlp) = &mut self.mlp {
            let expert = join(&name, "moe.experts.0");
            f(&join(&name, "pre_moe_layernorm.weight"), array(&mut mlp.norm.weight));
            if let Some(gate) = &mut mlp.gate {
                f(&join(&expert, "gate_proj.weight"), ParameterMut::Matrix(gate));
            }
            f(&join(&expert, "up_proj.weight"), ParameterMut::Matrix(&mut mlp.up));
            f(&join(&expert, "down_proj.weight"), ParameterMut::Matrix(&mut mlp.down));
        }
    }
}

impl Mlp {
    /// x += down(silu(gate(u)) ⊙ up(u)), or x += down(relu(up(u))²), for u `[tokens, H]`
    fn forward(&self, pass: &Pass, u: &[f32], x: &mut [f32]) {
        let (f, h) = self.up.dim();
        let rows = Rows { data: u, stride: h };
        let mut up = Buffer::any((pass.tokens, f));
        self.up.multiply(pass.team, rows, pass.tokens, flat_mut(&mut up), Out::Set);
        let inner = match &self.gate {
            Some(gate) => {
                let mut gated = Buffer::any((pass.tokens, f));
                gate.multiply(pass.team, rows, pass.tokens, flat_mut(&mut gated), Out::Set);
                pass.team.for_each(row_blocks(flat_mut(&mut gated), f), |(first, gated)| {
                    math::map_mul::<Silu>(gated, &flat(&up)[first * f..][..gated.len()]);
                });
                gated
            }
            None => {
                pass.team.for_each(row_blocks(flat_mut(&mut up), f), |(_, up)| math::map::<SquaredRelu>(up));
                up
            }
        };
        self.down.multiply(pass.team, Rows { data: flat(&inner), stride: f }, pass.tokens, x, Out::Add);
    }
}
