//! Attention from blocks of tiles. Scores are kept transposed, `(keys, queries)`, so that every statistic of a
//! query has a lane of its own and nothing is ever summed across a vector; the exponentials, not the products, take most
//! of the time.

use std::arch::x86_64::*;
use std::ops::Range;

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::cpu::Sizes;
use super::{AttentionMask, Saved};
use crate::Result;
use crate::ops::host::{dot, elements, floats};
use crate::ops::matmul::Mat;
use crate::ops::tiles::vector::{lanes, transpose};
use crate::ops::tiles::{Isa, Number, Packing, STEP, Shared, TILE, Tiles, multiply, pairs_of_tiles};

/// Queries of a block.
const QUERIES: usize = 64;
/// Keys of a block, forward and backward, as many as the first-level cache has room for. There are more of them forward,
/// because sums are rescaled once per block.
const fn keys_forward<T>() -> usize {
    if size_of::<T>() == 2 { 256 } else { 64 }
}

const fn keys_backward<T>() -> usize {
    if size_of::<T>() == 2 { 128 } else { 64 }
}

/// What a hidden score is, and what a maximum is before there is one: `2^(HIDDEN - NONE)` is 0.
const HIDDEN: f32 = -1e30;
const NONE: f32 = -1e20;

/// Which keys each of 16 queries sees: from `start` up to `end`, inclusive.
#[derive(Clone, Copy)]
struct Visible {
    start: __m512i,
    end: __m512i,
}

/// A block of queries, as the mask sees it.
struct QueryBlock {
    visible: [Visible; QUERIES / TILE],
    /// Keys that any of the queries sees, from a whole tile on.
    keys: Range<usize>,
    /// Keys that all of them see.
    seen_by_all: Range<usize>,
}

impl QueryBlock {
    #[target_feature(enable = "avx512f")]
    fn new(sizes: &Sizes, mask: &AttentionMask, row: usize, queries: Range<usize>) -> Self {
        let past = sizes.sk - sizes.sq;
        let (mut starts, mut ends) = ([0i32; QUERIES], [i32::MAX; QUERIES]);
        for (i, query) in queries.clone().enumerate() {
            starts[i] = mask.start(row, query, sizes.sq) as i32;
            ends[i] = (past + query) as i32;
        }
        let starts_of_queries = &starts[..queries.len()];
        let first = starts_of_queries.iter().min().map_or(0, |s| *s as usize);
        let last = starts_of_queries.iter().max().map_or(0, |s| *s as usize);
        Self {
            visible: std::array::from_fn(|g| {
                // SAFETY: 16 numbers each from the arrays' four times 16.
                unsafe {
                    Visible {
                        start: _mm512_loadu_si512(starts[g * TILE..].as_ptr().cast()),
                        end: _mm512_loadu_si512(ends[g * TILE..].as_ptr().cast()),
                    }
                }
            }),
            keys: first / STEP * STEP..past + queries.end,
            seen_by_all: last..past + queries.start + 1,
        }
    }

    /// Blocks of at most `size` keys.
    fn key_blocks(&self, size: usize) -> impl Iterator<Item = Range<usize>> {
        let end = self.keys.end;
        self.keys.clone().step_by(size).map(move |key| key..end.min(key + size))
    }

    /// Hides scores, `(keys, QUERIES)`, that a query must not see.
    #[target_feature(enable = "avx512f")]
    fn hide(&self, scores: &mut [f32], keys: Range<usize>, groups: usize) {
        // Up to whole tiles: keys beyond the last one are seen by none.
        let n = keys.len().next_multiple_of(STEP);
        if self.seen_by_all.start <= keys.start && keys.start + n <= self.seen_by_all.end {
            return;
        }
        let hidden = _mm512_set1_ps(HIDDEN);
        // If all see the first key, then all see those that follow, up to the end.
        let seen = match self.seen_by_all.start <= keys.start {
            true => self.seen_by_all.end.saturating_sub(keys.start),
            false => 0,
        };
        for (i, scores) in scores.chunks_exact_mut(QUERIES).enumerate().take(n).skip(seen) {
            let key = _mm512_set1_epi32((keys.start + i) as i32);
            for (visible, scores) in self.visible[..groups].iter().zip(scores.chunks_exact_mut(TILE)) {
                let hide = _mm512_cmplt_epi32_mask(key, visible.start) | _mm512_cmpgt_epi32_mask(key, visible.end);
                // SAFETY: a chunk is one vector.
                unsafe { _mm512_mask_storeu_ps(scores.as_mut_ptr(), hide, hidden) };
            }
        }
    }
}

