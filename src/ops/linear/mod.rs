//! Products with a weight matrix, and with what an adapter adds to it.

mod adapter;
mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;
#[cfg(feature = "cuda")]
mod cuda_adapter;

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Parameter, Value};
use crate::ops::add::{add_within, onto};
use crate::ops::copy::cast;
use crate::ops::{Residual, add_tensors, float8};
use crate::tools::profiler;

/// `y = x Wᵀ`, computed and returned in the compute dtype of `weight`, with f32 sums.
///
/// Backward returns `dx = dy W` and adds `dW = dyᵀ x` to the parameter's accumulator, if it has one. Where the weight has an
/// [`Adapter`](crate::autograd::Adapter), its share is part of both. Where it has a [`Float8`](crate::autograd::Float8), the
/// three products, but not those of the adapter, are of 8-bit floats.
///
/// # Shapes
/// `x`: `(…, in)`. `weight`: `(out, in)`. Returns `(…, out)`.
pub fn linear(x: &Value, weight: &Arc<Parameter>) -> Result<Value> {
    linear_onto(None, x, weight)
}

/// As [`linear`], the result added to `residual` if there is one, which is f32 or in the compute dtype.
pub fn linear_onto(residual: Option<Residual>, x: &Value, weight: &Arc<Parameter>) -> Result<Value> {
    let sum = |residual: Option<&Tensor>| {
        let _span = profiler::span("linear").shapes(&[x.tensor().dims(), weight.shape()]);
        forward_onto(residual, x.tensor(), weight)
    };
    onto(residual, sum, |y| {
        let (saved, weight) = (x.tensor().clone(), weight.clone());
        Value::record_sum("linear", y, [x], move |dy, sum| Ok([Some(backward(&saved, &weight, &dy, sum.as_ref())?)]))
    })
}

/// [`linear`] on bare tensors, for ops that contain one.
pub(in crate::ops) fn forward(x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    let y = match weight.float8() {
        None => on_device!(x, forward(x, &weight.compute()?))?,
        Some(how) => float8::forward(x, &weight.compute()?, how)?,
    };
    match weight.adapter() {
        None => Ok(y),
        Some(adapter) => add_tensors(&y, &adapter::forward(x, &adapter, weight.fqn())?),
    }
}

/// As [`forward`], added to `residual`, which only a GPU is given.
pub(in crate::ops) fn forward_onto(residual: Option<&Tensor>, x: &Tensor, weight: &Parameter) -> Result<Tensor> {
    match residual {
        None => forward(x, weight),
        #[cfg(feature = "cuda")]
        Some(residual) if weight.is_plain() => cuda::forward_onto(residual, x, &weight.compute()?),
        Some(residual) => add_within(residual, &forward(x, weight)?),
    }
}

/// The gradient of `x` under `dy`, added to `sum` if there is one; those of the weight and its adapter go to their
/// accumulators. A residual may have left `dy` in its own dtype.
pub(in crate::ops) fn backward(x: &Tensor, weight: &Parameter, dy: &Tensor, sum: Option<&Tensor>) -> Result<Tensor> {
    let (values, grad) = (weight.compute()?, weight.accumulator()?);
    let dy = &cast(dy, values.dtype())?;
    let dx = match weight.float8() {
        None => on_device!(x, backward(x, &values, grad.as_ref(), dy, sum))?,
        Some(how) => float8::backward(x, &values, grad.as_ref(), dy, sum, how)?,
    };
    match weight.adapter() {
        None => Ok(dx),
        Some(adapter) => add_tensors(&dx, &adapter::backward(x, &adapter, weight.fqn(), dy)?),
    }
}

/// As [`linear`], but the result is f32 whatever the compute dtype, and has no gradient: scores of a vocabulary, which
/// are to be compared with one another. `softcap`: they are `softcap · tanh(logits / softcap)`.
pub fn logits(x: &Tensor, weight: &Parameter, softcap: Option<f32>) -> Result<Tensor> {
    let _span = profiler::span("logits").shapes(&[x.dims(), weight.shape()]);
    on_device!(x, logits(x, &weight.compute()?, softcap))
}

