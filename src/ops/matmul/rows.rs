//! Products of few rows with the transpose of a weight, as when text is generated: each row of the weight is read once,
//! where it lies, so that memory decides the speed.

use rayon::prelude::*;

use super::{Dst, Mat, Product};
use crate::ops::host::{Element, dot, vectorized};
#[cfg(target_arch = "x86_64")]
use crate::ops::tiles::Number;

/// Rows of the left operand up to which arithmetic keeps up with memory.
const MOST: usize = 8;
/// Numbers of the weight that a task reads.
const GRAIN: usize = 1 << 17;

/// Whether a product is of this kind.
pub fn suits<T>(product: &Product<T>) -> bool {
    let Product { a, b, .. } = product;
    a.rows <= MOST && a.col_stride == 1 && b.row_stride == 1
}

/// Each element is summed over `k` in an order that depends on `k` only.
pub fn run<T: Element>(product: Product<T>) {
    let Product { a, b, dst } = product;
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    let left: Vec<f32> = (0..m).flat_map(|i| a.data[i * a.row_stride..][..k].iter().map(|x| x.load())).collect();
    let mut sums = vec![0f32; n * m]; // (n, m)
    let columns = GRAIN.div_ceil(k.max(1));
    sums.par_chunks_mut(columns * m).enumerate().for_each(|(task, sums)| {
        let data = &b.data[task * columns * b.col_stride..];
        let weight = Mat { data, rows: sums.len() / m, cols: k, row_stride: b.col_stride, col_stride: 1 };
        dots(&left, weight, |i, j, sum| sums[j * m + i] = sum);
    });
    let sums = (0..m).flat_map(|i| sums[i..].iter().step_by(m));
    match dst {
        Dst::Add(dst) => dst.iter_mut().zip(sums).for_each(|(dst, sum)| *dst += sum),
        Dst::F32(dst) => dst.iter_mut().zip(sums).for_each(|(dst, sum)| _ = dst.write(*sum)),
        Dst::Rounded(dst) => dst.iter_mut().zip(sums).for_each(|(dst, sum)| _ = dst.write(T::store(*sum))),
    }
}

