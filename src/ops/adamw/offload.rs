//! Steps whose weights and moments are in the host's memory, and whose gradients are on a GPU.

use candle_core::{Device, Tensor};

use super::{Adam, AdamSteps, StepRules, cpu};
use crate::Result;
use crate::autograd::{StageBuffers, StageBuilder};
use crate::ops::gpu::{self, Pinned};
use crate::tools::profiler;

/// The host's side: it takes the gradients of each stage in, and gives the new weights out.
#[derive(Debug)]
pub struct Offload {
    steps: AdamSteps,
    stages: Vec<Copies>,
}

/// What goes between the devices, in memory that the GPU copies from and to by itself.
#[derive(Debug)]
struct Copies {
    grads: Pinned,
    /// `None`: what goes out is the weights themselves, as they are of the compute dtype.
    compute: Option<Pinned>,
}

impl Offload {
    /// `None` where the weights are not apart from the gradients.
    pub fn of(adam: Adam, stages: &[StageBuilder]) -> Result<Option<Self>> {
        let is_apart =
            |stage: &StageBuilder| stage.buffers().weights.device().is_cpu() && stage.grads().device().is_cuda();
        if !stages.iter().any(is_apart) {
            return Ok(None);
        }
        let copies = stages.iter().map(|stage| {
            let StageBuffers { weights, compute, .. } = stage.buffers();
            let apart = weights.dtype() != compute.dtype();
            Ok(Copies {
                grads: Pinned::like(stage.grads())?,
                compute: apart.then(|| Pinned::like(compute)).transpose()?,
            })
        });
        let stages: Vec<Copies> = copies.collect::<Result<_>>()?;
        Ok(Some(Self { steps: AdamSteps::new(adam, stages.len(), &Device::Cpu)?, stages }))
    }

    pub fn prepare(&self, t: u64, rules: &StepRules) -> Result<()> {
        self.steps.prepare(t, rules)
    }

    /// Waits for what the GPU has decided, and does as [`AdamSteps::apply`] for all stages. `moments`: of each.
    pub fn apply<'a>(
        &self,
        decided: &AdamSteps,
        stages: &[StageBuilder],
        moments: impl Iterator<Item = (&'a Tensor, &'a Tensor)>,
    ) -> Result<()> {
        cpu::write(&self.steps.outcome, &decided.outcome.to_vec1::<f64>()?)?;
        for ((stage, copies), (exp_avg, exp_avg_sq)) in stages.iter().zip(&self.stages).zip(moments) {
            let _span = profiler::span(stage.name());
            let StageBuffers { weights, compute, .. } = stage.buffers();
            gpu::copy_to_host(stage.grads(), copies.grads.tensor())?;
            gpu::zero(stage.grads())?;
            let on_host = StageBuffers {
                weights: weights.clone(),
                compute: copies.compute.as_ref().map_or(weights, Pinned::tensor).clone(),
                grads: Some(copies.grads.tensor().clone()),
            };
            self.steps.apply(&on_host, exp_avg, exp_avg_sq)?;
            gpu::copy_to_gpu(&on_host.compute, compute)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use crate::Result;
    use crate::autograd::{Init, Precision, StageBuilder};
    use crate::components::optimizer::Optimizer;
    use crate::ops::testing::{devices, random};
    use crate::ops::{Adam, StepRules};
    use candle_core::{Device, Tensor};

    /// The same arithmetic on the same numbers, so the same bits.
    #[test]
    fn a_step_with_weights_on_the_host_is_that_of_the_host() -> Result<()> {
        let adam = Adam { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
        let n = 20_001;
        for (device, compute) in devices()[1..].iter().flat_map(|device| [(device, DType::BF16), (device, DType::F32)])
        {
            let run = |device: &Device, of_optimizer: &Device| -> Result<Vec<Vec<f32>>> {
                let mut stage = StageBuilder::default();
                let p = stage.parameter("p", &[n], Init::Constant(0.0));
                stage.allocate_apart(Precision { storage: DType::F32, compute }, device, of_optimizer, true)?;
                p.set(&Tensor::from_vec(random("w", n), n, &Device::Cpu)?)?;
                let stages = [stage];
                let mut optimizer = Optimizer::new(adam, &stages)?;
                for t in 0..3 {
                    let g = Tensor::from_vec(random(&format!("g{t}"), n), n, device)?;
                    p.grad()?.slice_set(&g, 0, 0)?;
                    let rules = StepRules { lr: 0.01, max_norm: 1e9, max_loss: f64::INFINITY };
                    assert!(optimizer.step(&stages, &Tensor::new(1f32, device)?, &rules)?.applied);
                }
                let read =
                    |t: Tensor| -> Result<Vec<f32>> { Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec1()?) };
                Ok(vec![read(p.weights()?)?, read(p.compute()?)?, read(p.grad()?)?])
            };
            assert!(run(device, &Device::Cpu)? == run(&Device::Cpu, &Device::Cpu)?, "{compute:?}");
        }
        Ok(())
    }
}
