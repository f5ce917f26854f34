//! Adam and AdamW over a model's stages.

use candle_core::Tensor;

use crate::Result;
use crate::autograd::StageBuilder;
use crate::ops::{AdamStep, adam_step, sum_of_squares};
use crate::tools::profiler;

/// What distinguishes one optimizer from another.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerKind {
    /// Whether weight decay is apart from the gradient (AdamW) or part of it (Adam).
    pub decoupled: bool,
    pub betas: (f64, f64),
    pub eps: f64,
}

/// The moments of all parameters, in flat buffers like those of the stages. Every parameter decays, norms and embeddings
/// too.
#[derive(Debug)]
pub struct Optimizer {
    kind: OptimizerKind,
    weight_decay: f64,
    /// Steps taken.
    t: u64,
    /// First and second moments of each stage.
    moments: Vec<Moments>,
}

#[derive(Debug)]
struct Moments {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// The name in a checkpoint of each moment, before the parameter's own.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

impl Optimizer {
    /// With moments of zero. The stages are allocated.
    pub fn new(kind: OptimizerKind, weight_decay: f64, stages: &[StageBuilder]) -> Result<Self> {
        let moments = stages.iter().map(|stage| {
            let weights = &stage.buffers().weights;
            Ok(Moments { exp_avg: weights.zeros_like()?, exp_avg_sq: weights.zeros_like()? })
        });
        Ok(Self { kind, weight_decay, t: 0, moments: moments.collect::<Result<_>>()? })
    }

    /// Scales the gradients so that their norm over all parameters is at most `max_norm`, steps, and zeroes the
    /// gradients. Returns the norm before clipping. Where that is not finite, nothing but the gradients changes.
    pub fn step(&mut self, stages: &[StageBuilder], lr: f64, max_norm: f64) -> Result<f64> {
        let norm = grad_norm(stages)?;
        if !norm.is_finite() {
            zero_grads(stages)?;
            return Ok(norm);
        }
        self.t += 1;
        let step = AdamStep {
            t: self.t,
            lr,
            beta1: self.kind.betas.0,
            beta2: self.kind.betas.1,
            eps: self.kind.eps,
            weight_decay: self.weight_decay,
            decoupled: self.kind.decoupled,
            grad_scale: (max_norm / (norm + 1e-6)).min(1.0),
        };
        for (stage, moments) in stages.iter().zip(&self.moments) {
            let _span = profiler::span(stage.name());
            adam_step(stage.buffers(), &moments.exp_avg, &moments.exp_avg_sq, &step)?;
        }
        Ok(norm)
    }

    /// Zeroes the gradients, and changes nothing else. Returns their norm over all parameters.
    pub fn discard(&self, stages: &[StageBuilder]) -> Result<f64> {
        let norm = grad_norm(stages)?;
        zero_grads(stages)?;
        Ok(norm)
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.t
    }

    /// `exp_avg.<fqn>` and `exp_avg_sq.<fqn>` of every parameter: windows of the buffers themselves.
    pub fn state(&self, stages: &[StageBuilder]) -> Result<Vec<(String, Tensor)>> {
        let mut windows = Vec::new();
        for (which, name) in MOMENTS.iter().enumerate() {
            for (stage, moments) in stages.iter().zip(&self.moments) {
                let flat = [&moments.exp_avg, &moments.exp_avg_sq][which];
                for parameter in stage.parameters() {
                    windows.push((format!("{name}.{}", parameter.fqn()), parameter.window(flat)?));
                }
            }
        }
        Ok(windows)
    }

    /// Goes on as after `steps` steps, whose moments were written into the windows of [`Optimizer::state`].
    pub fn set_steps(&mut self, steps: u64) {
        self.t = steps;
    }
}

fn grad_norm(stages: &[StageBuilder]) -> Result<f64> {
    let squares = stages.iter().map(|stage| profiler::span(stage.name()).around(|| sum_of_squares(stage.grads())));
    Ok(squares.sum::<Result<f64>>()?.sqrt())
}

fn zero_grads(stages: &[StageBuilder]) -> Result<()> {
    Ok(stages.iter().try_for_each(|stage| stage.grads().zero_set())?)
}
