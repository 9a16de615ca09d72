//! Rows of numbers in memory, which kernels read and write.

/// Rows of numbers, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T = f32> {
    pub data: &'a [T],
    pub stride: usize,
}

impl<'a, T: Copy> Rows<'a, T> {
    /// Without the first columns.
    pub(crate) fn skip_columns(self, column: usize) -> Self {
        Rows { data: self.data.get(column..).unwrap_or(&[]), ..self }
    }

    /// Without the first rows.
    pub(crate) fn skip_rows(self, row: usize) -> Self {
        self.skip_columns(row * self.stride)
    }

    /// The first `width` numbers of row `i`.
    pub(crate) fn row(&self, i: usize, width: usize) -> &'a [T] {
        &self.data[i * self.stride..][..width]
    }
}

/// Rows of numbers to write, `stride` apart.
pub(crate) struct RowsMut<'a> {
    pub data: &'a mut [f32],
    pub stride: usize,
}

/// What becomes of the numbers that `out` holds before a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Out {
    /// They are overwritten.
    Set,
    /// The product is added to them.
    Add,
}
