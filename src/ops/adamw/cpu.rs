use candle_core::Tensor;
use rayon::prelude::*;

use super::AdamStep;
use crate::Result;
use crate::autograd::StageBuffers;
use crate::ops::host::{Element, GRAIN, dot, floats, typed, update, vectorized};

pub fn step(buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor, step: &AdamStep) -> Result<()> {
    let StageBuffers { weights, compute, .. } = buffers;
    typed!(W = weights.dtype(), C = compute.dtype(); {
        if weights.dtype() == compute.dtype() {
            step_in::<W, C>(buffers, &mut [], exp_avg, exp_avg_sq, step)
        } else {
            update(compute, |compute: &mut [C]| step_in::<W, C>(buffers, compute, exp_avg, exp_avg_sq, step))?
        }
    })
}

/// `compute` is the copy to refresh; empty where the weights have none.
fn step_in<W: Element, C: Element>(
    buffers: &StageBuffers,
    compute: &mut [C],
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    step: &AdamStep,
) -> Result<()> {
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
    update(&buffers.weights, |weights: &mut [W]| {
        update(exp_avg, |m: &mut [W]| {
            update(exp_avg_sq, |v: &mut [W]| {
                update(grads, |grads: &mut [f32]| {
                    let copies = compute.chunks_mut(GRAIN).chain(std::iter::repeat_with(Default::default));
                    let copies: Vec<&mut [C]> = copies.take(weights.len().div_ceil(GRAIN)).collect();
                    let moments = m.par_chunks_mut(GRAIN).zip(v.par_chunks_mut(GRAIN));
                    let weights = weights.par_chunks_mut(GRAIN).zip(copies);
                    weights.zip(grads.par_chunks_mut(GRAIN)).zip(moments).for_each(
                        |(((weights, copy), grads), (m, v))| {
                            vectorized!({
                                for (((w, g), m), v) in weights.iter_mut().zip(grads).zip(m).zip(v) {
                                    let weight = w.load();
                                    let grad = *g * grad_scale + decay * weight;
                                    let first = beta1 * m.load() + one_minus_beta1 * grad;
                                    let second = beta2 * v.load() + one_minus_beta2 * grad * grad;
                                    *w = W::store(weight * keep - rate * first / (second.sqrt() * inverse_sqrt2 + eps));
                                    *m = W::store(first);
                                    *v = W::store(second);
                                    *g = 0.0;
                                }
                                // While the weights are in the cache.
                                copy.iter_mut().zip(&*weights).for_each(|(c, w)| *c = C::store(w.load()));
                            },);
                        },
                    );
                })
            })
        })
    })???
}

pub fn sum_of_squares(grads: &Tensor) -> Result<f64> {
    // Short enough sums of f32 that their rounding does not show, added in f64.
    const SPAN: usize = 512;
    let grads = floats(grads)?;
    let partial = grads.par_chunks(GRAIN).map(|chunk| {
        vectorized!({
            let mut sum = 0.0;
            for span in chunk.chunks(SPAN) {
                sum += f64::from(dot(span, span));
            }
            sum
        },)
    });
    Ok(partial.collect::<Vec<f64>>().iter().sum())
}
