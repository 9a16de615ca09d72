//! The feed-forward network of a block.

use ndarray::{Array2, ArrayView2};

use super::batch::{Spans, add_array, copied, for_rows};
use super::{Buffer, Dropout, Linear, Rng, flat, flat_mut};
use crate::kernels::math::{Gelu, SquaredRelu, map, map_backward, map_mul};
use crate::kernels::math::{Silu, Unary};
use crate::kernels::team::Team;
use crate::parameters::{Visitor, VisitorMut, join};

/// What stands between the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// W_down · gelu(W_up · x), with gelu(x) = x/2 · (1 + erf(x/√2))
    Gelu,
    /// W_down · (silu(W_gate · x) ⊙ (W_up · x))
    GatedSilu,
    /// W_down · max(W_up · x, 0)²
    SquaredRelu,
}

/// The maps may have a bias.
#[derive(Clone)]
pub(crate) struct Mlp {
    activation: Activation,
    /// Only of [`Activation::GatedSilu`].
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

/// What [`Mlp::backward`] reads: what goes into the activation, `[rows, inner]`.
pub(crate) struct MlpCache {
    gate: Option<Buffer>,
    up: Buffer,
}

impl Mlp {
    pub(crate) fn new(activation: Activation, gate: Option<Linear>, up: Linear, down: Linear) -> Self {
        debug_assert_eq!(gate.is_some(), activation == Activation::GatedSilu);
        Mlp { activation, gate, up, down }
    }

    /// A gradient of this network, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        let gate = self.gate.as_ref().map(Linear::zeros_like);
        Mlp { activation: self.activation, gate, up: self.up.zeros_like(), down: self.down.zeros_like() }
    }

    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.linears_mut().for_each(|linear| linear.init(rng));
    }

    pub(crate) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.gate.iter_mut().chain([&mut self.up, &mut self.down])
    }

    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    /// Calls `f` with every map and its name in files.
    pub(crate) fn visit_maps<'a>(&'a mut self, name: &str, f: &mut dyn FnMut(String, &'a mut Linear)) {
        self.gate.iter_mut().for_each(|gate| f(join(name, "gate"), gate));
        f(join(name, "up"), &mut self.up);
        f(join(name, "down"), &mut self.down);
    }

    /// x `[rows, h]` → `[rows, h]`
    pub(crate) fn forward(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        self.down.forward(team, self.inner_activated(team, x).view())
    }

    /// y `[rows, h]` += mlp(x `[rows, h]`)
    pub(crate) fn add_to(&self, team: &Team, x: ArrayView2<f32>, y: &mut Array2<f32>) {
        self.down.add_to(team, self.inner_activated(team, x).view(), y);
    }

    /// What goes into the last map.
    fn inner_activated(&self, team: &Team, x: ArrayView2<f32>) -> Buffer {
        let MlpCache { gate, mut up } = self.inner(team, x);
        match gate {
            Some(mut gate) => {
                silu_times(team, &mut gate, &up);
                gate
            }
            None => {
                self.activate(team, &mut up);
                up
            }
        }
    }

    /// As [`add_to`](Self::add_to); returns what [`backward`](Self::backward) reads.
    pub(crate) fn add_to_train(&self, team: &Team, x: ArrayView2<f32>, y: &mut Array2<f32>) -> MlpCache {
        let cache = self.inner(team, x);
        self.down.add_to(team, self.activated(team, &cache).view(), y);
        cache
    }

    /// x `[rows, h]` → `[rows, h]`, and what [`backward`](Self::backward) reads.
    pub(crate) fn forward_train(&self, team: &Team, x: ArrayView2<f32>) -> (Buffer, MlpCache) {
        let cache = self.inner(team, x);
        (self.down.forward(team, self.activated(team, &cache).view()), cache)
    }

    /// y `[rows, h]` = residual + dropout(mlp(x `[rows, h]`)), to the bit what [`add_to`](Self::add_to) makes of the residual where nothing
    /// is dropped; and what [`backward`](Self::backward) reads.
    pub(crate) fn residual_train(
        &self,
        team: &Team,
        spans: &Spans,
        x: ArrayView2<f32>,
        residual: &Array2<f32>,
        dropout: Dropout,
    ) -> (Buffer, MlpCache) {
        if dropout.is_none() {
            let mut y = copied(team, residual);
            let cache = self.add_to_train(team, x, &mut y);
            return (y, cache);
        }
        let (mut y, cache) = self.forward_train(team, x);
        dropout.apply(team, spans, &mut y);
        add_array(team, residual, &mut y);
        (y, cache)
    }

    /// The gradient at x, for dy `[rows, h]` → dx `[rows, h]`. The activation is computed again: it costs less than keeping it.
    pub(crate) fn backward(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        cache: &MlpCache,
        dy: ArrayView2<f32>,
        grad: &mut Mlp,
    ) -> Buffer {
        let mut dup = self.down.backward(team, self.activated(team, cache).view(), dy, &mut grad.down);
        match (&self.gate, &cache.gate, &mut grad.gate) {
            (Some(linear), Some(gate), Some(grad_gate)) => {
                // inner = silu(gate) ⊙ up
                let mut dgate = product(team, &dup, &cache.up);
                map_rows_backward::<Silu>(team, gate, &mut dgate);
                silu_times_reversed(team, gate, &mut dup);
                let mut dx = self.up.backward(team, x, dup.view(), &mut grad.up);
                linear.backward_add(team, x, dgate.view(), &mut dx, grad_gate);
                dx
            }
            _ => {
                match self.activation {
                    Activation::SquaredRelu => map_rows_backward::<SquaredRelu>(team, &cache.up, &mut dup),
                    _ => map_rows_backward::<Gelu>(team, &cache.up, &mut dup),
                }
                self.up.backward(team, x, dup.view(), &mut grad.up)
            }
        }
    }

    fn inner(&self, team: &Team, x: ArrayView2<f32>) -> MlpCache {
        MlpCache { gate: self.gate.as_ref().map(|gate| gate.forward(team, x)), up: self.up.forward(team, x) }
    }

    fn activated(&self, team: &Team, cache: &MlpCache) -> Buffer {
        match &cache.gate {
            Some(gate) => {
                let mut inner = copied(team, gate);
                silu_times(team, &mut inner, &cache.up);
                inner
            }
            None => {
                let mut inner = copied(team, &cache.up);
                self.activate(team, &mut inner);
                inner
            }
        }
    }

    fn activate(&self, team: &Team, inner: &mut Array2<f32>) {
        match self.activation {
            Activation::SquaredRelu => map_rows::<SquaredRelu>(team, inner),
            _ => map_rows::<Gelu>(team, inner),
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        if let Some(gate) = &self.gate {
            gate.visit(&join(name, "gate"), f);
        }
        self.up.visit(&join(name, "up"), f);
        self.down.visit(&join(name, "down"), f);
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        if let Some(gate) = &mut self.gate {
            gate.visit_mut(&join(name, "gate"), f);
        }
        self.up.visit_mut(&join(name, "up"), f);
        self.down.visit_mut(&join(name, "down"), f);
    }
}

