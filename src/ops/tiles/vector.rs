//! Arithmetic on vectors of sixteen numbers.

use std::arch::x86_64::*;

use super::TILE;

/// `2^x` to 3e-6 relative, for `x <= 0` and far below.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<0>(x);
    let f = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(1.339_887_4e-3);
    for c in [9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// The lanes of `n` elements, at most all.
pub fn lanes(n: usize) -> u16 {
    u16::MAX >> (TILE - n.min(TILE))
}

/// Two rows of non-negative numbers, or of any finite ones, as rows of pairs, each rounded to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
pub fn paired(even: __m512, odd: __m512) -> __m512i {
    let (even, odd) = (rounded(even), rounded(odd));
    _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
pub fn rounded(values: __m512) -> __m256i {
    // SAFETY: both are 32 bytes, and every pattern is a value.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(values)) }
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
