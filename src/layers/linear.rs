//! A linear map: y = x·Wᵀ + b.

use ndarray::{Array1, Array2, ArrayView2};
use rand::RngExt;

use super::{Buffer, Derived, Rng, Visitor, VisitorMut, flat, flat_mut, join};
use crate::kernels::clock::{Part, Work, timed};
use crate::kernels::matmul::{Out, Packed, Rows, matmul, matmul_gradient};
use crate::kernels::parallel;

/// W `[out, in]` and, where there is one, b `[out]`.
#[derive(Clone)]
pub(crate) struct Linear {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
    /// The weights in the order the product reads them.
    packed: Derived<Packed>,
}

impl Linear {
    /// All zero.
    pub(crate) fn zeros(inputs: usize, outputs: usize, bias: bool) -> Self {
        Linear {
            weight: Array2::zeros((outputs, inputs)),
            bias: bias.then(|| Array1::zeros(outputs)),
            packed: Derived::new(),
        }
    }

    /// Weights uniform in ±1/√inputs, bias zero.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.packed.forget();
        let bound = 1.0 / (self.weight.ncols() as f32).sqrt();
        self.weight.mapv_inplace(|_| rng.random_range(-bound..=bound));
    }

    /// x `[rows, in]` → `[rows, out]`. Rows may be longer than `in`; the rest is not read.
    pub(crate) fn forward(&self, x: ArrayView2<f32>) -> Buffer {
        let mut y = Buffer::any((x.nrows(), self.weight.nrows()));
        let rows = Rows { data: flat(&x), stride: x.ncols() };
        self.apply(rows, x.nrows(), flat_mut(&mut y), Out::Set);
        y
    }

    /// y `[rows, out]` += x·Wᵀ + b
    pub(crate) fn add_to(&self, x: ArrayView2<f32>, y: &mut Array2<f32>) {
        let rows = Rows { data: flat(&x), stride: x.ncols() };
        self.apply(rows, x.nrows(), flat_mut(y), Out::Add);
    }

    /// The gradient of [`forward`](Self::forward) at x: dy `[rows, out]` → dx `[rows, in]`.
    ///
    /// dx = dy·W, dW += dyᵀ·x, db += Σ_rows dy
    pub(crate) fn backward(&self, x: ArrayView2<f32>, dy: ArrayView2<f32>, grad: &mut Linear) -> Buffer {
        let (outputs, inputs) = self.weight.dim();
        let rows = dy.nrows();
        let (x, dy) = (Rows { data: flat(&x), stride: x.ncols() }, Rows { data: flat(&dy), stride: outputs });
        grad.packed.forget();
        let (dx, ()) = parallel::join_if(
            rows * inputs * outputs,
            || {
                let weight = flat(&self.weight);
                let across = timed(Part::Packing, Work::numbers(2 * weight.len()), || {
                    Packed::from_columns(inputs, outputs, |output| &weight[output * inputs..][..inputs])
                });
                let mut dx = Buffer::any((rows, inputs));
                matmul(dy, rows, &across, flat_mut(&mut dx), Out::Set);
                dx
            },
            || {
                matmul_gradient(dy, outputs, x, inputs, rows, flat_mut(&mut grad.weight));
                if let Some(bias) = &mut grad.bias {
                    timed(Part::Elementwise, Work::numbers(dy.data.len()), || {
                        for row in dy.data.chunks_exact(outputs) {
                            bias.iter_mut().zip(row).for_each(|(bias, dy)| *bias += dy);
                        }
                    });
                }
            },
        );
        dx
    }

    fn apply(&self, x: Rows, rows: usize, y: &mut [f32], mode: Out) {
        let packed = self.packed.get(|| {
            let (outputs, inputs) = self.weight.dim();
            let weight = flat(&self.weight);
            let row = |output: usize| &weight[output * inputs..][..inputs];
            timed(Part::Packing, Work::numbers(2 * weight.len()), || {
                Packed::from_rows(outputs, inputs, row, self.bias.as_ref().map(flat))
            })
        });
        matmul(x, rows, packed, y, mode);
    }

    /// Sets each number of the bias.
    pub(crate) fn init_bias(&mut self, mut value: impl FnMut() -> f32) {
        self.packed.forget();
        self.bias.iter_mut().flatten().for_each(|bias| *bias = value());
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        f(&join(name, "weight"), self.weight.view().into_dyn());
        if let Some(bias) = &self.bias {
            f(&join(name, "bias"), bias.view().into_dyn());
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.packed.forget();
        f(&join(name, "weight"), self.weight.view_mut().into_dyn());
        if let Some(bias) = &mut self.bias {
            f(&join(name, "bias"), bias.view_mut().into_dyn());
        }
    }
}
