//! The gate of a feed-forward, and the layer after it.

pub(in crate::ops) mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

use std::sync::Arc;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::ops::linear;
use crate::tools::profiler;

/// What a gate makes of its input, before it is multiplied with the other branch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate {
    /// `z / (1 + e⁻ᶻ)`: SwiGLU.
    Silu,
    /// `½ z (1 + tanh(√(2/π) (z + 0.044715 z³)))`: GeGLU.
    GeluTanh,
    /// `max(z, 0)`. With itself as the other branch it is ReLU squared.
    Relu,
    /// GPT-OSS's: with both branches clamped to `limit` (the gate from above only), `z / (1 + e^(-1.702 z))` times the
    /// other branch plus 1.
    Clamped { limit: f32 },
}

#[cfg(feature = "cuda")]
impl Gate {
    /// As `gates.cuh` knows it: which, and its limit.
    pub(in crate::ops) fn for_kernel(self) -> (i32, f32) {
        match self {
            Self::Silu => (0, 0.0),
            Self::GeluTanh => (1, 0.0),
            Self::Relu => (2, 0.0),
            Self::Clamped { limit } => (3, limit),
        }
    }
}

/// `(act(gate) · up) Wᵀ`, in the compute dtype of `weight`. The product of gate and up is rounded to it, and made anew in
/// backward: kept, it would be a third of a feed-forward's activations.
///
/// # Shapes
/// `gate`, `up`: `(…, hidden)`. `weight`: `(out, hidden)`. Returns `(…, out)`.
///
/// # Source
/// Shazeer, arXiv:2002.05202; ReLU squared: So et al., arXiv:2109.08668.
pub fn glu(gate: &Value, up: &Value, weight: &Arc<Parameter>, kind: Gate) -> Result<Value> {
    let _span = profiler::span("glu").shapes(&[gate.tensor().dims(), weight.shape()]);
    let hidden = on_device!(gate.tensor(), forward(gate.tensor(), up.tensor(), kind))?;
    let y = linear::forward(&hidden, weight)?;
    let (saved_gate, saved_up, weight) = (gate.tensor().clone(), up.tensor().clone(), weight.clone());
    Ok(Value::record("glu", y, [gate, up], move |dy| {
        let (dgate, dup) = on_device!(saved_gate, gradients_through(&saved_gate, &saved_up, &weight, &dy, kind))?;
        Ok([Some(dgate), Some(dup)])
    }))
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::{D, DType, Tensor};

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    /// `act(gate) · up`, in the dtype of its inputs.
    pub(in crate::ops) fn reference(kind: Gate, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let sigmoid = |z: &Tensor| -> Result<Tensor> { Ok((z.neg()?.exp()? + 1.0)?.recip()?) };
        Ok(match kind {
            Gate::Silu => (gate * sigmoid(gate)? * up)?,
            Gate::GeluTanh => (gate.gelu()? * up)?,
            Gate::Relu => (gate.relu()? * up)?,
            Gate::Clamped { limit } => {
                let limit = f64::from(limit);
                let (gate, up) = (gate.minimum(limit)?, up.clamp(-limit, limit)?);
                (&gate * sigmoid(&(&gate * 1.702)?)? * (up + 1.0)?)?
            }
        })
    }

    #[test]
    fn every_gate_matches_its_reference() -> Result<()> {
        for kind in [Gate::Silu, Gate::GeluTanh, Gate::Relu, Gate::Clamped { limit: 1.4 }] {
            for dtype in [DType::F32, DType::BF16] {
                let random = |name, dims: &[usize], by: f64| -> Result<Tensor> {
                    Ok((random_tensor(name, dims)? * by)?.to_dtype(dtype)?)
                };
                let strided = random("gate", &[1001, 3], 4.0)?.t()?;
                for gate in [random("gate", &[3, 1001], 4.0)?, strided, random("gate", &[3, 1000], 4.0)?] {
                    let hidden = gate.dim(D::Minus1)?;
                    Case::new("glu")
                        .compute(dtype)
                        .input(gate)
                        .input(random("up", &[3, hidden], 2.0)?)
                        .parameter("w", &[5, hidden])
                        .check_with_parameters(
                            |v, p| glu(&v[0], &v[1], &p[0], kind),
                            |t, p| Ok(reference(kind, &t[0], &t[1])?.matmul(&p[0].t()?)?),
                        )?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gates_are_finite_for_large_inputs() {
        let gates = [-1e30f32, -200., 0., 200., 1e30];
        assert_eq!(cpu::activate(&gates, &[1.0; 5], Gate::Silu), [0., 0., 0., 200., 1e30]);
        assert_eq!(cpu::activate(&gates[..4], &[1.0; 4], Gate::GeluTanh), [0., 0., 0., 200.]);
        assert_eq!(cpu::activate(&gates, &[0.0; 5], Gate::Clamped { limit: 7.0 })[..3], [0., 0., 0.]);
    }
}
