//! The matrix of a linear map or an embedding: one that can be trained, or one that is stored as narrow as can be.

use std::ops::Deref;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rand::RngExt;

use super::batch::for_rows;
use super::{Buffer, Lazy, Rng, all_rows, flat, flat_mut};
use crate::kernels::matmul::{Matrix, PANEL, Packed, PanelRow, Storage, matmul, matmul_columns, matmul_gradient};
use crate::kernels::rows::{Out, Rows};
use crate::kernels::team::{Team, work};
use crate::parameters::{Parameter, ParameterMut, StoredMatrix, Visitor, VisitorMut};

/// W `[out, in]`
pub(crate) enum Weight {
    /// In rows, as it is trained, and a copy in the order in which products read it, made when first needed, with the bias of
    /// the map in it; in training also a copy of the transpose. Both are used as long as the numbers stay the same, and their memory
    /// when these change.
    Trainable { rows: Array2<f32>, packed: Lazy<Packed>, across: Lazy<Packed> },
    /// In the order in which products read it only, and maybe narrower than f32.
    Stored(Matrix),
    /// The gradient of a weight that cannot be trained.
    Absent { outputs: usize, inputs: usize },
}

/// The transpose of a weight in the order in which products read it.
pub(crate) enum Across<'a> {
    /// The copy of a weight that can be trained.
    Kept(&'a Packed),
    /// Of a stored weight, for as long as it is used.
    Made(Packed),
}

impl Deref for Across<'_> {
    type Target = Packed;

    fn deref(&self) -> &Packed {
        match self {
            Across::Kept(packed) => packed,
            Across::Made(packed) => packed,
        }
    }
}

impl Weight {
    /// All zero; to be trained.
    pub(crate) fn zeros(outputs: usize, inputs: usize) -> Self {
        Weight::Trainable { rows: Array2::zeros((outputs, inputs)), packed: Lazy::new(), across: Lazy::new() }
    }

    /// All zero; to be read from a file.
    pub(crate) fn stored(outputs: usize, inputs: usize, storage: Storage) -> Self {
        Weight::Stored(Matrix::zeros(outputs, inputs, storage))
    }

    /// All zero, stored in this type or, for `None`, to be trained.
    pub(crate) fn new(outputs: usize, inputs: usize, storage: Option<Storage>) -> Self {
        match storage {
            Some(storage) => Self::stored(outputs, inputs, storage),
            None => Self::zeros(outputs, inputs),
        }
    }

    /// The same numbers as a weight to be trained, or rounded to the type they are to be stored in.
    pub(crate) fn store_as(&mut self, storage: Option<Storage>) {
        let (outputs, inputs) = self.dim();
        let mut new = Self::new(outputs, inputs, storage);
        match &mut new {
            Weight::Trainable { rows, .. } => {
                let rows = rows.rows_mut().into_iter().enumerate();
                rows.for_each(|(output, mut row)| self.row(output, row.as_slice_mut().expect("a row of a new array")));
            }
            Weight::Stored(matrix) => matrix.set_rows(|output, row| self.row(output, row)),
            Weight::Absent { .. } => {}
        }
        *self = new;
    }

    /// A gradient of this weight, zero.
    pub(crate) fn zeros_like(&self) -> Self {
        let (outputs, inputs) = self.dim();
        match self {
            Weight::Trainable { .. } => Weight::zeros(outputs, inputs),
            _ => Weight::Absent { outputs, inputs },
        }
    }

    /// Uniform in ±1/√in.
    pub(crate) fn init(&mut self, rng: &mut Rng) {
        self.forget();
        if let Weight::Trainable { rows, .. } = self {
            let bound = 1.0 / (rows.ncols() as f32).sqrt();
            rows.mapv_inplace(|_| rng.random_range(-bound..=bound));
        }
    }

    /// out and in.
    pub(crate) fn dim(&self) -> (usize, usize) {
        match self {
            Weight::Trainable { rows, .. } => rows.dim(),
            Weight::Stored(matrix) => matrix.dim(),
            Weight::Absent { outputs, inputs } => (*outputs, *inputs),
        }
    }

