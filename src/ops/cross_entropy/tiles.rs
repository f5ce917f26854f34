//! Head and loss on matrix instructions. Logits live in the cache only: they are computed once for the statistics of their
//! rows and, because a product costs less than memory, again for the gradient.

use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::marker::PhantomData;

use half::bf16;
use rayon::prelude::*;

use crate::ops::matmul::Mat;
use crate::ops::tiles::vector::{lanes, transpose, woven};
use crate::ops::tiles::{
    Consumer, Isa, Number, Packing, STEP, Shared, Source, Square, TILE, TILE_LEN, Tiles, multiply, multiply_each,
    pack_all, pairs_of_tiles, take_bf16,
};

/// Rows of `x`, and columns of logits, of a block whose gradient is in the cache.
const ROWS: usize = 128;
const COLUMNS: usize = 512;

/// Rows of the vocabulary that are gone through at a time: packed both ways they stay in the second-level cache.
const PART: usize = 2 * COLUMNS;

/// What the logits of a row that does not exist are compared to: exponentials are zero.
const NO_ROW: f32 = 1e30;

/// The output layer, and rows with targets.
pub struct Head<'a, S> {
    isa: Isa,
    /// `(rows, dim)`.
    x: Mat<'a, S>,
    /// `(vocab_size, dim)`.
    weight: Mat<'a, S>,
    targets: &'a [u32],
    /// Rows of the vocabulary whose logits are gone through at a time.
    part: usize,
}

/// Of the logits of a row.
#[derive(Clone, Copy)]
struct Statistics {
    target: f32,
    /// About the largest logit; that of the target, unless others are so much larger that their exponentials overflow.
    shift: f32,
    /// `Σ e^(logit - shift)`, by lanes.
    sums: [f32; TILE],
}

impl Statistics {
    /// So that no exponential of a logit up to `max` overflows.
    fn raise_shift(&mut self, max: f32) {
        if max > self.shift {
            self.sums = self.sums.map(|sum| sum * (self.shift - max).exp());
            self.shift = max;
        }
    }

    /// Of the sum of all.
    fn log(&self) -> f32 {
        self.sums.iter().sum::<f32>().ln()
    }

    fn logsumexp(&self) -> f32 {
        self.shift + self.log()
    }

    /// Not less than zero, as rounding could have it, but NaN if it is.
    fn loss(&self) -> f32 {
        let loss = self.log() + (self.shift - self.target);
        if loss < 0.0 { 0.0 } else { loss }
    }
}

impl<'a, S: Source + Number> Head<'a, S> {
    /// What this processor has for a head of such numbers.
    pub fn isa() -> Option<Isa> {
        let isa = bf16::isas().first().copied();
        isa.filter(|isa| S::PARTS == 1 || *isa == Isa::Amx)
    }

    /// Of rows of `dim` numbers.
    pub fn new(isa: Isa, x: &'a [S], weight: &'a [S], dim: usize, targets: &'a [u32]) -> Self {
        let (x, weight) = (Mat::new(x, targets.len(), dim), Mat::new(weight, weight.len() / dim, dim));
        Self { isa, x, weight, targets, part: PART }
    }

    /// The sum of all losses.
    pub fn loss(&self) -> f64 {
        self.sum_of(&self.statistics())
    }

    fn sum_of(&self, statistics: &[Statistics]) -> f64 {
        statistics.iter().map(|row| f64::from(row.loss())).sum()
    }

