use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::bf16;

use super::vector::{rounded, transpose};
use super::{Number, STEP, TILE, TILE_LEN};
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

/// As [`pack_tile`], for numbers of f32 as sums of three bf16, each of which is what the ones before have left over,
/// rounded. Writes three tiles.
///
/// # Safety
/// The processor has AVX-512 F, BW and VL, and AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn pack_parts(tiles: &mut [MaybeUninit<bf16>], matrix: &Mat<f32>, row: usize, k: usize, packing: Packing) {
    assert!(tiles.len() == 3 * TILE_LEN, "room for three tiles");
    assert!(matrix.col_stride == 1 || matrix.row_stride == 1, "rows or columns are dense");
    // The tile's two halves along `k`: their rows, or their `k`.
    let half = |k: usize| match row < matrix.rows && k < matrix.cols {
        // SAFETY: the matrix has this row and column.
        true => unsafe { f32::vectors(matrix, row, k) },
        false => [_mm512_setzero_si512(); TILE],
    };
    let mut rest = [half(k), half(k + TILE)].map(|half| half.map(|v| _mm512_castsi512_ps(v)));
    for part in tiles.chunks_exact_mut(TILE_LEN) {
        let mut vectors = [_mm512_setzero_si512(); TILE];
        if matrix.col_stride == 1 {
            for (i, vector) in vectors.iter_mut().enumerate() {
                let [low, high] = [0, 1].map(|half: usize| take_bf16(&mut rest[half][i]));
                *vector = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            }
        } else {
            for (pair, vector) in vectors.iter_mut().enumerate() {
                let half = &mut rest[pair / (TILE / 2)];
                let [even, odd] =
                    [0, 1].map(|i| _mm512_cvtepu16_epi32(take_bf16(&mut half[pair % (TILE / 2) * 2 + i])));
                *vector = _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd));
            }
        }
        if (matrix.col_stride == 1) == (packing == Packing::Right) {
            vectors = transpose(vectors);
        }
        for (i, vector) in vectors.into_iter().enumerate() {
            // SAFETY: a row of the tile.
            unsafe { _mm512_storeu_si512(part[i * STEP..].as_mut_ptr().cast(), vector) };
        }
    }
}

/// Rounds numbers to bf16, and leaves in their place what that has cut off.
#[inline]
#[target_feature(enable = "avx512f")]
fn take_bf16(values: &mut __m512) -> __m256i {
    let taken = rounded(*values);
    let wide = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(taken)));
    *values = _mm512_sub_ps(*values, wide);
    taken
}
