//! Root-mean-square normalisation.

pub(in crate::ops) mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

use std::sync::Arc;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::tools::profiler;

/// `y = x · rstd · w` with `rstd = 1 / sqrt(mean(x²) + eps)` over the last dimension and `w = offset + weight`, in the
/// compute dtype of `weight`.
///
/// Backward: `dx = rstd · (w·dy - x̂ · mean(w·dy·x̂))` with `x̂ = x · rstd`, and `dw += Σ dy · x̂` over rows.
///
/// # Shapes
/// `x`: `(…, dim)`. `weight`: `(dim)`.
///
/// # Source
/// Zhang & Sennrich, arXiv:1910.07467.
pub fn rms_norm(x: &Value, weight: &Arc<Parameter>, offset: f32, eps: f64) -> Result<Value> {
    let _span = profiler::span("rms_norm").shapes(&[x.tensor().dims()]);
    let dtype = weight.compute()?.dtype();
    let (y, rstd) = on_device!(x.tensor(), forward(x.tensor(), &weight.precise()?, offset, eps as f32, dtype))?;
    let (saved, weight) = (x.tensor().clone(), weight.clone());
    Ok(Value::record_sum("rms_norm", y, [x], move |dy, sum| {
        let (weights, grad) = (weight.precise()?, weight.accumulator()?);
        Ok([Some(on_device!(dy, backward(&saved, &weights, offset, grad.as_ref(), &rstd, &dy, sum.as_ref()))?)])
    }))
}

/// `y = x · rstd`: [`rms_norm`] without a weight, in `x`'s dtype.
pub fn unit_norm(x: &Value, eps: f64) -> Result<Value> {
    let _span = profiler::span("unit_norm").shapes(&[x.tensor().dims()]);
    let (y, rstd) = on_device!(x.tensor(), forward_unit(x.tensor(), eps as f32))?;
    let saved = x.tensor().clone();
    Ok(Value::record("unit_norm", y, [x], move |dy| Ok([Some(on_device!(dy, backward_unit(&saved, &rstd, &dy))?)])))
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType};
    use half::bf16;

    use super::*;
    use crate::ops::testing::{Case, devices, on_threads, parameters_on, random_tensor};

    #[test]
    fn rms_norm_matches_its_reference() -> Result<()> {
        for (dtype, offset) in [(DType::F32, 0.0), (DType::BF16, 0.0), (DType::F32, 1.0)] {
            let strided = random_tensor("x", &[2, 33, 130])?.transpose(1, 2)?;
            for x in [random_tensor("x", &[1, 1, 8])?, random_tensor("x", &[3, 67, 40])?, strided] {
                let dim = x.dim(D::Minus1)?;
                Case::new("rms_norm").compute(dtype).input(x).parameter("w", &[dim]).check_with_parameters(
                    |v, p| rms_norm(&v[0], &p[0], offset, 1e-5),
                    |t, p| {
                        let mean = (t[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?;
                        Ok(t[0].broadcast_div(&mean.sqrt()?)?.broadcast_mul(&(&p[0] + f64::from(offset))?)?)
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Rows as a GPU holds them: by a warp, by a block, in registers or not; and more of them than it has blocks.
    #[test]
    fn rows_of_every_width_are_normalised_alike() -> Result<()> {
        let kinds = [
            (DType::F32, DType::F32),
            (DType::F32, DType::BF16),
            (DType::BF16, DType::BF16),
            (DType::BF16, DType::F32),
        ];
        let sizes = [(2150, 16), (2130, 264), (300, 1032), (2, 4104), (3, 8200), (300, 1030)];
        for ((x, compute), (rows, dim)) in
            kinds.into_iter().cycle().zip(sizes.into_iter().chain(sizes.into_iter().rev()))
        {
            let x = random_tensor("x", &[rows, dim])?.to_dtype(x)?;
            Case::new("rms_norm").compute(compute).input(x).parameter("w", &[dim]).check_with_parameters(
                |v, p| rms_norm(&v[0], &p[0], 0.5, 1e-5),
                |t, p| {
                    let mean = (t[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?;
                    Ok(t[0].broadcast_div(&mean.sqrt()?)?.broadcast_mul(&(&p[0] + 0.5)?)?)
                },
            )?;
        }
        Ok(())
    }

    #[test]
    fn unit_norm_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let x = random_tensor("x", &[2, 33, 5, 12])?.to_dtype(dtype)?;
            for x in [x.clone(), x.transpose(1, 2)?] {
                Case::new("unit_norm").input(x).check(
                    |v| unit_norm(&v[0], 1e-5),
                    |t| Ok(t[0].broadcast_div(&(t[0].sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?)?),
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn rms_norm_is_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        let (x, dy) = (random_tensor("x", &[1500, 40])?, random_tensor("dy", &[1500, 40])?.to_dtype(DType::BF16)?);
        for device in devices() {
            let run = || -> Result<_> {
                let weight = &parameters_on(device, &[random_tensor("w", &[40])?], DType::BF16)?[0];
                let y = rms_norm(&Value::input(x.to_device(device)?), weight, 0.0, 1e-5)?;
                let result = y.tensor().to_vec2::<bf16>()?;
                let dx = y.backward(dy.to_device(device)?)?.to_vec2::<f32>()?;
                Ok((result, dx, weight.grad()?.to_vec1::<f32>()?))
            };
            assert!(on_threads(1, run)? == on_threads(3, run)?);
        }
        Ok(())
    }
}
