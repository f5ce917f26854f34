//! The optimizer's arithmetic, over a stage's flat buffers.

mod cpu;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::StageBuffers;
use crate::tools::profiler;

/// One step of Adam or AdamW, for all parameters alike.
///
/// With `g` the gradient times `grad_scale`: `m = β₁ m + (1 - β₁) g`, `v = β₂ v + (1 - β₂) g²`,
/// `w -= lr · (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + eps)`. Weight decay is decoupled (`w -= lr · weight_decay · w`,
/// AdamW) or added to the gradient (`g += weight_decay · w`, Adam).
///
/// # Source
/// Kingma & Ba, arXiv:1412.6980; Loshchilov & Hutter, arXiv:1711.05101.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep {
    /// Steps taken, this one included.
    pub t: u64,
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub decoupled: bool,
    /// What clipping multiplies gradients by.
    pub grad_scale: f64,
}

/// Takes the step: one pass that updates weights and moments, refreshes the compute copy and zeroes the gradients.
///
/// # Shapes
/// `exp_avg` (`m`) and `exp_avg_sq` (`v`) are laid out like the buffers, in the storage dtype.
pub fn adam_step(buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor, step: &AdamStep) -> Result<()> {
    let _span = profiler::span("adamw").shapes(&[buffers.weights.dims()]);
    cpu::step(buffers, exp_avg, exp_avg_sq, step)
}

/// `Σ g²` in f64, in an order that does not depend on the number of threads.
pub fn sum_of_squares(grads: &Tensor) -> Result<f64> {
    let _span = profiler::span("sum_of_squares").shapes(&[grads.dims()]);
    cpu::sum_of_squares(grads)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::autograd::{Init, Precision, StageBuilder};
    use crate::ops::testing::{assert_close, on_threads, random};

    /// The formula in f64, one weight at a time.
    fn reference(w: &mut f64, m: &mut f64, v: &mut f64, g: f64, s: &AdamStep) {
        let g = g * s.grad_scale + if s.decoupled { 0.0 } else { s.weight_decay * *w };
        *w -= if s.decoupled { s.lr * s.weight_decay * *w } else { 0.0 };
        *m = s.beta1 * *m + (1.0 - s.beta1) * g;
        *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
        let (m, v) = (*m / (1.0 - s.beta1.powi(s.t as i32)), *v / (1.0 - s.beta2.powi(s.t as i32)));
        *w -= s.lr * m / (v.sqrt() + s.eps);
    }

    fn check(storage: DType, compute: DType, decoupled: bool, tolerance: f64) -> Result<()> {
        let n = 40_001;
        let mut stage = StageBuilder::default();
        let p = stage.parameter("p", &[n], Init::Constant(0.0));
        stage.allocate(Precision { storage, compute }, &Device::Cpu, true)?;
        p.set(&Tensor::from_vec(random("w", n), n, &Device::Cpu)?)?;
        let moments = [0, 1].map(|_| Tensor::zeros(n, storage, &Device::Cpu).unwrap());
        let mut w: Vec<f64> = p.weights()?.to_dtype(DType::F64)?.to_vec1()?;
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        for t in 1..=3 {
            let step = AdamStep {
                t,
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                decoupled,
                grad_scale: 0.5,
            };
            let g = random(&format!("g{t}"), n);
            p.grad()?.slice_set(&Tensor::from_slice(&g, n, &Device::Cpu)?, 0, 0)?;
            adam_step(stage.buffers(), &moments[0], &moments[1], &step)?;
            (0..n).for_each(|i| reference(&mut w[i], &mut m[i], &mut v[i], f64::from(g[i]), &step));
        }
        assert_close("weights", &p.weights()?, &Tensor::from_vec(w, n, &Device::Cpu)?, tolerance)?;
        let refreshed = p.weights()?.to_dtype(compute)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        assert_eq!(p.compute()?.to_dtype(DType::F32)?.to_vec1::<f32>()?, refreshed);
        assert_eq!(sum_of_squares(&p.grad()?)?, 0.0, "gradients are zeroed");
        Ok(())
    }

    #[test]
    fn adam_and_adamw_match_their_reference() -> Result<()> {
        for decoupled in [true, false] {
            check(DType::F32, DType::F32, decoupled, 1e-6)?;
            check(DType::F32, DType::BF16, decoupled, 1e-6)?;
            check(DType::BF16, DType::BF16, decoupled, 1e-2)?;
        }
        Ok(())
    }

    #[test]
    fn a_sum_of_squares_is_exact_enough_and_the_same_on_any_number_of_threads() -> Result<()> {
        let values = random("g", 100_003);
        let expected: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let grads = Tensor::from_vec(values, 100_003, &Device::Cpu)?;
        let sum = sum_of_squares(&grads)?;
        assert!((sum - expected).abs() < 1e-6 * expected);
        assert_eq!(on_threads(1, || sum_of_squares(&grads))?, on_threads(3, || sum_of_squares(&grads))?);
        Ok(())
    }
}
