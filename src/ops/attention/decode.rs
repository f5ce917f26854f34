//! Attention of few queries, as when text is generated: keys and values are read once, where they lie.

use std::array::from_fn;
use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::cpu::{Sizes, exponentials};
use super::{AttentionMask, Scores};
use crate::Result;
use crate::ops::host::{Element, elements, exp, floats, softcapped, tensor, typed, vectorized};
use crate::ops::matmul::{Mat, dots};

/// Queries that share a key/value head, up to which arithmetic keeps up with memory.
const MOST: usize = 32;
/// Numbers of the keys that a task reads.
const GRAIN: usize = 1 << 16;
/// Rows of values that are added to a sum at a time.
const ROWS: usize = 4;

/// Whether there are few enough queries.
pub fn suits(q: &Tensor, k: &Tensor) -> Result<bool> {
    let sizes = Sizes::of(q, k)?;
    Ok(sizes.sq * (sizes.h / sizes.kv) <= MOST)
}

/// As [`super::attention`], without a gradient.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, mask: &AttentionMask, scores: &Scores) -> Result<Tensor> {
    typed!(T = k.dtype(); forward_in::<T>(q, k, v, mask, scores))
}

/// What one block of keys contributes to the queries of a row, `(h, sq)`.
struct Partial {
    /// The largest score, and the sum of the exponentials relative to it.
    max: Vec<f32>,
    total: Vec<f32>,
    /// The values, weighted by those exponentials: `(h, sq, hd)`.
    sums: Vec<f32>,
}

fn forward_in<T: Element>(q: &Tensor, k: &Tensor, v: &Tensor, mask: &AttentionMask, scores: &Scores) -> Result<Tensor> {
    let sizes = Sizes::of(q, k)?;
    let Sizes { b, sq, sk, h, kv, hd } = sizes;
    let (qs, ks, vs) = (floats(q)?, elements::<T>(k)?, elements::<T>(v)?);
    let (ks, vs): (&[T], &[T]) = (&ks, &vs);
    let scaled = |i: usize| {
        let (row, head, query) = (i / (h * sq), i / sq % h, i % sq);
        qs[sizes.query(row, query, head)..][..hd].iter().map(|q| q * scores.scale)
    };
    let queries: Vec<f32> = (0..b * h * sq).flat_map(scaled).collect(); // (b, h, sq, hd)

    // Blocks depend on the sizes and the mask only, so that results are the same bits on any number of threads.
    let size = (GRAIN / (kv * hd)).max(ROWS);
    let first = (0..b * sq).map(|i| mask.start(i / sq, i % sq, sq)).min().unwrap_or(0) / size;
    let n_blocks = sk.div_ceil(size) - first;
    let partials: Vec<Partial> = (0..b * n_blocks)
        .into_par_iter()
        .map(|task| {
            let (row, block) = (task / n_blocks, first + task % n_blocks);
            let queries = &queries[row * h * sq * hd..][..h * sq * hd];
            let keys = block * size..sk.min((block + 1) * size);
            vectorized!(partial(&sizes, queries, ks, vs, mask, scores.softcap, row, keys))
        })
        .collect();
    let sinks = scores.sink_values(h)?;
    let mut y = vec![0f32; qs.len()];
    for (y, partials) in y.chunks_exact_mut(sq * h * hd).zip(partials.chunks_exact(n_blocks)) {
        vectorized!(join(&sizes, partials, &sinks, y));
    }
    tensor(y, q.shape(), q.dtype())
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "inputs, and which part of them")]
fn partial<T: Element>(
    sizes: &Sizes,
    queries: &[f32],
    ks: &[T],
    vs: &[T],
    mask: &AttentionMask,
    softcap: Option<f32>,
    row: usize,
    keys: Range<usize>,
) -> Partial {
    let Sizes { sq, h, kv, hd, .. } = *sizes;
    let (n, group) = (keys.len(), h / kv * sq);
    let (mut max, mut total) = (vec![f32::NEG_INFINITY; h * sq], vec![0f32; h * sq]);
    let mut sums = vec![0f32; h * sq * hd];
    let mut scores = vec![0f32; group * n];
    for head in 0..kv {
        let own = head * group..(head + 1) * group;
        let k = sizes.keys(ks, row, keys.start, n, head);
        dots(&queries[own.start * hd..own.end * hd], k, |query, key, score| scores[query * n + key] = score);
        if let Some(cap) = softcap {
            scores.iter_mut().for_each(|score| *score = softcapped(*score, cap));
        }
        for (i, (scores, query)) in scores.chunks_exact_mut(n).zip(own.clone()).enumerate() {
            let visible = sizes.visible(mask, row, i % sq, keys.start, n);
            (total[query], _) = exponentials(scores, visible, &mut max[query]);
        }
        let v = sizes.keys(vs, row, keys.start, n, head);
        add_values(&mut sums[own.start * hd..own.end * hd], &scores, v);
    }
    Partial { max, total, sums }
}

/// `sums += scores v`, where `scores` has a row for each query and a column for each row of `v`.
#[inline(always)]
fn add_values<T: Element>(sums: &mut [f32], scores: &[f32], v: Mat<T>) {
    let (n, hd) = (v.rows(), v.cols());
    let mut values = vec![0f32; ROWS * hd];
    for first in (0..n).step_by(ROWS) {
        let n_rows = ROWS.min(n - first);
        for (i, values) in values.chunks_exact_mut(hd).enumerate().take(n_rows) {
            let row = &v.data[(first + i) * v.row_stride..][..hd];
            values.iter_mut().zip(row).for_each(|(value, x)| *value = x.load());
        }
        let [r0, r1, r2, r3]: [&[f32]; ROWS] = from_fn(|i| &values[i * hd..][..hd]);
        for (sums, scores) in sums.chunks_exact_mut(hd).zip(scores.chunks_exact(n)) {
            // Rows beyond the last one count as nothing.
            let p: [f32; ROWS] = from_fn(|i| if i < n_rows { scores[first + i] } else { 0.0 });
            for (sum, ((a, b), (c, d))) in sums.iter_mut().zip(r0.iter().zip(r1).zip(r2.iter().zip(r3))) {
                *sum += p[0] * a + p[1] * b + (p[2] * c + p[3] * d);
            }
        }
    }
}

/// Writes `(sq, h, hd)`: the sums of all blocks of keys under their joint maximum, divided by the sum of exponentials, those of
/// the sinks too.
#[inline(always)]
fn join(sizes: &Sizes, partials: &[Partial], sinks: &[f32], y: &mut [f32]) {
    let Sizes { sq, h, hd, .. } = *sizes;
    for (query, i) in (0..h).flat_map(|head| (0..sq).map(move |i| (head * sq + i, i * h + head))) {
        let y = &mut y[i * hd..][..hd];
        let max = partials.iter().map(|partial| partial.max[query]).fold(sinks[query / sq], f32::max);
        let weight = |partial: &Partial| exp(partial.max[query] - max);
        let total = partials.iter().map(|partial| weight(partial) * partial.total[query]).sum::<f32>();
        let total = total + exp(sinks[query / sq] - max);
        for partial in partials {
            let weight = weight(partial) / total;
            y.iter_mut().zip(&partial.sums[query * hd..]).for_each(|(y, sum)| *y += weight * sum);
        }
    }
}
