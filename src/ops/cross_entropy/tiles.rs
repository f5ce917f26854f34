//! Head and loss on matrix instructions. A row's exponentials are taken of its logits less that of its target, which is known
//! before all others. So they are final as soon as they are computed, and are multiplied with the weight while they are in the
//! cache, for the gradient of `x`; that of the weight waits for their sum, and they for it, in bf16, for some rows at a time.

use std::arch::x86_64::*;
use std::f32::consts::{LN_2, LOG2_E};
use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::ops::matmul::Mat;
use crate::ops::tiles::vector::{lanes, transpose, woven};
use crate::ops::tiles::{
    Consumer, Isa, Number, Packing, STEP, Shared, Source, Square, TILE, TILE_LEN, Tiles, multiply, multiply_each,
    pack_all, pairs_of_tiles, take_bf16,
};

/// Most rows of a block, and columns of logits that it goes through at a time: what they need of the weight, packed both ways,
/// stays in the second-level cache.
const ROWS: usize = 128;
const COLUMNS: usize = 512;

/// Rows of the vocabulary that are packed at a time: so many that threads seldom wait for one another.
const PART: usize = 8 * COLUMNS;

/// Most numbers that are kept for the gradient of the weight: 512 MiB.
const KEPT: usize = 1 << 28;

/// Rows of which they are kept at most: more would be no faster.
const MOST_ROWS: usize = 4096;

/// What the logits of a row that does not exist are compared to: exponentials are zero.
const NO_ROW: f32 = 1e30;

/// The output layer, and rows with targets.
#[derive(Clone, Copy)]
pub struct Head<'a, S> {
    isa: Isa,
    /// `(rows, dim)`.
    x: Mat<'a, S>,
    /// `(vocab_size, dim)`.
    weight: Mat<'a, S>,
    targets: &'a [u32],
    /// Rows of the vocabulary that are packed at a time.
    part: usize,
    /// Most numbers that are kept at a time.
    kept: usize,
}

/// Of the logits of a row, in binary logarithms.
#[derive(Clone, Copy)]
struct Statistics {
    target: f32,
    /// That of the target, unless other logits are so much larger that their exponentials would overflow.
    shift: f32,
    /// `Σ 2^(logit - shift)` over all but the target, by lanes.
    others: [f32; TILE],
}

impl Statistics {
    fn others(&self) -> f32 {
        self.others.iter().sum()
    }

    fn total(&self) -> f32 {
        self.others() + (self.target - self.shift).exp2()
    }

    /// In nats. Not less than zero, as rounding could have it, but NaN if it is.
    fn loss(&self) -> f32 {
        let loss = self.total().ln() + LN_2 * (self.shift - self.target);
        if loss < 0.0 { 0.0 } else { loss }
    }
}

/// Some rows, and what is known of them after a part of the vocabulary.
struct Block<'a> {
    /// The first of them.
    first: usize,
    statistics: &'a mut [Statistics],
    /// `Σ 2^(logit - shift) · weight` over all but the target, `(rows, dim)` in whole tiles; empty if it is not wanted.
    products: &'a mut [f32],
}

/// Where tiles begin, and numbers from one row of tiles to the next, and from one step to the next.
#[derive(Clone, Copy)]
struct Places {
    first: Shared<bf16>,
    row: usize,
    step: usize,
}

impl Places {
    fn of(tiles: &mut Tiles) -> Self {
        let (row, step) = tiles.strides();
        Self { first: Shared(tiles.at_mut(0, 0).as_mut_ptr()), row, step }
    }

    /// From row `row` of tiles, step `step` on.
    fn from(self, row: usize, step: usize) -> Self {
        Self { first: Shared(self.at(row, step)), ..self }
    }

    fn at(self, row: usize, step: usize) -> *mut bf16 {
        self.first.get().wrapping_add(row * self.row + step * self.step)
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
        Self { isa, x, weight, targets, part: PART, kept: KEPT }
    }

    /// The sum of all losses.
    pub fn loss(&self) -> f64 {
        sum_of_losses(&self.statistics(&mut [], None))
    }

