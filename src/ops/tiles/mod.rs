//! Blocks of matrices multiplied with f32 sums, on processors with AVX-512.
//!
//! Kernels read tiles of a kibibyte. Of the left operand a tile is 16 rows by 64 bytes of `k`: 32 numbers of bf16 or 16 of
//! f32. Of the right one it is as much `k` by 16 columns: `[k][column]` in f32, and `[pair of k][column][2]` in bf16, as
//! the instructions want it. Edges are padded with zeros.

mod amx;
mod avx512;
mod pack;
pub mod vector;

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::LazyLock;

use half::bf16;
use rayon::prelude::*;

use self::pack::pack_tile;
pub use self::pack::{Packing, take_bf16};
use self::vector::{EXP2_BF16, EXP2_F32, exp2, lanes, paired, rounded, rounded_rows};
use crate::ops::host::Element;
use crate::ops::matmul::Mat;

/// Rows of a tile of the left operand, columns of one of the right.
pub const TILE: usize = 16;
/// The `k` of a tile of bf16, which is also two tiles of rows.
pub const STEP: usize = 32;
/// Numbers in a tile of bf16.
pub const TILE_LEN: usize = TILE * STEP;

/// Instructions that multiply matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Isa {
    /// Intel's tile registers.
    Amx,
    /// Vectors: AVX-512, for bf16 with its extension AVX512-BF16.
    Avx512,
}

static AVX512: LazyLock<bool> = LazyLock::new(|| {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
});

/// What this processor has for bf16, the best first.
static BF16: LazyLock<Vec<Isa>> = LazyLock::new(|| match *AVX512 && is_x86_feature_detected!("avx512bf16") {
    true if amx::is_usable() => vec![Isa::Amx, Isa::Avx512],
    true => vec![Isa::Avx512],
    false => vec![],
});

/// What tiles are made of.
pub trait Number: Element + Default {
    /// The `k` of a tile.
    const STEP: usize;
    /// Most columns of tiles of a block.
    const COLUMNS: usize;

    /// What this processor has for these numbers, the best first.
    fn isas() -> &'static [Isa];

    /// # Safety
    /// As for [`Isa::block`].
    unsafe fn block(isa: Isa, block: Block<Self>);

    /// Sixteen vectors that are a tile of `matrix`: its rows of `k` if those are dense, or else its `k` (in bf16, pairs of
    /// `k`) of rows.
    ///
    /// # Safety
    /// The processor has AVX-512; the matrix has row `row` and column `k`.
    unsafe fn vectors(matrix: &Mat<Self>, row: usize, k: usize) -> [__m512i; TILE];

    /// Writes two `k`, of which the first is even, of a right operand's tile.
    ///
    /// # Safety
    /// The processor has AVX-512; `tile` has room for it.
    unsafe fn store_right(tile: *mut Self, k: usize, values: [__m512; 2]);

    /// Writes half of each of two rows (in f32 all of them) of a left operand's tile.
    ///
    /// # Safety
    /// The processor has AVX-512; `to` has room for it.
    unsafe fn store_rows(to: *mut Self, values: [__m512; 2]);

    /// Writes up to sixteen numbers.
    ///
    /// # Safety
    /// The processor has AVX-512; `to` has room for the lanes.
    unsafe fn store_lanes(to: *mut Self, lanes: u16, values: __m512);

    /// `2^x` for `x <= 0`, good enough for these numbers.
    ///
    /// # Safety
    /// The processor has AVX-512.
    unsafe fn exp2(x: __m512) -> __m512;
}

/// Where the tiles of a left operand lie. Distances are in numbers.
#[derive(Clone, Copy)]
pub struct Left<T> {
    pub data: *const T,
    /// From one row of a tile to the next.
    pub row: usize,
    /// From one tile to the next along `k`.
    pub step: usize,
    /// From one row of tiles to the next.
    pub tile: usize,
}

