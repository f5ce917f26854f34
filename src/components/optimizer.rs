//! Adam and AdamW over a model's stages.

use candle_core::{Device, Tensor};

use crate::Result;
use crate::autograd::StageBuilder;
use crate::ops::{self, Adam, AdamSteps, StepOutcome, StepRules};
use crate::tools::profiler;

/// The moments of all parameters, in flat buffers like those of the stages. Every parameter decays, norms and embeddings
/// too.
#[derive(Debug)]
pub struct Optimizer {
    /// Steps taken.
    t: u64,
    steps: AdamSteps,
    /// First and second moments of each stage.
    moments: Vec<Moments>,
    /// Where weights and moments are in the host's memory, and gradients on a GPU.
    #[cfg(feature = "cuda")]
    offload: Option<ops::Offload>,
}

#[derive(Debug)]
struct Moments {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

/// The name in a checkpoint of each moment, before the parameter's own.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

impl Optimizer {
    /// With moments of zero, on the device of the weights. The stages are allocated, all on one device, which the weights
    /// alone may be apart from.
    pub fn new(adam: Adam, stages: &[StageBuilder]) -> Result<Self> {
        let moments = stages.iter().map(|stage| {
            let weights = &stage.buffers().weights;
            Ok(Moments { exp_avg: weights.zeros_like()?, exp_avg_sq: weights.zeros_like()? })
        });
        let device = stages.first().map_or(&Device::Cpu, |stage| stage.grads().device());
        Ok(Self {
            t: 0,
            steps: AdamSteps::new(adam, stages.len(), device)?,
            moments: moments.collect::<Result<_>>()?,
            #[cfg(feature = "cuda")]
            offload: ops::Offload::of(adam, stages)?,
        })
    }

    /// Scales the gradients so that their norm over all parameters is at most `rules.max_norm`, steps, and zeroes the
    /// gradients. `loss`, `()` f32 on the device that trains, and the norm decide whether weights and moments change.
    ///
    /// The same as [`prepare`](Self::prepare), [`enqueue`](Self::enqueue) and [`finish`](Self::finish).
    pub fn step(&mut self, stages: &[StageBuilder], loss: &Tensor, rules: &StepRules) -> Result<StepOutcome> {
        self.prepare(rules)?;
        self.enqueue(stages, loss)?;
        self.finish()
    }

    /// Tells the device what the next step goes by.
    pub fn prepare(&self, rules: &StepRules) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(offload) = &self.offload {
            offload.prepare(self.t + 1, rules)?;
        }
        self.steps.prepare(self.t + 1, rules)
    }

    /// All work of the step, which a GPU does in its own time. It is the same launches every time, on the same memory, so
    /// that they can be recorded once and repeated after each [`prepare`](Self::prepare).
    pub fn enqueue(&self, stages: &[StageBuilder], loss: &Tensor) -> Result<()> {
        for (i, stage) in stages.iter().enumerate() {
            profiler::span(stage.name()).around(|| self.steps.measure(i, stage.grads()))?;
        }
        self.steps.decide(loss)?;
        #[cfg(feature = "cuda")]
        if let Some(offload) = &self.offload {
            let moments = self.moments.iter().map(|moments| (&moments.exp_avg, &moments.exp_avg_sq));
            return offload.apply(&self.steps, stages, moments);
        }
        for (stage, moments) in stages.iter().zip(&self.moments) {
            let _span = profiler::span(stage.name());
            self.steps.apply(stage.buffers(), &moments.exp_avg, &moments.exp_avg_sq)?;
        }
        Ok(())
    }

    /// Waits for the step, and counts it if it was applied.
    pub fn finish(&mut self) -> Result<StepOutcome> {
        let outcome = self.steps.outcome()?;
        self.t += u64::from(outcome.applied);
        Ok(outcome)
    }

    /// Zeroes the gradients, and changes nothing else.
    pub fn discard(&self, stages: &[StageBuilder]) -> Result<()> {
        stages.iter().try_for_each(|stage| ops::zero(stage.grads()))
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
