//! Arithmetic on vectors of sixteen numbers.

use std::arch::x86_64::*;

use super::TILE;

/// `2^x` to 2e-7 relative, for `x <= 0` and far below.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<0>(x);
    let f = _mm512_sub_ps(x, n);
    // Taylor's series of e^(f ln 2), |f| <= 1/2.
    let mut p = _mm512_set1_ps(1.540_353e-4);
    for c in [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// The lanes of `n` elements, at most all.
pub fn lanes(n: usize) -> u16 {
    u16::MAX >> (TILE - n.min(TILE))
}

/// Two rows of numbers as one row of pairs, each rounded to bf16.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn paired(even: __m512, odd: __m512) -> __m512i {
    let (even, odd) = (_mm512_cvtepu16_epi32(rounded(even)), _mm512_cvtepu16_epi32(rounded(odd)));
    _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
}

/// Rounded to bf16. Only for processors that have AVX512-BF16, as all of `bf16::isas` do; written as assembly so that code
/// for f32 and bf16 alike need not be compiled for that extension.
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