    /// The rows `first..first + part` of the weight.
    fn weight_part(&self, first: usize) -> Mat<'_, S> {
        let n = self.part.min(self.weight.rows - first);
        Mat::new(&self.weight.data[first * self.weight.cols..], n, self.weight.cols)
    }

    /// Where the targets of a block of rows are among logits from column `first` on; anywhere, if they are not among them.
    fn targets_of(&self, block: usize, first: usize) -> [usize; ROWS] {
        let mut targets = [usize::MAX; ROWS];
        for (at, target) in targets.iter_mut().zip(&self.targets[block * ROWS..]) {
            *at = (*target as usize).wrapping_sub(first);
        }
        targets
    }

    fn statistics(&self) -> Vec<Statistics> {
        let dim = self.x.cols;
        let rows = self.x.data.par_chunks_exact(dim).zip(self.targets);
        let mut statistics: Vec<Statistics> = rows
            .map(|(x, target)| {
                let weight = &self.weight.data[*target as usize * dim..][..dim];
                let target = x.iter().zip(weight).map(|(x, weight)| x.load() * weight.load()).sum();
                Statistics { target, shift: target, sums: [0.0; TILE] }
            })
            .collect();
        let x = &pack_all(vec![(self.x, Packing::Left)])[0];
        for first in (0..self.weight.rows).step_by(self.part) {
            let weight = self.weight_part(first);
            let [tiles] = &pack_all(vec![(weight, Packing::Right)])[..] else { unreachable!("one in, one out") };
            statistics.par_chunks_mut(ROWS).enumerate().for_each(|(block, statistics)| {
                let x = x.part(block * ROWS / TILE..x.rows().min((block + 1) * ROWS / TILE), 0..x.steps());
                // SAFETY: an `isa` means AVX-512.
                self.isa.with(|| unsafe {
                    let mut sums = Sums::<S>::new(statistics, weight.rows);
                    multiply_each(self.isa, &x, &tiles.all(), &mut sums);
                    if !sums.are_in_range() {
                        let mut maxima = Maxima { rows: [f32::MIN; ROWS], columns: weight.rows };
                        multiply_each(self.isa, &x, &tiles.all(), &mut maxima);
                        for (row, max) in statistics.iter_mut().zip(maxima.rows) {
                            row.raise_shift(max);
                        }
                        sums = Sums::new(statistics, weight.rows);
                        multiply_each(self.isa, &x, &tiles.all(), &mut sums);
                    }
                    for (row, sums) in statistics.iter_mut().zip(sums.rows) {
                        row.sums = sums;
                    }
                });
            });
        }
        statistics
    }

    /// The sum of all losses. Writes `mean` times its gradient with respect to `x` to `dx`, `(rows, dim)`, and adds that
    /// with respect to the weight to `grad`, `(vocab_size, dim)`, if it is wanted. `mean` is not negative.
    pub fn loss_grad(&self, mean: f32, dx: &mut [f32], mut grad: Option<&mut [f32]>) -> f64 {
        assert!(mean >= 0.0, "its logarithm becomes a part of the softmax's");
        let statistics = self.statistics();
        let (rows, dim) = (self.x.rows, self.x.cols);
        let width = dim.next_multiple_of(TILE);
        let steps = rows.div_ceil(STEP);
        let mut sums = vec![0f32; rows.next_multiple_of(ROWS) * width];
        let mut gradient = Tiles::<bf16>::default();
        let packed = pack_all(vec![(self.x, Packing::Left), (self.x.t(), Packing::Left)]);
        let [x, x_columns] = &packed[..] else { unreachable!("two in, two out") };
        for first in (0..self.weight.rows).step_by(self.part) {
            let weight = self.weight_part(first);
            let packed = pack_all(vec![(weight, Packing::Right), (weight.t(), Packing::Right)]);
            let [weight_rows, weight_columns] = &packed[..] else { unreachable!("two in, two out") };
            // A block of rows writes its own steps: they lie together, lest each vector fall into a page of its own.
            gradient.resize_by_step(pairs_of_tiles(weight.rows), steps, S::PARTS);
            let step_stride = gradient.strides().1;
            let pairs = Shared(gradient.at_mut(0, 0).as_mut_ptr());
            let blocks = sums.par_chunks_mut(ROWS * width).zip(statistics.par_chunks(ROWS)).enumerate();
            blocks.for_each_init(Tiles::<bf16>::default, |left, (block, (dx, statistics))| {
                left.resize(ROWS / TILE, COLUMNS / STEP, S::PARTS);
                let mut shifts = [NO_ROW; ROWS];
                for (shift, row) in shifts.iter_mut().zip(statistics) {
                    *shift = row.logsumexp() * LOG2_E - mean.log2();
                }
                let x = x.part(block * ROWS / TILE..x.rows().min((block + 1) * ROWS / TILE), 0..x.steps());
                for columns in (0..weight.rows).step_by(COLUMNS) {
                    let tiles = columns / TILE..(columns + COLUMNS).min(weight.rows).div_ceil(TILE);
                    let k = columns / STEP..(columns + COLUMNS).min(weight.rows).div_ceil(STEP);
                    let weight_columns = weight_columns.part(0..weight_columns.rows(), k.clone());
                    let (left_row, left_step) = left.strides();
                    // SAFETY: an `isa` means AVX-512. The tiles of these rows in `pairs` are this task's alone.
                    self.isa.with(|| unsafe {
                        let mut out = Gradient::<S> {
                            shifts,
                            targets: self.targets_of(block, first + columns),
                            columns: weight.rows - columns,
                            mean,
                            left: left.at_mut(0, 0).as_mut_ptr(),
                            left_row,
                            left_step,
                            pairs: pairs
                                .get()
                                .add(block * ROWS / STEP * step_stride + columns / TILE * S::PARTS * TILE_LEN),
                            step_stride,
                            of: PhantomData,
                        };
                        multiply_each(self.isa, &x, &weight_rows.part(tiles, 0..weight_rows.steps()), &mut out);
                        let left = left.part(0..ROWS / TILE, 0..k.len());
                        multiply(self.isa, left, weight_columns, dx, width, true);
                    });
                }
            });
            if let Some(grad) = grad.as_deref_mut() {
                self.add_products(x_columns, &gradient, &mut grad[first * dim..(first + weight.rows) * dim]);
            }
        }
        for (dx, sums) in dx.chunks_exact_mut(dim).zip(sums.chunks_exact(width)) {
            dx.copy_from_slice(&sums[..dim]);
        }
        self.sum_of(&statistics)
    }

    /// `grad += (xᵀ gradient)ᵀ`, `(vocabulary, dim)`.
    fn add_products(&self, x_columns: &Tiles, gradient: &Tiles, grad: &mut [f32]) {
        /// Steps that are summed over before sums go back to memory.
        const STEPS: usize = 16;
        let dim = self.x.cols;
        // As many columns as keep the sums in the cache.
        let columns = ((1 << 16) / dim.next_multiple_of(TILE) / STEP).clamp(1, 8) * STEP;
        let tasks = grad.par_chunks_mut(columns * dim).enumerate();
        tasks.for_each_init(Vec::new, |sums: &mut Vec<f32>, (task, grad)| {
            let first = task * columns / TILE;
            let tiles = first..gradient.rows().min(first + columns / TILE);
            let width = tiles.len() * TILE;
            sums.resize(x_columns.rows() * TILE * width, 0.0);
            // SAFETY: an `isa` means AVX-512.
            self.isa.with(|| unsafe {
                for step in (0..gradient.steps()).step_by(STEPS) {
                    let steps = step..gradient.steps().min(step + STEPS);
                    let x = x_columns.part(0..x_columns.rows(), steps.clone());
                    multiply(self.isa, x, gradient.part(tiles.clone(), steps), sums, width, step > 0);
                }
                add_transposed(sums, width, grad, dim);
            });
        });
    }
}

