use candle_core::{Device, Tensor};

use super::Gate;
use crate::Result;
use crate::autograd::Parameter;
use crate::ops::host::{Element, GRAIN, build, elements, exp, typed, vectorized};
use crate::ops::linear;

pub fn forward(gate: &Tensor, up: &Tensor, kind: Gate) -> Result<Tensor> {
    typed!(T = gate.dtype(); {
        let y = activate::<T>(&elements(gate)?, &elements(up)?, kind);
        Ok(Tensor::from_vec(y, gate.shape(), &Device::Cpu)?)
    })
}

/// The gradients of `gate` and `up` through the layer of `weight`, whose own go to its accumulators.
pub fn gradients_through(
    gate: &Tensor,
    up: &Tensor,
    weight: &Parameter,
    dy: &Tensor,
    kind: Gate,
) -> Result<(Tensor, Tensor)> {
    let dhidden = linear::backward(&forward(gate, up, kind)?, weight, dy, None)?;
    backward(gate, up, &dhidden, kind)
}

fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor, kind: Gate) -> Result<(Tensor, Tensor)> {
    typed!(T = gate.dtype(); {
        let (dgate, dup) = gradients::<T>(&elements(gate)?, &elements(up)?, &elements(dy)?, kind);
        Ok((Tensor::from_vec(dgate, gate.shape(), &Device::Cpu)?, Tensor::from_vec(dup, up.shape(), &Device::Cpu)?))
    })
}

/// What of a gate times what of an up: `values` gives both factors, `slopes` the derivative of each as well.
trait Factors: Sync {
    fn values(&self, gate: f32, up: f32) -> (f32, f32);
    /// `(value, slope)` of the gate's factor and of the up's.
    fn slopes(&self, gate: f32, up: f32) -> ((f32, f32), (f32, f32));
}

struct Silu;
struct GeluTanh;
struct Relu;
struct Clamped {
    limit: f32,
}

impl Factors for Silu {
    #[inline(always)]
    fn values(&self, gate: f32, up: f32) -> (f32, f32) {
        (gate * sigmoid(gate), up)
    }

    #[inline(always)]
    fn slopes(&self, gate: f32, up: f32) -> ((f32, f32), (f32, f32)) {
        let s = sigmoid(gate);
        ((gate * s, s * (1.0 + gate * (1.0 - s))), (up, 1.0))
    }
}

/// `½ z (1 + tanh u)` is `z · sigmoid(2 u)`.
impl GeluTanh {
    /// `2 √(2/π)`.
    const OUTER: f32 = 1.595_769_2;
    const CUBE: f32 = 0.044_715;

    #[inline(always)]
    fn sigmoid(z: f32) -> f32 {
        sigmoid(Self::OUTER * z * (1.0 + Self::CUBE * z * z))
    }
}

impl Factors for GeluTanh {
    #[inline(always)]
    fn values(&self, gate: f32, up: f32) -> (f32, f32) {
        (gate * Self::sigmoid(gate), up)
    }

    #[inline(always)]
    fn slopes(&self, gate: f32, up: f32) -> ((f32, f32), (f32, f32)) {
        let s = Self::sigmoid(gate);
        let slope = Self::OUTER * (1.0 + 3.0 * Self::CUBE * gate * gate);
        ((gate * s, s * (1.0 + gate * slope * (1.0 - s))), (up, 1.0))
    }
}

impl Factors for Relu {
    #[inline(always)]
    fn values(&self, gate: f32, up: f32) -> (f32, f32) {
        (gate.max(0.0), up)
    }

    #[inline(always)]
    fn slopes(&self, gate: f32, up: f32) -> ((f32, f32), (f32, f32)) {
        ((gate.max(0.0), if gate > 0.0 { 1.0 } else { 0.0 }), (up, 1.0))
    }
}

impl Clamped {
    const STEEPNESS: f32 = 1.702;
}

impl Factors for Clamped {
    #[inline(always)]
    fn values(&self, gate: f32, up: f32) -> (f32, f32) {
        let gate = gate.min(self.limit);
        (gate * sigmoid(Self::STEEPNESS * gate), up.clamp(-self.limit, self.limit) + 1.0)
    }

    #[inline(always)]
    fn slopes(&self, gate: f32, up: f32) -> ((f32, f32), (f32, f32)) {
        let clamped = gate.min(self.limit);
        let s = sigmoid(Self::STEEPNESS * clamped);
        let slope = s * (1.0 + Self::STEEPNESS * clamped * (1.0 - s));
        let inside = |is: bool| if is { 1.0 } else { 0.0 };
        let up_factor = up.clamp(-self.limit, self.limit) + 1.0;
        ((clamped * s, slope * inside(gate <= self.limit)), (up_factor, inside(up.abs() <= self.limit)))
    }
}

/// The product of the two factors of `kind`.
pub fn activate<T: Element>(gate: &[T], up: &[T], kind: Gate) -> Vec<T> {
    match kind {
        Gate::Silu => products(gate, up, &Silu),
        Gate::GeluTanh => products(gate, up, &GeluTanh),
        Gate::Relu => products(gate, up, &Relu),
        Gate::Clamped { limit } => products(gate, up, &Clamped { limit }),
    }
}

/// The gradients of `gate` and `up` under `dy`.
pub fn gradients<T: Element>(gate: &[T], up: &[T], dy: &[T], kind: Gate) -> (Vec<T>, Vec<T>) {
    match kind {
        Gate::Silu => gradients_of(gate, up, dy, &Silu),
        Gate::GeluTanh => gradients_of(gate, up, dy, &GeluTanh),
        Gate::Relu => gradients_of(gate, up, dy, &Relu),
        Gate::Clamped { limit } => gradients_of(gate, up, dy, &Clamped { limit }),
    }
}

fn products<T: Element>(gate: &[T], up: &[T], factors: &impl Factors) -> Vec<T> {
    let ([y], _) = build(gate.len(), GRAIN, |range, y| {
        let (gate, up) = (&gate[range.clone()], &up[range]);
        vectorized!(y.extend(gate.iter().zip(up).map(|(gate, up)| {
            let (gate, up) = factors.values(gate.load(), up.load());
            [T::store(gate * up)]
        })));
    });
    y
}

fn gradients_of<T: Element>(gate: &[T], up: &[T], dy: &[T], factors: &impl Factors) -> (Vec<T>, Vec<T>) {
    let ([dgate, dup], _) = build(gate.len(), GRAIN, |range, gradients| {
        let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
        vectorized!(gradients.extend(gate.iter().zip(up).zip(dy).map(|((gate, up), dy)| {
            let ((gate, dgate), (up, dup)) = factors.slopes(gate.load(), up.load());
            [T::store(dy.load() * up * dgate), T::store(dy.load() * gate * dup)]
        })));
    });
    (dgate, dup)
}

/// `1 / (1 + e⁻ᶻ)`; for `vectorized!`, as [`exp`] is.
#[inline(always)]
pub fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + exp(-z))
}