    /// Row `output`, as f32.
    pub(crate) fn row(&self, output: usize, numbers: &mut [f32]) {
        match self {
            Weight::Trainable { rows, .. } => numbers.copy_from_slice(flat(&rows.row(output))),
            Weight::Stored(matrix) => matrix.row(output, numbers),
            Weight::Absent { .. } => numbers.fill(0.0),
        }
    }

    /// y `[m, out]` = x `[m, in]` · Wᵀ + bias, or added to it.
    pub(crate) fn multiply(&self, team: &Team, x: Rows, m: usize, bias: Option<&[f32]>, y: &mut [f32], mode: Out) {
        match self {
            Weight::Trainable { rows, packed, .. } => matmul(team, x, m, arranged(team, rows, packed, bias), y, mode),
            Weight::Stored(matrix) => {
                let mode = match bias {
                    Some(bias) => {
                        start_with(bias, y, mode);
                        Out::Add
                    }
                    None => mode,
                };
                matrix.multiply(team, x, m, y, mode);
            }
            // as a matrix of zeros
            Weight::Absent { .. } => match (bias, mode) {
                (Some(bias), mode) => start_with(bias, y, mode),
                (None, Out::Set) => y.fill(0.0),
                (None, Out::Add) => {}
            },
        }
    }

    /// As [`multiply`](Self::multiply) → `[rows, out]`; the outputs from `first` on are needed in `only` some rows, and may be 0 in the
    /// others.
    pub(crate) fn multiply_needed(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        bias: Option<&[f32]>,
        only: &[usize],
        first: usize,
    ) -> Buffer {
        let ((outputs, inputs), m) = (self.dim(), x.nrows());
        let mut y = Buffer::uninit((m, outputs));
        match self {
            Weight::Trainable { rows, packed, .. } if first.is_multiple_of(PANEL) => {
                let packed = arranged(team, rows, packed, bias);
                let (everywhere, mut rest) = y.view_mut().split_at(Axis(1), first);
                matmul_columns(team, all_rows(&x), packed, 0..first, 0..inputs, everywhere, Out::Set);
                let (x, mut some) = (x.select(Axis(0), only), Buffer::uninit((only.len(), outputs - first)));
                matmul_columns(team, all_rows(&x), packed, first..outputs, 0..inputs, some.view_mut(), Out::Set);
                rest.fill(0.0);
                only.iter().zip(some.rows()).for_each(|(&row, numbers)| rest.row_mut(row).assign(&numbers));
            }
            // the columns of other weights cannot be told apart
            _ => self.multiply(team, all_rows(&x), m, bias, flat_mut(&mut y), Out::Set),
        }
        y
    }

    /// The gradient of [`multiply_needed`](Self::multiply_needed): dy is 0 where y was not computed.
    pub(crate) fn backward_needed(
        &self,
        team: &Team,
        x: ArrayView2<f32>,
        dy: ArrayView2<f32>,
        only: &[usize],
        first: usize,
        grad: &mut Weight,
    ) -> Buffer {
        let ((outputs, inputs), m, across) = (self.dim(), dy.nrows(), self.across(team));
        // dx = dy·W, of what is needed everywhere and then of the rest
        let mut dx = Buffer::uninit((m, inputs));
        matmul_columns(team, all_rows(&dy), &across, 0..inputs, 0..first, dx.view_mut(), Out::Set);
        let [some_x, some_dy] = [x, dy].map(|of| of.select(Axis(0), only));
        let (rest, mut more) = (all_rows(&some_dy).skip_columns(first), Buffer::uninit((only.len(), inputs)));
        matmul_columns(team, rest, &across, 0..inputs, first..outputs, more.view_mut(), Out::Set);
        dx.add_at(only, &more);
        // dW += dyᵀ·x, likewise
        grad.forget();
        if let Weight::Trainable { rows, .. } = grad {
            let (of_first, of_rest) = flat_mut(rows).split_at_mut(first * inputs);
            matmul_gradient(team, all_rows(&dy), first, all_rows(&x), inputs, m, of_first);
            matmul_gradient(team, rest, outputs - first, all_rows(&some_x), inputs, only.len(), of_rest);
        }
        dx
    }

