//! Root-mean-square normalisation.

mod cpu;

use std::sync::Arc;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::tools::profiler;

/// `y = x · rstd · w` with `rstd = 1 / sqrt(mean(x²) + eps)` over the last dimension, in the compute dtype of `weight`.
///
/// Backward: `dx = rstd · (w·dy - x̂ · mean(w·dy·x̂))` with `x̂ = x · rstd`, and `dw += Σ dy · x̂` over rows.
///
/// # Shapes
/// `x`: `(…, dim)`. `weight`: `(dim)`.
///
/// # Source
/// Zhang & Sennrich, arXiv:1910.07467.
pub fn rms_norm(x: &Value, weight: &Arc<Parameter>, eps: f64) -> Result<Value> {
    let _span = profiler::span("rms_norm").shapes(&[x.tensor().dims()]);
    let (y, rstd) = cpu::forward(x.tensor(), &weight.weights()?, eps as f32, weight.compute()?.dtype())?;
    let (saved, weight) = (x.tensor().clone(), weight.clone());
    Ok(Value::record("rms_norm", y, [x], move |dy| {
        Ok([Some(cpu::backward(&saved, &weight.weights()?, &weight.grad()?, &rstd, &dy)?)])
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType};

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    #[test]
    fn rms_norm_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            for dims in [[1, 1, 8], [3, 67, 40], [2, 130, 33]] {
                Case::new("rms_norm")
                    .compute(dtype)
                    .input(random_tensor("x", &dims)?)
                    .parameter("w", &[dims[2]])
                    .check_with_parameters(
                        |v, p| rms_norm(&v[0], &p[0], 1e-5),
                        |t, p| {
                            let mean = (t[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?;
                            Ok(t[0].broadcast_div(&mean.sqrt()?)?.broadcast_mul(&p[0])?)
                        },
                    )?;
            }
        }
        Ok(())
    }
}
