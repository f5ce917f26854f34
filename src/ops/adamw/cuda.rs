use candle_core::Tensor;

use super::AdamSteps;
use crate::Result;
use crate::autograd::StageBuffers;
use crate::ops::gpu::{THREADS, blocks, device, launch, suffix};
pub use crate::ops::gpu::{write, zero};

/// `Σ g²`, in as many parts as `squares` has room for.
pub fn sum_of_squares(grads: &Tensor, squares: &Tensor) -> Result<()> {
    let (n, shared) = (grads.elem_count(), 32 * size_of::<f64>());
    launch!(
        device(grads), "adamw", "adam_squares",
        grid: [squares.elem_count(), 1, 1], block: THREADS, shared: shared;
        grads, n, squares,
    );
    Ok(())
}

pub fn decide(steps: &AdamSteps, loss: &Tensor) -> Result<()> {
    let AdamSteps { rates, squares, outcome, .. } = steps;
    let (count, shared) = (squares.elem_count(), 32 * size_of::<f64>());
    launch!(
        device(loss), "adamw", "adam_decide", grid: [1, 1, 1], block: 1024, shared: shared;
        squares, count, loss, rates, outcome,
    );
    Ok(())
}

pub fn step(steps: &AdamSteps, buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor) -> Result<()> {
    let AdamSteps { adam, rates, outcome, .. } = steps;
    let StageBuffers { weights, compute, grads } = buffers;
    let grads = grads.as_ref().expect("a model that trains has gradients");
    let copy = (weights.dtype() != compute.dtype()).then_some(compute);
    let n = weights.elem_count();
    let (beta1, beta2, eps) = (adam.beta1 as f32, adam.beta2 as f32, adam.eps as f32);
    let (one_minus_beta1, one_minus_beta2) = ((1.0 - adam.beta1) as f32, (1.0 - adam.beta2) as f32);
    let decay = adam.decay_of_gradients();
    let kernel = format!("adam_{}", suffix(weights.dtype()));
    launch!(
        device(weights), "adamw", &kernel, grid: blocks(n.div_ceil(8)), block: THREADS;
        weights, copy, grads, exp_avg, exp_avg_sq, n, rates, outcome,
        beta1, beta2, one_minus_beta1, one_minus_beta2, eps, decay,
    );
    Ok(())
}