    /// The sum of all losses. Writes `mean` times its gradient with respect to `x` to `dx`, `(rows, dim)`, and adds that
    /// with respect to the weight to `grad`, `(vocab_size, dim)`, if it is wanted.
    pub fn loss_grad(&self, mean: f32, dx: &mut [f32], mut grad: Option<&mut [f32]>) -> f64 {
        let dim = self.x.cols;
        let rows = match grad {
            // A power of two, so that its blocks keep all threads busy.
            Some(_) => 1 << (self.kept / S::PARTS / self.weight.rows).clamp(ROWS, MOST_ROWS).ilog2(),
            None => self.x.rows,
        };
        let mut kept = Tiles::default();
        let chunks = self.x.data.chunks(rows * dim).zip(self.targets.chunks(rows)).zip(dx.chunks_mut(rows * dim));
        chunks
            .map(|((x, targets), dx)| {
                let head = Self { x: Mat::new(x, targets.len(), dim), targets, ..*self };
                head.loss_grad_at_once(mean, dx, grad.as_deref_mut(), &mut kept)
            })
            .sum()
    }

    /// As [`Self::loss_grad`], keeping the exponentials of all rows.
    fn loss_grad_at_once(&self, mean: f32, dx: &mut [f32], grad: Option<&mut [f32]>, kept: &mut Tiles) -> f64 {
        let (rows, dim) = (self.x.rows, self.x.cols);
        let width = dim.next_multiple_of(TILE);
        let mut products = vec![0f32; rows.next_multiple_of(STEP) * width];
        let statistics = if grad.is_some() {
            kept.resize(pairs_of_tiles(self.weight.rows), rows.div_ceil(STEP), S::PARTS);
            self.statistics(&mut products, Some(Places::of(kept)))
        } else {
            self.statistics(&mut products, None)
        };

        // Of a row's target, the softmax less one.
        let at_target = |row: &Statistics| -mean * row.others() / row.total();
        let weight_of = |target: u32| &self.weight.data[target as usize * dim..][..dim];
        let rows = statistics.par_iter().zip(self.targets);
        dx.par_chunks_exact_mut(dim).zip(products.par_chunks_exact(width)).zip(rows).for_each(
            |((dx, products), (row, target))| {
                let (others, target_share) = (mean / row.total(), at_target(row));
                for ((dx, product), weight) in dx.iter_mut().zip(products).zip(weight_of(*target)) {
                    *dx = others * product + target_share * weight.load();
                }
            },
        );
        if let Some(grad) = grad {
            let mut scaled = vec![S::default(); self.x.data.len()];
            let rows = self.x.data.par_chunks_exact(dim).zip(&statistics);
            scaled.par_chunks_exact_mut(dim).zip(rows).for_each(|(scaled, (x, row))| {
                let others = mean / row.total();
                scaled.iter_mut().zip(x).for_each(|(scaled, x)| *scaled = S::store(others * x.load()));
            });
            let scaled = Mat::new(&scaled, self.x.rows, dim);
            self.add_products(&pack_all(vec![(scaled.t(), Packing::Left)])[0], kept, grad);
            for ((x, target), row) in self.x.data.chunks_exact(dim).zip(self.targets).zip(&statistics) {
                let grad = &mut grad[*target as usize * dim..][..dim];
                let target_share = at_target(row);
                grad.iter_mut().zip(x).for_each(|(grad, x)| *grad += target_share * x.load());
            }
        }
        sum_of_losses(&statistics)
    }

    /// Goes through all logits. Adds exponentials times the weight to `products`, unless that is empty. Keeps them too if there
    /// is a place for them: `(vocabulary, rows)`, as tiles of a right operand.
    fn statistics(&self, products: &mut [f32], kept: Option<Places>) -> Vec<Statistics> {
        let dim = self.x.cols;
        let rows = self.x.data.par_chunks_exact(dim).zip(self.targets);
        let mut statistics: Vec<Statistics> = rows
            .map(|(x, target)| {
                let weight = &self.weight.data[*target as usize * dim..][..dim];
                let target = LOG2_E * x.iter().zip(weight).map(|(x, weight)| x.load() * weight.load()).sum::<f32>();
                Statistics { target, shift: target, others: [0.0; TILE] }
            })
            .collect();
        // Fewer rows where that gives each thread two blocks. No sum depends on it.
        let rows = (self.x.rows / 2 / rayon::current_num_threads()).next_multiple_of(STEP).clamp(STEP, ROWS);
        let mut products = products.chunks_mut(rows * dim.next_multiple_of(TILE));
        let mut blocks: Vec<Block> = (0..)
            .step_by(rows)
            .zip(statistics.chunks_mut(rows))
            .map(|(first, statistics)| Block { first, statistics, products: products.next().unwrap_or_default() })
            .collect();
        let with_products = !blocks[0].products.is_empty();
        let x = &pack_all(vec![(self.x, Packing::Left)])[0];
        for first in (0..self.weight.rows).step_by(self.part) {
            let n = self.part.min(self.weight.rows - first);
            let weight = Mat::new(&self.weight.data[first * dim..], n, dim);
            let mut layouts = vec![(weight, Packing::Right)];
            layouts.extend(with_products.then_some((weight.t(), Packing::Right)));
            let weight = &pack_all(layouts)[..];
            blocks.par_iter_mut().for_each_init(Tiles::default, |left, block| {
                // SAFETY: an `isa` means AVX-512.
                self.isa.with(|| unsafe { self.go_through(block, x, weight, first..first + n, left, kept) });
            });
        }
        statistics
    }

