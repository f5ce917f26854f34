//! Matrix products on the host.

#[cfg(feature = "cuda")]
pub mod cuda;
mod rows;
#[cfg(target_arch = "x86_64")]
mod tiles;

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use candle_core::DType;
use gemm::Parallelism;
use half::bf16;

pub use self::rows::dots;
use super::host::{Element, convert, typed};
#[cfg(target_arch = "x86_64")]
use super::tiles::{Isa, Number};

/// A matrix seen through strides: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T = f32> {
    pub data: &'a [T],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// `(rows, cols)`, row-major and dense.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// `(rows, cols)` whose rows begin `row_stride` elements apart.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || cols == 0 || (rows - 1) * row_stride + cols <= data.len(), "matrix outside its slice");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// The same view of other numbers.
    fn of<U>(self, data: &[U]) -> Mat<'_, U> {
        let Self { rows, cols, row_stride, col_stride, .. } = self;
        Mat { data, rows, cols, row_stride, col_stride }
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

/// Where a product goes: row-major and dense, `(a.rows, b.cols)`.
pub enum Dst<'a, T> {
    /// Added to sums of f32.
    Add(&'a mut [f32]),
    F32(&'a mut [MaybeUninit<f32>]),
    /// In the numbers of the operands, rounded once.
    Rounded(&'a mut [MaybeUninit<T>]),
}

/// A product to be computed, with sums of f32. Every element of its destination is written.
pub struct Product<'a, T> {
    a: Mat<'a, T>,
    b: Mat<'a, T>,
    dst: Dst<'a, T>,
}

impl<'a, T> Product<'a, T> {
    pub fn new(a: Mat<'a, T>, b: Mat<'a, T>, dst: Dst<'a, T>) -> Self {
        let len = match &dst {
            Dst::Add(dst) => dst.len(),
            Dst::F32(dst) => dst.len(),
            Dst::Rounded(dst) => dst.len(),
        };
        assert_eq!(a.cols, b.rows, "inner sizes of a product");
        assert_eq!(a.rows * b.cols, len, "size of a product");
        Self { a, b, dst }
    }
}

/// What matrices are made of.
pub trait Operand: Element {
    /// Computes all products, in parallel. Each element is summed over `k` in an order that depends on the shapes only,
    /// so results are the same bits on any number of threads.
    fn multiply(products: Vec<Product<Self>>) {
        let (few, many): (Vec<_>, Vec<_>) = products.into_iter().partition(rows::suits);
        few.into_iter().for_each(rows::run);
        if !many.is_empty() {
            Self::multiply_blocks(many);
        }
    }

    /// As [`Operand::multiply`], for products of many rows.
    fn multiply_blocks(products: Vec<Product<Self>>);
}

/// On tile registers as products of sums of three bf16, twice as fast as with vectors of f32; but not where there is more
/// to pack than to multiply, and the rows of both operands are what is summed over, as for the gradients of weights.
impl Operand for f32 {
    fn multiply_blocks(products: Vec<Product<Self>>) {
        #[cfg(target_arch = "x86_64")]
        if let Some(isa @ Isa::Amx) = bf16::isas().first() {
            let suits_vectors = |Product { a, b, .. }: &Product<f32>| {
                a.row_stride == 1 && b.col_stride == 1 && a.cols >= 4 * a.rows.max(b.cols)
            };
            let (by_vectors, by_tiles) = products.into_iter().partition(suits_vectors);
            tiles::run(*isa, by_tiles);
            return vectors(by_vectors);
        }
        vectors(products);
    }
}

/// Products of f32 by vectors.
fn vectors(products: Vec<Product<f32>>) {
    for Product { a, b, dst } in products {
        let (store, dst) = match dst {
            Dst::Add(dst) => (Store::Add, dst),
            // SAFETY: the product writes every element and reads none, because it overwrites.
            Dst::F32(dst) | Dst::Rounded(dst) => (Store::Overwrite, unsafe { assume_written(dst) }),
        };
        matmul(dst, b.cols, store, 1.0, a, b, Parallelism::Rayon(0));
    }
}

/// # Safety
/// Nothing reads an element before it is written.
unsafe fn assume_written(values: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    // SAFETY: same layout; every pattern is a number; the rest is promised by the caller.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [f32]) }
}

impl Operand for bf16 {
    fn multiply_blocks(products: Vec<Product<Self>>) {
        #[cfg(target_arch = "x86_64")]
        if let Some(isa) = bf16::isas().first() {
            return tiles::run(*isa, products);
        }
        widened(products);
    }
}

/// Products of bf16 on processors that have no instructions for them.
fn widened(products: Vec<Product<bf16>>) {
    for Product { a, b, dst } in products {
        let (m, n) = (a.rows, b.cols);
        let (wide_a, wide_b) = (convert::<_, f32>(a.data), convert::<_, f32>(b.data));
        let (a, b) = (a.of(&wide_a), b.of(&wide_b));
        match dst {
            Dst::Add(dst) => f32::multiply(vec![Product::new(a, b, Dst::Add(dst))]),
            Dst::F32(dst) => f32::multiply(vec![Product::new(a, b, Dst::F32(dst))]),
            Dst::Rounded(dst) => {
                let mut wide = Vec::with_capacity(m * n);
                f32::multiply(vec![Product::new(a, b, Dst::F32(&mut wide.spare_capacity_mut()[..m * n]))]);
                // SAFETY: a product writes all of its destination.
                unsafe { wide.set_len(m * n) };
                for (dst, value) in dst.iter_mut().zip(convert::<_, bf16>(&wide)) {
                    dst.write(value);
                }
            }
        }
    }
}

/// `a b`, in the numbers of the operands.
pub fn product<T: Operand>(a: Mat<T>, b: Mat<T>) -> Vec<T> {
    product_to(a, b, |dst| Dst::Rounded(dst))
}

/// `a b`, in f32.
pub fn wide_product<T: Operand>(a: Mat<T>, b: Mat<T>) -> Vec<f32> {
    product_to(a, b, |dst| Dst::F32(dst))
}

fn product_to<T: Operand, U>(a: Mat<T>, b: Mat<T>, to: impl FnOnce(&mut [MaybeUninit<U>]) -> Dst<T>) -> Vec<U> {
    let len = a.rows * b.cols;
    let mut values = Vec::with_capacity(len);
    T::multiply(vec![Product::new(a, b, to(&mut values.spare_capacity_mut()[..len]))]);
    // SAFETY: a product writes all of its destination.
    unsafe { values.set_len(len) };
    values
}

/// The rate of the best of several square products, in floating-point operations per second: what this machine can do.
/// Takes a twentieth of a second or so.
pub fn measured_peak_flops(dtype: DType) -> f64 {
    typed!(T = dtype; peak_of::<T>())
}

fn peak_of<T: Operand>() -> f64 {
    const SIZE: usize = 1024;
    const AT_LEAST: usize = 3;
    const BUDGET: Duration = Duration::from_millis(50);
    let values = vec![T::store(1.0); SIZE * SIZE];
    let start = Instant::now();
    let mut best_s = f64::INFINITY;
    let mut runs = 0;
    while runs < AT_LEAST || start.elapsed() < BUDGET {
        let run = Instant::now();
        product(Mat::new(&values, SIZE, SIZE), Mat::new(&values, SIZE, SIZE));
        best_s = best_s.min(run.elapsed().as_secs_f64());
        runs += 1;
    }
    2.0 * (SIZE as f64).powi(3) / best_s
}

/// `a[rows of group i] b[i]` for all `i`, in the numbers of the operands. Group `i` is rows `offsets[i]..offsets[i + 1]`.
pub fn grouped_product<T: Operand>(offsets: &[usize], a: &[T], b: &[Mat<T>]) -> Vec<T> {
    let len = a.len() / b[0].rows * b[0].cols;
    let mut values = Vec::with_capacity(len);
    T::multiply(groups(offsets, a, b, &mut values.spare_capacity_mut()[..len], Dst::Rounded));
    // SAFETY: the groups cover the rows, and a product writes all of its destination.
    unsafe { values.set_len(len) };
    values
}

/// The sum over all terms `(a, b)` of their grouped products, in f32.
pub fn grouped_sum<T: Operand>(offsets: &[usize], terms: &[(&[T], Vec<Mat<T>>)]) -> Vec<f32> {
    let (a, b) = &terms[0];
    let len = a.len() / b[0].rows * b[0].cols;
    let mut values = Vec::with_capacity(len);
    T::multiply(groups(offsets, a, b, &mut values.spare_capacity_mut()[..len], Dst::F32));
    // SAFETY: as for `grouped_product`.
    unsafe { values.set_len(len) };
    for (a, b) in &terms[1..] {
        T::multiply(groups(offsets, a, b, &mut values, Dst::Add));
    }
    values
}

/// The product of each group that has rows.
fn groups<'a, T: Copy, U>(
    offsets: &[usize],
    a: &'a [T],
    b: &[Mat<'a, T>],
    mut dst: &'a mut [U],
    to: impl Fn(&'a mut [U]) -> Dst<'a, T>,
) -> Vec<Product<'a, T>> {
    assert_eq!(offsets.last().map(|rows| rows * b[0].rows), Some(a.len()), "the groups are all the rows");
    let mut products = Vec::with_capacity(b.len());
    for (rows, b) in offsets.windows(2).zip(b) {
        let n = rows[1] - rows[0];
        let dst = dst.split_off_mut(..n * b.cols).expect("groups follow one another");
        if n > 0 {
            products.push(Product::new(Mat::new(&a[rows[0] * b.rows..rows[1] * b.rows], n, b.rows), *b, to(dst)));
        }
    }
    products
}

/// `dst += a b`.
pub fn add_product<T: Operand>(dst: &mut [f32], a: Mat<T>, b: Mat<T>) {
    T::multiply(vec![Product::new(a, b, Dst::Add(dst))]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{on_threads, random};

    /// Every way to multiply bf16, on odd sizes, each operand dense in rows or in columns, against sums in f64.
    #[test]
    fn products_of_bf16_match_sums_in_f64() {
        let ways = std::iter::once(("widened", widened as fn(Vec<Product<bf16>>)));
        #[cfg(target_arch = "x86_64")]
        let ways = ways.chain(bf16::isas().iter().map(|isa| match isa {
            Isa::Amx => ("AMX", (|p| tiles::run(Isa::Amx, p)) as fn(Vec<Product<bf16>>)),
            Isa::Avx512 => ("AVX512-BF16", (|p| tiles::run(Isa::Avx512, p)) as fn(Vec<Product<bf16>>)),
        }));
        for (way, multiply) in ways {
            for (m, n, k) in [(1, 1, 1), (7, 5, 3), (33, 17, 31), (16, 32, 64), (130, 70, 1100), (40, 530, 65)] {
                let (a, b, c) = (
                    convert::<_, bf16>(&random("a", m * k)),
                    convert::<_, bf16>(&random("b", k * n)),
                    random("c", m * n),
                );
                let at = |i: usize, j: usize, left_rows: bool, right_rows: bool| -> f64 {
                    let a = |l: usize| if left_rows { a[i * k + l] } else { a[l * m + i] };
                    let b = |l: usize| if right_rows { b[l * n + j] } else { b[j * k + l] };
                    (0..k).map(|l| a(l).to_f64() * b(l).to_f64()).sum()
                };
                for (left_rows, right_rows) in [(true, true), (true, false), (false, true), (false, false)] {
                    let left = if left_rows { Mat::new(&a, m, k) } else { Mat::new(&a, k, m).t() };
                    let right = if right_rows { Mat::new(&b, k, n) } else { Mat::new(&b, n, k).t() };
                    let mut added = c.clone();
                    let (mut wide, mut rounded) = (Vec::with_capacity(m * n), Vec::with_capacity(m * n));
                    multiply(vec![
                        Product::new(left, right, Dst::Add(&mut added)),
                        Product::new(left, right, Dst::F32(&mut wide.spare_capacity_mut()[..m * n])),
                        Product::new(left, right, Dst::Rounded(&mut rounded.spare_capacity_mut()[..m * n])),
                    ]);
                    // SAFETY: a product writes all of its destination.
                    unsafe {
                        wide.set_len(m * n);
                        rounded.set_len(m * n);
                    }
                    let tolerance = 1e-6 * (k as f64).sqrt().max(4.0);
                    for (index, wide) in wide.iter().enumerate() {
                        let expected = at(index / n, index % n, left_rows, right_rows);
                        let what = format!("{way}: {m} x {n} x {k}, {left_rows} {right_rows}, [{index}]");
                        assert!((f64::from(*wide) - expected).abs() < tolerance, "{what}: {wide}, not {expected}");
                        let sum = f64::from(added[index]) - f64::from(c[index]);
                        assert!((sum - expected).abs() < 2.0 * tolerance, "{what}: {sum} added, not {expected}");
                        assert_eq!(rounded[index], bf16::from_f32(*wide), "{what}: rounded");
                    }
                }
            }
        }
    }

    #[test]
    fn both_ways_to_multiply_f32_match_sums_in_f64() {
        let ways = [("as it is chosen", f32::multiply as fn(Vec<Product<f32>>)), ("vectors", vectors)];
        for (way, multiply) in ways {
            for (m, n, k) in [(1, 1, 1), (7, 5, 3), (33, 17, 31), (130, 70, 1100), (40, 530, 65)] {
                let (a, b) = (random("a", m * k), random("b", k * n));
                let (left, right) = (Mat::new(&a, k, m).t(), Mat::new(&b, n, k).t());
                let mut c = vec![0f32; m * n];
                multiply(vec![Product::new(left, right, Dst::Add(&mut c))]);
                for (index, c) in c.iter().enumerate() {
                    let (i, j) = (index / n, index % n);
                    let terms = (0..k).map(|l| f64::from(a[l * m + i]) * f64::from(b[j * k + l]));
                    let (sum, scale) = terms.fold((0.0, 0.0), |(sum, scale), x| (sum + x, scale + x.abs()));
                    let error = (f64::from(*c) - sum).abs();
                    assert!(error <= 1e-6 * scale.max(1e-3), "{way}: {m} x {n} x {k}, [{index}]: {c}, not {sum}");
                }
            }
        }
    }

    #[test]
    fn products_of_bf16_are_the_same_bits_on_one_thread_and_on_three() {
        for (m, n, k) in [(257, 131, 1537), (1, 512, 300), (512, 1, 300), (64, 768, 256), (300, 300, 4100)] {
            let (a, b) = (convert::<_, bf16>(&random("a", m * k)), convert::<_, bf16>(&random("b", k * n)));
            let product = || product(Mat::new(&a, m, k), Mat::new(&b, n, k).t());
            assert_eq!(on_threads(1, product), on_threads(3, product), "{m} x {n} x {k}");
        }
    }

    #[test]
    fn products_are_the_same_bits_on_one_thread_and_on_three() {
        for (m, n, k) in [(257, 131, 1537), (1, 512, 300), (512, 1, 300), (5, 7, 3), (64, 768, 256), (300, 300, 4100)] {
            let (a, b) = (random("a", m * k), random("b", k * n));
            let product = || {
                let mut dst = random("dst", m * n);
                add_product(&mut dst, Mat::new(&a, m, k), Mat::new(&b, n, k).t());
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