/// For each head its own product, without a gradient: with `Wₕ` the rows `rows` of the head's part of `weight`,
/// `x Wₕᵀ`, or `x Wₕ` if `transposed`. An adapter's share is part of it.
///
/// # Shapes
/// `x`: `(b, s, h, in)`. `weight`: `(h · n, m)`. Returns `(b, s, h, out)`, where `in` and `out` are `m` and `rows.len()`,
/// or the other way round.
pub fn by_head(x: &Tensor, weight: &Parameter, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    let _span = profiler::span("by_head").shapes(&[x.dims(), weight.shape()]);
    let y = on_device!(x, by_head(x, &weight.compute()?, rows.clone(), transposed))?;
    match weight.adapter() {
        None => Ok(y),
        Some(adapter) => add_tensors(&y, &adapter::by_head(x, &adapter, rows, transposed)?),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::{Adapter, Dropout, Float8, Scaling};
    use crate::ops::testing::{Case, assert_close, devices, parameters_on, random_tensor};
    use crate::ops::{self, Gate};

    #[test]
    fn each_head_is_multiplied_by_its_own_rows() -> Result<()> {
        let (b, s, h, n, m) = (2, 3, 4, 7, 10);
        let weight = random_tensor("w", &[h * n, m])?;
        for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 2e-2)] {
            for (rows, transposed) in [(0..5, true), (5..7, false), (0..7, false)] {
                let x = random_tensor("x", &[b, s, h, if transposed { rows.len() } else { m }])?;
                let own = weight.reshape((h, n, m))?.narrow(1, rows.start, rows.len())?;
                let own = if transposed { own } else { own.transpose(1, 2)? };
                let by_head = x.reshape((b * s, h, ()))?.transpose(0, 1)?.contiguous()?;
                let expected = by_head.matmul(&own.contiguous()?)?.transpose(0, 1)?.reshape((b, s, h, ()))?;
                for device in devices() {
                    let parameter = &parameters_on(device, std::slice::from_ref(&weight), dtype)?[0];
                    let x = x.to_dtype(dtype)?.to_device(device)?;
                    let ours = super::by_head(&x, parameter, rows.clone(), transposed)?;
                    assert_close("by_head", &ours, &expected, tolerance)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn linear_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            for (rows, inner, outer) in [(7, 33, 19), (1, 64, 5), (130, 16, 48)] {
                Case::new("linear")
                    .compute(dtype)
                    .input(random_tensor("x", &[1, rows, inner])?)
                    .parameter("w", &[outer, inner])
                    .check_with_parameters(
                        |v, p| linear(&v[0], &p[0]),
                        |t, p| Ok(t[0].broadcast_matmul(&p[0].t()?)?),
                    )?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_weight_in_float8_is_multiplied_in_float8_and_its_adapter_is_not() -> Result<()> {
        let values = [random_tensor("w", &[32, 48])?, random_tensor("a", &[4, 48])?, random_tensor("b", &[32, 4])?];
        let (x, up) = (random_tensor("x", &[1, 20, 48])?, random_tensor("up", &[1, 20, 48])?);
        let dy = random_tensor("dy", &[1, 20, 32])?;
        let how = Float8 { scaling: Scaling::Rowwise, emulate: true };
        for device in devices() {
            let [x, up, dy] = [x.to_device(device)?, up.to_device(device)?, dy.to_device(device)?];
            let weight = || -> Result<_> {
                let parameters = parameters_on(device, &values, DType::F32)?;
                parameters[0].set_float8(how);
                Ok(parameters)
            };
            let plain = values[0].to_device(device)?;
            let grad = (&plain * 0.0)?;
            let expected = float8::forward(&x, &plain, how)?;
            let expected_dx = float8::backward(&x, &plain, Some(&grad), &dy, None, how)?.to_device(&Device::Cpu)?;
            let grad = grad.to_device(&Device::Cpu)?;

            let parameters = weight()?;
            let y = linear(&Value::input(x.clone()), &parameters[0])?;
            assert_close("y", y.tensor(), &expected.to_device(&Device::Cpu)?, 0.0)?;
            assert_close("dx", &y.backward(dy.clone())?, &expected_dx, 0.0)?;
            assert_close("dW", &parameters[0].grad()?, &grad, 0.0)?;

            // Where the gate is 1, the other branch goes through the layer as it is.
            let gate = Value::constant((&x * 0.0)?.affine(1.0, 1.0)?);
            let parameters = weight()?;
            let y = ops::glu(&gate, &Value::input(x.clone()), &parameters[0], Gate::Relu, None)?;
            assert_close("y of a gate", y.tensor(), &expected.to_device(&Device::Cpu)?, 0.0)?;
            assert_close("dx of a gate", &y.backward(dy.clone())?, &expected_dx, 0.0)?;
            assert_close("dW of a gate", &parameters[0].grad()?, &grad, 0.0)?;

            let parameters = weight()?;
            let dropout = Arc::new(Dropout::new(0.0, 0));
            let (a, b) = (parameters[1].clone(), parameters[2].clone());
            parameters[0].set_adapter(Some(Arc::new(Adapter { a, b, scale: 0.5, dropout })));
            let of_adapter = up.broadcast_matmul(&values[1].to_device(device)?.t()?)?;
            let of_adapter = (of_adapter.broadcast_matmul(&values[2].to_device(device)?.t()?)? * 0.5)?;
            let expected = (float8::forward(&up, &plain, how)? + of_adapter)?.to_device(&Device::Cpu)?;
            let y = linear(&Value::constant(up), &parameters[0])?;
            assert_close("y with an adapter", y.tensor(), &expected, 2e-6)?;
        }
        Ok(())
    }

    #[test]
    fn logits_may_be_capped() -> Result<()> {
        let weight = random_tensor("w", &[19, 33])?;
        let x = (random_tensor("x", &[1, 7, 33])? * 9.0)?;
        let expected = x.broadcast_matmul(&weight.t()?)?;
        let capped = ((&expected / 5.0)?.tanh()? * 5.0)?;
        for device in devices() {
            let parameter = &parameters_on(device, std::slice::from_ref(&weight), DType::F32)?[0];
            let x = x.to_device(device)?;
            assert_close("logits", &logits(&x, parameter, None)?, &expected, 2e-6)?;
            assert_close("capped logits", &logits(&x, parameter, Some(5.0))?, &capped, 2e-6)?;
        }
        Ok(())
    }

    #[test]
    fn linear_takes_transposed_inputs() -> Result<()> {
        Case::new("linear of a transpose")
            .input(random_tensor("x", &[12, 5])?.t()?)
            .parameter("w", &[3, 12])
            .check_with_parameters(|v, p| linear(&v[0], &p[0]), |t, p| Ok(t[0].matmul(&p[0].t()?)?))
    }
}
