//! Matrix products on the host.

use gemm::Parallelism;

/// A matrix seen through strides: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// `(rows, cols)`, row-major and dense.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `(rows, cols)` whose rows begin `row_stride` elements apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "matrix outside its slice");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// What a product does with what its destination holds.
#[derive(Clone, Copy, PartialEq)]
pub enum Store {
    Overwrite,
    Add,
}

/// `dst = scale * a b`, or `dst += scale * a b`; `dst` is row-major, its rows `dst_stride` apart.
///
/// Each element is summed over `k` in an order that depends on the shapes only, so results are the same bits on any
/// number of threads.
pub fn matmul(dst: &mut [f32], dst_stride: usize, store: Store, scale: f32, a: Mat, b: Mat, parallelism: Parallelism) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes of a product");
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * dst_stride + n <= dst.len() && (m == 1 || n <= dst_stride), "destination outside its slice");
    // SAFETY: `Mat`'s constructors and the assertion above keep every access inside the three slices; `dst` is borrowed
    // mutably, so it overlaps neither input, and its rows do not overlap one another.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            store == Store::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// As [`matmul`] into a dense destination, on all threads.
pub fn matmul_all(dst: &mut [f32], store: Store, a: Mat, b: Mat) {
    matmul(dst, b.cols, store, 1.0, a, b, Parallelism::Rayon(0));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{on_threads, random};

    #[test]
    fn products_are_the_same_bits_on_one_thread_and_on_three() {
        for (m, n, k) in [(257, 131, 1537), (1, 512, 300), (512, 1, 300), (5, 7, 3), (64, 768, 256), (300, 300, 4100)] {
            let (a, b) = (random("a", m * k), random("b", k * n));
            let product = || {
                let mut dst = random("dst", m * n);
                matmul_all(&mut dst, Store::Add, Mat::new(&a, m, k), Mat::new(&b, n, k).t());
                dst
            };
            assert_eq!(on_threads(1, product), on_threads(3, product), "{m} x {n} x {k}");
        }
    }

    #[test]
    fn strided_products_match_sums_in_f64() {
        let (m, n, k, stride) = (9, 5, 7, 11);
        let (a, b) = (random("a", m * stride), random("b", k * n));
        let mut dst = vec![1.0; m * stride];
        matmul(
            &mut dst,
            stride,
            Store::Overwrite,
            0.5,
            Mat::strided(&a, m, k, stride),
            Mat::new(&b, k, n),
            Parallelism::None,
        );
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|l| f64::from(a[i * stride + l]) * f64::from(b[l * n + j])).sum();
                assert!((f64::from(dst[i * stride + j]) - 0.5 * sum).abs() < 1e-6);
            }
        }
        assert_eq!(dst[n], 1.0, "what lies between rows is left alone");
    }
}