/// What a forward task works in.
#[derive(Default)]
struct Forward<T> {
    k: Tiles<T>,
    v: Tiles<T>,
    q: Tiles<T>,
    p: Tiles<T>,
    scores: Vec<f32>,
    sums: Vec<f32>,
}

/// As [`super::cpu::forward`]; the logsumexps are of base 2.
pub fn forward<T: Number>(
    isa: Isa,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &AttentionMask,
    scale: f32,
) -> Result<(Tensor, Tensor)> {
    let sizes = Sizes::of(q, k)?;
    let Sizes { b, sq, h, kv, .. } = sizes;
    let inputs = (elements::<T>(q)?, elements::<T>(k)?, elements::<T>(v)?);
    let (q_values, k_values, v_values): (&[T], &[T], &[T]) = (&inputs.0, &inputs.1, &inputs.2);
    let mut y = Box::<[T]>::new_uninit_slice(q_values.len());
    let mut logsumexp = vec![0f32; b * h * sq];
    let (y_out, logsumexp_out) = (Shared(y.as_mut_ptr().cast::<T>()), Shared(logsumexp.as_mut_ptr()));

    // A task has one key/value head, and so many blocks of queries that packing its keys does not show.
    let chunk = QUERIES * sq.div_ceil(QUERIES).div_ceil(4 * rayon::current_num_threads().div_ceil(b * kv)).max(4);
    let chunks = sq.div_ceil(chunk);
    (0..b * kv * chunks).into_par_iter().for_each_init(Forward::<T>::default, |scratch, task| {
        let (row, kv_head) = (task / chunks / kv, task / chunks % kv);
        let queries = task % chunks * chunk..sq.min((task % chunks + 1) * chunk);
        let sk = sizes.sk - sq + queries.end;
        let keys = sizes.keys(k_values, row, 0, sk, kv_head);
        let values = sizes.keys(v_values, row, 0, sk, kv_head);
        // SAFETY: an `isa` means AVX-512.
        isa.with(|| unsafe {
            scratch.k.pack(&keys, pairs_of_tiles(sk), sizes.hd, Packing::Left);
            scratch.v.pack(&values.t(), sizes.hd.div_ceil(TILE), sk.next_multiple_of(STEP), Packing::Left);
            for head in kv_head * (h / kv)..(kv_head + 1) * (h / kv) {
                for first in queries.clone().step_by(QUERIES) {
                    let block = first..queries.end.min(first + QUERIES);
                    let q = sizes.queries(q_values, row, first, block.len(), head);
                    let masked = QueryBlock::new(&sizes, mask, row, block.clone());
                    let lse = logsumexp_out.get().add((row * h + head) * sq + first);
                    // A task writes the rows of its own queries and heads, which no other task has.
                    let y = y_out.get().add(sizes.query(row, first, head));
                    scratch.block(isa, &q, &masked, scale, y, h * sizes.hd, lse);
                }
            }
        });
    });
    // SAFETY: every row of every head has been written.
    let y = unsafe { y.assume_init() }.into_vec();
    let logsumexp = Tensor::from_vec(logsumexp, (b, h, sq), &Device::Cpu)?;
    Ok((Tensor::from_vec(y, q.shape(), &Device::Cpu)?, logsumexp))
}

