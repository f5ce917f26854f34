//! Products with a number, or with one for each position.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Value;
use crate::tools::profiler;

/// `factor · x`, in `x`'s dtype.
pub fn scale(x: &Value, factor: f32) -> Result<Value> {
    let y = scale_tensor(x.tensor(), factor)?;
    Ok(Value::record("scale", y, [x], move |dy| Ok([Some(scale_tensor(&dy, factor)?)])))
}

/// As [`scale`], on a bare tensor.
pub(crate) fn scale_tensor(x: &Tensor, factor: f32) -> Result<Tensor> {
    let _span = profiler::span("scale").shapes(&[x.dims()]);
    on_device!(x, scale(x, factor))
}

/// Each position times its own factor, in `x`'s dtype.
///
/// # Shapes
/// `x`: `(b, s, h, hd)`. `factors`: `(s)`, f32.
pub fn scale_positions(x: &Value, factors: &Tensor) -> Result<Value> {
    let _span = profiler::span("scale_positions").shapes(&[x.tensor().dims()]);
    let scaled = |x: &Tensor, factors: &Tensor| on_device!(x, scale_positions(x, factors));
    let y = scaled(x.tensor(), factors)?;
    let factors = factors.clone();
    Ok(Value::record("scale_positions", y, [x], move |dy| Ok([Some(scaled(&dy, &factors)?)])))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    #[test]
    fn scale_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let x = random_tensor("x", &[3, 37])?.to_dtype(dtype)?;
            for x in [x.clone(), x.t()?, random_tensor("x", &[5, 512])?.to_dtype(dtype)?] {
                Case::new("scale").input(x).check(|v| scale(&v[0], 0.22), |t| Ok((&t[0] * f64::from(0.22f32))?))?;
            }
        }
        Ok(())
    }

    #[test]
    fn each_position_has_its_own_factor_in_every_row() -> Result<()> {
        let (b, s, h) = (2, 7, 3);
        let factors = random_tensor("factors", &[s])?;
        let wide = factors.to_dtype(DType::F64)?.reshape((1, s, 1, 1))?;
        for dtype in [DType::F32, DType::BF16] {
            let x = |dims: &[usize]| -> Result<_> { Ok(random_tensor("x", dims)?.to_dtype(dtype)?) };
            for x in [x(&[b, s, h, 5])?, x(&[b, h, s, 5])?.transpose(1, 2)?, x(&[b, s, h, 16])?] {
                Case::new("scale_positions").input(x).check(
                    |v| scale_positions(&v[0], &factors.to_device(v[0].tensor().device())?),
                    |t| Ok(t[0].broadcast_mul(&wide)?),
                )?;
            }
        }
        Ok(())
    }
}
