use candle_core::{DType, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{AttentionMask, Saved, Scores, decode};
use crate::Result;
use crate::ops::host::{
    Disjoint, dot, exp, floats, max_of, softcap_slope, softcapped, sum_of, tensor, typed, update, vectorized,
};
use crate::ops::matmul::{Mat, Store, matmul};
#[cfg(target_arch = "x86_64")]
use crate::ops::tiles::Number;

/// Queries and keys per block of scores: the block stays in the second-level cache.
const QUERIES: usize = 64;
const KEYS: usize = 128;

/// Sizes, and where a head's rows lie in tensors of `(b, s, heads, hd)`.
pub struct Sizes {
    pub b: usize,
    pub sq: usize,
    pub sk: usize,
    pub h: usize,
    pub kv: usize,
    pub hd: usize,
}

impl Sizes {
    pub fn of(q: &Tensor, k: &Tensor) -> Result<Self> {
        let (b, sq, h, hd) = q.dims4()?;
        let (_, sk, kv, _) = k.dims4()?;
        assert!(h % kv == 0 && sq <= sk, "query heads share key heads evenly, and queries are the last positions");
        Ok(Self { b, sq, sk, h, kv, hd })
    }

    /// Offset of query row `i` of head `head` in batch row `b`.
    pub fn query(&self, b: usize, i: usize, head: usize) -> usize {
        ((b * self.sq + i) * self.h + head) * self.hd
    }

    /// As [`Sizes::query`] for keys and values.
    pub fn key(&self, b: usize, i: usize, head: usize) -> usize {
        ((b * self.sk + i) * self.kv + head) * self.hd
    }

    /// Queries `i..i + n` of a head as a matrix `(n, hd)`.
    pub fn queries<'a, T>(&self, data: &'a [T], b: usize, i: usize, n: usize, head: usize) -> Mat<'a, T> {
        Mat::strided(&data[self.query(b, i, head)..], n, self.hd, self.h * self.hd)
    }

    pub fn keys<'a, T>(&self, data: &'a [T], b: usize, i: usize, n: usize, head: usize) -> Mat<'a, T> {
        Mat::strided(&data[self.key(b, i, head)..], n, self.hd, self.kv * self.hd)
    }

    /// The blocks of keys that queries `i..i + n` of row `b` see any of, as `(first key, number of keys)`.
    fn key_blocks(&self, mask: &AttentionMask, b: usize, i: usize, n: usize) -> impl Iterator<Item = (usize, usize)> {
        let first = (i..i + n).map(|i| mask.start(b, i, self.sq)).min().unwrap_or(0) / KEYS * KEYS;
        let end = self.sk - self.sq + i + n;
        (first..end).step_by(KEYS).map(move |key| (key, KEYS.min(end - key)))
    }

    /// The part of the key block at `key` that query `i` sees, relative to the block.
    pub fn visible(
        &self,
        mask: &AttentionMask,
        b: usize,
        i: usize,
        key: usize,
        n_keys: usize,
    ) -> std::ops::Range<usize> {
        let start = mask.start(b, i, self.sq).max(key) - key;
        let end = (self.sk - self.sq + i + 1).clamp(key, key + n_keys) - key;
        start.min(end)..end
    }
}

/// The width that heads are padded to: any will do.
pub fn width(hd: usize) -> usize {
    hd
}

/// As [`forward`], where no gradient is wanted.
pub fn without_gradient(q: &Tensor, k: &Tensor, v: &Tensor, mask: &AttentionMask, options: &Scores) -> Result<Tensor> {
    match decode::suits(q, k)? {
        true => decode::forward(q, k, v, mask, options),
        false => Ok(forward(q, k, v, mask, options)?.0),
    }
}