    /// What the logits of `vocabulary` add. `weight`: its rows of the weight, packed for logits and, if they are wanted, for
    /// products.
    ///
    /// # Safety
    /// Inside [`Isa::with`]. The steps of `kept` of these rows are the caller's alone.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn go_through(
        &self,
        block: &mut Block,
        x: &Tiles,
        weight: &[Tiles],
        vocabulary: Range<usize>,
        left: &mut Tiles,
        kept: Option<Places>,
    ) {
        let width = self.x.cols.next_multiple_of(TILE);
        let tiles = pairs_of_tiles(block.statistics.len());
        let x = x.part(block.first / TILE..x.rows().min(block.first / TILE + tiles), 0..x.steps());
        left.resize(ROWS / TILE, COLUMNS / STEP, S::PARTS);
        for first in vocabulary.clone().step_by(COLUMNS) {
            let (columns, at) = (COLUMNS.min(vocabulary.end - first), first - vocabulary.start);
            let logits = weight[0].part(at / TILE..(at + columns).div_ceil(TILE), 0..weight[0].steps());
            let to = match weight.len() {
                1 => None,
                _ => Some((Places::of(left), kept.map(|kept| kept.from(first / TILE, block.first / STEP)))),
            };
            // SAFETY: promised by the caller; `to` has room for the block.
            unsafe {
                let mut found = Exponentials::<S>::new(block, self.targets, first, columns, to);
                multiply_each(self.isa, &x, &logits, &mut found);
                if !found.sums.iter().all(is_in_range) {
                    let mut maxima = Maxima { rows: [f32::MIN; ROWS], columns };
                    multiply_each(self.isa, &x, &logits, &mut maxima);
                    let factors = block.raise(&found.sums, &maxima.rows);
                    if let Some(kept) = kept {
                        block.scale(kept, first / TILE, &factors);
                    }
                    found = Exponentials::new(block, self.targets, first, columns, to);
                    multiply_each(self.isa, &x, &logits, &mut found);
                }
                for (row, others) in block.statistics.iter_mut().zip(found.sums) {
                    row.others = others;
                }
                if let [_, weight] = weight {
                    let left = left.part(0..tiles, 0..columns.div_ceil(STEP));
                    let weight = weight.part(0..weight.rows(), at / STEP..(at + columns).div_ceil(STEP));
                    multiply(self.isa, left, weight, block.products, width, true);
                }
            }
        }
    }

    /// `grad += (xᵀ exponentials)ᵀ`, `(vocabulary, dim)`.
    fn add_products(&self, x_columns: &Tiles, exponentials: &Tiles, grad: &mut [f32]) {
        /// Steps that are summed over before sums go back to memory.
        const STEPS: usize = 16;
        let dim = self.x.cols;
        // As many columns as keep the sums in the cache.
        let columns = ((1 << 16) / dim.next_multiple_of(TILE) / STEP).clamp(1, 8) * STEP;
        let tasks = grad.par_chunks_mut(columns * dim).enumerate();
        tasks.for_each_init(Vec::new, |sums: &mut Vec<f32>, (task, grad)| {
            let first = task * columns / TILE;
            let tiles = first..exponentials.rows().min(first + columns / TILE);
            let width = tiles.len() * TILE;
            sums.resize(x_columns.rows() * TILE * width, 0.0);
            // SAFETY: an `isa` means AVX-512.
            self.isa.with(|| unsafe {
                for step in (0..exponentials.steps()).step_by(STEPS) {
                    let steps = step..exponentials.steps().min(step + STEPS);
                    let x = x_columns.part(0..x_columns.rows(), steps.clone());
                    multiply(self.isa, x, exponentials.part(tiles.clone(), steps), sums, width, step > 0);
                }
                add_transposed(sums, width, grad, dim);
            });
        });
    }
}

