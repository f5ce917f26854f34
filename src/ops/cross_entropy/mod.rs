//! The output layer with the loss, without ever holding the logits of all tokens.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(target_arch = "x86_64")]
mod tiles;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Parameter;
use crate::tools::profiler::{self, Category};

/// A target that carries no loss: what is predicted there does not matter.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Mean next-token cross-entropy, in nats per token, of the logits `x Wᵀ`: `()`, f32, on `x`'s device.
///
/// `1/N · Σ (logsumexp(logits) - logits[target])` over the `N` targets other than [`IGNORE_INDEX`]; 0 if there are none.
/// On the host, the rows of the others are left out before anything is computed. Logits are computed for some rows at a
/// time, so that at most 512 MiB of them exist, or of their exponentials; they are rounded to the compute dtype of `weight`,
/// the rest is f32.
///
/// `softcap`: the logits are `softcap · tanh(logits / softcap)`.
///
/// # Shapes
/// `x`: `(b, s, dim)`. `weight`: `(vocab_size, dim)`. `targets`: `(b, s)`, u32.
pub fn cross_entropy_loss(x: &Tensor, weight: &Parameter, softcap: Option<f32>, targets: &Tensor) -> Result<Tensor> {
    let _span = profiler::span("cross_entropy").shapes(&[x.dims(), weight.shape()]);
    on_device!(x, forward(x, &weight.compute()?, softcap, targets))
}

/// A loss, and its gradient with respect to the output layer's input.
pub struct LossAndGrad {
    /// `()`, f32.
    pub loss: Tensor,
    /// `(b, s, dim)`, in the input's dtype.
    pub dx: Tensor,
}

