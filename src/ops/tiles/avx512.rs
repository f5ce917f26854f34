use std::arch::x86_64::*;

use super::{Block, Left, STEP, TILE, TILE_LEN};

/// Rows whose sums are held in registers at a time.
const ROWS: usize = 8;

/// # Safety
/// As for [`super::Isa::block`].
#[inline]
pub unsafe fn block(block: Block) {
    for i in 0..block.m {
        for half in 0..TILE / ROWS {
            let row = half * ROWS;
            // SAFETY: promised by the caller: these are rows of the block.
            unsafe {
                let a = block.a;
                let rows = Block {
                    a: Left { data: a.data.add(i * a.tile + row * a.row), ..a },
                    c: block.c.add((i * TILE + row) * block.c_stride),
                    ..block
                };
                match block.n {
                    2 => sums::<2>(rows),
                    _ => sums::<1>(rows),
                }
            }
        }
    }
}

/// [`ROWS`] rows by `N` tiles of columns.
///
/// # Safety
/// As for [`super::Isa::block`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn sums<const N: usize>(block: Block) {
    let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
    // SAFETY: promised by the caller.
    unsafe {
        if block.add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(block.c.add(i * block.c_stride + j * TILE));
                }
            }
        }
        for step in 0..block.steps {
            let (a, b) = (block.a.data.add(step * block.a.step), block.b.add(step * TILE_LEN));
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
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(block.c.add(i * block.c_stride + j * TILE), *sum);
            }
        }
    }
}

#[inline(always)]
fn as_bf16(vector: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes, and every pattern is a value.
    unsafe { std::mem::transmute(vector) }
}
