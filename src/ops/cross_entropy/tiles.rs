//! Head and loss on matrix instructions. Logits live in the cache only: they are computed once for the statistics of their
//! rows and, because a product costs less than memory, again for the gradient.

use std::arch::x86_64::*;

use half::bf16;
use rayon::prelude::*;

use crate::ops::matmul::Mat;
use crate::ops::tiles::vector::{lanes, paired, transpose};
use crate::ops::tiles::{
    Isa, Number, Packing, STEP, Shared, Source, TILE, TILE_LEN, Tiles, multiply, pack_all, pairs_of_tiles, take_bf16,
};

/// Rows of `x`, and columns of logits, of a block that is in the cache.
const ROWS: usize = 128;
const COLUMNS: usize = 512;

/// Rows of the vocabulary that are gone through at a time: packed both ways they stay in the second-level cache.
const PART: usize = 2 * COLUMNS;

/// What the logits of a row that does not exist are compared to, and logits that do not exist: exponentials are zero.
const NO_ROW: f32 = 1e30;
const NO_LOGIT: f32 = -1e30;

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
    max: f32,
    /// `Σ e^(logit - max)`.
    sum: f32,
    target: f32,
}

impl Statistics {
    fn logsumexp(&self) -> f32 {
        self.max + self.sum.ln()
    }
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    logits: Vec<f32>,
    gradient: Tiles,
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
        statistics.iter().map(|row| f64::from(row.logsumexp()) - f64::from(row.target)).sum()
    }

    /// The rows `first..first + part` of the weight.
    fn weight_part(&self, first: usize) -> Mat<'_, S> {
        let n = self.part.min(self.weight.rows - first);
        Mat::new(&self.weight.data[first * self.weight.cols..], n, self.weight.cols)
    }

    fn statistics(&self) -> Vec<Statistics> {
        let mut statistics = vec![Statistics { max: f32::MIN, sum: 0.0, target: 0.0 }; self.x.rows];
        let x = &pack_all(vec![(self.x, Packing::Left)])[0];
        for first in (0..self.weight.rows).step_by(self.part) {
            let weight = self.weight_part(first);
            let [tiles] = &pack_all(vec![(weight, Packing::Right)])[..] else { unreachable!("one in, one out") };
            let blocks = statistics.par_chunks_mut(ROWS).enumerate();
            blocks.for_each_init(Scratch::default, |scratch, (block, statistics)| {
                // SAFETY: an `isa` means AVX-512.
                self.isa.with(|| unsafe {
                    scratch.logits(self.isa, x, block, tiles, weight.rows, |columns, logits| {
                        let targets = &self.targets[block * ROWS..];
                        let rows = logits.as_chunks::<COLUMNS>().0;
                        for ((row, target), logits) in statistics.iter_mut().zip(targets).zip(rows) {
                            row.update::<S>(logits);
                            if let Some(target) = in_block(*target, first + columns) {
                                row.target = logits[target];
                            }
                        }
                    });
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
            blocks.for_each_init(Scratch::default, |scratch, (block, (dx, statistics))| {
                let mut gradient = std::mem::take(&mut scratch.gradient);
                gradient.resize(ROWS / TILE, COLUMNS / STEP, S::PARTS);
                // SAFETY: an `isa` means AVX-512. The tiles of these rows in `pairs` are this task's alone.
                self.isa.with(|| unsafe {
                    scratch.logits(self.isa, x, block, weight_rows, weight.rows, |columns, logits| {
                        let tiles = pairs_of_tiles(COLUMNS.min(weight.rows - columns));
                        let pairs =
                            pairs.get().add(block * ROWS / STEP * step_stride + columns / TILE * S::PARTS * TILE_LEN);
                        let out = Gradient { left: &mut gradient, pairs: Shared(pairs), step_stride };
                        let targets = &self.targets[block * ROWS..];
                        out.write::<S>(logits, tiles, statistics, mean, |row| in_block(targets[row], first + columns));
                        let k = columns / STEP..columns / STEP + tiles / 2;
                        let weight = weight_columns.part(0..weight_columns.rows(), k.clone());
                        let gradient = gradient.part(0..ROWS / TILE, 0..k.len());
                        multiply(self.isa, gradient, weight, dx, width, true);
                    });
                });
                scratch.gradient = gradient;
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

/// Where the token `target` is in a block of tokens from `first` on.
fn in_block(target: u32, first: usize) -> Option<usize> {
    (target as usize).checked_sub(first).filter(|at| *at < COLUMNS)
}

impl Scratch {
    /// Computes the logits of a block of rows with all the `n` columns in `weight`, and hands [`COLUMNS`] at a time on, with
    /// the first of them: `(ROWS, COLUMNS)`. Columns that do not exist are [`NO_LOGIT`].
    ///
    /// # Safety
    /// As for [`Isa::block`].
    unsafe fn logits(
        &mut self,
        isa: Isa,
        x: &Tiles,
        block: usize,
        weight: &Tiles,
        n: usize,
        mut body: impl FnMut(usize, &mut [f32]),
    ) {
        let rows = block * ROWS / TILE..x.rows().min((block + 1) * ROWS / TILE);
        let x = x.part(rows, 0..x.steps());
        self.logits.resize(ROWS * COLUMNS, 0.0);
        for tile in (0..weight.rows()).step_by(COLUMNS / TILE) {
            let tiles = tile..weight.rows().min(tile + COLUMNS / TILE);
            let weight = weight.part(tiles, 0..weight.steps());
            // SAFETY: promised by the caller.
            unsafe { multiply(isa, x.clone(), weight, &mut self.logits, COLUMNS, false) };
            if n - tile * TILE < COLUMNS {
                self.logits.chunks_exact_mut(COLUMNS).for_each(|row| row[n - tile * TILE..].fill(NO_LOGIT));
            }
            body(tile * TILE, &mut self.logits);
        }
    }
}

impl Statistics {
    /// Takes more logits of the row in.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn update<S: Number>(&mut self, logits: &[f32; COLUMNS]) {
        const LANES: usize = 4;
        // SAFETY: inside the array.
        let at = |i: usize| unsafe { _mm512_loadu_ps(logits.as_ptr().add(i * TILE)) };
        let mut maxima = [_mm512_set1_ps(self.max); LANES];
        for first in (0..COLUMNS / TILE).step_by(LANES) {
            for (i, max) in maxima.iter_mut().enumerate() {
                *max = _mm512_max_ps(*max, at(first + i));
            }
        }
        let max = _mm512_max_ps(_mm512_max_ps(maxima[0], maxima[1]), _mm512_max_ps(maxima[2], maxima[3]));
        let max = _mm512_reduce_max_ps(max);
        let factor = _mm512_set1_ps(std::f32::consts::LOG2_E);
        let shift = _mm512_set1_ps(max * std::f32::consts::LOG2_E);
        let mut sums = [_mm512_setzero_ps(); LANES];
        for first in (0..COLUMNS / TILE).step_by(LANES) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: promised by the caller.
                let p = unsafe { S::exp2(_mm512_fmsub_ps(at(first + i), factor, shift)) };
                *sum = _mm512_add_ps(*sum, p);
            }
        }
        let sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
        self.sum = self.sum * (self.max - max).exp() + _mm512_reduce_add_ps(sum);
        self.max = max;
    }
}

/// Where the gradient of a block of logits goes: to the tiles of a left operand, and to those of a right one whose `k`
/// are the rows.
struct Gradient<'a> {
    left: &'a mut Tiles,
    /// The first tile of these columns.
    pairs: Shared<bf16>,
    /// Numbers from one step of `pairs` to the next.
    step_stride: usize,
}

impl Gradient<'_> {
    /// `mean · (softmax - one-hot)`, from `logits`, `(ROWS, COLUMNS)`, the first `tiles` tiles of their columns.
    ///
    /// # Safety
    /// The processor has AVX-512, and no one else uses these tiles of `pairs`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn write<S: Source + Number>(
        self,
        logits: &[f32],
        tiles: usize,
        statistics: &[Statistics],
        mean: f32,
        target: impl Fn(usize) -> Option<usize>,
    ) {
        assert!(logits.len() == ROWS * COLUMNS && tiles <= COLUMNS / TILE && statistics.len() <= ROWS);
        let factor = _mm512_set1_ps(std::f32::consts::LOG2_E);
        let log2_mean = mean.log2();
        // Of softmax's logarithm, with `mean` in it.
        let shift = |row: usize| match statistics.get(row) {
            Some(statistics) => statistics.logsumexp() * std::f32::consts::LOG2_E - log2_mean,
            None => NO_ROW,
        };
        let (left_row, left_step) = self.left.strides();
        let left = self.left.at_mut(0, 0).as_mut_ptr();
        for pair in 0..statistics.len().next_multiple_of(STEP) / 2 {
            let row = 2 * pair;
            let shifts = [_mm512_set1_ps(shift(row)), _mm512_set1_ps(shift(row + 1))];
            // SAFETY: rows of `logits`, of a row of tiles, and of a step, by the caller's promise this task's.
            unsafe {
                let from = logits.as_ptr().add(row * COLUMNS);
                let left = left.add(row / TILE * left_row + row % TILE * STEP);
                let pairs = self.pairs.get().add(row / STEP * self.step_stride + row % STEP * TILE);
                let gradients = |tile: usize| {
                    let p = |i: usize| {
                        let logits = _mm512_loadu_ps(from.add(i * COLUMNS + tile * TILE));
                        S::exp2(_mm512_fmsub_ps(logits, factor, shifts[i]))
                    };
                    [p(0), p(1)]
                };
                let store = |tile: usize, gradients: [__m512; 2]| {
                    let left = left.add(tile / 2 * left_step + tile % 2 * TILE);
                    let pairs = pairs.add(tile * S::PARTS * TILE_LEN);
                    let [mut first, mut second] = gradients;
                    for part in 0..S::PARTS {
                        let (left, pairs) = (left.add(part * TILE_LEN), pairs.add(part * TILE_LEN));
                        let rows = take_bf16(&mut first, &mut second);
                        _mm256_storeu_si256(left.cast(), _mm512_castsi512_si256(rows));
                        _mm256_storeu_si256(left.add(STEP).cast(), _mm512_extracti64x4_epi64::<1>(rows));
                        _mm512_storeu_si512(pairs.cast(), paired(rows));
                    }
                };
                for tile in 0..tiles {
                    store(tile, gradients(tile));
                }
                // The few tiles that have a target, again: most have none.
                let targets = [0, 1].map(|i| if row + i < statistics.len() { target(row + i) } else { None });
                for tile in targets.into_iter().flatten().map(|target| target / TILE) {
                    let mut gradients = gradients(tile);
                    for (gradient, target) in gradients.iter_mut().zip(targets) {
                        if let Some(target) = target.filter(|target| target / TILE == tile) {
                            *gradient =
                                _mm512_mask_sub_ps(*gradient, 1 << (target % TILE), *gradient, _mm512_set1_ps(mean));
                        }
                    }
                    store(tile, gradients);
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
