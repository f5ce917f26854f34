use std::arch::x86_64::*;

use half::bf16;

use super::{Block, Left, Number, STEP, TILE};

/// # Safety
/// As for [`super::Isa::block`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn block(block: Block<bf16>) {
    for row in (0..block.m * TILE).step_by(8) {
        let rows = rows(&block, row);
        // SAFETY: promised by the caller: these are rows of the block.
        unsafe {
            match block.n {
                2 => sums::<8, 2>(rows),
                _ => sums::<8, 1>(rows),
            }
        }
    }
}

/// As many sums in registers as there are, and few loads for each: of 32 registers up to 24.
///
/// # Safety
/// As for [`super::Isa::block`].
#[target_feature(enable = "avx512f")]
pub unsafe fn block_f32(block: Block<f32>) {
    // With a distance that is known, addresses cost no instructions, of which the sums' units would have to do a part.
    assert!(block.a.row == TILE, "tiles of f32 are packed");
    for row in (0..block.m * TILE).step_by(TILE) {
        let rows = |i: usize| rows(&block, row + i);
        // SAFETY: promised by the caller: these are rows of the block.
        unsafe {
            match block.n {
                4 => {
                    sums_f32::<6, 4>(rows(0));
                    sums_f32::<6, 4>(rows(6));
                    sums_f32::<4, 4>(rows(12));
                }
                3 => {
                    sums_f32::<8, 3>(rows(0));
                    sums_f32::<8, 3>(rows(8));
                }
                2 => {
                    sums_f32::<8, 2>(rows(0));
                    sums_f32::<8, 2>(rows(8));
                }
                _ => sums_f32::<16, 1>(rows(0)),
            }
        }
    }
}

/// The block from its row `row` on.
#[inline(always)]
fn rows<T: Number>(block: &Block<T>, row: usize) -> Block<T> {
    let data = block.a.data.wrapping_add(row / TILE * block.a.tile + row % TILE * block.a.row);
    Block { a: Left { data, ..block.a }, c: block.c.wrapping_add(row * block.c_stride), ..*block }
}

/// The sums that a block adds to: zeros, if it does not.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load<const M: usize, const N: usize, T>(block: &Block<T>) -> [[__m512; N]; M] {
    let mut sums = [[_mm512_setzero_ps(); N]; M];
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
unsafe fn store<const M: usize, const N: usize, T>(block: &Block<T>, sums: [[__m512; N]; M]) {
    for (i, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(block.c.add(i * block.c_stride + j * TILE), *sum) };
        }
    }
}

/// `M` rows of packed tiles by `N` tiles of columns.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn sums_f32<const M: usize, const N: usize>(block: Block<f32>) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = load::<M, N, _>(&block);
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

/// `M` rows by `N` tiles of columns.
///
/// # Safety
/// As for [`super::Isa::block`].
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn sums<const M: usize, const N: usize>(block: Block<bf16>) {
    // SAFETY: promised by the caller.
    unsafe {
        let mut sums = load::<M, N, _>(&block);
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
