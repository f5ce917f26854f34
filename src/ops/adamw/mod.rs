//! The optimizer's arithmetic, over a stage's flat buffers.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod offload;

use candle_core::{DType, Device, Tensor};
#[cfg(feature = "cuda")]
pub use offload::Offload;

use crate::Result;
use crate::autograd::StageBuffers;
use crate::tools::profiler;

/// Adam or AdamW, for all parameters alike.
///
/// With `g` the gradient times what clips it: `m = β₁ m + (1 - β₁) g`, `v = β₂ v + (1 - β₂) g²`,
/// `w -= lr · (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + eps)`. Weight decay is decoupled (`w -= lr · weight_decay · w`,
/// AdamW) or added to the gradient (`g += weight_decay · w`, Adam).
///
/// # Source
/// Kingma & Ba, arXiv:1412.6980; Loshchilov & Hutter, arXiv:1711.05101.
#[derive(Clone, Copy, Debug)]
pub struct Adam {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub decoupled: bool,
}

impl Adam {
    /// What of a weight is added to its gradient.
    fn decay_of_gradients(&self) -> f32 {
        if self.decoupled { 0.0 } else { self.weight_decay as f32 }
    }
}

/// What differs from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepRules {
    pub lr: f64,
    /// What the gradients' norm over all parameters is clipped to.
    pub max_norm: f64,
    /// A larger loss, or one that is not a number, keeps the step from being applied.
    pub max_loss: f64,
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Of the gradients, before clipping.
    pub norm: f64,
    pub loss: f32,
    /// Whether weights and moments have changed. They have not where norm or loss is not finite, or the loss too large.
    pub applied: bool,
}

/// What the stages of a step share, in the memory of the device that trains: so that a step reads nothing back on its way,
/// and is the same work each time, whatever its numbers are.
///
/// A step is [`prepare`](Self::prepare), then [`measure`](Self::measure) of every stage, [`decide`](Self::decide),
/// [`apply`](Self::apply) to every stage, and [`outcome`](Self::outcome).
#[derive(Debug)]
pub struct AdamSteps {
    adam: Adam,
    /// What the host sets, `(5)` f64, in the order of [`Rates`].
    rates: Tensor,
    /// Sums of the squares of each stage's gradients, `(n_stages, parts)` f64.
    squares: Tensor,
    /// Norm, loss, whether the step is applied (1 or 0), and the factor that clips; f64.
    outcome: Tensor,
}

/// What depends on the number of a step and on its rules.
struct Rates {
    /// `lr / (1 - β₁ᵗ)`.
    rate: f32,
    /// `1 / sqrt(1 - β₂ᵗ)`.
    inverse_sqrt2: f32,
    /// What is kept of a weight that decays apart from its gradient.
    keep: f32,
    max_norm: f64,
    max_loss: f64,
}

impl Rates {
    fn new(adam: &Adam, t: u64, rules: &StepRules) -> Self {
        let correction1 = 1.0 - adam.beta1.powi(t as i32);
        let correction2 = 1.0 - adam.beta2.powi(t as i32);
        Self {
            rate: (rules.lr / correction1) as f32,
            inverse_sqrt2: (1.0 / correction2.sqrt()) as f32,
            keep: if adam.decoupled { (1.0 - rules.lr * adam.weight_decay) as f32 } else { 1.0 },
            max_norm: rules.max_norm,
            max_loss: rules.max_loss,
        }
    }

    fn to_array(&self) -> [f64; 5] {
        let Self { rate, inverse_sqrt2, keep, max_norm, max_loss } = *self;
        [rate.into(), inverse_sqrt2.into(), keep.into(), max_norm, max_loss]
    }

    fn from_tensor(rates: &Tensor) -> Result<Self> {
        let rates = rates.to_vec1::<f64>()?;
        let [rate, inverse_sqrt2, keep] = [0, 1, 2].map(|i| rates[i] as f32);
        Ok(Self { rate, inverse_sqrt2, keep, max_norm: rates[3], max_loss: rates[4] })
    }
}

impl AdamSteps {
    pub fn new(adam: Adam, n_stages: usize, device: &Device) -> Result<Self> {
        let parts = if device.is_cuda() { SQUARES_ON_GPU } else { 1 };
        Ok(Self {
            adam,
            rates: Tensor::zeros(5, DType::F64, device)?,
            squares: Tensor::zeros((n_stages, parts), DType::F64, device)?,
            outcome: Tensor::zeros(4, DType::F64, device)?,
        })
    }

