use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{dot, floats, tensor, update, vectorized};

/// Rows per task. Fixed, so that the sums of weight gradients do not depend on the number of threads.
const ROWS: usize = 32;

/// The result, and `rstd` of each row.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f32, dtype: DType) -> Result<(Tensor, Vec<f32>)> {
    let dim = x.dim(D::Minus1)?;
    let (values, weight) = (floats(x)?, floats(weight)?);
    let weight: &[f32] = &weight; // an enum inside a loop would keep it from vectorising
    let mut y = vec![0f32; values.len()];
    let mut rstd = vec![0f32; values.len() / dim];
    y.par_chunks_mut(ROWS * dim).zip(values.par_chunks(ROWS * dim)).zip(rstd.par_chunks_mut(ROWS)).for_each(
        |((y, x), rstd)| {
            vectorized!({
                for ((y, x), rstd) in y.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(rstd) {
                    *rstd = 1.0 / (dot(x, x) / dim as f32 + eps).sqrt();
                    y.iter_mut().zip(x.iter().zip(weight)).for_each(|(y, (x, w))| *y = x * *rstd * w);
                }
            },);
        },
    );
    Ok((tensor(y, x.shape(), dtype)?, rstd))
}

pub fn backward(x: &Tensor, weight: &Tensor, grad: &Tensor, rstd: &[f32], dy: &Tensor) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let (values, weights, dy) = (floats(x)?, floats(weight)?, floats(dy)?);
    let weights: &[f32] = &weights;
    let mut dx = vec![0f32; values.len()];
    let partial_dw: Vec<Vec<f32>> = dx
        .par_chunks_mut(ROWS * dim)
        .zip(values.par_chunks(ROWS * dim).zip(dy.par_chunks(ROWS * dim)))
        .zip(rstd.par_chunks(ROWS))
        .map(|((dx, (x, dy)), rstd)| {
            vectorized!({
                let mut dw = vec![0f32; dim];
                let rows = x.chunks_exact(dim).zip(dy.chunks_exact(dim));
                for ((dx, (x, dy)), &rstd) in dx.chunks_exact_mut(dim).zip(rows).zip(rstd) {
                    for (((dw, dx), (x, dy)), w) in dw.iter_mut().zip(&mut *dx).zip(x.iter().zip(dy)).zip(weights) {
                        *dw += dy * x * rstd;
                        *dx = dy * w; // the gradient of x̂, until the mean is known
                    }
                    let mean = dot(dx, x) * rstd / dim as f32;
                    dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = rstd * (*dx - x * rstd * mean));
                }
                dw
            },)
        })
        .collect();
    update(grad, |grad: &mut [f32]| {
        for partial in &partial_dw {
            grad.iter_mut().zip(partial).for_each(|(grad, dw)| *grad += dw);
        }
    })?;
    tensor(dx, x.shape(), x.dtype())
}