    /// The gradient of [`multiply`](Self::multiply) at x `[m, in]`: dy `[m, out]` → dx `[m, in]`.
    ///
    /// dx = dy·W, dW += dyᵀ·x
    pub(crate) fn backward(&self, team: &Team, x: Rows, dy: ArrayView2<f32>, grad: &mut Weight) -> Buffer {
        self.backward_by(team, x, dy, &self.across(team), grad)
    }

    /// W in the order in which products with dy read it.
    pub(crate) fn across(&self, team: &Team) -> Across<'_> {
        let (outputs, inputs) = self.dim();
        match self {
            Weight::Trainable { rows, across, .. } => Across::Kept(
                across.get_again(|retired| transposed(team, rows.view(), retired.map_or(Vec::new(), |old| old.panels))),
            ),
            _ => {
                /// Rows that are widened at a time.
                const ROWS: usize = 512;
                let mut across = Packed::zeros(inputs, outputs);
                let mut numbers = Buffer::uninit((ROWS.min(outputs), inputs));
                for begin in (0..outputs).step_by(ROWS) {
                    let rows = begin..outputs.min(begin + ROWS);
                    let numbers = &mut flat_mut(&mut numbers)[..rows.len() * inputs];
                    for_rows(team, numbers, inputs, |first, numbers| {
                        let numbers = numbers.chunks_exact_mut(inputs).enumerate();
                        numbers.for_each(|(i, row)| self.row(begin + first + i, row));
                    });
                    across.set_columns(team, rows, |output| &numbers[(output - begin) * inputs..][..inputs]);
                }
                Across::Made(across)
            }
        }
    }

    /// As [`backward`](Self::backward), with what [`across`](Self::across) gave.
    pub(crate) fn backward_by(
        &self,
        team: &Team,
        x: Rows,
        dy: ArrayView2<f32>,
        across: &Packed,
        grad: &mut Weight,
    ) -> Buffer {
        let mut dx = Buffer::uninit((dy.nrows(), self.dim().1));
        self.backward_to(team, x, dy, across, grad, &mut dx, Out::Set);
        dx
    }

    /// As [`backward_by`](Self::backward_by), into dx or added to it.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward_to(
        &self,
        team: &Team,
        x: Rows,
        dy: ArrayView2<f32>,
        across: &Packed,
        grad: &mut Weight,
        dx: &mut Array2<f32>,
        mode: Out,
    ) {
        let ((outputs, inputs), m) = (self.dim(), dy.nrows());
        let dy = Rows { data: flat(&dy), stride: outputs };
        matmul(team, dy, m, across, flat_mut(dx), mode);
        grad.forget();
        if let Weight::Trainable { rows, .. } = grad {
            matmul_gradient(team, dy, outputs, x, inputs, m, flat_mut(rows));
        }
    }

    /// The rows of a weight that can be trained, or of its gradient.
    pub(crate) fn rows_mut(&mut self) -> Option<ArrayViewMut2<'_, f32>> {
        self.forget();
        match self {
            Weight::Trainable { rows, .. } => Some(rows.view_mut()),
            _ => None,
        }
    }

    /// Changes every row by `f`, which is told which it is.
    pub(crate) fn change_rows(&mut self, f: impl Fn(usize, &mut [f32])) {
        self.forget();
        let (outputs, inputs) = self.dim();
        let mut numbers = vec![0.0; inputs];
        for output in 0..outputs {
            self.row(output, &mut numbers);
            f(output, &mut numbers);
            match self {
                Weight::Trainable { rows, .. } => rows.row_mut(output).assign(&ndarray::ArrayView1::from(&numbers)),
                Weight::Stored(matrix) => matrix.set_row(output, &numbers),
                Weight::Absent { .. } => {}
            }
        }
    }

    /// Stores what could be trained for products only, in f32.
    pub(crate) fn freeze(&mut self) {
        if let Weight::Trainable { rows, .. } = self {
            let mut matrix = Matrix::zeros(rows.nrows(), rows.ncols(), Storage::F32);
            rows.rows().into_iter().enumerate().for_each(|(i, row)| matrix.set_row(i, flat(&row)));
            *self = Weight::Stored(matrix);
        }
    }

    /// Gives back the copy of the transpose, which only training reads.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn end_training(&mut self) {
        if let Weight::Trainable { across, .. } = self {
            *across = Lazy::new();
        }
    }

    /// Bytes of the copies that a training step will make of it: of those that stay, and of those that are there only while they are
    /// used.
    #[cfg_attr(not(feature = "lm"), allow(dead_code))]
    pub(crate) fn copies_to_make(&self) -> [usize; 2] {
        let (outputs, inputs) = self.dim();
        let bytes = work([outputs, inputs, size_of::<f32>()]);
        match self {
            Weight::Trainable { packed, across, .. } => {
                [[packed, across].into_iter().filter(|copy| copy.is_empty()).count() * bytes, 0]
            }
            Weight::Stored(_) => [0, bytes],
            Weight::Absent { .. } => [0, 0],
        }
    }

    /// To be called wherever the numbers, or the bias, are lent out for changing.
    pub(crate) fn forget(&mut self) {
        if let Weight::Trainable { packed, across, .. } = self {
            packed.retire();
            across.retire();
        }
    }

    pub(crate) fn visit<'a>(&'a self, name: &str, f: &mut Visitor<'_, 'a>) {
        match self {
            Weight::Trainable { rows, .. } => f(name, Parameter::Array(rows.view().into_dyn())),
            Weight::Stored(matrix) => f(name, Parameter::Stored(StoredMatrix(matrix))),
            Weight::Absent { .. } => {}
        }
    }

    pub(crate) fn visit_mut<'a>(&'a mut self, name: &str, f: &mut VisitorMut<'_, 'a>) {
        self.forget();
        match self {
            Weight::Trainable { rows, .. } => f(name, ParameterMut::Array(rows.view_mut().into_dyn())),
            Weight::Stored(matrix) => f(name, ParameterMut::Stored(matrix)),
            Weight::Absent { .. } => {}
        }
    }
}

