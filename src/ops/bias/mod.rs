//! A vector that is added to every row.

pub(in crate::ops) mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

use std::sync::Arc;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::tools::profiler;

/// `y = x + b`, in `x`'s dtype. Backward: `dx = dy`, and `db += Σ dy` over rows.
///
/// # Shapes
/// `x`: `(…, dim)`. `bias`: `(dim)`.
pub fn add_bias(x: &Value, bias: &Arc<Parameter>) -> Result<Value> {
    let _span = profiler::span("add_bias").shapes(&[x.tensor().dims()]);
    let y = on_device!(x.tensor(), forward(x.tensor(), &bias.precise()?))?;
    let bias = bias.clone();
    Ok(Value::record("add_bias", y, [x], move |dy| {
        if let Some(grad) = bias.accumulator()? {
            on_device!(dy, accumulate(&grad, &dy))?;
        }
        Ok([Some(dy)])
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType};

    use super::*;
    use crate::ops::testing::{Case, devices, on_threads, parameters_on, random_tensor};

    #[test]
    fn add_bias_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let x = random_tensor("x", &[3, 67, 40])?.to_dtype(dtype)?;
            let long = random_tensor("x", &[600, 264])?.to_dtype(dtype)?;
            for x in [x.clone(), x.transpose(0, 1)?, random_tensor("x", &[70, 35])?.to_dtype(dtype)?, long] {
                let dim = x.dim(D::Minus1)?;
                Case::new("add_bias")
                    .input(x)
                    .parameter("b", &[dim])
                    .check_with_parameters(|v, p| add_bias(&v[0], &p[0]), |t, p| Ok(t[0].broadcast_add(&p[0])?))?;
            }
        }
        Ok(())
    }

    #[test]
    fn the_gradient_of_a_bias_is_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        for device in devices() {
            let run = || -> Result<Vec<f32>> {
                let bias = &parameters_on(device, &[random_tensor("b", &[40])?], DType::F32)?[0];
                let y = add_bias(&Value::input(random_tensor("x", &[3000, 40])?.to_device(device)?), bias)?;
                y.backward(random_tensor("dy", &[3000, 40])?.to_device(device)?)?;
                Ok(bias.grad()?.to_vec1()?)
            };
            assert_eq!(on_threads(1, run)?, on_threads(3, run)?);
        }
        Ok(())
    }
}
