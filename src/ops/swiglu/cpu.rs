use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{GRAIN, exp, floats, tensor, vectorized};

pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    tensor(activate(&floats(gate)?, &floats(up)?), gate.shape(), gate.dtype())
}

pub fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (dgate, dup) = gradients(&floats(gate)?, &floats(up)?, &floats(dy)?);
    Ok((tensor(dgate, gate.shape(), gate.dtype())?, tensor(dup, up.shape(), up.dtype())?))
}

/// `silu(gate) · up`.
pub fn activate(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut y = vec![0f32; gate.len()];
    y.par_chunks_mut(GRAIN).zip(gate.par_chunks(GRAIN).zip(up.par_chunks(GRAIN))).for_each(|(y, (gate, up))| {
        vectorized!(y.iter_mut().zip(gate.iter().zip(up)).for_each(|(y, (g, u))| *y = g * sigmoid(*g) * u));
    });
    y
}

/// The gradients of `gate` and `up` under `dy`.
pub fn gradients(gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut dgate, mut dup) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
    dgate
        .par_chunks_mut(GRAIN)
        .zip(dup.par_chunks_mut(GRAIN))
        .zip(gate.par_chunks(GRAIN).zip(up.par_chunks(GRAIN)).zip(dy.par_chunks(GRAIN)))
        .for_each(|((dgate, dup), ((gate, up), dy))| {
            vectorized!({
                let inputs = gate.iter().zip(up).zip(dy);
                for (((g, u), dy), (dgate, dup)) in inputs.zip(dgate.iter_mut().zip(dup)) {
                    let s = sigmoid(*g);
                    *dup = dy * g * s;
                    *dgate = dy * u * s * (1.0 + g * (1.0 - s));
                }
            },);
        });
    (dgate, dup)
}

#[inline(always)]
pub fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}
