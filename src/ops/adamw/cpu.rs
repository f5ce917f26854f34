use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::AdamStep;
use crate::Result;
use crate::autograd::StageBuffers;
use crate::ops::host::{Element, GRAIN, dot, floats, typed, update, vectorized};

pub fn step(buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor, step: &AdamStep) -> Result<()> {
    typed!(T = buffers.weights.dtype(); step_in::<T>(buffers, exp_avg, exp_avg_sq, step))
}

fn step_in<T: Element>(buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor, step: &AdamStep) -> Result<()> {
    let correction1 = 1.0 - step.beta1.powi(step.t as i32);
    let correction2 = 1.0 - step.beta2.powi(step.t as i32);
    let rate = (step.lr / correction1) as f32;
    let inverse_sqrt2 = (1.0 / correction2.sqrt()) as f32;
    let (beta1, beta2, eps) = (step.beta1 as f32, step.beta2 as f32, step.eps as f32);
    let (one_minus_beta1, one_minus_beta2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let (keep, decay) = if step.decoupled {
        ((1.0 - step.lr * step.weight_decay) as f32, 0.0)
    } else {
        (1.0, step.weight_decay as f32)
    };
    let grad_scale = step.grad_scale as f32;

    let grads = buffers.grads.as_ref().expect("a model that trains has gradients");
    update(&buffers.weights, |weights: &mut [T]| {
        update(exp_avg, |m: &mut [T]| {
            update(exp_avg_sq, |v: &mut [T]| {
                update(grads, |grads: &mut [f32]| {
                    let moments = m.par_chunks_mut(GRAIN).zip(v.par_chunks_mut(GRAIN));
                    weights.par_chunks_mut(GRAIN).zip(grads.par_chunks_mut(GRAIN)).zip(moments).for_each(
                        |((weights, grads), (m, v))| {
                            vectorized!({
                                for (((w, g), m), v) in weights.iter_mut().zip(grads).zip(m).zip(v) {
                                    let weight = w.load();
                                    let grad = *g * grad_scale + decay * weight;
                                    let first = beta1 * m.load() + one_minus_beta1 * grad;
                                    let second = beta2 * v.load() + one_minus_beta2 * grad * grad;
                                    *w = T::store(weight * keep - rate * first / (second.sqrt() * inverse_sqrt2 + eps));
                                    *m = T::store(first);
                                    *v = T::store(second);
                                    *g = 0.0;
                                }
                            },);
                        },
                    );
                })
            })
        })
    })????;
    refresh(buffers)
}

/// Rounds the weights into the compute copy, where that is another.
fn refresh(buffers: &StageBuffers) -> Result<()> {
    if buffers.compute.dtype() == buffers.weights.dtype() {
        return Ok(());
    }
    let weights = floats(&buffers.weights)?;
    let copy = |compute: &mut [bf16]| {
        compute.par_chunks_mut(GRAIN).zip(weights.par_chunks(GRAIN)).for_each(|(compute, weights)| {
            vectorized!(compute.iter_mut().zip(weights).for_each(|(c, w)| *c = bf16::from_f32(*w)));
        });
    };
    if buffers.compute.dtype() == DType::BF16 {
        update(&buffers.compute, copy)
    } else {
        Ok(buffers.compute.slice_set(&buffers.weights.to_dtype(buffers.compute.dtype())?, 0, 0)?)
    }
}

pub fn sum_of_squares(grads: &Tensor) -> Result<f64> {
    // Short enough sums of f32 that their rounding does not show, added in f64.
    const SPAN: usize = 512;
    let grads = floats(grads)?;
    let chunk_sum = |chunk: &[f32]| chunk.chunks(SPAN).map(|span| f64::from(vectorized!(dot(span, span)))).sum::<f64>();
    let partial: Vec<f64> = grads.par_chunks(GRAIN).map(chunk_sum).collect();
    Ok(partial.iter().sum())
}
