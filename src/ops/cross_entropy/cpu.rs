use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{
    check_tokens, exp, floats, floats_in, max_of, round, sum_of, tensor, update, vectorized, with_indices,
};
use crate::ops::matmul::{Mat, Store, matmul_all};

/// Logits that exist at a time: 128 MiB of f32.
const LOGITS: usize = 1 << 25;

/// The sum of the losses of all tokens.
pub fn forward(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<f64> {
    let (x, w) = (floats_in(x, weight.dtype())?, floats(weight)?);
    with_indices(targets, |targets| {
        let mut sum = 0.0;
        for_chunks(&x, &w, weight, targets, |_, logits, targets, vocab_size| {
            sum += losses(logits, targets, vocab_size, |_, _, _| {});
        })?;
        Ok(sum)
    })?
}

/// As [`forward`], with the gradients of `mean` times that sum.
pub fn forward_backward(
    x: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
    targets: &Tensor,
    mean: f32,
) -> Result<(f64, Tensor)> {
    let dtype = weight.dtype();
    let (values, w) = (floats_in(x, dtype)?, floats(weight)?);
    let mut dx = vec![0f32; values.len()];
    let sum = with_indices(targets, |targets| {
        update(grad, |grad: &mut [f32]| -> Result<f64> {
            let mut sum = 0.0;
            for_chunks(&values, &w, weight, targets, |first, logits, targets, vocab_size| {
                // logits become their own gradient: mean · (softmax - one-hot)
                sum += losses(logits, targets, vocab_size, |logits, target, logsumexp| {
                    logits.iter_mut().for_each(|l| *l = mean * exp(*l - logsumexp));
                    logits[target] -= mean;
                });
                round(logits, dtype);
                let (rows, dim) = (targets.len(), w.len() / vocab_size);
                let dlogits = Mat::new(logits, rows, vocab_size);
                let x = Mat::new(&values[first * dim..], rows, dim);
                matmul_all(&mut dx[first * dim..], Store::Overwrite, dlogits, Mat::new(&w, vocab_size, dim));
                matmul_all(grad, Store::Add, dlogits.t(), x);
            })?;
            Ok(sum)
        })?
    })??;
    Ok((sum, tensor(dx, x.shape(), x.dtype())?))
}

/// Computes the logits of some rows at a time and hands them on: `(first row, logits, targets, vocab_size)`.
fn for_chunks(
    x: &[f32],
    w: &[f32],
    weight: &Tensor,
    targets: &[u32],
    mut body: impl FnMut(usize, &mut [f32], &[u32], usize),
) -> Result<()> {
    let (vocab_size, dim) = weight.dims2()?;
    check_tokens(targets, vocab_size)?;
    let rows = (LOGITS / vocab_size).clamp(1, targets.len());
    let mut buffer = vec![0f32; rows * vocab_size];
    for (chunk, targets) in targets.chunks(rows).enumerate() {
        let first = chunk * rows;
        let logits = &mut buffer[..targets.len() * vocab_size];
        let x = Mat::new(&x[first * dim..], targets.len(), dim);
        matmul_all(logits, Store::Overwrite, x, Mat::new(w, vocab_size, dim).t());
        round(logits, weight.dtype());
        body(first, logits, targets, vocab_size);
    }
    Ok(())
}

/// The sum over rows of `logsumexp - logits[target]`, in f64. `then` gets each row's logits, target and logsumexp.
fn losses(logits: &mut [f32], targets: &[u32], vocab_size: usize, then: impl Fn(&mut [f32], usize, f32) + Sync) -> f64 {
    let rows: Vec<f64> = logits
        .par_chunks_mut(vocab_size)
        .zip(targets)
        .map(|(logits, target)| {
            vectorized!({
                let max = max_of(logits, f32::NEG_INFINITY);
                let sum: f64 = logits.chunks(256).map(|chunk| f64::from(sum_of(chunk, |l| exp(l - max)))).sum();
                let logsumexp = max + (sum as f32).ln();
                let loss = f64::from(logsumexp) - f64::from(logits[*target as usize]);
                then(logits, *target as usize, logsumexp);
                loss
            },)
        })
        .collect();
    rows.iter().sum()
}