/// As [`cross_entropy_loss`], times `scale`; with the gradient in the same pass over the logits. The gradient of
/// `weight` is added to its accumulator, if it has one.
pub fn cross_entropy_grad(
    x: &Tensor,
    weight: &Parameter,
    softcap: Option<f32>,
    targets: &Tensor,
    scale: f64,
) -> Result<LossAndGrad> {
    let _span = profiler::span_in(Category::ForwardBackward, "cross_entropy").shapes(&[x.dims(), weight.shape()]);
    let grad = weight.accumulator()?;
    let (loss, dx) = on_device!(x, forward_backward(x, &weight.compute()?, grad.as_ref(), softcap, targets, scale))?;
    Ok(LossAndGrad { loss, dx })
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType, Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, devices, parameters, parameters_on, random_tensor};

    fn number(loss: &Tensor) -> Result<f64> {
        Ok(f64::from(loss.to_scalar::<f32>()?))
    }

    #[test]
    fn cross_entropy_matches_its_reference() -> Result<()> {
        for (dtype, tolerance, [s, dim, vocab_size], softcap) in [
            (DType::F32, 1e-5, [19, 24, 53], None),
            (DType::BF16, 2e-2, [19, 24, 53], None),
            (DType::BF16, 2e-2, [150, 72, 1100], None),
            (DType::F32, 1e-5, [19, 24, 53], Some(4.0)),
            (DType::BF16, 2e-2, [19, 24, 53], Some(4.0)),
        ] {
            let b = 2;
            let x = (random_tensor("x", &[b, s, dim])? * 3.0)?;
            let w = random_tensor("w", &[vocab_size, dim])?;
            let targets: Vec<u32> = (0..b * s).map(|i| (i * 7 % vocab_size) as u32).collect();
            let targets = Tensor::from_vec(targets, (b, s), &Device::Cpu)?;
            let x64 = Var::from_tensor(&x.to_dtype(DType::F64)?)?;
            let w64 = Var::from_tensor(&w.to_dtype(dtype)?.to_dtype(DType::F64)?)?;
            let logits = x64.broadcast_matmul(&w64.t()?)?;
            let logits = match softcap {
                Some(cap) => ((logits / f64::from(cap))?.tanh()? * f64::from(cap))?,
                None => logits,
            };
            let picked = candle_nn::ops::log_softmax(&logits, D::Minus1)?.gather(&targets.unsqueeze(2)?, 2)?;
            let expected = (picked.mean_all()?.neg()? * 0.5)?;
            let grads = expected.backward()?;

            let expected = expected.to_scalar::<f64>()?;
            for device in devices() {
                let parameter = &parameters_on(device, std::slice::from_ref(&w), dtype)?[0];
                let (x, targets) = (x.to_device(device)?, targets.to_device(device)?);
                let LossAndGrad { loss, dx } = cross_entropy_grad(&x, parameter, softcap, &targets, 0.5)?;
                // A GPU rounds logits to bf16: of those near 16 it loses up to 1/32, and as much of their probability.
                let tolerance = if device.is_cuda() { 2.0 * tolerance } else { tolerance };
                let loss = number(&loss)?;
                assert!((loss - expected).abs() < tolerance * expected, "{loss}, expected {expected}");
                let mean = number(&cross_entropy_loss(&x, parameter, softcap, &targets)?)?;
                assert!((mean - 2.0 * expected).abs() < 4.0 * tolerance * expected);
                assert_close("dx", &dx, grads.get(&x64).unwrap(), tolerance)?;
                assert_close("dw", &parameter.grad()?, grads.get(&w64).unwrap(), tolerance)?;
            }
        }
        Ok(())
    }

    /// Rows without a target are as if they were not there; so their gradient is zero, and nothing reads them.
    #[test]
    fn ignored_targets_carry_neither_loss_nor_gradient() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let (b, s, dim, vocab_size) = (2, 70, 24, 53);
            let x = random_tensor("x", &[b, s, dim])?;
            let w = random_tensor("w", &[vocab_size, dim])?;
            let kept: Vec<u32> = (0..(b * s) as u32).filter(|i| i % 3 == 1).collect();
            let mut targets = vec![IGNORE_INDEX; b * s];
            kept.iter().for_each(|i| targets[*i as usize] = i * 7 % vocab_size as u32);
            let targets = Tensor::from_vec(targets, (b, s), &Device::Cpu)?;
            let places = Tensor::new(&kept[..], &Device::Cpu)?;
            let pick = |t: &Tensor, width, places: &Tensor| -> Result<Tensor> {
                Ok(t.reshape((b * s, width))?.index_select(places, 0)?.unsqueeze(0)?)
            };
            let rows = |t, width| pick(t, width, &places);
            let (few, few_targets) = (rows(&x, dim)?, rows(&targets, 1)?.squeeze(2)?);

            let [sparse, dense] = [0, 1].map(|_| parameters(std::slice::from_ref(&w), dtype).unwrap().remove(0));
            let expected = cross_entropy_grad(&few, &dense, None, &few_targets, 0.5)?;
            let found = cross_entropy_grad(&x, &sparse, None, &targets, 0.5)?;
            assert_eq!(number(&found.loss)?, number(&expected.loss)?);
            assert_eq!(
                number(&cross_entropy_loss(&x, &sparse, None, &targets)?)?,
                number(&cross_entropy_loss(&few, &dense, None, &few_targets)?)?
            );
            // A GPU leaves nothing out, and sums in another order.
            for device in &devices()[1..] {
                let parameter = &parameters_on(device, std::slice::from_ref(&w), dtype)?[0];
                let (x, targets) = (x.to_device(device)?, targets.to_device(device)?);
                let there = cross_entropy_grad(&x, parameter, None, &targets, 0.5)?;
                let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
                assert!((number(&there.loss)? / number(&expected.loss)? - 1.0).abs() < tolerance);
                assert_close("dx", &there.dx, &found.dx, tolerance)?;
                assert_close("dw", &parameter.grad()?, &dense.grad()?, tolerance)?;
                let none = Tensor::full(IGNORE_INDEX, (b, s), device)?;
                assert_eq!(number(&cross_entropy_loss(&x, parameter, None, &none)?)?, 0.0);
            }
            assert_close("dw", &sparse.grad()?, &dense.grad()?, 0.0)?;
            assert_close("dx of the kept", &rows(&found.dx, dim)?, &expected.dx, 0.0)?;
            let total = |t: &Tensor| -> Result<f32> { Ok(t.abs()?.sum_all()?.to_scalar()?) };
            let others: Vec<u32> = (0..(b * s) as u32).filter(|i| !kept.contains(i)).collect();
            assert_eq!(total(&pick(&found.dx, dim, &Tensor::new(others, &Device::Cpu)?)?)?, 0.0);

            let none = cross_entropy_grad(&x, &sparse, None, &Tensor::full(IGNORE_INDEX, (b, s), &Device::Cpu)?, 1.0)?;
            assert_eq!((number(&none.loss)?, total(&none.dx)?), (0.0, 0.0));
        }
        Ok(())
    }
}