/// The result, and the logsumexp of each query, `(b, h, sq)`.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, mask: &AttentionMask, options: &Scores) -> Result<(Tensor, Tensor)> {
    #[cfg(target_arch = "x86_64")]
    if options.is_plain() {
        typed!(T = q.dtype(); if let Some(isa) = T::isas().first() {
            return tiles::forward::<T>(*isa, q, k, v, mask, options.scale);
        });
    }
    let sizes = Sizes::of(q, k)?;
    let Sizes { b, sq, h, kv, hd, .. } = sizes;
    let (qs, ks, vs) = (floats(q)?, floats(k)?, floats(v)?);
    let mut y = vec![0f32; qs.len()];
    let mut logsumexp = vec![0f32; b * h * sq];
    let (y_out, logsumexp_out) = (Disjoint::new(&mut y), Disjoint::new(&mut logsumexp));
    let sinks = options.sink_values(h)?;

    let blocks_per_head = sq.div_ceil(QUERIES);
    (0..b * h * blocks_per_head).into_par_iter().for_each_init(
        || (vec![0f32; QUERIES * KEYS], vec![0f32; QUERIES * hd]),
        |(scores, sums), task| {
            let (row, head) = (task / blocks_per_head / h, task / blocks_per_head % h);
            let i0 = task % blocks_per_head * QUERIES;
            let n = QUERIES.min(sq - i0);
            let kv_head = head / (h / kv);
            let (mut max, mut total) = ([f32::NEG_INFINITY; QUERIES], [0f32; QUERIES]);
            sums.fill(0.0);

            for (key, n_keys) in sizes.key_blocks(mask, row, i0, n) {
                let (q, k) = (sizes.queries(&qs, row, i0, n, head), sizes.keys(&ks, row, key, n_keys, kv_head));
                matmul(scores, KEYS, Store::Overwrite, options.scale, q, k.t(), Parallelism::None);
                vectorized!({
                    for i in 0..n {
                        let visible = sizes.visible(mask, row, i0 + i, key, n_keys);
                        let scores = &mut scores[i * KEYS..i * KEYS + n_keys];
                        if let Some(cap) = options.softcap {
                            scores.iter_mut().for_each(|score| *score = softcapped(*score, cap));
                        }
                        let (sum, correction) = exponentials(scores, visible, &mut max[i]);
                        total[i] = total[i] * correction + sum;
                        sums[i * hd..(i + 1) * hd].iter_mut().for_each(|x| *x *= correction);
                    }
                },);
                let probabilities = Mat::strided(scores, n, n_keys, KEYS);
                let v = sizes.keys(&vs, row, key, n_keys, kv_head);
                matmul(sums, hd, Store::Add, 1.0, probabilities, v, Parallelism::None);
            }
            for i in 0..n {
                let at = sizes.query(row, i0 + i, head);
                // SAFETY: a task writes the rows of its own queries and head, which no other task has.
                let (y, lse) = unsafe {
                    let statistic = (row * h + head) * sq + i0 + i;
                    (y_out.slice_mut(at..at + hd), logsumexp_out.slice_mut(statistic..statistic + 1))
                };
                // The sink takes part in the sum of exponentials, and in nothing else.
                let new_max = max[i].max(sinks[head]);
                let shrunk = (max[i] - new_max).exp();
                let total = total[i] * shrunk + (sinks[head] - new_max).exp();
                y.iter_mut().zip(&sums[i * hd..]).for_each(|(y, sum)| *y = sum * shrunk / total);
                lse[0] = new_max + total.ln();
            }
        },
    );
    Ok((tensor(y, q.shape(), q.dtype())?, tensor(logsumexp, (b, h, sq), DType::F32)?))
}

/// Turns visible scores into exponentials relative to the running maximum, hidden ones into zeros. Returns their sum,
/// and the factor by which sums under the old maximum shrink.
#[inline(always)]
pub fn exponentials(scores: &mut [f32], visible: std::ops::Range<usize>, max: &mut f32) -> (f32, f32) {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    let scores = &mut scores[visible];
    if scores.is_empty() {
        return (0.0, 1.0);
    }
    let new_max = max_of(scores, *max);
    let correction = exp(*max - new_max);
    *max = new_max;
    scores.iter_mut().for_each(|s| *s = exp(*s - new_max));
    (sum_of(scores, |p| p), correction)
}

