//! Layer normalisation.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::sync::Arc;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::tools::profiler;

/// `y = (x - mean) · rstd · w + b` with `rstd = 1 / sqrt(variance + eps)` over the last dimension, in the compute dtype of
/// `weight`.
///
/// Backward: with `x̂ = (x - mean) · rstd`, `dx = rstd · (w·dy - mean(w·dy) - x̂ · mean(w·dy·x̂))`, and over rows
/// `dw += Σ dy · x̂` and `db += Σ dy`.
///
/// # Shapes
/// `x`: `(…, dim)`. `weight`, `bias`: `(dim)`.
///
/// # Source
/// Ba et al., arXiv:1607.06450.
pub fn layer_norm(x: &Value, weight: &Arc<Parameter>, bias: &Arc<Parameter>, eps: f64) -> Result<Value> {
    let _span = profiler::span("layer_norm").shapes(&[x.tensor().dims()]);
    let dtype = weight.compute()?.dtype();
    let (w, b) = (weight.precise()?, bias.precise()?);
    let (y, moments) = on_device!(x.tensor(), forward(x.tensor(), &w, &b, eps as f32, dtype))?;
    let (saved, weight, bias) = (x.tensor().clone(), weight.clone(), bias.clone());
    Ok(Value::record("layer_norm", y, [x], move |dy| {
        let grads = weight.accumulator()?.zip(bias.accumulator()?);
        let weights = weight.precise()?;
        Ok([Some(on_device!(dy, backward(&saved, &weights, grads.as_ref(), &moments, &dy))?)])
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType};

    use super::*;
    use crate::ops::testing::{Case, devices, on_threads, parameters_on, random_tensor};

    #[test]
    fn layer_norm_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let strided = random_tensor("x", &[2, 33, 130])?.transpose(1, 2)?;
            // Rows as a GPU holds them: by a warp, by a block, in registers or not; and more of them than it has blocks.
            let sizes = match dtype {
                DType::F32 => [(2150, 16), (300, 1032), (3, 8200)],
                _ => [(2130, 264), (2, 4104), (300, 1030)],
            };
            let wide = sizes.map(|(rows, dim)| random_tensor("x", &[rows, dim]).unwrap());
            let some = [random_tensor("x", &[1, 1, 8])?, (random_tensor("x", &[3, 67, 40])? + 2.0)?, strided];
            for x in some.into_iter().chain(wide) {
                let dim = x.dim(D::Minus1)?;
                Case::new("layer_norm")
                    .compute(dtype)
                    .input(x)
                    .parameter("w", &[dim])
                    .parameter("b", &[dim])
                    .check_with_parameters(
                        |v, p| layer_norm(&v[0], &p[0], &p[1], 1e-5),
                        |t, p| {
                            let centred = t[0].broadcast_sub(&t[0].mean_keepdim(D::Minus1)?)?;
                            let variance = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?;
                            Ok(centred.broadcast_div(&variance.sqrt()?)?.broadcast_mul(&p[0])?.broadcast_add(&p[1])?)
                        },
                    )?;
            }
        }
        Ok(())
    }

    #[test]
    fn layer_norm_is_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        let (x, dy) = (random_tensor("x", &[1500, 40])?, random_tensor("dy", &[1500, 40])?);
        for device in devices() {
            let run = || -> Result<_> {
                let p = parameters_on(device, &[random_tensor("w", &[40])?, random_tensor("b", &[40])?], DType::F32)?;
                let y = layer_norm(&Value::input(x.to_device(device)?), &p[0], &p[1], 1e-5)?;
                let result = y.tensor().to_vec2::<f32>()?;
                let dx = y.backward(dy.to_device(device)?)?.to_vec2::<f32>()?;
                Ok((result, dx, p[0].grad()?.to_vec1::<f32>()?, p[1].grad()?.to_vec1::<f32>()?))
            };
            assert!(on_threads(1, run)? == on_threads(3, run)?);
        }
        Ok(())
    }
}