/// Hands on `(i, j, a[i] · b[j])` for all rows of `a` and `b`, those of `a` dense and as long as those of `b`.
pub fn dots<T: Element>(a: &[f32], b: Mat<T>, mut put: impl FnMut(usize, usize, f32)) {
    let k = b.cols;
    if k == 0 {
        return;
    }
    assert!(b.rows == 0 || (b.rows - 1) * b.row_stride + k <= b.data.len(), "rows inside their slice");
    #[cfg(target_arch = "x86_64")]
    if !f32::isas().is_empty() {
        // SAFETY: an entry means AVX-512.
        return unsafe { avx512::dots(a, b, put) };
    }
    vectorized!({
        for j in 0..b.rows {
            let right = &b.data[j * b.row_stride..][..k];
            a.chunks_exact(k).enumerate().for_each(|(i, left)| put(i, j, dot(left, right)));
        }
    });
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use candle_core::DType;

    use super::{Element, Mat};
    use crate::ops::tiles::vector::lanes;

    /// Rows of either operand whose products are summed side by side.
    const BLOCK: usize = 4;
    const LANES: usize = 16;

    /// As [`super::dots`].
    ///
    /// # Safety
    /// The processor has AVX-512, and rows of `b` lie inside their slice.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn dots<T: Element>(a: &[f32], b: Mat<T>, mut put: impl FnMut(usize, usize, f32)) {
        let m = a.len() / b.cols;
        for j in (0..b.rows).step_by(BLOCK) {
            for i in (0..m).step_by(BLOCK) {
                // SAFETY: promised by the caller.
                unsafe {
                    match m - i {
                        1 => rows::<T, 1>(a, b, i, j, &mut put),
                        2 => rows::<T, 2>(a, b, i, j, &mut put),
                        3 => rows::<T, 3>(a, b, i, j, &mut put),
                        _ => rows::<T, BLOCK>(a, b, i, j, &mut put),
                    }
                }
            }
        }
    }

    /// `M` rows of `a` from `i` on, with up to [`BLOCK`] rows of `b` from `j` on.
    ///
    /// # Safety
    /// As for [`dots`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn rows<T: Element, const M: usize>(
        a: &[f32],
        b: Mat<T>,
        i: usize,
        j: usize,
        put: &mut impl FnMut(usize, usize, f32),
    ) {
        // SAFETY: promised by the caller.
        unsafe {
            if j + BLOCK <= b.rows {
                block::<T, M, BLOCK>(a, b, i, j, put);
            } else {
                (j..b.rows).for_each(|j| block::<T, M, 1>(a, b, i, j, put));
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn block<T: Element, const M: usize, const N: usize>(
        a: &[f32],
        b: Mat<T>,
        i: usize,
        j: usize,
        put: &mut impl FnMut(usize, usize, f32),
    ) {
        let k = b.cols;
        let (a, b, stride) = (a[i * k..][..M * k].as_ptr(), b.data[j * b.row_stride..].as_ptr(), b.row_stride);
        let mut sums = [[_mm512_setzero_ps(); N]; M];
        for first in (0..k).step_by(LANES) {
            let lanes = lanes(k - first);
            // SAFETY: masked to numbers of rows, which lie inside their slices.
            unsafe {
                let mut right = [_mm512_setzero_ps(); N];
                for (j, right) in right.iter_mut().enumerate() {
                    *right = load(b.add(j * stride + first), lanes);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left = load(a.add(i * k + first), lanes);
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_fmadd_ps(left, right, *sum);
                    }
                }
            }
        }
        for (x, sums) in sums.into_iter().enumerate() {
            for (y, sum) in sums.into_iter().enumerate() {
                put(i + x, j + y, _mm512_reduce_add_ps(sum));
            }
        }
    }

    /// Up to sixteen numbers; the lanes beyond are zero.
    ///
    /// # Safety
    /// The numbers of the lanes can be read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load<T: Element>(from: *const T, lanes: u16) -> __m512 {
        // SAFETY: promised by the caller.
        unsafe {
            match T::DTYPE {
                DType::BF16 => {
                    let numbers = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(numbers))
                }
                DType::F32 => _mm512_maskz_loadu_ps(lanes, from.cast()),
                other => unreachable!("matrices are f32 or bf16, not {other:?}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use half::bf16;

    use super::*;
    use crate::ops::host::convert;
    use crate::ops::matmul::Operand;
    use crate::ops::testing::{on_threads, random};

    /// `dst` of a product, in one of three ways: added to ones, in f32, rounded.
    fn products<T: Operand>(a: Mat<T>, b: Mat<T>) -> (Vec<f32>, Vec<f32>, Vec<T>) {
        let len = a.rows * b.cols;
        let (mut added, mut wide, mut rounded) = (vec![1f32; len], vec![MaybeUninit::new(7.0); len], vec![]);
        rounded.resize(len, MaybeUninit::new(T::store(7.0)));
        let to = [Dst::Add(&mut added), Dst::F32(&mut wide), Dst::Rounded(&mut rounded)];
        let products: Vec<_> = to.map(|dst| Product::new(a, b, dst)).into();
        assert!(products.iter().all(suits));
        products.into_iter().for_each(run);
        // SAFETY: all of them began initialised.
        let read = |values: Vec<MaybeUninit<f32>>| values.into_iter().map(|x| unsafe { x.assume_init() }).collect();
        // SAFETY: as above.
        (added, read(wide), rounded.into_iter().map(|x| unsafe { x.assume_init() }).collect())
    }

    fn check<T: Operand>() {
        for (m, n, k) in [(1, 1, 1), (1, 9, 40), (2, 3, 16), (3, 70, 33), (4, 4, 64), (7, 13, 100), (8, 530, 300)] {
            // Rows of both operands lie apart.
            let (a_stride, b_stride) = (k + 3, k + 1);
            let a: Vec<T> = convert(&random("a", m * a_stride));
            let b: Vec<T> = convert(&random("b", n * b_stride));
            let (left, right) = (Mat::strided(&a, m, k, a_stride), Mat::strided(&b, n, k, b_stride).t());
            let (added, wide, rounded) = products(left, right);
            for index in 0..m * n {
                let (i, j) = (index / n, index % n);
                let term = |l: usize| f64::from(a[i * a_stride + l].load()) * f64::from(b[j * b_stride + l].load());
                let expected: f64 = (0..k).map(term).sum();
                let what = format!("{m} x {n} x {k}, ({i}, {j})");
                assert!((f64::from(wide[index]) - expected).abs() < 1e-5, "{what}: {}, not {expected}", wide[index]);
                assert_eq!(added[index], 1.0 + wide[index], "{what}");
                assert_eq!(rounded[index].load(), T::store(wide[index]).load(), "{what}");
            }
        }
    }

    #[test]
    fn products_of_few_rows_match_sums_in_f64() {
        check::<f32>();
        check::<bf16>();
    }

    #[test]
    fn a_row_has_the_same_product_alone_and_among_others_on_any_number_of_threads() {
        let (n, k) = (1201, 333);
        let (a, b) = (random("a", MOST * k), random("b", n * k));
        let product = |rows| products(Mat::new(&a[..rows * k], rows, k), Mat::new(&b, n, k).t()).1;
        let all = on_threads(1, || product(MOST));
        assert_eq!(all, on_threads(3, || product(MOST)));
        for rows in 1..MOST {
            assert_eq!(all[..rows * n], product(rows), "{rows} rows");
        }
    }
}
