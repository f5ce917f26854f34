//! Products with a number.

mod cpu;

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

#[cfg(test)]
mod tests {
    use candle_core::DType;

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
}
