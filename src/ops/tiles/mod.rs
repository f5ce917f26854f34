//! Blocks of bf16 matrices multiplied with f32 sums, on processors that have instructions for them.
//!
//! Kernels read tiles of 16 x 32 numbers: of the left operand 16 rows by 32 `k`; of the right one, 16 columns by 32 `k`,
//! in pairs of `k` as the instructions want them (`[pair of k][column][2]`). Edges are padded with zeros.

mod amx;
mod avx512;
mod pack;
pub mod vector;

use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use rayon::prelude::*;

pub use self::pack::{Packing, pack_tile};
use crate::ops::matmul::Mat;

/// Rows of a tile of the left operand, columns of one of the right.
pub const TILE: usize = 16;
/// The `k` of a tile.
pub const STEP: usize = 32;
/// Numbers in a tile.
pub const TILE_LEN: usize = TILE * STEP;

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

/// Packed tiles: `rows` of `steps` tiles each.
#[derive(Default)]
pub struct Tiles {
    data: Vec<bf16>,
    steps: usize,
}

impl Tiles {
    /// Packs all of `matrix`, and zeros up to `rows` rows of tiles.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn pack(&mut self, matrix: &Mat<bf16>, rows: usize, packing: Packing) {
        self.steps = matrix.cols().div_ceil(STEP);
        let len = rows * self.steps * TILE_LEN;
        self.data.clear();
        self.data.reserve(len);
        for (i, tile) in self.data.spare_capacity_mut()[..len].chunks_exact_mut(TILE_LEN).enumerate() {
            // SAFETY: promised by the caller.
            unsafe { pack_tile(tile, matrix, i / self.steps * TILE, i % self.steps * STEP, packing) };
        }
        // SAFETY: every tile has been written.
        unsafe { self.data.set_len(len) };
    }

    /// `rows` of tiles, to be written before they are read.
    pub fn resize(&mut self, rows: usize, steps: usize) {
        self.steps = steps;
        self.data.resize(rows * steps * TILE_LEN, bf16::ZERO);
    }

    pub fn rows(&self) -> usize {
        self.data.len() / (self.steps * TILE_LEN).max(1)
    }

    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The tiles of row `row` from step `step` on.
    pub fn at(&self, row: usize, step: usize) -> &[bf16] {
        &self.data[((row * self.steps + step) * TILE_LEN).min(self.data.len())..]
    }

    pub fn at_mut(&mut self, row: usize, step: usize) -> &mut [bf16] {
        &mut self.data[(row * self.steps + step) * TILE_LEN..]
    }

    pub fn all(&self) -> Part<'_> {
        self.part(0..self.rows(), 0..self.steps)
    }

    /// Part of the tiles.
    pub fn part(&self, rows: Range<usize>, steps: Range<usize>) -> Part<'_> {
        assert!(rows.end <= self.rows() && steps.end <= self.steps, "a part inside its tiles");
        Part { tiles: self, rows, steps }
    }
}

/// Packs matrices in parallel.
pub fn pack_all(matrices: Vec<(Mat<bf16>, Packing)>) -> Vec<Tiles> {
    /// Rows and steps of a task: whole cache lines of matrices of either layout.
    const ROWS: usize = 16;
    const STEPS: usize = 8;
    let mut packed = Vec::with_capacity(matrices.len());
    let mut tasks = Vec::new();
    for (matrix, packing) in &matrices {
        let (rows, steps) = (matrix.rows.div_ceil(TILE), matrix.cols.div_ceil(STEP));
        let mut tiles = Tiles { data: Vec::with_capacity(rows * steps * TILE_LEN), steps };
        let to = Shared(tiles.data.as_mut_ptr());
        packed.push(tiles);
        for row in (0..rows).step_by(ROWS) {
            for step in (0..steps).step_by(STEPS) {
                tasks.push((matrix, *packing, to, steps, row..rows.min(row + ROWS), step..steps.min(step + STEPS)));
            }
        }
    }
    tasks.into_par_iter().for_each(|(matrix, packing, to, n_steps, rows, steps)| {
        for step in steps {
            for row in rows.clone() {
                // SAFETY: inside the memory reserved above; no other task has this tile. Tiles are for processors that
                // have an entry in `ISAS`, and each of those has AVX-512.
                unsafe {
                    let tile = to.get().add((row * n_steps + step) * TILE_LEN).cast();
                    let tile = std::slice::from_raw_parts_mut(tile, TILE_LEN);
                    pack_tile(tile, matrix, row * TILE, step * STEP, packing);
                }
            }
        }
    });
    for (tiles, (matrix, _)) in packed.iter_mut().zip(&matrices) {
        // SAFETY: every tile was written above.
        unsafe { tiles.data.set_len(matrix.rows.div_ceil(TILE) * tiles.steps * TILE_LEN) };
    }
    packed
}

/// A pointer to a buffer of which each task writes its own part.
#[derive(Clone, Copy)]
pub struct Shared<T>(pub *mut T);

// SAFETY: tasks write disjoint parts.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub fn get(self) -> *mut T {
        self.0
    }
}

/// Rows of tiles, and tiles of each.
#[derive(Clone)]
pub struct Part<'a> {
    tiles: &'a Tiles,
    rows: Range<usize>,
    steps: Range<usize>,
}

impl Part<'_> {
    fn at(&self, row: usize) -> *const bf16 {
        self.tiles.at(self.rows.start + row, self.steps.start).as_ptr()
    }
}

/// `c = a b`, or `c += a b`. Rows of `c` are `c_stride` apart.
///
/// # Safety
/// As for [`Isa::block`].
#[inline]
pub unsafe fn multiply(isa: Isa, a: Part, b: Part, c: &mut [f32], c_stride: usize, add: bool) {
    let (m, n, steps) = (a.rows.len(), b.rows.len(), a.steps.len());
    assert!(steps == b.steps.len() && n * TILE <= c_stride && m * TILE * c_stride <= c.len(), "room for a product");
    if steps == 0 || m == 0 {
        return;
    }
    for j in (0..n).step_by(2) {
        // SAFETY: inside the three buffers by the assertions of `part` and above.
        unsafe {
            isa.block(Block {
                a: Left::packed(a.at(0), a.tiles.steps),
                b: b.at(j),
                b_stride: b.tiles.steps * TILE_LEN,
                steps,
                c: c.as_mut_ptr().add(j * TILE),
                c_stride,
                m,
                n: (n - j).min(2),
                add,
            });
        }
    }
}

/// Tiles that hold `n` rows, in whole pairs: a tile's [`STEP`] of `k` is two tiles of rows.
pub fn pairs_of_tiles(n: usize) -> usize {
    n.div_ceil(STEP) * 2
}
