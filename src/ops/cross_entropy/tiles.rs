//! Head and loss in bf16 on matrix instructions. Logits live in the cache only: they are computed once for the statistics
//! of their rows and, because a product costs less than memory, again for the gradient.

use std::arch::x86_64::*;

use half::bf16;
use rayon::prelude::*;

use crate::ops::matmul::Mat;
use crate::ops::tiles::vector::{exp2, lanes, paired, rounded, transpose};
use crate::ops::tiles::{Isa, Packing, STEP, Shared, TILE, TILE_LEN, Tiles, multiply, pack_all, pairs_of_tiles};

/// Rows of `x`, and columns of logits, of a block that is in the cache.
const ROWS: usize = 128;
const COLUMNS: usize = 512;

/// Numbers in the gradient of a part of the logits: 32 MiB.
const GRADIENT: usize = 1 << 24;

/// The logit's exponentials relative to a row that does not exist: all zero.
const NO_ROW: f32 = 1e30;

/// The output layer, and rows with targets.
pub struct Head<'a> {
    isa: Isa,
    /// `(rows, dim)`.
    x: Mat<'a, bf16>,
    /// `(vocab_size, dim)`.
    weight: Mat<'a, bf16>,
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
    x: Tiles,
    logits: Vec<f32>,
    gradient: Tiles,
}

impl<'a> Head<'a> {
    /// Of rows of `dim` numbers.
    pub fn new(isa: Isa, x: &'a [bf16], weight: &'a [bf16], dim: usize, targets: &'a [u32]) -> Self {
        let (x, weight) = (Mat::new(x, targets.len(), dim), Mat::new(weight, weight.len() / dim, dim));
        let part = (GRADIENT / x.rows / COLUMNS * COLUMNS).max(COLUMNS);
        Self { isa, x, weight, targets, part }
    }

    /// The sum of all losses.
    pub fn loss(&self) -> f64 {
        self.sum_of(&self.statistics())
    }

    fn sum_of(&self, statistics: &[Statistics]) -> f64 {
        statistics.iter().map(|row| f64::from(row.logsumexp()) - f64::from(row.target)).sum()
    }

