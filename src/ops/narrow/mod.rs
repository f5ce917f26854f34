//! Parts of the last dimension: taken out, and joined with a part that all heads share.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{D, Tensor};

use crate::Result;
use crate::autograd::Value;
use crate::tools::profiler;

/// The numbers `start..start + len` of the last dimension.
///
/// # Shapes
/// `x`: `(…, width)`. Returns `(…, len)`.
pub fn narrow(x: &Value, start: usize, len: usize) -> Result<Value> {
    let _span = profiler::span("narrow").shapes(&[x.tensor().dims()]);
    let width = *x.tensor().dims().last().expect("activations have at least one dimension");
    let y = resized(x.tensor(), start as isize, len)?;
    Ok(Value::record("narrow", y, [x], move |dy| Ok([Some(resized(&dy, -(start as isize), width)?)])))
}

/// `x` with zeros behind its last dimension, or without what is beyond, so that it is `width` wide.
pub(in crate::ops) fn with_width(x: &Tensor, width: usize) -> Result<Tensor> {
    if x.dim(D::Minus1)? == width { Ok(x.clone()) } else { resized(x, 0, width) }
}

fn resized(x: &Tensor, start: isize, width: usize) -> Result<Tensor> {
    on_device!(x, resized(x, start, width))
}

/// Each head of `x`, and behind it what all heads of a token share.
///
/// # Shapes
/// `x`: `(b, s, h, n)`. `shared`: `(b, s, 1, m)`, of the same dtype. Returns `(b, s, h, n + m)`.
pub fn join_shared(x: &Value, shared: &Value) -> Result<Value> {
    let _span = profiler::span("join_shared").shapes(&[x.tensor().dims(), shared.tensor().dims()]);
    let (n, m) = (x.tensor().dims4()?.3, shared.tensor().dims4()?.3);
    let y = on_device!(x.tensor(), join_shared(x.tensor(), shared.tensor()))?;
    Ok(Value::record("join_shared", y, [x, shared], move |dy| {
        Ok([Some(resized(&dy, 0, n)?), Some(on_device!(dy, sum_of_heads(&dy, n, m))?)])
    }))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::ops::testing::{Case, random_tensor};

    #[test]
    fn narrow_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let x = random_tensor("x", &[3, 5, 70])?.to_dtype(dtype)?;
            for x in [x.clone(), x.transpose(0, 1)?] {
                for (start, len) in [(0, 70), (0, 31), (31, 39), (10, 1)] {
                    Case::new("narrow")
                        .input(x.clone())
                        .check(|v| narrow(&v[0], start, len), |t| Ok(t[0].narrow(D::Minus1, start, len)?))?;
                }
            }
            let x = random_tensor("x", &[15, 72])?.to_dtype(dtype)?;
            Case::new("narrow").input(x).check(|v| narrow(&v[0], 16, 40), |t| Ok(t[0].narrow(D::Minus1, 16, 40)?))?;
        }
        Ok(())
    }

    #[test]
    fn join_shared_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            for (n, m) in [(10, 6), (16, 8)] {
                Case::new("join_shared")
                    .input(random_tensor("x", &[2, 7, 3, n])?.to_dtype(dtype)?)
                    .input(random_tensor("shared", &[2, 7, 1, m])?.to_dtype(dtype)?)
                    .check(
                        |v| join_shared(&v[0], &v[1]),
                        |t| Ok(Tensor::cat(&[t[0].clone(), t[1].broadcast_as((2, 7, 3, m))?], D::Minus1)?),
                    )?;
            }
        }
        Ok(())
    }
}
