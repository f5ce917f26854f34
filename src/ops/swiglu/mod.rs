//! The gate of a SwiGLU feed-forward.

pub(in crate::ops) mod cpu;

use crate::Result;
use crate::autograd::Value;
use crate::tools::profiler;

/// `silu(gate) · up` with `silu(z) = z / (1 + e⁻ᶻ)`, elementwise, in the inputs' dtype.
///
/// # Source
/// Shazeer, arXiv:2002.05202.
pub fn swiglu(gate: &Value, up: &Value) -> Result<Value> {
    let _span = profiler::span("swiglu").shapes(&[gate.tensor().dims()]);
    let y = cpu::forward(gate.tensor(), up.tensor())?;
    let saved = (gate.tensor().clone(), up.tensor().clone());
    Ok(Value::record("swiglu", y, [gate, up], move |dy| {
        let (dgate, dup) = cpu::backward(&saved.0, &saved.1, &dy)?;
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
                    .input(gate)
                    .input(random_tensor("up", &[3, 1001])?.to_dtype(dtype)?)
                    .check(|v| swiglu(&v[0], &v[1]), |t| Ok((candle_nn::ops::silu(&t[0])? * &t[1])?))?;
            }
        }
        Ok(())
    }

    #[test]
    fn swiglu_is_finite_for_large_gates() -> Result<()> {
        let gate =
            Value::input(candle_core::Tensor::new(&[-1e30f32, -200., 0., 200., 1e30], &candle_core::Device::Cpu)?);
        let up = Value::constant(candle_core::Tensor::ones(5, DType::F32, &candle_core::Device::Cpu)?);
        assert_eq!(swiglu(&gate, &up)?.tensor().to_vec1::<f32>()?, [0., 0., 0., 200., 1e30]);
        Ok(())
    }
}