/// Sums up exponentials.
struct Sums<S> {
    /// In binary logarithms.
    shifts: [f32; ROWS],
    rows: [[f32; TILE]; ROWS],
    columns: usize,
    of: PhantomData<S>,
}

impl<S> Sums<S> {
    fn new(statistics: &[Statistics], columns: usize) -> Self {
        let (mut shifts, mut rows) = ([NO_ROW; ROWS], [[0.0; TILE]; ROWS]);
        for ((shift, sums), row) in shifts.iter_mut().zip(&mut rows).zip(statistics) {
            (*shift, *sums) = (row.shift * LOG2_E, row.sums);
        }
        Self { shifts, rows, columns, of: PhantomData }
    }

    /// Whether exponentials and their sums are in the range of f32, with some room for adding up more of them.
    fn are_in_range(&self) -> bool {
        self.rows.as_flattened().iter().all(|sum| *sum < 1e30)
    }
}

impl<S: Number> Consumer for Sums<S> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn rows(&mut self, square: Square, pair: usize) {
        for i in [2 * pair, 2 * pair + 1] {
            let row = square.row + i;
            // SAFETY: a row of the square, and one of ours, which have as many numbers.
            unsafe {
                let [first, second] = exponentials::<S>(&square, i, self.shifts[row], self.columns);
                let sums = self.rows[row].as_mut_ptr();
                _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(first, second)));
            }
        }
    }
}