    /// Sets what depends on the step, number `t` from 1. All else is work of the device alone.
    pub fn prepare(&self, t: u64, rules: &StepRules) -> Result<()> {
        on_device!(self.rates, write(&self.rates, &Rates::new(&self.adam, t, rules).to_array()))
    }

    /// Sums the squares of a stage's gradients, in f64 and in an order that is always the same.
    pub fn measure(&self, stage: usize, grads: &Tensor) -> Result<()> {
        let _span = profiler::span("sum_of_squares").shapes(&[grads.dims()]);
        on_device!(grads, sum_of_squares(grads, &self.squares.get(stage)?))
    }

    /// Decides from the gradients and the `loss`, `()` f32, whether the step is applied, and what it multiplies them by.
    pub fn decide(&self, loss: &Tensor) -> Result<()> {
        on_device!(loss, decide(self, loss))
    }

    /// One pass over a stage that updates weights and moments, refreshes the compute copy and zeroes the gradients; or, of a
    /// step that is not applied, zeroes the gradients.
    ///
    /// # Shapes
    /// `exp_avg` (`m`) and `exp_avg_sq` (`v`) are laid out like the buffers, in the storage dtype.
    pub fn apply(&self, buffers: &StageBuffers, exp_avg: &Tensor, exp_avg_sq: &Tensor) -> Result<()> {
        let _span = profiler::span("adamw").shapes(&[buffers.weights.dims()]);
        on_device!(buffers.weights, step(self, buffers, exp_avg, exp_avg_sq))
    }

    /// Waits for the step.
    pub fn outcome(&self) -> Result<StepOutcome> {
        let outcome = self.outcome.to_vec1::<f64>()?;
        Ok(StepOutcome { norm: outcome[0], loss: outcome[1] as f32, applied: outcome[2] != 0.0 })
    }
}

/// Parts that a GPU sums squares in.
const SQUARES_ON_GPU: usize = 512;

