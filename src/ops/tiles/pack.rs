use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::bf16;

use super::vector::transpose;
use super::{STEP, TILE};
use crate::ops::matmul::Mat;

/// How a tile lies in memory.
#[derive(Clone, Copy, PartialEq)]
pub enum Packing {
    /// `[row][k]`.
    Left,
    /// `[pair of k][row][2]`; the "rows" are the columns of a right operand, which is handed over transposed.
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
pub unsafe fn pack_tile(tile: &mut [MaybeUninit<bf16>], matrix: &Mat<bf16>, row: usize, k: usize, packing: Packing) {
    assert!(tile.len() == TILE * STEP, "room for a tile");
    let mut vectors = [_mm512_setzero_si512(); TILE];
    if row >= matrix.rows || k >= matrix.cols {
        tile.fill(MaybeUninit::new(bf16::ZERO));
        return;
    }
    let (rows, columns) = ((matrix.rows - row).min(TILE), (matrix.cols - k).min(STEP));
    let from = matrix.data[row * matrix.row_stride + k * matrix.col_stride..].as_ptr();
    // SAFETY: loads are masked to the part of the tile that is inside the matrix, and so inside its slice.
    unsafe {
        let transposed = if matrix.col_stride == 1 {
            let mask = u32::MAX >> (STEP - columns);
            for (i, vector) in vectors.iter_mut().enumerate().take(rows) {
                *vector = _mm512_maskz_loadu_epi16(mask, from.add(i * matrix.row_stride).cast());
            }
            packing == Packing::Right
        } else {
            assert_eq!(matrix.row_stride, 1, "rows or columns are dense");
            let mask = u16::MAX >> (TILE - rows);
            let column = |k: usize| {
                let column = _mm256_maskz_loadu_epi16(mask, from.add(k * matrix.col_stride).cast());
                _mm512_cvtepu16_epi32(column)
            };
            for (pair, vector) in vectors.iter_mut().enumerate().take(columns.div_ceil(2)) {
                *vector = column(2 * pair);
                if 2 * pair + 1 < columns {
                    *vector = _mm512_or_si512(*vector, _mm512_slli_epi32::<16>(column(2 * pair + 1)));
                }
            }
            packing == Packing::Left
        };
        if transposed {
            vectors = transpose(vectors);
        }
        for (i, vector) in vectors.into_iter().enumerate() {
            _mm512_storeu_si512(tile[i * STEP..].as_mut_ptr().cast(), vector);
        }
    }
}
