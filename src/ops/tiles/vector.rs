//! Arithmetic on vectors of sixteen numbers.

use std::arch::x86_64::*;

use super::TILE;

/// Minimax polynomials of `2^f`, `0 <= f < 1`, highest power first: to 1.5e-7 and 3e-6 relative, and exact at 0.
pub const EXP2_F32: [f32; 6] = [1.867_13e-3, 9.017_031e-3, 5.579_991e-2, 0.240_164_44, 0.693_151_3, 1.0];
pub const EXP2_BF16: [f32; 5] = [1.342_668_5e-2, 5.224_247e-2, 0.241_280_2, 0.693_044_84, 1.0];

/// `2^x` for `x <= 0`, by a polynomial for its fraction. Zero below `2^-100`, lest numbers get so small that the processor
/// takes a hundred times as long for them.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
pub fn exp2<const N: usize>(x: __m512, polynomial: [f32; N]) -> __m512 {
    const FLOOR: i32 = 1;
    let f = _mm512_reduce_ps::<FLOOR>(x);
    let mut p = _mm512_set1_ps(polynomial[0]);
    let mut i = 1;
    while i < N {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(polynomial[i]));
        i += 1;
    }
    _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(-100.0)), p, x)
}

/// The lanes of `n` elements, at most all.
pub fn lanes(n: usize) -> u16 {
    ((1u32 << n.min(TILE)) - 1) as u16
}

/// Rows of numbers, rounded to bf16, one after the other. Only for processors that have AVX512-BF16, as all of
/// `bf16::isas` do; written as assembly so that code for f32 and bf16 alike need not be compiled for that extension.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn rounded_rows(first: __m512, second: __m512) -> __m512i {
    let result: __m512i;
    // SAFETY: arithmetic on registers, on processors that have the instruction.
    unsafe {
        std::arch::asm!("vcvtne2ps2bf16 {result:z}, {second:z}, {first:z}", first = in(zmm_reg) first,
            second = in(zmm_reg) second, result = lateout(zmm_reg) result, options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// What [`rounded_rows`] gives, as one row of pairs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn paired(rows: __m512i) -> __m512i {
    const fn order() -> [u16; 32] {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * TILE) as u16;
            i += 1;
        }
        order
    }
    const ORDER: [u16; 32] = order();
    // SAFETY: 64 bytes, any of which is a number.
    _mm512_permutexvar_epi16(unsafe { std::mem::transmute::<[u16; 32], __m512i>(ORDER) }, rows)
}

/// Two rows of 32 numbers as pairs of one above the other: the first sixteen, and the rest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub fn woven(above: __m512i, below: __m512i) -> [__m512i; 2] {
    const fn order(first: u16) -> [u16; 32] {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = first + (i / 2 + i % 2 * 32) as u16;
            i += 1;
        }
        order
    }
    const ORDERS: [[u16; 32]; 2] = [order(0), order(TILE as u16)];
    // SAFETY: 128 bytes, any of which is a number.
    let [first, rest] = unsafe { std::mem::transmute::<[[u16; 32]; 2], [__m512i; 2]>(ORDERS) };
    [_mm512_permutex2var_epi16(above, first, below), _mm512_permutex2var_epi16(above, rest, below)]
}

/// Rounded to bf16. As for [`rounded_rows`].
#[inline]
#[target_feature(enable = "avx512f")]
pub fn rounded(values: __m512) -> __m256i {
    let result: __m256i;
    // SAFETY: arithmetic on registers, on processors that have the instruction.
    unsafe {
        std::arch::asm!("vcvtneps2bf16 {result:y}, {values:z}", values = in(zmm_reg) values,
            result = lateout(ymm_reg) result, options(pure, nomem, nostack, preserves_flags));
    }
    result
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