/// Zeroes gradients.
pub fn zero(grads: &Tensor) -> Result<()> {
    on_device!(grads, zero(grads))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Init, Precision, StageBuilder};
    use crate::ops::testing::{assert_close, devices, on_threads, random};

    const RULES: StepRules = StepRules { lr: 0.01, max_norm: 20.0, max_loss: 7.0 };

    fn adam(decoupled: bool) -> Adam {
        Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled }
    }

    /// The formula in f64, one weight at a time.
    fn reference(w: &mut f64, m: &mut f64, v: &mut f64, g: f64, s: &Adam, t: i32) {
        let g = g + if s.decoupled { 0.0 } else { s.weight_decay * *w };
        *w -= if s.decoupled { RULES.lr * s.weight_decay * *w } else { 0.0 };
        *m = s.beta1 * *m + (1.0 - s.beta1) * g;
        *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
        let (m, v) = (*m / (1.0 - s.beta1.powi(t)), *v / (1.0 - s.beta2.powi(t)));
        *w -= RULES.lr * m / (v.sqrt() + s.eps);
    }

    fn loss(loss: f32, device: &Device) -> Result<Tensor> {
        Ok(Tensor::new(loss, device)?)
    }

    fn stage_of(n: usize, storage: DType, compute: DType, device: &Device) -> Result<StageBuilder> {
        let mut stage = StageBuilder::default();
        let p = stage.parameter("p", &[n], Init::Constant(0.0));
        stage.allocate(Precision { storage, compute }, device, true)?;
        p.set(&Tensor::from_vec(random("w", n), n, &Device::Cpu)?)?;
        Ok(stage)
    }

    fn on_host(tensor: &Tensor) -> Result<Vec<f64>> {
        Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?)
    }

    fn check(storage: DType, compute: DType, decoupled: bool, tolerance: f64, device: &Device) -> Result<()> {
        let n = 40_001;
        let stage = stage_of(n, storage, compute, device)?;
        let p = &stage.parameters()[0];
        let moments = [0, 1].map(|_| Tensor::zeros(n, storage, device).unwrap());
        let mut w = on_host(&p.weights()?)?;
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let adam = adam(decoupled);
        let steps = AdamSteps::new(adam, 1, device)?;
        for t in 1..=3 {
            // The first is not clipped.
            let g: Vec<f32> = random(&format!("g{t}"), n).iter().map(|g| if t == 1 { g / 10.0 } else { *g }).collect();
            let norm = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert_eq!(norm < RULES.max_norm, t == 1);
            p.grad()?.slice_set(&Tensor::from_slice(&g, n, device)?, 0, 0)?;
            steps.prepare(t, &RULES)?;
            steps.measure(0, stage.grads())?;
            steps.decide(&loss(7.0, device)?)?;
            steps.apply(stage.buffers(), &moments[0], &moments[1])?;
            let outcome = steps.outcome()?;
            assert!(outcome.applied && outcome.loss == 7.0 && (outcome.norm - norm).abs() < 1e-6 * norm, "{outcome:?}");
            let scale = (RULES.max_norm / (norm + 1e-6)).min(1.0);
            (0..n).for_each(|i| reference(&mut w[i], &mut m[i], &mut v[i], f64::from(g[i]) * scale, &adam, t as i32));
        }
        assert_close("weights", &p.weights()?, &Tensor::from_vec(w, n, &Device::Cpu)?, tolerance)?;
        let refreshed = p.weights()?.to_device(&Device::Cpu)?.to_dtype(compute)?;
        assert_eq!(on_host(&p.compute()?)?, on_host(&refreshed)?);
        assert!(on_host(&p.grad()?)?.iter().all(|g| *g == 0.0), "gradients are zeroed");
        Ok(())
    }

    #[test]
    fn adam_and_adamw_match_their_reference() -> Result<()> {
        for device in devices() {
            for decoupled in [true, false] {
                check(DType::F32, DType::F32, decoupled, 1e-6, device)?;
                check(DType::F32, DType::BF16, decoupled, 1e-6, device)?;
                check(DType::BF16, DType::BF16, decoupled, 1e-2, device)?;
                check(DType::BF16, DType::F32, decoupled, 1e-2, device)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_step_whose_numbers_are_bad_only_zeroes_the_gradients() -> Result<()> {
        let n = 1003;
        for device in devices() {
            for (own_loss, bad) in
                [(f32::NAN, 0.5), (f32::INFINITY, 0.5), (7.5, 0.5), (1.0, f32::NAN), (1.0, f32::INFINITY)]
            {
                let stage = stage_of(n, DType::F32, DType::BF16, device)?;
                let p = &stage.parameters()[0];
                let moments = [0, 1].map(|_| Tensor::zeros(n, DType::F32, device).unwrap());
                let mut g = random("g", n);
                g[1002] = bad;
                p.grad()?.slice_set(&Tensor::from_slice(&g, n, device)?, 0, 0)?;
                let before = [on_host(&p.weights()?)?, on_host(&p.compute()?)?];
                let steps = AdamSteps::new(adam(true), 1, device)?;
                steps.prepare(1, &RULES)?;
                steps.measure(0, stage.grads())?;
                steps.decide(&loss(own_loss, device)?)?;
                steps.apply(stage.buffers(), &moments[0], &moments[1])?;
                let outcome = steps.outcome()?;
                assert!(
                    !outcome.applied && outcome.norm.is_finite() == bad.is_finite(),
                    "{own_loss} {bad}: {outcome:?}"
                );
                assert_eq!([on_host(&p.weights()?)?, on_host(&p.compute()?)?], before);
                for zeros in [&moments[0], &moments[1], stage.grads()] {
                    assert!(on_host(zeros)?.iter().all(|x| *x == 0.0));
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_norm_is_exact_enough_and_the_same_on_any_number_of_threads() -> Result<()> {
        let parts = [random("g", 100_003), random("h", 7)];
        let squares = parts.iter().flatten().map(|x| f64::from(*x) * f64::from(*x));
        let expected = squares.sum::<f64>().sqrt();
        for device in devices() {
            let norm = || -> Result<f64> {
                let steps = AdamSteps::new(adam(true), 2, device)?;
                steps.prepare(1, &RULES)?;
                for (stage, grads) in parts.iter().enumerate() {
                    steps.measure(stage, &Tensor::from_slice(grads, grads.len(), device)?)?;
                }
                steps.decide(&loss(0.0, device)?)?;
                Ok(steps.outcome()?.norm)
            };
            assert!((norm()? - expected).abs() < 1e-6 * expected);
            assert_eq!(on_threads(1, norm)?, on_threads(3, norm)?);
        }
        Ok(())
    }

    #[test]
    fn gradients_are_zeroed_where_they_are() -> Result<()> {
        for device in devices() {
            let grads = Tensor::from_vec(random("g", 1003), 1003, device)?;
            zero(&grads)?;
            assert!(on_host(&grads)?.iter().all(|g| *g == 0.0));
        }
        Ok(())
    }
}
