//! The output layer with the loss, without ever holding the logits of all tokens.

mod cpu;
#[cfg(target_arch = "x86_64")]
mod tiles;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Parameter;
use crate::tools::profiler::{self, Category};

/// Mean next-token cross-entropy, in nats per token, of the logits `x Wᵀ`.
///
/// `1/N · Σ (logsumexp(logits) - logits[target])` over all `N` tokens. Logits are computed for some rows at a time, so
/// that at most 128 MiB of them exist; they are rounded to the compute dtype of `weight`, the rest is f32.
///
/// # Shapes
/// `x`: `(b, s, dim)`. `weight`: `(vocab_size, dim)`. `targets`: `(b, s)`, u32.
pub fn cross_entropy_loss(x: &Tensor, weight: &Parameter, targets: &Tensor) -> Result<f32> {
    let _span = profiler::span("cross_entropy").shapes(&[x.dims(), weight.shape()]);
    let mean = 1.0 / targets.elem_count() as f64;
    Ok((cpu::forward(x, &weight.compute()?, targets)? * mean) as f32)
}

/// A loss, and its gradient with respect to the output layer's input.
pub struct LossAndGrad {
    pub loss: f32,
    /// `(b, s, dim)`, in the input's dtype.
    pub dx: Tensor,
}

/// As [`cross_entropy_loss`], times `scale`; with the gradient in the same pass over the logits. The gradient of
/// `weight` is added to its accumulator.
pub fn cross_entropy_grad(x: &Tensor, weight: &Parameter, targets: &Tensor, scale: f64) -> Result<LossAndGrad> {
    let _span = profiler::span_in(Category::ForwardBackward, "cross_entropy").shapes(&[x.dims(), weight.shape()]);
    let mean = scale / targets.elem_count() as f64;
    let (sum, dx) = cpu::forward_backward(x, &weight.compute()?, &weight.grad()?, targets, mean as f32)?;
    Ok(LossAndGrad { loss: (sum * mean) as f32, dx })
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, parameters, random_tensor};

    #[test]
    fn cross_entropy_matches_its_reference() -> Result<()> {
        for (dtype, tolerance, [s, dim, vocab_size]) in
            [(DType::F32, 1e-5, [19, 24, 53]), (DType::BF16, 2e-2, [19, 24, 53]), (DType::BF16, 2e-2, [150, 72, 1100])]
        {
            let b = 2;
            let x = (random_tensor("x", &[b, s, dim])? * 3.0)?;
            let w = random_tensor("w", &[vocab_size, dim])?;
            let targets: Vec<u32> = (0..b * s).map(|i| (i * 7 % vocab_size) as u32).collect();
            let targets = Tensor::from_vec(targets, (b, s), &Device::Cpu)?;
            let parameter = &parameters(std::slice::from_ref(&w), dtype)?[0];

            let x64 = Var::from_tensor(&x.to_dtype(DType::F64)?)?;
            let w64 = Var::from_tensor(&w.to_dtype(dtype)?.to_dtype(DType::F64)?)?;
            let logits = x64.broadcast_matmul(&w64.t()?)?;
            let picked = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets.unsqueeze(2)?, 2)?;
            let expected = (picked.mean_all()?.neg()? * 0.5)?;
            let grads = expected.backward()?;

            let LossAndGrad { loss, dx } = cross_entropy_grad(&x, parameter, &targets, 0.5)?;
            let expected = expected.to_scalar::<f64>()?;
            assert!((f64::from(loss) - expected).abs() < tolerance * expected, "{loss}, expected {expected}");
            assert!(
                (f64::from(cross_entropy_loss(&x, parameter, &targets)?) - 2.0 * expected).abs()
                    < 4.0 * tolerance * expected
            );
            assert_close("dx", &dx, grads.get(&x64).unwrap(), tolerance)?;
            assert_close("dw", &parameter.grad()?, grads.get(&w64).unwrap(), tolerance)?;
        }
        Ok(())
    }
}
