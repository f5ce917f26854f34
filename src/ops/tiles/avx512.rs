use std::arch::x86_64::*;

use half::bf16;

use super::{Block, Left, Number, STEP, TILE};

/// Rows whose sums are held in registers at a time.
const ROWS: usize = 8;

/// # Safety
/// As for [`super::Isa::block`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn block(block: Block<bf16>) {
    for i in 0..block.m * TILE / ROWS {
        let rows = rows(&block, i);
        // SAFETY: promised by the caller: these are rows of the block.
        unsafe {
            match block.n {
                2 => sums::<2>(rows),
                _ => sums::<1>(rows),
            }
        }
    }
}

/// # Safety
/// As for [`super::Isa::block`].
#[target_feature(enable = "avx512f")]
pub unsafe fn block_f32(block: Block<f32>) {
    for i in 0..block.m * TILE / ROWS {
        let rows = rows(&block, i);
        // SAFETY: promised by the caller: these are rows of the block.
        unsafe {
            match block.n {
                2 => sums_f32::<2>(rows),
                _ => sums_f32::<1>(rows),
            }
        }
    }
}

/// The block's `i`-th [`ROWS`] rows.
#[inline(always)]
fn rows<T: Number>(block: &Block<T>, i: usize) -> Block<T> {
    let (tile, row) = (i * ROWS / TILE, i * ROWS % TILE);
    let data = block.a.data.wrapping_add(tile * block.a.tile + row * block.a.row);
    Block { a: Left { data, ..block.a }, c: block.c.wrapping_add(i * ROWS * block.c_stride), ..*block }
}

/// The sums that a block adds to: zeros, if it does not.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load<const N: usize, T>(block: &Block<T>) -> [[__m512; N]; ROWS] {
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    if block.add {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: promised by the caller.
                *sum = unsafe { _mm512_loadu_ps(block.c.add(i * block.c_stride + j * TILE)) };
            }
        }
    }
    sums
}

/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const N: usize, T>(block: &Block<T>, sums: [[__m512; N]; ROWS]) {
    for (i, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(block.c.add(i * block.c_stride + j * TILE), *sum) };
        }
    }
}

/// [`ROWS`] rows of packed tiles by `N` tiles of columns.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sums_f32<const N: usize>(block: Block<f32>) {
    // With a distance that is known, addresses cost no instructions, of which the sums' units would have to do a part.
    assert!(block.a.row == TILE, "tiles of f32 are packed");
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = load::<N, _>(&block);
        for step in 0..block.steps {
            let (a, b) = (block.a.data.add(step * block.a.step), block.b.add(step * block.b_step));
            for k in 0..TILE {
                let mut columns = [_mm512_setzero_ps(); N];
                for (j, columns) in columns.iter_mut().enumerate() {
                    *columns = _mm512_loadu_ps(b.add(j * block.b_stride + k * TILE));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let row = _mm512_set1_ps(*a.add(i * TILE + k));
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_fmadd_ps(row, columns, *sum);
                    }
                }
            }
        }
        store(&block, sums);
    }
}

/// [`ROWS`] rows by `N` tiles of columns.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn sums<const N: usize>(block: Block<bf16>) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = load::<N, _>(&block);
        for step in 0..block.steps {
            let (a, b) = (block.a.data.add(step * block.a.step), block.b.add(step * block.b_step));
            for pair in 0..STEP / 2 {
                let mut columns = [_mm512_setzero_si512(); N];
                for (j, columns) in columns.iter_mut().enumerate() {
                    *columns = _mm512_loadu_si512(b.add(j * block.b_stride + pair * STEP).cast());
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let row = _mm512_set1_epi32(a.add(i * block.a.row + 2 * pair).cast::<i32>().read_unaligned());
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbf16_ps(*sum, as_bf16(row), as_bf16(columns));
                    }
                }
            }
        }
        store(&block, sums);
    }
}

#[inline(always)]
fn as_bf16(vector: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, and every pattern is a value.
    unsafe { std::mem::transmute(vector) }
}