/// A block of at most [`Number::COLUMNS`] columns of tiles of a product: `c = a b`, or `c += a b`.
#[derive(Clone, Copy)]
pub struct Block<T> {
    /// Tiles of the left operand.
    pub a: Left<T>,
    /// Packed tiles of the right operand.
    pub b: *const T,
    /// Numbers from one column of tiles to the next, and from one tile to the next along `k`.
    pub b_stride: usize,
    pub b_step: usize,
    /// Tiles that are summed over.
    pub steps: usize,
    /// Consecutive tiles of which the numbers of a step are the sum, in both operands: 1, or 3 for [`Isa::Amx`].
    pub parts: usize,
    /// `(16 m, 16 n)` f32, rows `c_stride` apart.
    pub c: *mut f32,
    pub c_stride: usize,
    /// Rows of tiles.
    pub m: usize,
    /// Columns of tiles.
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
    /// `self` is one of [`Number::isas`], and inside its [`Isa::with`]. The pointers of `block` are good for what it says.
    #[inline]
    pub unsafe fn block<T: Number>(self, block: Block<T>) {
        // SAFETY: promised by the caller.
        unsafe { T::block(self, block) };
    }
}

impl Number for bf16 {
    const STEP: usize = STEP;
    const COLUMNS: usize = 2;