/// `e^logit / 2^shift` of row `i` of a square of logits; zero from column `columns` of the product on.
///
/// # Safety
/// The processor has AVX-512; the square has the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn exponentials<S: Number>(square: &Square, i: usize, shift: f32, columns: usize) -> [__m512; 2] {
    let (factor, shift) = (_mm512_set1_ps(LOG2_E), _mm512_set1_ps(shift));
    let mut values = [_mm512_setzero_ps(); 2];
    for (tile, value) in values.iter_mut().enumerate() {
        // SAFETY: a row of the square.
        unsafe {
            let logits = _mm512_loadu_ps(square.values.add(i * STEP + tile * TILE));
            *value = S::exp2(_mm512_fmsub_ps(logits, factor, shift));
        }
    }
    if square.column + STEP > columns {
        for (tile, value) in values.iter_mut().enumerate() {
            *value = _mm512_maskz_mov_ps(lanes(columns.saturating_sub(square.column + tile * TILE)), *value);
        }
    }
    values
}

/// The largest logit of each row.
struct Maxima {
    rows: [f32; ROWS],
    columns: usize,
}

impl Consumer for Maxima {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn rows(&mut self, square: Square, pair: usize) {
        for i in [2 * pair, 2 * pair + 1] {
            let max = &mut self.rows[square.row + i];
            for column in 0..STEP.min(self.columns.saturating_sub(square.column)) {
                // SAFETY: inside the square.
                *max = max.max(unsafe { *square.values.add(i * STEP + column) });
            }
        }
    }
}

/// Writes `mean · (softmax - one-hot)` of [`COLUMNS`] logits of a block of rows: as tiles of a left operand, and as those of
/// a right one whose `k` are the rows.
struct Gradient<S> {
    /// Softmax's logarithm, with that of `mean` in it, is a logit's less this. Binary.
    shifts: [f32; ROWS],
    targets: [usize; ROWS],
    columns: usize,
    mean: f32,
    left: *mut bf16,
    left_row: usize,
    left_step: usize,
    /// The first tile of these rows and columns.
    pairs: *mut bf16,
    step_stride: usize,
    of: PhantomData<S>,
}

impl<S: Source + Number> Consumer for Gradient<S> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn rows(&mut self, square: Square, pair: usize) {
        let mut gradients = [[_mm512_setzero_ps(); 2]; 2];
        let first = square.row + 2 * pair;
        for (i, gradients) in gradients.iter_mut().enumerate() {
            let row = first + i;
            // SAFETY: a row of the square.
            *gradients = unsafe { exponentials::<S>(&square, 2 * pair + i, self.shifts[row], self.columns) };
            let target = self.targets[row].wrapping_sub(square.column);
            if target < STEP {
                let gradient = &mut gradients[target / TILE];
                *gradient = _mm512_mask_sub_ps(*gradient, 1 << (target % TILE), *gradient, _mm512_set1_ps(self.mean));
            }
        }
        let [[a, b], [c, d]] = &mut gradients;
        // SAFETY: inside the tiles of the block, by the caller's promise.
        unsafe {
            let left = self.left.add(first / TILE * self.left_row + square.column / STEP * self.left_step);
            let left = left.add(first % TILE * STEP);
            let pairs = self.pairs.add(first / STEP * self.step_stride + square.column * S::PARTS * STEP);
            let pairs = pairs.add(first % STEP * TILE);
            for part in 0..S::PARTS {
                let (left, pairs) = (left.add(part * TILE_LEN), pairs.add(part * TILE_LEN));
                let rows = [take_bf16(a, b), take_bf16(c, d)];
                let woven = woven(rows[0], rows[1]);
                for i in 0..2 {
                    _mm512_storeu_si512(left.add(i * STEP).cast(), rows[i]);
                    _mm512_storeu_si512(pairs.add(i * S::PARTS * TILE_LEN).cast(), woven[i]);
                }
            }
        }
    }
}

