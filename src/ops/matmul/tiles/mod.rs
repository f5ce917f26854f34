//! Products of bf16 matrices with f32 sums, on processors that have instructions for them.
//!
//! Both operands are first packed into tiles of 16 x 32 numbers, a kibibyte each, that kernels read from front to back:
//! of the left operand a tile holds 16 rows by 32 `k`; of the right one, 16 columns by 32 `k`, in pairs of `k` as the
//! instructions want them (`[pair of k][column][2]`). Edges are padded with zeros. The right operand is packed once for
//! the whole product, the left one by the task that needs it.

mod amx;
mod avx512;
mod pack;

use std::mem::MaybeUninit;
use std::sync::LazyLock;

use half::bf16;
use rayon::prelude::*;

pub use self::pack::{Packing, pack_tile, transpose};
use super::{Dst, Mat, Product};
use crate::ops::host::Element;

/// Rows of a tile of the left operand, columns of one of the right.
pub const TILE: usize = 16;
/// The `k` of a tile.
pub const STEP: usize = 32;
/// Numbers in a tile.
pub const TILE_LEN: usize = TILE * STEP;

/// Tiles of `k` that are summed before sums go back to memory: the operands of a block stay in the first-level cache.
const K_STEPS: usize = 16;

/// Instructions that multiply bf16 matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Isa {
    /// Intel's tile registers.
    Amx,
    /// AVX512-BF16: vectors.
    Avx512,
}

/// What this processor has, the best first.
pub static ISAS: LazyLock<Vec<Isa>> = LazyLock::new(|| {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16");
    match avx512 {
        true if amx::is_usable() => vec![Isa::Amx, Isa::Avx512],
        true => vec![Isa::Avx512],
        false => vec![],
    }
});

/// Where the tiles of a left operand lie. Distances are in numbers.
#[derive(Clone, Copy)]
pub struct Left {
    pub data: *const bf16,
    /// From one row of a tile to the next.
    pub row: usize,
    /// From one tile to the next along `k`.
    pub step: usize,
    /// From one row of tiles to the next.
    pub tile: usize,
}

impl Left {
    /// Packed rows of `steps` tiles each.
    pub fn packed(data: *const bf16, steps: usize) -> Self {
        Self { data, row: STEP, step: TILE_LEN, tile: steps * TILE_LEN }
    }
}

/// A block of one or two columns of tiles of a product: `c = a b`, or `c += a b`.
#[derive(Clone, Copy)]
pub struct Block {
    /// Tiles of the left operand.
    pub a: Left,
    /// Packed tiles of the right operand; those of one column of tiles follow one another.
    pub b: *const bf16,
    /// Numbers from one column of tiles to the next.
    pub b_stride: usize,
    /// Tiles that are summed over.
    pub steps: usize,
    /// `(16 m, 16 n)` f32, rows `c_stride` apart.
    pub c: *mut f32,
    pub c_stride: usize,
    /// Rows of tiles.
    pub m: usize,
    /// Columns of tiles, 1 or 2.
    pub n: usize,
    pub add: bool,
}

impl Isa {
    /// Runs `body`, inside which this thread may call [`Isa::block`].
    pub fn with<R>(self, body: impl FnOnce() -> R) -> R {
        let _tiles = (self == Self::Amx).then(amx::Tiles::configure);
        body()
    }

    /// # Safety
    /// `self` is one of [`ISAS`], and inside its [`Isa::with`]. The pointers of `block` are good for what it says.
    #[inline]
    pub unsafe fn block(self, block: Block) {
        // SAFETY: promised by the caller.
        unsafe {
            match self {
                Self::Amx => amx::block(block),
                Self::Avx512 => avx512::block(block),
            }
        }
    }
}

/// The right operand of a product, packed.
struct Right {
    tiles: Vec<bf16>,
    /// Columns of tiles, and tiles in each.
    columns: usize,
    steps: usize,
}

impl Right {
    /// Memory for the tiles of `b`, which [`Right::fill`] writes.
    fn for_matrix(b: &Mat<bf16>) -> Self {
        let (columns, steps) = (b.cols.div_ceil(TILE), b.rows.div_ceil(STEP));
        Self { tiles: Vec::with_capacity(columns * steps * TILE_LEN), columns, steps }
    }
}