impl<T: Number> Forward<T> {
    /// One block of queries against all the keys they see.
    ///
    /// # Safety
    /// As for [`Isa::block`]; rows of `y`, `y_stride` apart, and `lse` have room for the queries.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[expect(clippy::too_many_arguments, reason = "inputs, and where two outputs go")]
    unsafe fn block(
        &mut self,
        isa: Isa,
        q: &Mat<T>,
        masked: &QueryBlock,
        scale: f32,
        y: *mut T,
        y_stride: usize,
        lse: *mut f32,
    ) {
        let (n, hd) = (q.rows(), q.cols());
        let groups = pairs_of_tiles(n);
        let factor = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
        let (mut max, mut total) = ([_mm512_set1_ps(NONE); QUERIES / TILE], [_mm512_setzero_ps(); QUERIES / TILE]);
        self.sums.clear();
        self.sums.resize(self.v.rows() * TILE * QUERIES, 0.0);
        self.scores.resize(keys_forward::<T>() * QUERIES, 0.0);
        // SAFETY: promised by the caller; every vector lies inside its slice, by the sizes above.
        unsafe {
            self.q.pack(q, groups, hd, Packing::Right);
            for keys in masked.key_blocks(keys_forward::<T>()) {
                let n_keys = keys.len().next_multiple_of(STEP);
                let key_tiles = keys.start / TILE..(keys.start + n_keys) / TILE;
                let k = self.k.part(key_tiles, 0..self.k.steps());
                multiply(isa, k, self.q.all(), &mut self.scores, QUERIES, false);
                let scores = &mut self.scores[..n_keys * QUERIES];
                masked.hide(scores, keys.clone(), groups);
                self.p.resize(groups, n_keys / T::STEP, 1);
                for g in 0..groups {
                    let at = |i: usize| scores[i * QUERIES + g * TILE..].as_ptr();
                    let mut maxima = [_mm512_set1_ps(HIDDEN); 4];
                    for i in (0..n_keys).step_by(4) {
                        for (j, max) in maxima.iter_mut().enumerate() {
                            *max = _mm512_max_ps(*max, _mm512_loadu_ps(at(i + j)));
                        }
                    }
                    let largest =
                        _mm512_max_ps(_mm512_max_ps(maxima[0], maxima[1]), _mm512_max_ps(maxima[2], maxima[3]));
                    let new_max = _mm512_max_ps(max[g], _mm512_mul_ps(largest, factor));
                    let correction = T::exp2(_mm512_sub_ps(max[g], new_max));
                    max[g] = new_max;
                    let mut sums = [_mm512_setzero_ps(); 2];
                    let tiles = self.p.at_mut(g, 0).as_mut_ptr();
                    for key in (0..n_keys).step_by(2) {
                        let even = T::exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at(key)), factor, new_max));
                        let odd = T::exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at(key + 1)), factor, new_max));
                        sums[0] = _mm512_add_ps(sums[0], even);
                        sums[1] = _mm512_add_ps(sums[1], odd);
                        T::store_right(tiles, key, [even, odd]);
                    }
                    total[g] = _mm512_fmadd_ps(total[g], correction, _mm512_add_ps(sums[0], sums[1]));
                    for sums in self.sums.chunks_exact_mut(QUERIES) {
                        let sums = sums[g * TILE..].as_mut_ptr();
                        _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), correction));
                    }
                }
                let steps = keys.start / T::STEP..(keys.start + n_keys) / T::STEP;
                let v = self.v.part(0..self.v.rows(), steps);
                multiply(isa, v, self.p.all(), &mut self.sums, QUERIES, true);
            }
            for g in 0..n.div_ceil(TILE) {
                let lanes = lanes(n - g * TILE);
                let mut totals = [0f32; TILE];
                _mm512_storeu_ps(totals.as_mut_ptr(), total[g]);
                let logs = totals.map(f32::log2);
                let logs = _mm512_add_ps(max[g], _mm512_loadu_ps(logs.as_ptr()));
                _mm512_mask_storeu_ps(lse.add(g * TILE), lanes, logs);
                let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), total[g]);
                store_transposed(&self.sums, g, n, hd, inverse, y, y_stride);
            }
        }
    }
}