    /// The rows `first..first + part` of the weight.
    fn weight_part(&self, first: usize) -> Mat<'_, bf16> {
        let n = self.part.min(self.weight.rows - first);
        Mat::new(&self.weight.data[first * self.weight.cols..], n, self.weight.cols)
    }

    fn statistics(&self) -> Vec<Statistics> {
        let mut statistics = vec![Statistics { max: f32::MIN, sum: 0.0, target: 0.0 }; self.x.rows];
        for first in (0..self.weight.rows).step_by(self.part) {
            let weight = self.weight_part(first);
            let [tiles] = &pack_all(vec![(weight, Packing::Right)])[..] else { unreachable!("one in, one out") };
            let blocks = statistics.par_chunks_mut(ROWS).enumerate();
            blocks.for_each_init(Scratch::default, |scratch, (block, statistics)| {
                // SAFETY: an `isa` means AVX-512.
                self.isa.with(|| unsafe {
                    scratch.logits(self, block, tiles, |columns, logits| {
                        let width = COLUMNS.min(weight.rows - columns);
                        let targets = &self.targets[block * ROWS..];
                        for ((row, target), logits) in statistics.iter_mut().zip(targets).zip(logits.chunks(COLUMNS)) {
                            row.update(&logits[..width]);
                            if let Some(target) = in_block(*target, first + columns, width) {
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
    /// with respect to the weight to `grad`, `(vocab_size, dim)`.
    pub fn loss_grad(&self, mean: f32, dx: &mut [f32], grad: &mut [f32]) -> f64 {
        let statistics = self.statistics();
        let (rows, dim) = (self.x.rows, self.x.cols);
        let width = dim.next_multiple_of(TILE);
        let steps = rows.div_ceil(STEP);
        let mut sums = vec![0f32; rows.next_multiple_of(ROWS) * width];
        let mut gradient = Tiles::default();
        let mut packed = pack_all(vec![(self.x.t(), Packing::Left)]);
        let x_columns = packed.remove(0);
        for first in (0..self.weight.rows).step_by(self.part) {
            let weight = self.weight_part(first);
            let packed = pack_all(vec![(weight, Packing::Right), (weight.t(), Packing::Right)]);
            let [weight_rows, weight_columns] = &packed[..] else { unreachable!("two in, two out") };
            // A block of rows writes its own steps: they lie together, lest each vector fall into a page of its own.
            gradient.resize_by_step(pairs_of_tiles(weight.rows), steps);
            let step_stride = gradient.strides().1;
            let pairs = Shared(gradient.at_mut(0, 0).as_mut_ptr());
            let blocks = sums.par_chunks_mut(ROWS * width).zip(statistics.par_chunks(ROWS)).enumerate();
            blocks.for_each_init(Scratch::default, |scratch, (block, (dx, statistics))| {
                let mut gradient = std::mem::take(&mut scratch.gradient);
                gradient.resize(ROWS / TILE, COLUMNS / STEP);
                // SAFETY: an `isa` means AVX-512. The tiles of these rows in `pairs` are this task's alone.
                self.isa.with(|| unsafe {
                    scratch.logits(self, block, weight_rows, |columns, logits| {
                        let valid = COLUMNS.min(weight.rows - columns);
                        let first_step = block * ROWS / STEP;
                        let out = Gradient { left: &mut gradient, pairs, step_stride, first_step };
                        let targets = &self.targets[block * ROWS..];
                        out.write(logits, valid, columns, statistics, mean, |row| {
                            in_block(targets[row], first + columns, valid)
                        });
                        let k = columns / STEP..(columns + valid).div_ceil(STEP);
                        let weight = weight_columns.part(0..weight_columns.rows(), k.clone());
                        let gradient = gradient.part(0..ROWS / TILE, 0..k.len());
                        multiply(self.isa, gradient, weight, dx, width, true);
                    });
                });
                scratch.gradient = gradient;
            });
            let grad = &mut grad[first * dim..(first + weight.rows) * dim];
            self.add_products(&x_columns, &gradient, grad);
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

/// Where the token `target` is in a block of `width` tokens from `first` on.
fn in_block(target: u32, first: usize, width: usize) -> Option<usize> {
    (target as usize).checked_sub(first).filter(|at| *at < width)
}

impl Scratch {
    /// Computes the logits of a block of rows with all the columns in `weight`, and hands [`COLUMNS`] at a time on, with
    /// the first of them: `(ROWS, COLUMNS)`.
    ///
    /// # Safety
    /// As for [`Isa::block`].
    unsafe fn logits(&mut self, head: &Head, block: usize, weight: &Tiles, mut body: impl FnMut(usize, &mut [f32])) {
        let rows = ROWS.min(head.x.rows - block * ROWS);
        let x = Mat::new(&head.x.data[block * ROWS * head.x.cols..], rows, head.x.cols);
        self.logits.resize(ROWS * COLUMNS, 0.0);
        // SAFETY: promised by the caller.
        unsafe {
            self.x.pack(&x, ROWS / TILE, x.cols(), Packing::Left);
            for tile in (0..weight.rows()).step_by(COLUMNS / TILE) {
                let tiles = tile..weight.rows().min(tile + COLUMNS / TILE);
                let weight = weight.part(tiles, 0..weight.steps());
                multiply(head.isa, self.x.all(), weight, &mut self.logits, COLUMNS, false);
                body(tile * TILE, &mut self.logits);
            }
        }
    }
}

impl Statistics {
    /// Takes more logits of the row in.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn update(&mut self, logits: &[f32]) {
        let chunks = || logits.chunks(TILE).map(|chunk| (lanes(chunk.len()), chunk.as_ptr()));
        let mut maxima = _mm512_set1_ps(self.max);
        for (lanes, from) in chunks() {
            // SAFETY: masked to the chunk.
            let values = unsafe { _mm512_maskz_loadu_ps(lanes, from) };
            maxima = _mm512_mask_max_ps(maxima, lanes, maxima, values);
        }
        let max = _mm512_reduce_max_ps(maxima);
        let factor = _mm512_set1_ps(std::f32::consts::LOG2_E);
        let shift = _mm512_set1_ps(max * std::f32::consts::LOG2_E);
        let mut sums = _mm512_setzero_ps();
        for (lanes, from) in chunks() {
            // SAFETY: as above.
            let values = unsafe { _mm512_maskz_loadu_ps(lanes, from) };
            sums = _mm512_mask_add_ps(sums, lanes, sums, exp2(_mm512_fmsub_ps(values, factor, shift)));
        }
        self.sum = self.sum * (self.max - max).exp() + _mm512_reduce_add_ps(sums);
        self.max = max;
    }
}

/// Where the gradient of a block of logits goes: to the tiles of a left operand, and to those of a right one whose `k`
/// are the rows.
struct Gradient<'a> {
    left: &'a mut Tiles,
    pairs: Shared<bf16>,
    /// Numbers from one step of `pairs` to the next, and the first step of this block.
    step_stride: usize,
    first_step: usize,
}

impl Gradient<'_> {
    /// `mean · (softmax - one-hot)`, from `logits`, `(ROWS, COLUMNS)`, of which `valid` columns from `column` on exist.
    ///
    /// # Safety
    /// The processor has AVX-512, and no one else uses these tiles of `pairs`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn write(
        self,
        logits: &[f32],
        valid: usize,
        column: usize,
        statistics: &[Statistics],
        mean: f32,
        target: impl Fn(usize) -> Option<usize>,
    ) {
        let factor = _mm512_set1_ps(std::f32::consts::LOG2_E);
        let scale = _mm512_set1_ps(mean);
        let shift = |row: usize| {
            _mm512_set1_ps(statistics.get(row).map_or(NO_ROW, |s| s.logsumexp() * std::f32::consts::LOG2_E))
        };
        let pairs_of_rows = statistics.len().div_ceil(STEP) * STEP / 2;
        let tiles = pairs_of_tiles(valid);
        for pair in 0..pairs_of_rows {
            let rows = [2 * pair, 2 * pair + 1];
            let shifts = rows.map(shift);
            let targets = rows.map(|row| if row < statistics.len() { target(row) } else { None });
            for tile in 0..tiles {
                let exists = match valid.checked_sub(tile * TILE) {
                    Some(n) if n > 0 => lanes(n),
                    _ => 0,
                };
                let mut values = [_mm512_setzero_ps(); 2];
                for i in 0..2 {
                    let at = rows[i] * COLUMNS + tile * TILE;
                    // SAFETY: `logits` has all columns of the block.
                    let logits = unsafe { _mm512_loadu_ps(logits[at..at + TILE].as_ptr()) };
                    let p = exp2(_mm512_fmsub_ps(logits, factor, shifts[i]));
                    let one = match targets[i].and_then(|target| target.checked_sub(tile * TILE)) {
                        Some(lane) if lane < TILE => 1 << lane,
                        _ => 0,
                    };
                    let p = _mm512_mask_sub_ps(p, one, p, _mm512_set1_ps(1.0));
                    values[i] = _mm512_maskz_mul_ps(exists, p, scale);
                    let to = self.left.at_mut(rows[i] / TILE, tile / 2);
                    let to = to[rows[i] % TILE * STEP + tile % 2 * TILE..][..TILE].as_mut_ptr();
                    // SAFETY: half a row of a tile.
                    unsafe { _mm256_storeu_si256(to.cast(), rounded(values[i])) };
                }
                let step = self.first_step + pair / (STEP / 2);
                let at = step * self.step_stride + (column / TILE + tile) * TILE_LEN + pair % (STEP / 2) * STEP;
                // SAFETY: a row of a tile, by the caller's promise this task's.
                unsafe { _mm512_storeu_si512(self.pairs.get().add(at).cast(), paired(values[0], values[1])) };
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
    use crate::ops::tiles::Number;

    #[test]
    fn losses_and_gradients_do_not_depend_on_the_parts_of_the_vocabulary_or_the_threads() {
        let (rows, dim, vocab_size) = (300, 40, 1100);
        let x = convert::<_, bf16>(&random("x", rows * dim));
        let weight = convert::<_, bf16>(&random("weight", vocab_size * dim));
        let targets: Vec<u32> = (0..rows).map(|i| (i * 131 % vocab_size) as u32).collect();
        for isa in bf16::isas().iter() {
            let run = |part: Option<usize>| {
                let mut head = Head::new(*isa, &x, &weight, dim, &targets);
                head.part = part.unwrap_or(head.part);
                let (mut dx, mut grad) = (vec![0f32; rows * dim], vec![0f32; vocab_size * dim]);
                let loss = head.loss_grad(0.01, &mut dx, &mut grad);
                assert_eq!(loss, head.loss());
                (loss, dx, grad)
            };
            let whole = on_threads(1, || run(None));
            assert!(whole == on_threads(3, || run(None)), "{isa:?}");
            assert!(whole == run(Some(COLUMNS)), "{isa:?}");
        }
    }
}
