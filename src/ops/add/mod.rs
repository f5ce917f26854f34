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
    Ok(record(add_tensors(x.tensor(), y.tensor())?, x, y))
}

fn record(sum: Tensor, x: &Value, y: &Value) -> Value {
    let dtype = y.tensor().dtype();
    Value::record("add", sum, [x, y], move |grad| {
        let dy = cast(&grad, dtype)?;
        Ok([Some(grad), Some(dy)])
    })
}

/// What a layer adds its result to.
#[derive(Clone, Copy)]
pub struct Residual<'a> {
    pub stream: &'a Value,
    /// Whether anything but a gradient comes of the sum: what only an unread one needs is not computed.
    pub is_read: bool,
}

impl Residual<'_> {
    /// Whether ops add to it in passing, as a GPU's products do, one term after the other. Else an op's result is rounded to its
    /// own dtype, and several are added to each other first. To what nobody reads, nothing is added either way.
    pub fn is_added_in_passing(&self) -> bool {
        !self.is_read || !self.stream.tensor().device().is_cpu()
    }
}

/// `y`, added to `residual` if there is one.
pub fn add_onto(residual: Option<Residual>, y: Value) -> Result<Value> {
    match residual {
        None => Ok(y),
        Some(Residual { stream, is_read: true }) => add(stream, &y),
        Some(Residual { stream, .. }) => Ok(record(stream.tensor().clone(), stream, &y)),
    }
}

/// An op that adds its result to `residual`, if there is one. `sum` makes the result, added to the tensor that it is given if
/// it is given one; for an unread sum it is not called. `op` records how gradients flow through the op itself, with any tensor
/// as its result.
pub(in crate::ops) fn onto(
    residual: Option<Residual>,
    sum: impl FnOnce(Option<&Tensor>) -> Result<Tensor>,
    op: impl FnOnce(Tensor) -> Value,
) -> Result<Value> {
    let Some(Residual { stream, is_read }) = residual.filter(Residual::is_added_in_passing) else {
        return add_onto(residual, op(sum(None)?));
    };
    let sum = if is_read { sum(Some(stream.tensor()))? } else { stream.tensor().clone() };
    Ok(record(sum.clone(), stream, &op(sum)))
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