/// Writes queries `16 g..` of `sums`, `(hd, QUERIES)`, times `scale`, as the rows of `to`, `(n, hd)`.
///
/// # Safety
/// Rows of `to`, `stride` apart, have room for `hd` numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn store_transposed<T: Number>(
    sums: &[f32],
    g: usize,
    n: usize,
    hd: usize,
    scale: __m512,
    to: *mut T,
    stride: usize,
) {
    for first in (0..hd).step_by(TILE) {
        let mut rows = [_mm512_setzero_si512(); TILE];
        for (i, row) in rows.iter_mut().enumerate() {
            // SAFETY: rows of sums come in whole tiles.
            let sums = unsafe { _mm512_loadu_ps(sums[(first + i) * QUERIES + g * TILE..].as_ptr()) };
            *row = _mm512_castps_si512(_mm512_mul_ps(sums, scale));
        }
        for (i, row) in transpose(rows).into_iter().enumerate().take(n - g * TILE) {
            let to = to.wrapping_add((g * TILE + i) * stride + first);
            // SAFETY: promised by the caller.
            unsafe { T::store_lanes(to, lanes(hd - first), _mm512_castsi512_ps(row)) };
        }
    }
}

/// What a backward task works in.
#[derive(Default)]
struct Backward<T> {
    k: Tiles<T>,
    k_columns: Tiles<T>,
    v: Tiles<T>,
    q: Tiles<T>,
    q_columns: Tiles<T>,
    dy: Tiles<T>,
    dy_columns: Tiles<T>,
    p: Tiles<T>,
    ds: Tiles<T>,
    ds_columns: Tiles<T>,
    scores: Vec<f32>,
    dp: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// As [`super::cpu::backward`].
pub fn backward<T: Number>(
    isa: Isa,
    saved: Saved,
    dy: &Tensor,
    mask: &AttentionMask,
    scale: f32,
) -> Result<(Tensor, Tensor, Tensor)> {
    let sizes = Sizes::of(saved.q, saved.k)?;
    let Sizes { b, sq, sk, h, kv, hd } = sizes;
    let inputs = (elements::<T>(saved.q)?, elements::<T>(saved.k)?, elements::<T>(saved.v)?);
    let (qs, ks, vs): (&[T], &[T], &[T]) = (&inputs.0, &inputs.1, &inputs.2);
    let logsumexps = floats(saved.logsumexp)?;
    let logsumexps: &[f32] = &logsumexps;
    let outputs = (elements::<T>(saved.y)?, elements::<T>(dy)?);
    let (ys, dys): (&[T], &[T]) = (&outputs.0, &outputs.1);
    let mut grads = [qs.len(), ks.len(), vs.len()].map(Box::<[T]>::new_uninit_slice);
    let [dq, dk, dv] = grads.each_mut().map(|grad| Shared(grad.as_mut_ptr().cast::<T>()));

    // A task owns one key/value head with all the query heads that read it, so that no two tasks add to one gradient.
    (0..b * kv).into_par_iter().for_each_init(Backward::<T>::default, |scratch, task| {
        let (row, kv_head) = (task / kv, task % kv);
        let (k, v) = (sizes.keys(ks, row, 0, sk, kv_head), sizes.keys(vs, row, 0, sk, kv_head));
        // SAFETY: an `isa` means AVX-512; gradients of a task's heads are written by no other task.
        isa.with(|| unsafe {
            scratch.start(&k, &v);
            for head in kv_head * (h / kv)..(kv_head + 1) * (h / kv) {
                for first in (0..sq).step_by(QUERIES) {
                    let block = first..sq.min(first + QUERIES);
                    let (mut lse, mut d) = ([0f32; QUERIES], [0f32; QUERIES]);
                    for (i, query) in block.clone().enumerate() {
                        let at = sizes.query(row, query, head);
                        lse[i] = logsumexps[(row * h + head) * sq + query];
                        d[i] = short_dot(&ys[at..at + hd], &dys[at..at + hd]);
                    }
                    let q = sizes.queries(qs, row, first, block.len(), head);
                    let dy = sizes.queries(dys, row, first, block.len(), head);
                    let masked = QueryBlock::new(&sizes, mask, row, block);
                    let dq = dq.get().add(sizes.query(row, first, head));
                    scratch.block(isa, &q, &dy, &lse, &d, &masked, scale, dq, h * hd);
                }
            }
            store_rows(&scratch.dk, sk, hd, scale, dk.get().add(sizes.key(row, 0, kv_head)), kv * hd);
            store_rows(&scratch.dv, sk, hd, 1.0, dv.get().add(sizes.key(row, 0, kv_head)), kv * hd);
        });
    });
    // SAFETY: every row of every head has been written.
    let [dq, dk, dv] = grads.map(|grad| unsafe { grad.assume_init() }.into_vec());
    Ok((
        Tensor::from_vec(dq, saved.q.shape(), &Device::Cpu)?,
        Tensor::from_vec(dk, saved.k.shape(), &Device::Cpu)?,
        Tensor::from_vec(dv, saved.v.shape(), &Device::Cpu)?,
    ))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn short_dot<T: Number>(a: &[T], b: &[T]) -> f32 {
    dot(a, b)
}

/// Writes the first `n` rows of `sums`, times `scale`, as the rows of `to`, `(n, hd)`.
///
/// # Safety
/// Rows of `to`, `stride` apart, have room for `hd` numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn store_rows<T: Number>(sums: &[f32], n: usize, hd: usize, scale: f32, to: *mut T, stride: usize) {
    for (i, sums) in sums.chunks_exact(hd.next_multiple_of(TILE)).enumerate().take(n) {
        for (j, sum) in sums[..hd].iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { to.add(i * stride + j).write(T::store(sum * scale)) };
        }
    }
}