/// `to += sumsᵀ`: adds `sums`, `(dim, width)`, to the rows of `to`, `(rows, dim)`, of which there may be fewer.
///
/// # Safety
/// The processor has AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add_transposed(sums: &[f32], width: usize, to: &mut [f32], dim: usize) {
    for (tile, to) in to.chunks_mut(TILE * dim).enumerate() {
        for first in (0..dim).step_by(TILE) {
            let mut rows = [_mm512_setzero_si512(); TILE];
            for (i, row) in rows.iter_mut().enumerate() {
                let at = (first + i) * width + tile * TILE;
                // SAFETY: sums come in whole tiles.
                *row = unsafe { _mm512_loadu_si512(sums[at..at + TILE].as_ptr().cast()) };
            }
            let lanes = lanes(dim - first);
            for (row, to) in transpose(rows).into_iter().zip(to.chunks_exact_mut(dim)) {
                let to = to[first..].as_mut_ptr();
                // SAFETY: masked to the rest of the row.
                unsafe {
                    let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, to), _mm512_castsi512_ps(row));
                    _mm512_mask_storeu_ps(to, lanes, sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::host::convert;
    use crate::ops::testing::{on_threads, random};

    #[test]
    fn losses_and_gradients_do_not_depend_on_the_parts_of_the_vocabulary_or_the_threads() {
        let (rows, dim, vocab_size) = (300, 40, 1100);
        let (x, weight) = (random("x", rows * dim), random("weight", vocab_size * dim));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 131 % vocab_size) as u32).collect();
        check(bf16::isas(), &convert::<_, bf16>(&x), &convert::<_, bf16>(&weight), &targets);
        check(Head::<f32>::isa().as_slice(), &x, &weight, &targets);
    }

    #[test]
    fn logits_far_above_the_target_do_not_overflow() {
        let (rows, dim, vocab_size) = (40, 64, 700);
        // The last token's logits are hundreds above all others.
        let x = convert::<_, bf16>(&vec![4.0; rows * dim]);
        let mut weight = convert::<_, bf16>(&random("weight", vocab_size * dim));
        weight[(vocab_size - 1) * dim..].fill(bf16::from_f32(2.0));
        let targets: Vec<u32> = (0..rows as u32).collect();
        let logit =
            |token: usize| weight[token * dim..][..dim].iter().map(|w| 4.0 * f64::from(w.to_f32())).sum::<f64>();
        let losses: Vec<f64> = (0..rows).map(|token| logit(vocab_size - 1) - logit(token)).collect();
        assert!(losses.iter().all(|loss| *loss > 100.0));
        for isa in bf16::isas() {
            let head = Head::new(*isa, &x, &weight, dim, &targets);
            let (mut dx, mut grad) = (vec![0f32; rows * dim], vec![0f32; vocab_size * dim]);
            let loss = head.loss_grad(1.0, &mut dx, Some(&mut grad));
            let expected: f64 = losses.iter().sum();
            assert!((loss - expected).abs() < 1e-6 * expected, "{isa:?}: {loss}, not {expected}");
            // Softmax is all on the last token.
            assert!(grad[(vocab_size - 1) * dim..].iter().all(|g| *g == 4.0 * rows as f32), "{isa:?}");
            assert!(grad[..dim].iter().all(|g| *g == -4.0), "{isa:?}");
        }
    }

    fn check<S: Source + Number>(isas: &[Isa], x: &[S], weight: &[S], targets: &[u32]) {
        for isa in isas {
            let run = |part: Option<usize>| {
                let mut head = Head::new(*isa, x, weight, x.len() / targets.len(), targets);
                head.part = part.unwrap_or(head.part);
                let (mut dx, mut grad) = (vec![0f32; x.len()], vec![0f32; weight.len()]);
                let loss = head.loss_grad(0.01, &mut dx, Some(&mut grad));
                assert_eq!(loss, head.loss());
                (loss, dx, grad)
            };
            let whole = on_threads(1, || run(None));
            assert!(whole == on_threads(3, || run(None)), "{isa:?}");
            assert!(whole == run(Some(COLUMNS)), "{isa:?}");
        }
    }
}
