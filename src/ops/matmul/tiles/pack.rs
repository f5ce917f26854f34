use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::bf16;

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

/// The transpose of a 16 x 16 matrix of 32-bit numbers.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let mut a = r;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut b = a;
    for i in 0..4 {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    // Now vector 4i + j holds, in each 128-bit lane l, column 4l + j of rows 4i..4i + 4.
    let mut out = b;
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
        let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
        let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        out[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
    out
}
