//! Sums of activations.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Value;
use crate::ops::copy::cast;
use crate::tools::profiler;

/// `x + y`, in `x`'s dtype: the residual stream keeps its own precision whatever is added to it.
///
/// # Shapes
/// Equal.
pub fn add(x: &Value, y: &Value) -> Result<Value> {
    let sum = add_tensors(x.tensor(), y.tensor())?;
    let dtype = y.tensor().dtype();
    Ok(Value::record("add", sum, [x, y], move |grad| {
        let dy = cast(&grad, dtype)?;
        Ok([Some(grad), Some(dy)])
    }))
}

/// As [`add`], on bare tensors.
pub(crate) fn add_tensors(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let _span = profiler::span("add").shapes(&[x.dims(), y.dims()]);
    add_within(x, y)
}

/// As [`add_tensors`], as a part of an op that a profile shows as one.
pub(in crate::ops) fn add_within(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    on_device!(x, add(x, y))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    #[test]
    fn add_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let low = random_tensor("x", &[5, 512])?.to_dtype(DType::BF16)?;
            let strided = random_tensor("x", &[37, 3])?.t()?;
            for x in [random_tensor("x", &[3, 37])?, strided, random_tensor("x", &[5, 512])?, low] {
                let y = random_tensor("y", x.dims())?.to_dtype(dtype)?;
                Case::new("add").input(x).input(y).check(|v| add(&v[0], &v[1]), |t| Ok((&t[0] + &t[1])?))?;
            }
        }
        Ok(())
    }
}