    fn isas() -> &'static [Isa] {
        &BF16
    }

    #[inline]
    unsafe fn block(isa: Isa, block: Block<Self>) {
        // SAFETY: promised by the caller.
        unsafe {
            match isa {
                Isa::Amx => amx::block(block),
                Isa::Avx512 => avx512::block(block),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn vectors(matrix: &Mat<Self>, row: usize, k: usize) -> [__m512i; TILE] {
        let (rows, columns) = ((matrix.rows - row).min(TILE), (matrix.cols - k).min(STEP));
        let from = matrix.data[row * matrix.row_stride + k * matrix.col_stride..].as_ptr();
        let mut vectors = [_mm512_setzero_si512(); TILE];
        // SAFETY: loads are masked to the part of the tile that is inside the matrix, and so inside its slice.
        unsafe {
            if matrix.col_stride == 1 {
                let mask = u32::MAX >> (STEP - columns);
                for (i, vector) in vectors.iter_mut().enumerate().take(rows) {
                    *vector = _mm512_maskz_loadu_epi16(mask, from.add(i * matrix.row_stride).cast());
                }
            } else {
                let column = |k: usize| {
                    let column = _mm256_maskz_loadu_epi16(lanes(rows), from.add(k * matrix.col_stride).cast());
                    _mm512_cvtepu16_epi32(column)
                };
                for (pair, vector) in vectors.iter_mut().enumerate().take(columns.div_ceil(2)) {
                    *vector = column(2 * pair);
                    if 2 * pair + 1 < columns {
                        *vector = _mm512_or_si512(*vector, _mm512_slli_epi32::<16>(column(2 * pair + 1)));
                    }
                }
            }
        }
        vectors
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn store_right(tile: *mut Self, k: usize, values: [__m512; 2]) {
        let pairs = paired(rounded_rows(values[0], values[1]));
        // SAFETY: promised by the caller.
        unsafe { _mm512_storeu_si512(tile.add(k * TILE).cast(), pairs) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_rows(to: *mut Self, values: [__m512; 2]) {
        let rows = rounded_rows(values[0], values[1]);
        // SAFETY: promised by the caller.
        unsafe {
            _mm256_storeu_si256(to.cast(), _mm512_castsi512_si256(rows));
            _mm256_storeu_si256(to.add(STEP).cast(), _mm512_extracti64x4_epi64::<1>(rows));
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn store_lanes(to: *mut Self, lanes: u16, values: __m512) {
        // SAFETY: promised by the caller.
        unsafe { _mm256_mask_storeu_epi16(to.cast(), lanes, rounded(values)) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn exp2(x: __m512) -> __m512 {
        exp2(x, EXP2_BF16)
    }
}

impl Number for f32 {
    const STEP: usize = 16;
    const COLUMNS: usize = 4;

    fn isas() -> &'static [Isa] {
        if *AVX512 { &[Isa::Avx512] } else { &[] }
    }

    #[inline]
    unsafe fn block(_: Isa, block: Block<Self>) {
        // SAFETY: promised by the caller.
        unsafe { avx512::block_f32(block) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vectors(matrix: &Mat<Self>, row: usize, k: usize) -> [__m512i; TILE] {
        let (rows, columns) = ((matrix.rows - row).min(TILE), (matrix.cols - k).min(TILE));
        let from = matrix.data[row * matrix.row_stride + k * matrix.col_stride..].as_ptr();
        let (n, stride, mask) = match matrix.col_stride {
            1 => (rows, matrix.row_stride, lanes(columns)),
            stride => (columns, stride, lanes(rows)),
        };
        let mut vectors = [_mm512_setzero_si512(); TILE];
        for (i, vector) in vectors.iter_mut().enumerate().take(n) {
            // SAFETY: masked to the part of the tile that is inside the matrix, and so inside its slice.
            *vector = unsafe { _mm512_maskz_loadu_epi32(mask, from.add(i * stride).cast()) };
        }
        vectors
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_right(tile: *mut Self, k: usize, values: [__m512; 2]) {
        for (i, values) in values.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(tile.add((k + i) * TILE), values) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_rows(to: *mut Self, values: [__m512; 2]) {
        for (i, values) in values.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(to.add(i * TILE), values) };
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_lanes(to: *mut Self, lanes: u16, values: __m512) {
        // SAFETY: promised by the caller.
        unsafe { _mm512_mask_storeu_ps(to, lanes, values) };
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn exp2(x: __m512) -> __m512 {
        exp2(x, EXP2_F32)
    }
}

/// Packed tiles: `rows` of `steps` each. A step's numbers may be the sums of so many `parts`, which lie together.
pub struct Tiles<T = bf16> {
    data: Vec<T>,
    steps: usize,
    parts: usize,
}

impl<T> Default for Tiles<T> {
    fn default() -> Self {
        Self { data: Vec::new(), steps: 0, parts: 1 }
    }
}

impl<T: Number> Tiles<T> {
    /// Numbers in a tile.
    const LEN: usize = TILE * T::STEP;

    /// Packs all of `matrix`, and zeros up to `rows` rows of tiles and a `k` of `columns`.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn pack(&mut self, matrix: &Mat<T>, rows: usize, columns: usize, packing: Packing) {
        (self.steps, self.parts) = (columns.div_ceil(T::STEP), 1);
        let len = rows * self.steps * Tiles::<T>::LEN;
        self.data.clear();
        self.data.reserve(len);
        for (i, tile) in self.data.spare_capacity_mut()[..len].chunks_exact_mut(Tiles::<T>::LEN).enumerate() {
            // SAFETY: promised by the caller.
            unsafe { pack_tile(tile, matrix, i / self.steps * TILE, i % self.steps * T::STEP, packing) };
        }
        // SAFETY: every tile has been written.
        unsafe { self.data.set_len(len) };
    }

    /// `rows` of tiles, to be written before they are read.
    pub fn resize(&mut self, rows: usize, steps: usize, parts: usize) {
        (self.steps, self.parts) = (steps, parts);
        self.data.resize(rows * steps * parts * Tiles::<T>::LEN, T::default());
    }

    /// Numbers from one row of tiles to the next, and from one step to the next.
    pub fn strides(&self) -> (usize, usize) {
        let tile = self.parts * Self::LEN;
        (self.steps * tile, tile)
    }

    pub fn rows(&self) -> usize {
        self.data.len() / (self.steps * self.parts * Tiles::<T>::LEN).max(1)
    }

    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The tiles from row `row`, step `step` on.
    pub fn at(&self, row: usize, step: usize) -> &[T] {
        let (row_stride, step_stride) = self.strides();
        &self.data[(row * row_stride + step * step_stride).min(self.data.len())..]
    }

    pub fn at_mut(&mut self, row: usize, step: usize) -> &mut [T] {
        let (row_stride, step_stride) = self.strides();
        &mut self.data[row * row_stride + step * step_stride..]
    }

    pub fn all(&self) -> Part<'_, T> {
        self.part(0..self.rows(), 0..self.steps)
    }

    /// Part of the tiles.
    pub fn part(&self, rows: Range<usize>, steps: Range<usize>) -> Part<'_, T> {
        assert!(rows.end <= self.rows() && steps.end <= self.steps, "a part inside its tiles");
        Part { tiles: self, rows, steps }
    }
}

/// Numbers that can be packed into tiles of bf16.
pub trait Source: Element {
    /// Tiles that hold one tile's numbers.
    const PARTS: usize;

    /// As [`pack_tile`], into [`Source::PARTS`] tiles.
    ///
    /// # Safety
    /// As for [`pack_tile`]; the processor has AVX512-BF16.
    unsafe fn pack(tiles: &mut [MaybeUninit<bf16>], matrix: &Mat<Self>, row: usize, k: usize, packing: Packing);
}

impl Source for bf16 {
    const PARTS: usize = 1;

    unsafe fn pack(tiles: &mut [MaybeUninit<bf16>], matrix: &Mat<Self>, row: usize, k: usize, packing: Packing) {
        // SAFETY: promised by the caller.
        unsafe { pack_tile(tiles, matrix, row, k, packing) };
    }
}

/// As the sum of three bf16, which together have the 24 bits of an f32.
impl Source for f32 {
    const PARTS: usize = 3;

    unsafe fn pack(tiles: &mut [MaybeUninit<bf16>], matrix: &Mat<Self>, row: usize, k: usize, packing: Packing) {
        // SAFETY: promised by the caller.
        unsafe { pack::pack_parts(tiles, matrix, row, k, packing) };
    }
}

/// Packs matrices into tiles of bf16, in parallel.
pub fn pack_all<S: Source>(matrices: Vec<(Mat<S>, Packing)>) -> Vec<Tiles> {
    /// Rows and steps of a task: whole cache lines of matrices of either layout.
    const ROWS: usize = 16;
    const STEPS: usize = 8;
    let step_len = S::PARTS * TILE_LEN;
    let mut packed: Vec<Tiles> = Vec::with_capacity(matrices.len());
    let mut tasks = Vec::new();
    for (matrix, packing) in &matrices {
        let (rows, steps) = (matrix.rows.div_ceil(TILE), matrix.cols.div_ceil(STEP));
        let mut tiles = Tiles { data: Vec::with_capacity(rows * steps * step_len), steps, parts: S::PARTS };
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
                // have an entry in `isas`, and each of those has AVX-512.
                unsafe {
                    let tile = to.get().add((row * n_steps + step) * step_len).cast();
                    let tile = std::slice::from_raw_parts_mut(tile, step_len);
                    S::pack(tile, matrix, row * TILE, step * STEP, packing);
                }
            }
        }
    });
    for (tiles, (matrix, _)) in packed.iter_mut().zip(&matrices) {
        // SAFETY: every tile was written above.
        unsafe { tiles.data.set_len(matrix.rows.div_ceil(TILE) * tiles.steps * S::PARTS * TILE_LEN) };
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
pub struct Part<'a, T> {
    tiles: &'a Tiles<T>,
    rows: Range<usize>,
    steps: Range<usize>,
}

impl<T: Number> Part<'_, T> {
    fn at(&self, row: usize) -> *const T {
        self.tiles.at(self.rows.start + row, self.steps.start).as_ptr()
    }
}

/// `c = a b`, or `c += a b`. Rows of `c` are `c_stride` apart.
///
/// # Safety
/// As for [`Isa::block`].
#[inline]
pub unsafe fn multiply<T: Number>(isa: Isa, a: Part<T>, b: Part<T>, c: &mut [f32], c_stride: usize, add: bool) {
    let (m, n, steps) = (a.rows.len(), b.rows.len(), a.steps.len());
    let parts = a.tiles.parts;
    assert!(steps == b.steps.len() && parts == b.tiles.parts, "operands of one inner size");
    assert!(n * TILE <= c_stride && m * TILE * c_stride <= c.len(), "room for a product");
    if steps == 0 || m == 0 {
        return;
    }
    let ((a_stride, a_step), (b_stride, b_step)) = (a.tiles.strides(), b.tiles.strides());
    for j in (0..n).step_by(T::COLUMNS) {
        // SAFETY: inside the three buffers by the assertions of `part` and above.
        unsafe {
            isa.block(Block {
                a: Left { data: a.at(0), row: T::STEP, step: a_step, tile: a_stride },
                b: b.at(j),
                b_stride,
                b_step,
                steps,
                parts,
                c: c.as_mut_ptr().add(j * TILE),
                c_stride,
                m,
                n: (n - j).min(T::COLUMNS),
                add,
            });
        }
    }
}

/// Two by two tiles of a product, `(STEP, STEP)`, from row `row` and column `column` on.
#[derive(Clone, Copy)]
pub struct Square {
    pub row: usize,
    pub column: usize,
    pub values: *const f32,
}

/// Pairs of rows of a [`Square`].
pub const PAIRS: usize = STEP / 2;

/// What a product is computed for, if not to be stored.
pub trait Consumer {
    /// Takes the rows `2 pair` and `2 pair + 1` of a square. Past the last row or column of the operands' tiles there may be
    /// any numbers.
    ///
    /// # Safety
    /// The processor has AVX-512; the square is one of the product that this consumer was made for.
    unsafe fn rows(&mut self, square: Square, pair: usize);
}

/// Hands the product `a b` to `consumer`, square by square, each column of squares from its top to its bottom.
///
/// # Safety
/// As for [`Isa::block`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub unsafe fn multiply_each<C: Consumer>(isa: Isa, a: &Part<bf16>, b: &Part<bf16>, consumer: &mut C) {
    let (m, n, steps, parts) = (a.rows.len(), b.rows.len(), a.steps.len(), a.tiles.parts);
    assert!(steps > 0 && steps == b.steps.len() && parts == b.tiles.parts, "operands of one inner size");
    let ((a_stride, a_step), (b_stride, b_step)) = (a.tiles.strides(), b.tiles.strides());
    let [mut even, mut odd] = [[0f32; STEP * STEP]; 2];
    let (mut values, mut others) = (even.as_mut_ptr(), odd.as_mut_ptr());
    // What the consumer takes while the next square is computed.
    let mut last: Option<Square> = None;
    for j in (0..n).step_by(2) {
        for i in (0..m).step_by(2) {
            // An odd last tile stands for its missing neighbour too.
            let tile = if i + 1 < m { a_stride } else { 0 };
            let b_stride = if j + 1 < n { b_stride } else { 0 };
            let left = Left { data: a.at(i), row: STEP, step: a_step, tile };
            let block = Block {
                a: left,
                b: b.at(j),
                b_stride,
                b_step,
                steps,
                parts,
                c: values,
                c_stride: STEP,
                m: 2,
                n: 2,
                add: false,
            };
            // SAFETY: inside the operands by the assertions of `part` and above, and a square of our own.
            unsafe {
                match isa {
                    Isa::Amx => amx::square(block, last, consumer),
                    Isa::Avx512 => {
                        isa.block(block);
                        take(last, consumer);
                    }
                }
            }
            last = Some(Square { row: i * TILE, column: j * TILE, values });
            std::mem::swap(&mut values, &mut others);
        }
    }
    // SAFETY: promised by the caller.
    unsafe { take(last, consumer) };
}

/// # Safety
/// As for [`Consumer::rows`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn take<C: Consumer>(square: Option<Square>, consumer: &mut C) {
    if let Some(square) = square {
        for pair in 0..PAIRS {
            // SAFETY: promised by the caller.
            unsafe { consumer.rows(square, pair) };
        }
    }
}

/// Tiles that hold `n` rows, in whole pairs: a tile's [`STEP`] of `k` is two tiles of rows.
pub fn pairs_of_tiles(n: usize) -> usize {
    n.div_ceil(STEP) * 2
}