/// A clone packs its own copy.
impl Clone for Weight {
    fn clone(&self) -> Self {
        match self {
            Weight::Trainable { rows, packed, across } => {
                Weight::Trainable { rows: rows.clone(), packed: packed.clone(), across: across.clone() }
            }
            Weight::Stored(matrix) => Weight::Stored(matrix.clone()),
            Weight::Absent { outputs, inputs } => Weight::Absent { outputs: *outputs, inputs: *inputs },
        }
    }
}

/// W `[out, in]` and the bias packed for products x·Wᵀ + b.
fn arranged<'a>(team: &Team, rows: &Array2<f32>, packed: &'a Lazy<Packed>, bias: Option<&[f32]>) -> &'a Packed {
    let ((outputs, inputs), weight) = (rows.dim(), flat(rows));
    packed.get_again(|retired| {
        let memory = retired.map_or(Vec::new(), |retired| retired.panels);
        Packed::refill_from_rows(team, outputs, inputs, |output| &weight[output * inputs..][..inputs], bias, memory)
    })
}

/// W `[out, in]` packed for products dy·W.
fn transposed(team: &Team, rows: ArrayView2<f32>, memory: Vec<PanelRow>) -> Packed {
    let ((outputs, inputs), weight) = (rows.dim(), flat(&rows));
    Packed::refill_from_columns(team, inputs, outputs, |output| &weight[output * inputs..][..inputs], memory)
}

/// Puts the bias where a product will be added.
fn start_with(bias: &[f32], y: &mut [f32], mode: Out) {
    let mut y = ArrayViewMut2::from_shape((y.len() / bias.len().max(1), bias.len()), y).expect("whole rows");
    let bias = ndarray::ArrayView1::from(bias);
    match mode {
        Out::Set => y.assign(&bias),
        Out::Add => y += &bias,
    }
}
