//! Products of few rows with the transpose of a weight, as when text is generated: each row of the weight is read once,
//! where it lies, so that memory decides the speed.

use std::array::from_fn;

use rayon::prelude::*;

use super::{Dst, Mat, Product};
use crate::ops::host::{Element, vectorized};

/// Rows of the left operand up to which arithmetic keeps up with memory.
const MOST: usize = 8;
/// Numbers of the weight that a task reads.
const GRAIN: usize = 1 << 17;
/// Rows of either operand whose products are summed side by side, in registers.
const BLOCK: usize = 4;
const LANES: usize = 16;

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
    let columns_per_task = (GRAIN / k.max(1)).next_multiple_of(BLOCK).max(BLOCK);
    let mut sums = vec![0f32; n * m]; // (n, m)
    sums.par_chunks_mut(columns_per_task * m).enumerate().for_each(|(task, sums)| {
        let weight = Mat { rows: sums.len() / m, cols: k, row_stride: b.col_stride, col_stride: 1, data: b.data };
        let weight = Mat { data: &b.data[task * columns_per_task * b.col_stride..], ..weight };
        vectorized!(dots(&left, weight, |i, j, sum| sums[j * m + i] = sum));
    });
    let sums = (0..m).flat_map(|i| sums[i..].iter().step_by(m));
    match dst {
        Dst::Add(dst) => dst.iter_mut().zip(sums).for_each(|(dst, sum)| *dst += sum),
        Dst::F32(dst) => dst.iter_mut().zip(sums).for_each(|(dst, sum)| _ = dst.write(*sum)),
        Dst::Rounded(dst) => dst.iter_mut().zip(sums).for_each(|(dst, sum)| _ = dst.write(T::store(*sum))),
    }
}

/// Hands on `(i, j, a[i] · b[j])` for all rows of `a`, which are dense and as long as those of `b`. For `vectorized!`.
#[inline(always)]
pub fn dots<T: Element>(a: &[f32], b: Mat<T>, mut put: impl FnMut(usize, usize, f32)) {
    let k = b.cols;
    let m = a.len().checked_div(k).unwrap_or(0);
    let left = |i: usize| &a[i * k..][..k];
    let right = |j: usize| &b.data[j * b.row_stride..][..k];
    for j in (0..b.rows).step_by(BLOCK) {
        let n = BLOCK.min(b.rows - j);
        for i in (0..m).step_by(BLOCK) {
            match m - i {
                1 => rows::<T, 1>(from_fn(|d| left(i + d)), n, |d| right(j + d), |x, y, sum| put(i + x, j + y, sum)),
                2 => rows::<T, 2>(from_fn(|d| left(i + d)), n, |d| right(j + d), |x, y, sum| put(i + x, j + y, sum)),
                3 => rows::<T, 3>(from_fn(|d| left(i + d)), n, |d| right(j + d), |x, y, sum| put(i + x, j + y, sum)),
                _ => rows::<T, 4>(from_fn(|d| left(i + d)), n, |d| right(j + d), |x, y, sum| put(i + x, j + y, sum)),
            }
        }
    }
}

/// `M` rows with `n` rows, at most [`BLOCK`].
#[inline(always)]
fn rows<'a, T: Element, const M: usize>(
    a: [&[f32]; M],
    n: usize,
    b: impl Fn(usize) -> &'a [T],
    mut put: impl FnMut(usize, usize, f32),
) {
    if n == BLOCK {
        let sums = block::<T, M, BLOCK>(a, from_fn(&b));
        (0..BLOCK).for_each(|j| (0..M).for_each(|i| put(i, j, sums[i][j])));
    } else {
        for j in 0..n {
            let sums = block::<T, M, 1>(a, [b(j)]);
            (0..M).for_each(|i| put(i, j, sums[i][0]));
        }
    }
}

#[inline(always)]
fn block<T: Element, const M: usize, const N: usize>(a: [&[f32]; M], b: [&[T]; N]) -> [[f32; N]; M] {
    let n_vectors = b[0].len() / LANES;
    let (a_vectors, a_rest) = (a.map(|a| &a.as_chunks::<LANES>().0[..n_vectors]), a.map(|a| &a[n_vectors * LANES..]));
    let (b_vectors, b_rest) = (b.map(|b| &b.as_chunks::<LANES>().0[..n_vectors]), b.map(|b| &b[n_vectors * LANES..]));
    let mut lanes = [[[0f32; LANES]; N]; M];
    for k in 0..n_vectors {
        let b = b_vectors.map(|b| b[k].map(T::load));
        for (lanes, a) in lanes.iter_mut().zip(a_vectors) {
            for (lanes, b) in lanes.iter_mut().zip(&b) {
                for l in 0..LANES {
                    lanes[l] = a[k][l].mul_add(b[l], lanes[l]);
                }
            }
        }
    }
    from_fn(|i| {
        from_fn(|j| {
            let total = lanes[i][j];
            let total: [f32; 8] = from_fn(|l| total[l] + total[l + 8]);
            let total: [f32; 4] = from_fn(|l| total[l] + total[l + 4]);
            let rest = a_rest[i].iter().zip(b_rest[j]).fold(0.0, |sum, (a, b)| a.mul_add(b.load(), sum));
            total[0] + total[1] + (total[2] + total[3]) + rest
        })
    })
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
