//! Products with a number, or with one for each position.

mod cpu;

use std::sync::Arc;

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
    cpu::scale(x, factor)
}

/// Each position times its own factor, in `x`'s dtype.
///
/// # Shapes
/// `x`: `(b, s, h, hd)`. `factors`: `s`.
pub fn scale_positions(x: &Value, factors: &Arc<[f32]>) -> Result<Value> {
    let _span = profiler::span("scale_positions").shapes(&[x.tensor().dims()]);
    let y = cpu::scale_positions(x.tensor(), factors)?;
    let factors = factors.clone();
    Ok(Value::record("scale_positions", y, [x], move |dy| Ok([Some(cpu::scale_positions(&dy, &factors)?)])))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    #[test]
    fn scale_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let x = random_tensor("x", &[3, 37])?.to_dtype(dtype)?;
            for x in [x.clone(), x.t()?] {
                Case::new("scale").input(x).check(|v| scale(&v[0], 0.22), |t| Ok((&t[0] * f64::from(0.22f32))?))?;
            }
        }
        Ok(())
    }

    #[test]
    fn each_position_has_its_own_factor_in_every_row() -> Result<()> {
        let (b, s, h, hd) = (2, 7, 3, 5);
        let factors: Arc<[f32]> = crate::ops::testing::random("factors", s).into();
        let wide = Tensor::from_iter(factors.iter().map(|f| f64::from(*f)), &Device::Cpu)?.reshape((1, s, 1, 1))?;
        for dtype in [DType::F32, DType::BF16] {
            let x = |dims: &[usize]| -> Result<_> { Ok(random_tensor("x", dims)?.to_dtype(dtype)?) };
            for x in [x(&[b, s, h, hd])?, x(&[b, h, s, hd])?.transpose(1, 2)?] {
                Case::new("scale_positions")
                    .input(x)
                    .check(|v| scale_positions(&v[0], &factors), |t| Ok(t[0].broadcast_mul(&wide)?))?;
            }
        }
        Ok(())
    }
}