/// The gradients of q, k and v. With `P` the probabilities and `D = Σ dy · y` per query:
/// `dv = Pᵀ dy`, `dS = P · (dy vᵀ - D)`, `dq = scale · dS k`, `dk = scale · dSᵀ q`; a softcap's slope multiplies `dS`.
/// Sinks have the gradient `-Σ exp(sink - logsumexp) · D`, which is added to their accumulator.
pub fn backward(saved: Saved, dy: &Tensor, mask: &AttentionMask, options: &Scores) -> Result<(Tensor, Tensor, Tensor)> {
    let scale = options.scale;
    #[cfg(target_arch = "x86_64")]
    if options.is_plain() {
        typed!(T = saved.q.dtype(); if let Some(isa) = T::isas().first() {
            return tiles::backward::<T>(*isa, saved, dy, mask, scale);
        });
    }
    let sizes = Sizes::of(saved.q, saved.k)?;
    let Sizes { b, sq, sk, h, kv, hd } = sizes;
    let (qs, ks, vs) = (floats(saved.q)?, floats(saved.k)?, floats(saved.v)?);
    let (ys, dys, logsumexps) = (floats(saved.y)?, floats(dy)?, floats(saved.logsumexp)?);
    let (mut dq, mut dk, mut dv) = (vec![0f32; qs.len()], vec![0f32; ks.len()], vec![0f32; vs.len()]);
    let (dq_out, dk_out, dv_out) = (Disjoint::new(&mut dq), Disjoint::new(&mut dk), Disjoint::new(&mut dv));
    let sinks = options.sink_values(h)?;

    // A task owns one key/value head with all the query heads that read it, so that no two tasks add to one gradient.
    let task = |task: usize| {
        let (row, kv_head) = (task / kv, task % kv);
        let mut dsinks = vec![0f32; h / kv];
        let (mut p, mut dp) = (vec![0f32; QUERIES * KEYS], vec![0f32; QUERIES * KEYS]);
        let mut dq_block = vec![0f32; QUERIES * hd];
        let (mut dk_head, mut dv_head) = (vec![0f32; sk * hd], vec![0f32; sk * hd]);
        for head in kv_head * (h / kv)..(kv_head + 1) * (h / kv) {
            let lse = &logsumexps[(row * h + head) * sq..];
            for i0 in (0..sq).step_by(QUERIES) {
                let n = QUERIES.min(sq - i0);
                let q = sizes.queries(&qs, row, i0, n, head);
                let dy = sizes.queries(&dys, row, i0, n, head);
                let mut d = [0f32; QUERIES];
                for (i, d) in d.iter_mut().enumerate().take(n) {
                    let at = sizes.query(row, i0 + i, head);
                    *d = dot(&ys[at..at + hd], &dys[at..at + hd]);
                    dsinks[head % (h / kv)] -= (sinks[head] - lse[i0 + i]).exp() * *d;
                }
                dq_block.fill(0.0);
                for (key, n_keys) in sizes.key_blocks(mask, row, i0, n) {
                    let (k, v) =
                        (sizes.keys(&ks, row, key, n_keys, kv_head), sizes.keys(&vs, row, key, n_keys, kv_head));
                    matmul(&mut p, KEYS, Store::Overwrite, scale, q, k.t(), Parallelism::None);
                    matmul(&mut dp, KEYS, Store::Overwrite, 1.0, dy, v.t(), Parallelism::None);
                    vectorized!({
                        for i in 0..n {
                            let visible = sizes.visible(mask, row, i0 + i, key, n_keys);
                            let (p, ds) = (&mut p[i * KEYS..][..n_keys], &mut dp[i * KEYS..][..n_keys]);
                            for hidden in [0..visible.start, visible.end..n_keys] {
                                p[hidden.clone()].fill(0.0);
                                ds[hidden].fill(0.0);
                            }
                            let (lse, d) = (lse[i0 + i], d[i]);
                            let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
                            if let Some(cap) = options.softcap {
                                for (p, ds) in p.iter_mut().zip(ds) {
                                    let score = softcapped(*p, cap);
                                    *p = exp(score - lse);
                                    *ds = *p * (*ds - d) * softcap_slope(score, cap);
                                }
                            } else {
                                for (p, ds) in p.iter_mut().zip(ds) {
                                    *p = exp(*p - lse);
                                    *ds = *p * (*ds - d);
                                }
                            }
                        }
                    },);
                    let (p, ds) = (Mat::strided(&p, n, n_keys, KEYS), Mat::strided(&dp, n, n_keys, KEYS));
                    matmul(&mut dv_head[key * hd..], hd, Store::Add, 1.0, p.t(), dy, Parallelism::None);
                    matmul(&mut dk_head[key * hd..], hd, Store::Add, scale, ds.t(), q, Parallelism::None);
                    matmul(&mut dq_block, hd, Store::Add, scale, ds, k, Parallelism::None);
                }
                for i in 0..n {
                    let at = sizes.query(row, i0 + i, head);
                    // SAFETY: the query heads of this task's key head are read by no other task.
                    unsafe { dq_out.slice_mut(at..at + hd) }.copy_from_slice(&dq_block[i * hd..(i + 1) * hd]);
                }
            }
        }
        for i in 0..sk {
            let at = sizes.key(row, i, kv_head);
            // SAFETY: one task per batch row and key head.
            unsafe {
                dk_out.slice_mut(at..at + hd).copy_from_slice(&dk_head[i * hd..(i + 1) * hd]);
                dv_out.slice_mut(at..at + hd).copy_from_slice(&dv_head[i * hd..(i + 1) * hd]);
            }
        }
        dsinks
    };
    let dsinks: Vec<Vec<f32>> = (0..b * kv).into_par_iter().map(task).collect();
    if let Some(grad) = options.sinks.as_ref().map(|sinks| sinks.accumulator()).transpose()?.flatten() {
        let dsinks: Vec<f32> = dsinks.concat(); // (b, h)
        update(&grad, |grad: &mut [f32]| {
            dsinks.chunks_exact(h).for_each(|row| grad.iter_mut().zip(row).for_each(|(grad, d)| *grad += d));
        })?;
    }
    Ok((
        tensor(dq, saved.q.shape(), saved.q.dtype())?,
        tensor(dk, saved.k.shape(), saved.k.dtype())?,
        tensor(dv, saved.v.shape(), saved.v.dtype())?,
    ))
}
