//! Products from blocks of tiles of bf16. The right operand is packed into tiles once for the whole product. The left one
//! is read where it lies if it is bf16 with dense rows, and else packed by the task that needs it.

use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::DType;
use half::bf16;
use rayon::prelude::*;

use super::{Dst, Mat, Product};
use crate::ops::host::Element;
use crate::ops::tiles::{Block, Isa, Left, Packing, STEP, Source, TILE, TILE_LEN, Tiles, pack_all};

/// Tiles of `k` that are summed before sums go back to memory: the operands of a block stay in the first-level cache.
const K_STEPS: usize = 16;

/// Where a task writes.
#[derive(Clone, Copy)]
enum Target {
    Add(*mut f32),
    F32(*mut f32),
    BF16(*mut bf16),
}

// SAFETY: tasks write disjoint blocks.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// A block of rows and columns of one product.
struct Task<'a, S> {
    a: Mat<'a, S>,
    b: &'a Tiles,
    n: usize,
    target: Target,
    rows: Range<usize>,
    /// Columns of tiles.
    columns: Range<usize>,
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    a: Vec<bf16>,
    c: Vec<f32>,
}

/// Runs all products, in parallel over blocks of all of them.
///
/// Each element is summed over `k` in an order that depends on `k` only, so results are the same bits on any number of
/// threads.
pub fn run<S: Source>(isa: Isa, products: Vec<Product<S>>) {
    let packed = pack_all(products.iter().map(|product| (product.b.t(), Packing::Right)).collect());
    let n_threads = rayon::current_num_threads();
    // Blocks of 128 rows by 512 columns; smaller ones where that would leave threads without work.
    let (mut rows, mut columns) = (8 * TILE, 32);
    let n_tasks = |rows: usize, columns: usize| -> usize {
        products.iter().map(|p| p.a.rows.div_ceil(rows) * p.b.cols.div_ceil(columns * TILE)).sum()
    };
    while n_threads > 1 && n_tasks(rows, columns) < 4 * n_threads && columns > 2 {
        if rows > 4 * TILE || columns <= 4 {
            rows = (rows / 2).max(2 * TILE)
        } else {
            columns /= 2
        }
        if rows == 2 * TILE {
            columns /= 2;
        }
    }
    let mut tasks = Vec::with_capacity(n_tasks(rows, columns));
    for (product, b) in products.into_iter().zip(&packed) {
        let (m, n) = (product.a.rows, product.b.cols);
        let target = match product.dst {
            Dst::Add(dst) => Target::Add(dst.as_mut_ptr()),
            Dst::F32(dst) => Target::F32(dst.as_mut_ptr().cast()),
            Dst::Rounded(dst) if S::DTYPE == DType::BF16 => Target::BF16(dst.as_mut_ptr().cast()),
            Dst::Rounded(dst) => Target::F32(dst.as_mut_ptr().cast()),
        };
        for column in (0..b.rows()).step_by(columns) {
            for row in (0..m).step_by(rows) {
                let (rows, columns) = (row..m.min(row + rows), column..b.rows().min(column + columns));
                tasks.push(Task { a: product.a, b, n, target, rows, columns });
            }
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        // SAFETY: `isa` is one of `bf16::isas`.
        isa.with(|| unsafe { task.run(isa, scratch) });
    });
}

