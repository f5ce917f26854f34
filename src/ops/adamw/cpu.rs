use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::{Adam, AdamSteps, Rates};
use crate::Result;
use crate::autograd::StageBuffers;
use crate::ops::host::{Element, GRAIN, dot, floats, typed, update, vectorized};

pub fn write(tensor: &Tensor, values: &[f64]) -> Result<()> {
    Ok(tensor.slice_set(&Tensor::new(values, &Device::Cpu)?, 0, 0)?)
}

pub fn zero(tensor: &Tensor) -> Result<()> {
    Ok(tensor.zero_set()?)
}

pub fn decide(steps: &AdamSteps, loss: &Tensor) -> Result<()> {
    let rates = Rates::from_tensor(&steps.rates)?;
    let norm = steps.squares.flatten_all()?.to_vec1::<f64>()?.iter().sum::<f64>().sqrt();
    let loss = f64::from(loss.to_scalar::<f32>()?);
    let applied = norm.is_finite() && loss.is_finite() && loss <= rates.max_loss;
    let scale = (rates.max_norm / (norm + 1e-6)).min(1.0);
    write(&steps.outcome, &[norm, loss, f64::from(u8::from(applied)), scale])
}

pub fn step(steps: &AdamSteps, buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor) -> Result<()> {
    let StageBuffers { weights, compute, grads } = buffers;
    let outcome = steps.outcome.to_vec1::<f64>()?;
    let (applied, grad_scale) = (outcome[2] != 0.0, outcome[3] as f32);
    if !applied {
        return zero(grads.as_ref().expect("a model that trains has gradients"));
    }
    let (adam, rates) = (&steps.adam, &Rates::from_tensor(&steps.rates)?);
    typed!(W = weights.dtype(), C = compute.dtype(); {
        let step = |compute: &mut [C]| step_in::<W, C>(buffers, compute, exp_avg, exp_avg_sq, adam, rates, grad_scale);
        if weights.dtype() == compute.dtype() { step(&mut []) } else { update(compute, step)? }
    })
}

/// `compute` is the copy to refresh; empty where the weights have none.
fn step_in<W: Element, C: Element>(
    buffers: &StageBuffers,
    compute: &mut [C],
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    adam: &Adam,
    rates: &Rates,
    grad_scale: f32,
) -> Result<()> {
    let (beta1, beta2, eps) = (adam.beta1 as f32, adam.beta2 as f32, adam.eps as f32);
    let (one_minus_beta1, one_minus_beta2) = ((1.0 - adam.beta1) as f32, (1.0 - adam.beta2) as f32);
    let &Rates { rate, inverse_sqrt2, keep, .. } = rates;
    let decay = adam.decay_of_gradients();

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

/// `Σ g²`, `squares` has room for one number.
pub fn sum_of_squares(grads: &Tensor, squares: &Tensor) -> Result<()> {
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
    write(squares, &[partial.collect::<Vec<f64>>().iter().sum()])
}
