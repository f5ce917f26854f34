//! The output layer with the loss, without ever holding the logits of all tokens.

mod cpu;
#[cfg(target_arch = "x86_64")]
mod tiles;

use candle_core::{D, Tensor};

use crate::Result;
use crate::autograd::Parameter;
use crate::tools::profiler::{self, Category};

/// A target that carries no loss: what is predicted there does not matter.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Mean next-token cross-entropy, in nats per token, of the logits `x Wᵀ`.
///
/// `1/N · Σ (logsumexp(logits) - logits[target])` over the `N` targets other than [`IGNORE_INDEX`]; 0 if there are none.
/// The rows of the others are left out before anything is computed. Logits are computed for some rows at a time, so
/// that at most 128 MiB of them exist; they are rounded to the compute dtype of `weight`, the rest is f32.
///
/// `softcap`: the logits are `softcap · tanh(logits / softcap)`.
///
/// # Shapes
/// `x`: `(b, s, dim)`. `weight`: `(vocab_size, dim)`. `targets`: `(b, s)`, u32.
pub fn cross_entropy_loss(x: &Tensor, weight: &Parameter, softcap: Option<f32>, targets: &Tensor) -> Result<f32> {
    let _span = profiler::span("cross_entropy").shapes(&[x.dims(), weight.shape()]);
    let Some(Counted { x, targets, .. }) = Counted::of(x, targets)? else { return Ok(0.0) };
    let mean = 1.0 / targets.elem_count() as f64;
    Ok((cpu::forward(&x, &weight.compute()?, softcap, &targets)? * mean) as f32)
}

/// A loss, and its gradient with respect to the output layer's input.
pub struct LossAndGrad {
    pub loss: f32,
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
    let Some(counted) = Counted::of(x, targets)? else { return Ok(LossAndGrad { loss: 0.0, dx: x.zeros_like()? }) };
    let Counted { x: rows, targets, places } = counted;
    let mean = scale / targets.elem_count() as f64;
    let grad = weight.accumulator()?;
    let (sum, dx) = cpu::forward_backward(&rows, &weight.compute()?, grad.as_ref(), softcap, &targets, mean as f32)?;
    let dx = match places {
        None => dx,
        Some(places) => {
            let all = Tensor::zeros((x.elem_count() / x.dim(D::Minus1)?, x.dim(D::Minus1)?), dx.dtype(), dx.device())?;
            all.index_add(&places, &dx, 0)?.reshape(x.shape())?
        }
    };
    Ok(LossAndGrad { loss: (sum * mean) as f32, dx })
}

/// The rows that have targets.
struct Counted {
    x: Tensor,
    targets: Tensor,
    /// Where among all rows they were; `None`: they are all.
    places: Option<Tensor>,
}

impl Counted {
    /// `None` if there are no such rows.
    fn of(x: &Tensor, targets: &Tensor) -> Result<Option<Self>> {
        let flat = targets.flatten_all()?;
        let kept: Vec<u32> =
            flat.to_vec1::<u32>()?.iter().zip(0..).filter(|(t, _)| **t != IGNORE_INDEX).map(|(_, i)| i).collect();
        if kept.len() == flat.elem_count() {
            return Ok(Some(Self { x: x.clone(), targets: targets.clone(), places: None }));
        }
        if kept.is_empty() {
            return Ok(None);
        }
        let places = Tensor::new(kept, x.device())?;
        let rows = x.reshape(((), x.dim(D::Minus1)?))?.contiguous()?;
        let (x, targets) = (rows.index_select(&places, 0)?, flat.index_select(&places, 0)?);
        Ok(Some(Self { x, targets, places: Some(places) }))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, parameters, random_tensor};

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
            let parameter = &parameters(std::slice::from_ref(&w), dtype)?[0];

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

            let LossAndGrad { loss, dx } = cross_entropy_grad(&x, parameter, softcap, &targets, 0.5)?;
            let expected = expected.to_scalar::<f64>()?;
            assert!((f64::from(loss) - expected).abs() < tolerance * expected, "{loss}, expected {expected}");
            assert!(
                (f64::from(cross_entropy_loss(&x, parameter, softcap, &targets)?) - 2.0 * expected).abs()
                    < 4.0 * tolerance * expected
            );
            assert_close("dx", &dx, grads.get(&x64).unwrap(), tolerance)?;
            assert_close("dw", &parameter.grad()?, grads.get(&w64).unwrap(), tolerance)?;
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
            assert_eq!(found.loss, expected.loss);
            assert_eq!(
                cross_entropy_loss(&x, &sparse, None, &targets)?,
                cross_entropy_loss(&few, &dense, None, &few_targets)?
            );
            assert_close("dw", &sparse.grad()?, &dense.grad()?, 0.0)?;
            assert_close("dx of the kept", &rows(&found.dx, dim)?, &expected.dx, 0.0)?;
            let total = |t: &Tensor| -> Result<f32> { Ok(t.abs()?.sum_all()?.to_scalar()?) };
            let others: Vec<u32> = (0..(b * s) as u32).filter(|i| !kept.contains(i)).collect();
            assert_eq!(total(&pick(&found.dx, dim, &Tensor::new(others, &Device::Cpu)?)?)?, 0.0);

            let none = cross_entropy_grad(&x, &sparse, None, &Tensor::full(IGNORE_INDEX, (b, s), &Device::Cpu)?, 1.0)?;
            assert_eq!((none.loss, total(&none.dx)?), (0.0, 0.0));
        }
        Ok(())
    }
}
