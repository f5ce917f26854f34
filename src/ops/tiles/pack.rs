use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::vector::transpose;
use super::{Number, TILE};
use crate::ops::matmul::Mat;

/// How a tile lies in memory.
#[derive(Clone, Copy, PartialEq)]
pub enum Packing {
    /// `[row][k]`.
    Left,
    /// `[k][row]`, in bf16 `[pair of k][row][2]`; the "rows" are the columns of a right operand, which is handed over
    /// transposed.
    Right,
}

/// Writes the tile of `matrix` whose first row is `row` and whose first column is `k`. What lies outside of the matrix
/// is zero.
///
/// # Safety
/// The processor has AVX-512 F, BW and VL.
///
/// # Panics
/// If neither rows nor columns of the matrix are dense.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_tile<T: Number>(
    tile: &mut [MaybeUninit<T>],
    matrix: &Mat<T>,
    row: usize,
    k: usize,
    packing: Packing,
) {
    assert!(tile.len() == TILE * T::STEP, "room for a tile");
    assert!(matrix.col_stride == 1 || matrix.row_stride == 1, "rows or columns are dense");
    if row >= matrix.rows || k >= matrix.cols {
        tile.fill(MaybeUninit::new(T::default()));
        return;
    }
    // SAFETY: the matrix has this row and column.
    let mut vectors = unsafe { T::vectors(matrix, row, k) };
    if (matrix.col_stride == 1) == (packing == Packing::Right) {
        vectors = transpose(vectors);
    }
    for (i, vector) in vectors.into_iter().enumerate() {
        // SAFETY: a row of the tile.
        unsafe { _mm512_storeu_si512(tile[i * T::STEP..].as_mut_ptr().cast(), vector) };
    }
}
