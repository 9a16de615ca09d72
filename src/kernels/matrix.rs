//! stub
use super::matmul::{Out, Packed, Rows, matmul_part};
use super::team::Team;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    F32,
    F16,
    Bf16,
}
pub(crate) struct Matrix {
    n: usize,
    k: usize,
    storage: Storage,
    data: Vec<f32>,
}
impl Matrix {
    pub(crate) fn zeros(n: usize, k: usize, storage: Storage) -> Matrix {
        Matrix { n, k, storage, data: vec![0.0; n * k] }
    }
    pub(crate) fn set_row(&mut self, row: usize, numbers: &[f32]) {
        self.data[row * self.k..][..self.k].copy_from_slice(numbers);
    }
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.data[row * self.k..][..self.k]);
    }
    pub(crate) fn dim(&self) -> (usize, usize) {
        (self.n, self.k)
    }
    pub(crate) fn storage(&self) -> Storage {
        self.storage
    }
    pub(crate) fn num_bytes(&self) -> usize {
        self.data.len() * 4
    }
    pub(crate) fn multiply(&self, _team: &Team, x: Rows, m: usize, out: &mut [f32], mode: Out) {
        let packed = Packed::from_rows(self.n, self.k, |i| &self.data[i * self.k..][..self.k], None);
        matmul_part(x, m, &packed, 0..self.n, 0..self.k, out, self.n, mode);
    }
}