/// Packs the right operands of all products, in parallel.
fn pack_right(products: &[Product<bf16>]) -> Vec<Right> {
    /// Columns of tiles and tiles of `k` of a task: whole cache lines of operands of either layout.
    const COLUMNS: usize = 16;
    const STEPS: usize = 8;
    let mut packed: Vec<Right> = products.iter().map(|product| Right::for_matrix(&product.b)).collect();
    let mut tasks = Vec::new();
    for (product, right) in products.iter().zip(&mut packed) {
        let tiles = Target::BF16(right.tiles.as_mut_ptr());
        for column in (0..right.columns).step_by(COLUMNS) {
            for step in (0..right.steps).step_by(STEPS) {
                let columns = column..right.columns.min(column + COLUMNS);
                tasks.push((product.b.t(), tiles, right.steps, columns, step..right.steps.min(step + STEPS)));
            }
        }
    }
    tasks.into_par_iter().for_each(|(b, tiles, n_steps, columns, steps)| {
        let Target::BF16(tiles) = tiles else { unreachable!("tiles are bf16") };
        for step in steps {
            for column in columns.clone() {
                // SAFETY: inside the memory reserved for tiles, and no other task has this one. Products run only where
                // `ISAS` has an entry, and each of those has AVX-512.
                unsafe {
                    let tile = tiles.add((column * n_steps + step) * TILE_LEN).cast();
                    let tile = std::slice::from_raw_parts_mut(tile, TILE_LEN);
                    pack_tile(tile, &b, column * TILE, step * STEP, Packing::Right);
                }
            }
        }
    });
    for right in &mut packed {
        // SAFETY: every tile was written above.
        unsafe { right.tiles.set_len(right.columns * right.steps * TILE_LEN) };
    }
    packed
}

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
struct Task<'a> {
    a: Mat<'a, bf16>,
    b: &'a Right,
    n: usize,
    target: Target,
    rows: std::ops::Range<usize>,
    /// Columns of tiles.
    columns: std::ops::Range<usize>,
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
pub fn run(isa: Isa, products: Vec<Product<bf16>>) {
    let packed = pack_right(&products);
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
            Dst::Rounded(dst) => Target::BF16(dst.as_mut_ptr().cast()),
        };
        for column in (0..b.columns).step_by(columns) {
            for row in (0..m).step_by(rows) {
                let (rows, columns) = (row..m.min(row + rows), column..b.columns.min(column + columns));
                tasks.push(Task { a: product.a, b, n, target, rows, columns });
            }
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        // SAFETY: `isa` is one of `ISAS`.
        isa.with(|| unsafe { task.run(isa, scratch) });
    });
}

impl Task<'_> {
    /// # Safety
    /// As for [`Isa::block`].
    unsafe fn run(&self, isa: Isa, scratch: &mut Scratch) {
        let steps = self.b.steps;
        let (m, n) = (self.rows.len().div_ceil(TILE), self.columns.len());
        let a_steps = steps.min(K_STEPS);
        scratch.a.clear();
        scratch.a.reserve(m * a_steps * TILE_LEN);
        let a = &mut scratch.a.spare_capacity_mut()[..m * a_steps * TILE_LEN];
        // Sums that wait for the next block of `k`, or, if there is but one, a single block of them.
        let (c_stride, waiting) = if steps <= K_STEPS { (2 * TILE, false) } else { (n * TILE, true) };
        scratch.c.resize(if waiting { m * TILE * c_stride } else { 2 * TILE * c_stride }, 0.0);

        // Whole tiles of dense rows are read where they lie.
        let direct = match self.a.col_stride == 1 && self.a.cols.is_multiple_of(STEP) {
            true => self.rows.len() / TILE,
            false => 0,
        };
        for first in (0..steps.max(1)).step_by(K_STEPS) {
            let block_steps = K_STEPS.min(steps - first);
            let mut rows = self.a;
            rows.rows = self.rows.end;
            for step in 0..block_steps {
                for i in direct..m {
                    let tile = &mut a[(i * a_steps + step) * TILE_LEN..][..TILE_LEN];
                    let (row, k) = (self.rows.start + i * TILE, (first + step) * STEP);
                    // SAFETY: all of `ISAS` have AVX-512.
                    unsafe { pack_tile(tile, &rows, row, k, Packing::Left) };
                }
            }
            let left = |i: usize| {
                if i < direct {
                    let stride = self.a.row_stride;
                    let data = self.a.data[(self.rows.start + i * TILE) * stride + first * STEP..].as_ptr();
                    Left { data, row: stride, step: STEP, tile: TILE * stride }
                } else {
                    Left::packed(a[i * a_steps * TILE_LEN..].as_ptr().cast(), a_steps)
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
                            b: self.b.tiles[((self.columns.start + j) * steps + first) * TILE_LEN..].as_ptr(),
                            b_stride: steps * TILE_LEN,
                            steps: block_steps,
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
