use candle_core::{Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, elements, exp, typed, vectorized};

pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    typed!(T = gate.dtype(); {
        let y = activate::<T>(&elements(gate)?, &elements(up)?);
        Ok(Tensor::from_vec(y, gate.shape(), &Device::Cpu)?)
    })
}

pub fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    typed!(T = gate.dtype(); {
        let (dgate, dup) = gradients::<T>(&elements(gate)?, &elements(up)?, &elements(dy)?);
        Ok((Tensor::from_vec(dgate, gate.shape(), &Device::Cpu)?, Tensor::from_vec(dup, up.shape(), &Device::Cpu)?))
    })
}

/// `silu(gate) · up`.
pub fn activate<T: Element>(gate: &[T], up: &[T]) -> Vec<T> {
    let ([y], _) = build(gate.len(), GRAIN, |range, y| {
        let (gate, up) = (&gate[range.clone()], &up[range]);
        vectorized!(y.extend(gate.iter().zip(up).map(|(gate, up)| {
            let g = gate.load();
            [T::store(g * sigmoid(g) * up.load())]
        })));
    });
    y
}

/// The gradients of `gate` and `up` under `dy`.
pub fn gradients<T: Element>(gate: &[T], up: &[T], dy: &[T]) -> (Vec<T>, Vec<T>) {
    let ([dgate, dup], _) = build(gate.len(), GRAIN, |range, gradients| {
        let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
        vectorized!(gradients.extend(gate.iter().zip(up).zip(dy).map(|((gate, up), dy)| {
            let (g, dy) = (gate.load(), dy.load());
            let s = sigmoid(g);
            [T::store(dy * up.load() * s * (1.0 + g * (1.0 - s))), T::store(dy * g * s)]
        })));
    });
    (dgate, dup)
}

/// `1 / (1 + e⁻ᶻ)`; for `vectorized!`, as [`exp`] is.
#[inline(always)]
pub fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}