fn sum_of_losses(statistics: &[Statistics]) -> f64 {
    statistics.iter().map(|row| f64::from(row.loss())).sum()
}

/// Whether sums leave f32 some room, and what is divided by them some too. Decided by row, so that no row depends on others.
fn is_in_range(sums: &[f32; TILE]) -> bool {
    sums.iter().all(|sum| *sum < 1e20)
}

impl Block<'_> {
    /// Raises the shifts of rows whose `sums` are not in range, as `maxima` of their logits demand. Returns the powers of two
    /// by which everything of a row becomes smaller.
    fn raise(&mut self, sums: &[[f32; TILE]; ROWS], maxima: &[f32; ROWS]) -> [f32; ROWS] {
        let mut factors = [1.0; ROWS];
        let width = self.products.len() / self.statistics.len().next_multiple_of(STEP);
        for (i, row) in self.statistics.iter_mut().enumerate().filter(|(i, _)| !is_in_range(&sums[*i])) {
            let by = (LOG2_E * maxima[i] - row.shift).ceil().max(0.0);
            row.shift += by;
            factors[i] = (-by).exp2();
            let products = &mut self.products[i * width..][..width];
            row.others.iter_mut().chain(products).for_each(|sum| *sum *= factors[i]);
        }
        factors
    }

    /// Scales what has been kept of these rows, up to tile `n`.
    ///
    /// # Safety
    /// It has been written, and is the caller's alone.
    unsafe fn scale(&self, kept: Places, n: usize, factors: &[f32; ROWS]) {
        for (step, factors) in factors[..self.statistics.len()].chunks(STEP).enumerate() {
            for tile in 0..n {
                let first = kept.at(tile, self.first / STEP + step);
                // SAFETY: promised by the caller.
                let numbers = unsafe { std::slice::from_raw_parts_mut(first, kept.step) };
                for (i, number) in numbers.iter_mut().enumerate() {
                    // Of each pair of rows, all columns.
                    if let Some(factor) = factors.get(i % TILE_LEN / STEP * 2 + i % 2) {
                        *number = bf16::from_f32(number.to_f32() * factor);
                    }
                }
            }
        }
    }
}

/// Exponentials of [`COLUMNS`] logits of a block of rows, but for the targets': sums of them, and themselves, as tiles of a
/// left operand and, to be kept, as those of a right one whose `k` are the rows.
struct Exponentials<S> {
    shifts: [f32; ROWS],
    /// Where the targets are among the columns; anywhere else, if they are not.
    targets: [usize; ROWS],
    sums: [[f32; TILE]; ROWS],
    columns: usize,
    to: Option<(Places, Option<Places>)>,
    of: PhantomData<S>,
}

impl<S> Exponentials<S> {
    fn new(block: &Block, targets: &[u32], first: usize, columns: usize, to: Option<(Places, Option<Places>)>) -> Self {
        let (shifts, targets_at, sums) = ([NO_ROW; ROWS], [usize::MAX; ROWS], [[0.0; TILE]; ROWS]);
        let mut found = Self { shifts, targets: targets_at, sums, columns, to, of: PhantomData };
        for (i, (row, target)) in block.statistics.iter().zip(&targets[block.first..]).enumerate() {
            found.shifts[i] = row.shift;
            found.targets[i] = (*target as usize).wrapping_sub(first);
            found.sums[i] = row.others;
        }
        found
    }
}

impl<S: Source + Number> Consumer for Exponentials<S> {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn rows(&mut self, square: Square, pair: usize) {
        let mut exponentials = [[_mm512_setzero_ps(); 2]; 2];
        let first = square.row + 2 * pair;
        for (i, exponentials) in exponentials.iter_mut().enumerate() {
            let row = first + i;
            // SAFETY: a row of the square, and one of ours, which have as many numbers.
            unsafe {
                *exponentials = of_row::<S>(&square, 2 * pair + i, self.shifts[row], self.columns);
                let target = self.targets[row].wrapping_sub(square.column);
                if target < STEP {
                    let of_tile = &mut exponentials[target / TILE];
                    *of_tile = _mm512_maskz_mov_ps(!(1 << (target % TILE)), *of_tile);
                }
                let sums = self.sums[row].as_mut_ptr();
                let sum = _mm512_add_ps(exponentials[0], exponentials[1]);
                _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), sum));
            }
        }
        let Some((left, kept)) = self.to else { return };
        let [[a, b], [c, d]] = &mut exponentials;
        for part in 0..S::PARTS {
            let rows = [take_bf16(a, b), take_bf16(c, d)];
            // SAFETY: inside the tiles of the block, by the promise of who made this.
            unsafe {
                let left = left.at(first / TILE, square.column / STEP).add(part * TILE_LEN + first % TILE * STEP);
                _mm512_storeu_si512(left.cast(), rows[0]);
                _mm512_storeu_si512(left.add(STEP).cast(), rows[1]);
                if let Some(kept) = kept {
                    for (tile, woven) in [0, 1].into_iter().zip(woven(rows[0], rows[1])) {
                        let kept = kept.at(square.column / TILE + tile, first / STEP);
                        _mm512_storeu_si512(kept.add(part * TILE_LEN + first % STEP * TILE).cast(), woven);
                    }
                }
            }
        }
    }
}

