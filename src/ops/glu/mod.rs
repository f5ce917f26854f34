//! The gate of a feed-forward, and the layer after it.

pub(in crate::ops) mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::ops::add::onto;
use crate::ops::{Residual, linear};
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

/// `(act(gate) · up) Wᵀ`, in the compute dtype of `weight`, added to `residual` if there is one. The product of gate and up is
/// rounded to it, and made anew in backward: kept, it would be a third of a feed-forward's activations.
///
/// # Shapes
/// `gate`, `up`: `(…, hidden)`. `weight`: `(out, hidden)`. Returns `(…, out)`.
///
/// # Source
/// Shazeer, arXiv:2002.05202; ReLU squared: So et al., arXiv:2109.08668.
pub fn glu(gate: &Value, up: &Value, weight: &Arc<Parameter>, kind: Gate, residual: Option<Residual>) -> Result<Value> {
    let sum = |residual: Option<&Tensor>| {
        let _span = profiler::span("glu").shapes(&[gate.tensor().dims(), weight.shape()]);
        let hidden = on_device!(gate.tensor(), forward(gate.tensor(), up.tensor(), kind))?;
        linear::forward_onto(residual, &hidden, weight)
    };
    onto(residual, sum, |y| {
        let (saved_gate, saved_up, weight) = (gate.tensor().clone(), up.tensor().clone(), weight.clone());
        Value::record("glu", y, [gate, up], move |dy| {
            let (dgate, dup) = on_device!(saved_gate, gradients_through(&saved_gate, &saved_up, &weight, &dy, kind))?;
            Ok([Some(dgate), Some(dup)])
        })
    })
}

/// [`glu`] of `x W₁ᵀ` and `x W₃ᵀ`, through `W₂`. A GPU makes both by one product where their weights lie one behind the other.
///
/// # Shapes
/// `x`: `(…, dim)`. `w1`, `w3`: `(hidden, dim)`. `w2`: `(out, hidden)`. Returns `(…, out)`.
pub fn feed_forward(
    x: &Value,
    [w1, w2, w3]: [&Arc<Parameter>; 3],
    kind: Gate,
    residual: Option<Residual>,
) -> Result<Value> {
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(_), Some(w13)) = (x.tensor().device(), Parameter::stacked(&[w1, w3])) {
        return feed_forward_at_once(x, w13, w2, kind, residual);
    }
    let (gate, up) = (linear(x, w1)?, linear(x, w3)?);
    glu(&gate, &up, w2, kind, residual)
}

#[cfg(feature = "cuda")]
fn feed_forward_at_once(
    x: &Value,
    w13: Parameter,
    w2: &Arc<Parameter>,
    kind: Gate,
    residual: Option<Residual>,
) -> Result<Value> {
    let _span = profiler::span("feed_forward").shapes(&[x.tensor().dims(), w13.shape(), w2.shape()]);
    let both = linear::forward(x.tensor(), &w13)?;
    let sum = |residual: Option<&Tensor>| linear::forward_onto(residual, &cuda::forward_at_once(&both, kind)?, w2);
    onto(residual, sum, |y| {
        let (saved, both, w2) = (x.tensor().clone(), both.clone(), w2.clone());
        Value::record_sum("feed_forward", y, [x], move |dy, sum| {
            let gradients = cuda::gradients_at_once(&both, &w2, &dy, kind)?;
            Ok([Some(linear::backward(&saved, &w13, &gradients, sum.as_ref())?)])
        })
    })
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use candle_core::{D, DType, Tensor};

    use super::*;
    use crate::ops::testing::{Case, devices, parameters_on, random_tensor};

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
                            |v, p| glu(&v[0], &v[1], &p[0], kind, None),
                            |t, p| Ok(reference(kind, &t[0], &t[1])?.matmul(&p[0].t()?)?),
                        )?;
                }
            }
        }
        Ok(())
    }

    /// Weights of gate and up one behind the other, and apart.
    #[test]
    fn a_feed_forward_matches_its_reference_onto_a_residual_and_without() -> Result<()> {
        for (dtype, [rows, dim, hidden], order) in [
            (DType::F32, [7, 12, 10], [0, 1, 2]),
            (DType::F32, [7, 12, 10], [0, 2, 1]),
            (DType::BF16, [33, 16, 24], [0, 2, 1]),
            (DType::BF16, [33, 16, 21], [0, 2, 1]),
        ] {
            let shapes: [&[usize]; 3] = [&[hidden, dim], &[dim, hidden], &[hidden, dim]];
            for is_residual in [false, true] {
                let mut case = Case::new("feed_forward").compute(dtype).input(random_tensor("x", &[1, rows, dim])?);
                for i in order {
                    case = case.parameter("w", shapes[i]);
                }
                let at = |i: usize| order.iter().position(|it| *it == i).unwrap();
                case.check_with_parameters(
                    |v, p| {
                        let residual = is_residual.then(|| Residual { stream: &v[0], is_read: true });
                        feed_forward(&v[0], [0, 1, 2].map(|i| &p[at(i)]), Gate::Silu, residual)
                    },
                    |t, p| {
                        let product = |x: &Tensor, i: usize| x.broadcast_matmul(&p[at(i)].t()?);
                        let hidden = reference(Gate::Silu, &product(&t[0], 0)?, &product(&t[0], 2)?)?;
                        let y = product(&hidden, 1)?;
                        Ok(if is_residual { (&t[0] + y)? } else { y })
                    },
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_sum_that_nobody_reads_has_the_gradients_of_one_that_is_read() -> Result<()> {
        let values = [[6, 4], [6, 4], [4, 6]].map(|shape| random_tensor("w", &shape).unwrap());
        for device in devices() {
            let run = |is_read| -> Result<Vec<Vec<f32>>> {
                let p = parameters_on(device, &values, DType::BF16)?;
                let stream = Value::input(random_tensor("x", &[1, 5, 4])?.to_device(device)?);
                let y = feed_forward(
                    &stream,
                    [&p[0], &p[2], &p[1]],
                    Gate::Silu,
                    Some(Residual { stream: &stream, is_read }),
                )?;
                let dx = y.backward(random_tensor("dy", &[1, 5, 4])?.to_device(device)?)?;
                let grads = p.iter().map(|p| p.grad());
                let all = grads.chain([Ok(dx)]).map(|it| Ok(it?.flatten_all()?.to_vec1()?));
                all.collect()
            };
            assert_eq!(run(false)?, run(true)?);
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