fn map_rows<F: Unary>(team: &Team, x: &mut Array2<f32>) {
    let width = x.ncols();
    for_rows(team, flat_mut(x), width, |_, x| map::<F>(x));
}

fn map_rows_backward<F: crate::kernels::math::Differentiable>(team: &Team, x: &Array2<f32>, dy: &mut Array2<f32>) {
    let width = x.ncols();
    for_rows(team, flat_mut(dy), width, |first, dy| map_backward::<F>(&flat(x)[first * width..][..dy.len()], dy));
}

/// a ⊙ b
fn product(team: &Team, a: &Array2<f32>, b: &Array2<f32>) -> Buffer {
    let (mut product, width) = (Buffer::uninit(a.dim()), a.ncols());
    for_rows(team, flat_mut(&mut product), width, |first, product| {
        let factors = flat(a)[first * width..].iter().zip(&flat(b)[first * width..]);
        product.iter_mut().zip(factors).for_each(|(product, (a, b))| *product = a * b);
    });
    product
}

/// gate = silu(gate) ⊙ up
fn silu_times(team: &Team, gate: &mut Array2<f32>, up: &Array2<f32>) {
    let width = up.ncols();
    for_rows(team, flat_mut(gate), width, |first, gate| {
        map_mul::<Silu>(gate, &flat(up)[first * width..][..gate.len()]);
    });
}

/// d = silu(gate) ⊙ d
fn silu_times_reversed(team: &Team, gate: &Array2<f32>, d: &mut Array2<f32>) {
    let width = gate.ncols();
    for_rows(team, flat_mut(d), width, |first, d| {
        let mut factor = flat(gate)[first * width..][..d.len()].to_vec();
        map_mul::<Silu>(&mut factor, d);
        d.copy_from_slice(&factor);
    });
}
