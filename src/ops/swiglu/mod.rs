//! The gate of a SwiGLU feed-forward, and the layer after it.

pub(in crate::ops) mod cpu;

use std::sync::Arc;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::ops::linear;
use crate::tools::profiler;

/// `(silu(gate) · up) Wᵀ` with `silu(z) = z / (1 + e⁻ᶻ)`, in the compute dtype of `weight`. The product of gate and up is
/// rounded to it, and made anew in backward: kept, it would be a third of a feed-forward's activations.
///
/// # Shapes
/// `gate`, `up`: `(…, hidden)`. `weight`: `(out, hidden)`. Returns `(…, out)`.
///
/// # Source
/// Shazeer, arXiv:2002.05202.
pub fn swiglu(gate: &Value, up: &Value, weight: &Arc<Parameter>) -> Result<Value> {
    let _span = profiler::span("swiglu").shapes(&[gate.tensor().dims(), weight.shape()]);
    let y = linear::forward(&cpu::forward(gate.tensor(), up.tensor())?, weight)?;
    let (saved_gate, saved_up, weight) = (gate.tensor().clone(), up.tensor().clone(), weight.clone());
    Ok(Value::record("swiglu", y, [gate, up], move |dy| {
        let hidden = cpu::forward(&saved_gate, &saved_up)?;
        let dhidden = linear::backward(&hidden, &weight, &dy)?;
        let (dgate, dup) = cpu::backward(&saved_gate, &saved_up, &dhidden)?;
        Ok([Some(dgate), Some(dup)])
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    #[test]
    fn swiglu_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let gate = |dims: &[usize]| -> Result<_> { Ok((random_tensor("gate", dims)? * 4.0)?.to_dtype(dtype)?) };
            for gate in [gate(&[3, 1001])?, gate(&[1001, 3])?.t()?] {
                Case::new("swiglu")
                    .compute(dtype)
                    .input(gate)
                    .input(random_tensor("up", &[3, 1001])?.to_dtype(dtype)?)
                    .parameter("w", &[5, 1001])
                    .check_with_parameters(
                        |v, p| swiglu(&v[0], &v[1], &p[0]),
                        |t, p| Ok((candle_nn::ops::silu(&t[0])? * &t[1])?.matmul(&p[0].t()?)?),
                    )?;
            }
        }
        Ok(())
    }

    #[test]
    fn the_gate_is_finite_for_large_inputs() {
        assert_eq!(cpu::activate(&[-1e30f32, -200., 0., 200., 1e30], &[1.0; 5]), [0., 0., 0., 200., 1e30]);
    }
}
