use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::bf16;

use super::vector::{paired, rounded_rows, transpose};
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
    // The tile's two halves along `k`: their rows, or their `k`. Loops, because closures that are handed to other functions
    // are not compiled for these instructions.
    let mut rest = [[_mm512_setzero_ps(); TILE]; 2];
    for (half, rest) in rest.iter_mut().enumerate() {
        let k = k + half * TILE;
        if row < matrix.rows && k < matrix.cols {
            // SAFETY: the matrix has this row and column.
            let vectors = unsafe { f32::vectors(matrix, row, k) };
            for (rest, vector) in rest.iter_mut().zip(vectors) {
                *rest = _mm512_castsi512_ps(vector);
            }
        }
    }
    let [low, high] = &mut rest;
    for part in tiles.chunks_exact_mut(TILE_LEN) {
        let mut vectors = [_mm512_setzero_si512(); TILE];
        if matrix.col_stride == 1 {
            for i in 0..TILE {
                vectors[i] = take_bf16(&mut low[i], &mut high[i]);
            }
        } else {
            for i in 0..TILE / 2 {
                let [even, odd] = &mut low[2 * i..2 * i + 2] else { unreachable!("two of sixteen") };
                vectors[i] = paired(take_bf16(even, odd));
                let [even, odd] = &mut high[2 * i..2 * i + 2] else { unreachable!("two of sixteen") };
                vectors[TILE / 2 + i] = paired(take_bf16(even, odd));
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

/// Rounds two rows of numbers to bf16, and leaves in their place what that has cut off.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn take_bf16(first: &mut __m512, second: &mut __m512) -> __m512i {
    let taken = rounded_rows(*first, *second);
    let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(taken));
    let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(taken));
    *first = _mm512_sub_ps(*first, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(low)));
    *second = _mm512_sub_ps(*second, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(high)));
    taken
}