impl<T: Number> Backward<T> {
    /// Packs the keys and values of a head, and forgets gradients.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn start(&mut self, k: &Mat<T>, v: &Mat<T>) {
        // SAFETY: promised by the caller.
        unsafe {
            self.k.pack(k, pairs_of_tiles(k.rows()), k.cols(), Packing::Left);
            self.k_columns.pack(&k.t(), k.cols().div_ceil(TILE), k.rows().next_multiple_of(STEP), Packing::Left);
            self.v.pack(v, pairs_of_tiles(k.rows()), k.cols(), Packing::Left);
        }
        let (keys, width) = (k.rows().next_multiple_of(STEP), k.cols().next_multiple_of(TILE));
        for grad in [&mut self.dk, &mut self.dv] {
            grad.clear();
            grad.resize(keys * width, 0.0);
        }
        self.scores.resize(keys_backward::<T>() * QUERIES, 0.0);
        self.dp.resize(keys_backward::<T>() * QUERIES, 0.0);
    }

    /// One block of queries against all the keys they see. `lse` is of base 2.
    ///
    /// # Safety
    /// As for [`Isa::block`]; rows of `dq_out`, `stride` apart, have room for the queries.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[expect(clippy::too_many_arguments, reason = "what forward left, and where the gradient goes")]
    unsafe fn block(
        &mut self,
        isa: Isa,
        q: &Mat<T>,
        dy: &Mat<T>,
        lse: &[f32; QUERIES],
        d: &[f32; QUERIES],
        masked: &QueryBlock,
        scale: f32,
        dq_out: *mut T,
        stride: usize,
    ) {
        let (n, hd) = (q.rows(), q.cols());
        let (groups, width) = (pairs_of_tiles(n), hd.next_multiple_of(TILE));
        let q_steps = groups * TILE / T::STEP;
        let factor = _mm512_set1_ps(scale * std::f32::consts::LOG2_E);
        self.dq.clear();
        self.dq.resize(width * QUERIES, 0.0);
        // SAFETY: promised by the caller; every vector lies inside its slice, by the sizes above.
        unsafe {
            self.q.pack(q, groups, hd, Packing::Right);
            self.q_columns.pack(&q.t(), hd.div_ceil(TILE), groups * TILE, Packing::Right);
            self.dy.pack(dy, groups, hd, Packing::Right);
            self.dy_columns.pack(&dy.t(), hd.div_ceil(TILE), groups * TILE, Packing::Right);
            for keys in masked.key_blocks(keys_backward::<T>()) {
                let n_keys = keys.len().next_multiple_of(STEP);
                let key_tiles = keys.start / TILE..(keys.start + n_keys) / TILE;
                let hd_steps = 0..self.k.steps();
                let k = self.k.part(key_tiles.clone(), hd_steps.clone());
                multiply(isa, k, self.q.all(), &mut self.scores, QUERIES, false);
                multiply(isa, self.v.part(key_tiles, hd_steps), self.dy.all(), &mut self.dp, QUERIES, false);
                masked.hide(&mut self.scores, keys.clone(), groups);
                self.p.resize(n_keys / TILE, q_steps, 1);
                self.ds.resize(n_keys / TILE, q_steps, 1);
                self.ds_columns.resize(groups, n_keys / T::STEP, 1);
                let row_stride = self.p.strides().0;
                for g in 0..groups {
                    let (lse, d) = (_mm512_loadu_ps(lse[g * TILE..].as_ptr()), _mm512_loadu_ps(d[g * TILE..].as_ptr()));
                    let (step, in_step) = (g * TILE / T::STEP, g * TILE % T::STEP);
                    let columns = self.ds_columns.at_mut(g, 0).as_mut_ptr();
                    for tile in 0..n_keys / TILE {
                        let at = tile * TILE * QUERIES + g * TILE;
                        let (scores, dp) = (self.scores[at..].as_ptr(), self.dp[at..].as_ptr());
                        let at = tile * row_stride + step * TILE * T::STEP + in_step;
                        let (p, ds) = (self.p.at_mut(0, 0)[at..].as_mut_ptr(), self.ds.at_mut(0, 0)[at..].as_mut_ptr());
                        for key in (0..TILE).step_by(2) {
                            let row = |from: *const f32, key: usize| _mm512_loadu_ps(from.add(key * QUERIES));
                            let p_of = |key| T::exp2(_mm512_fmsub_ps(row(scores, key), factor, lse));
                            let probabilities = [p_of(key), p_of(key + 1)];
                            let ds_of = |j: usize| _mm512_mul_ps(probabilities[j], _mm512_sub_ps(row(dp, key + j), d));
                            let gradients = [ds_of(0), ds_of(1)];
                            T::store_rows(p.add(key * T::STEP), probabilities);
                            T::store_rows(ds.add(key * T::STEP), gradients);
                            T::store_right(columns, tile * TILE + key, gradients);
                        }
                    }
                }
                let (dk, dv) = (&mut self.dk[keys.start * width..], &mut self.dv[keys.start * width..]);
                multiply(isa, self.p.all(), self.dy_columns.all(), dv, width, true);
                multiply(isa, self.ds.all(), self.q_columns.all(), dk, width, true);
                let steps = keys.start / T::STEP..(keys.start + n_keys) / T::STEP;
                let k_columns = self.k_columns.part(0..self.k_columns.rows(), steps);
                multiply(isa, k_columns, self.ds_columns.all(), &mut self.dq, QUERIES, true);
            }
            for g in 0..n.div_ceil(TILE) {
                store_transposed(&self.dq, g, n, hd, _mm512_set1_ps(scale), dq_out, stride);
            }
        }
    }
}