/// `2^(logit - shift)` of row `i` of a square of logits, with the logit in binary; zero from column `columns` of the product
/// on.
///
/// # Safety
/// The processor has AVX-512; the square has the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn of_row<S: Number>(square: &Square, i: usize, shift: f32, columns: usize) -> [__m512; 2] {
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
            let expected = 4.0 * rows as f32;
            assert!(grad[(vocab_size - 1) * dim..].iter().all(|g| (g / expected - 1.0).abs() < 1e-2), "{isa:?}");
            assert!(grad[..dim].iter().all(|g| *g == -4.0), "{isa:?}");
        }
    }

    /// Logits that leave the range of f32 when much of what others add has been kept already.
    #[test]
    fn rows_whose_shift_is_raised_keep_what_they_have() {
        let (rows, dim, vocab_size) = (70, 32, 1500);
        let (x, mut weight) = (vec![bf16::ONE; rows * dim], vec![bf16::ZERO; vocab_size * dim]);
        // Of these tokens the logits are 44, 48 and 46 for every row; all others' are zero.
        for (token, logit) in [(3, 44.0), (600, 48.0), (1400, 46.0)] {
            weight[token * dim] = bf16::from_f32(logit);
        }
        let targets: Vec<u32> = (0..rows as u32).map(|row| 10 + row % 5 * 200).collect();
        let total: f64 = [44f64, 48.0, 46.0].map(|logit| (logit - 48.0).exp()).iter().sum();
        let loss = 48.0 + total.ln();
        for isa in bf16::isas() {
            let head = Head::new(*isa, &x, &weight, dim, &targets);
            let (mut dx, mut grad) = (vec![0f32; rows * dim], vec![0f32; vocab_size * dim]);
            let found = head.loss_grad(1.0, &mut dx, Some(&mut grad));
            assert!((found / rows as f64 - loss).abs() < 1e-6 * loss, "{isa:?}: {found}");
            for (token, logit) in [(3, 44.0), (600, 48.0), (1400, 46f64)] {
                let expected = rows as f64 * (logit - 48.0).exp() / total;
                let found = f64::from(grad[token * dim]);
                assert!((found / expected - 1.0).abs() < 1e-2, "{isa:?}, token {token}: {found}, not {expected}");
            }
            let expected: f64 = [44f64, 48.0, 46.0].map(|logit| logit * (logit - 48.0).exp() / total).iter().sum();
            assert!(dx.chunks(dim).all(|dx| (f64::from(dx[0]) / expected - 1.0).abs() < 1e-2), "{isa:?}: {dx:?}");
        }
    }

    fn check<S: Source + Number>(isas: &[Isa], x: &[S], weight: &[S], targets: &[u32]) {
        for isa in isas {
            let run = |part: usize, kept: usize| {
                let head = Head { part, kept, ..Head::new(*isa, x, weight, x.len() / targets.len(), targets) };
                let (mut dx, mut grad) = (vec![0f32; x.len()], vec![0f32; weight.len()]);
                let loss = head.loss_grad(0.01, &mut dx, Some(&mut grad));
                assert_eq!(loss, head.loss());
                (loss, dx, grad)
            };
            let whole = on_threads(1, || run(PART, KEPT));
            assert!(whole == on_threads(3, || run(PART, KEPT)), "{isa:?}");
            assert!(whole == run(COLUMNS, KEPT), "{isa:?}");
            // Of few rows at a time, gradients of the weight are added in another order.
            let (loss, dx, grad) = run(PART, 1);
            assert!((loss / whole.0 - 1.0).abs() < 1e-6 && dx == whole.1, "{isa:?}");
            assert!(grad.iter().zip(&whole.2).all(|(few, all)| (few - all).abs() < 1e-6), "{isa:?}");
        }
    }
}