impl<S: Source> Task<'_, S> {
    /// # Safety
    /// As for [`Isa::block`].
    unsafe fn run(&self, isa: Isa, scratch: &mut Scratch) {
        // A step is one tile of `k`, or as many as its numbers have parts.
        let steps = self.b.steps();
        let step_len = S::PARTS * TILE_LEN;
        let most_steps = K_STEPS / S::PARTS;
        let (m, n) = (self.rows.len().div_ceil(TILE), self.columns.len());
        let a_steps = steps.min(most_steps);
        scratch.a.clear();
        scratch.a.reserve(m * a_steps * step_len);
        let a = &mut scratch.a.spare_capacity_mut()[..m * a_steps * step_len];
        // Sums that wait for the next block of `k`, or, if there is but one, a single block of them.
        let (c_stride, waiting) = if steps <= most_steps { (2 * TILE, false) } else { (n * TILE, true) };
        scratch.c.resize(if waiting { m * TILE * c_stride } else { 2 * TILE * c_stride }, 0.0);

        // Whole tiles of dense rows are read where they lie.
        let direct = match S::DTYPE == DType::BF16 && self.a.col_stride == 1 && self.a.cols.is_multiple_of(STEP) {
            true => self.rows.len() / TILE,
            false => 0,
        };
        for first in (0..steps.max(1)).step_by(most_steps) {
            let block_steps = most_steps.min(steps - first);
            let mut rows = self.a;
            rows.rows = self.rows.end;
            for step in 0..block_steps {
                for i in direct..m {
                    let tile = &mut a[(i * a_steps + step) * step_len..][..step_len];
                    let (row, k) = (self.rows.start + i * TILE, (first + step) * STEP);
                    // SAFETY: all of `bf16::isas` have AVX-512.
                    unsafe { S::pack(tile, &rows, row, k, Packing::Left) };
                }
            }
            let left = |i: usize| {
                if i < direct {
                    let stride = self.a.row_stride;
                    let data = self.a.data[(self.rows.start + i * TILE) * stride + first * STEP..].as_ptr().cast();
                    Left { data, row: stride, step: STEP, tile: TILE * stride }
                } else {
                    let data = a[i * a_steps * step_len..].as_ptr().cast();
                    Left { data, row: STEP, step: step_len, tile: a_steps * step_len }
                }
            };
            for j in (0..n).step_by(2) {
                let mut i = 0;
                while i < m {
                    let at = if waiting { i * TILE * c_stride + j * TILE } else { 0 };
                    let block_m = if i < direct { (direct - i).min(2) } else { (m - i).min(2) };
                    let block_n = (n - j).min(2);
                    let c = &mut scratch.c[at..];
                    // SAFETY: tiles `i..i + block_m` and `j..j + block_n` lie inside `a` and `b`, the block inside `c`,
                    // whose rows beyond the last one that is written here belong to no one else.
                    unsafe {
                        isa.block(Block {
                            a: left(i),
                            b: self.b.at(self.columns.start + j, first).as_ptr(),
                            b_stride: steps * step_len,
                            b_step: step_len,
                            steps: block_steps,
                            parts: S::PARTS,
                            c: c.as_mut_ptr(),
                            c_stride,
                            m: block_m,
                            n: block_n,
                            add: first > 0,
                        });
                        if first + block_steps >= steps {
                            self.store(c, c_stride, i * TILE, j * TILE, block_m);
                        }
                    }
                    i += block_m;
                }
            }
        }
    }

    /// Writes the block of sums `c`, `tiles` rows of tiles, that begins at row `row` and column `column` of this task.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    unsafe fn store(&self, c: &[f32], c_stride: usize, row: usize, column: usize, tiles: usize) {
        let column = self.columns.start * TILE + column;
        let width = (self.n - column).min(2 * TILE).min(self.columns.end * TILE - column);
        for i in 0..(self.rows.len() - row).min(tiles * TILE) {
            let sums = &c[i * c_stride..][..width];
            let at = (self.rows.start + row + i) * self.n + column;
            // SAFETY: inside the destination, whose size `Product` checked; no other task has this block.
            unsafe {
                match self.target {
                    Target::F32(dst) => std::slice::from_raw_parts_mut(dst.add(at), width).copy_from_slice(sums),
                    Target::Add(dst) => {
                        let dst = std::slice::from_raw_parts_mut(dst.add(at), width);
                        dst.iter_mut().zip(sums).for_each(|(dst, sum)| *dst += sum);
                    }
                    Target::BF16(dst) => {
                        let dst = std::slice::from_raw_parts_mut(dst.add(at).cast::<MaybeUninit<bf16>>(), width);
                        dst.iter_mut().zip(sums).for_each(|(dst, sum)| {
                            dst.write(bf16::store(*sum));
                        });
                    }
                }
            }
        }
    }
}
