//! One optimizer step, and what becomes of one whose numbers cannot be trusted.

use std::time::Duration;

use candle_core::Tensor;
use tracing::warn;

use super::Trainer;
use crate::components::checkpoint::{step_name, steps_in};
use crate::config::{JobConfig, NanPolicy};
use crate::data::Batch;
use crate::engine::{self, MicroBatch};
use crate::models::decoder::Sequence;
use crate::ops::{self, StepOutcome, StepRules};
use crate::tools::profiler::{self, Category};
use crate::{Error, Result};

/// What a step found out.
pub struct Step {
    pub loss: f32,
    pub grad_norm: f64,
    pub lr: f64,
    pub n_tokens: u64,
    pub data_loading: Duration,
}

/// A part of a step's batch, and the factor of its mean loss in the step's.
pub(super) type Part = (MicroBatch, f64);

impl Trainer {
    /// Gradient accumulation, clipping, the optimizer, and expert biases. A step that is skipped changes nothing of these,
    /// but counts.
    ///
    /// # Errors
    /// [`Error::Training`] if its numbers are bad and the config does not want it skipped.
    pub(super) fn train_step(&mut self, batches: Vec<Batch>, data_loading: Duration) -> Result<Step> {
        let n_tokens = batches.iter().map(|batch| batch.labels.len() as u64).sum();
        let n_targets: usize = batches.iter().map(Batch::n_targets).sum();
        // Each token that is learned weighs the same, however many of them its batch has.
        let scale = |batch: &Batch| batch.n_targets() as f64 / n_targets as f64;
        let vocab_size = self.model.args().vocab_size;
        let parts = batches.into_iter().map(|batch| (scale(&batch), batch));
        let parts = parts.map(|(scale, batch)| Ok((batch.micro_batch(&self.device, vocab_size)?, scale)));
        let parts: Vec<Part> = parts.collect::<Result<_>>()?;

        let step = self.step + 1;
        let lr = self.config.optimizer.lr * self.schedule.factor(self.step);
        let rules = StepRules { lr, max_norm: self.config.training.max_norm, max_loss: self.guard.max_loss() };
        let StepOutcome { norm: grad_norm, loss, applied } = self.compute(&parts, &rules)?;
        let loss = f64::from(loss);
        let spike = self.guard.spike(loss);
        if applied {
            self.guard.applied(loss);
        }
        match spike {
            _ if !(loss.is_finite() && grad_norm.is_finite()) => self.not_finite(step, loss, grad_norm, &parts)?,
            Some(spike) if applied => warn!("step {step}: {spike}"),
            Some(spike) => self.guard.skipped(step, &spike)?,
            None => {}
        }
        let moves = applied && self.model.adapters().is_none();
        self.model.expert_loads().values().try_for_each(|load| load.rebalance(moves))?;

        self.step = step;
        self.n_tokens_seen += n_tokens;
        Ok(Step { loss: loss as f32, grad_norm, lr, n_tokens, data_loading })
    }

    /// All arithmetic of a step. Nothing of it is read back before its end.
    fn compute(&mut self, parts: &[Part], rules: &StepRules) -> Result<StepOutcome> {
        self.optimizer.prepare(rules)?;
        #[cfg(feature = "cuda")]
        if let Some(recorder) = self.recorder.take() {
            self.recorder = recorder.step(self, parts)?;
        } else {
            self.enqueue(parts)?;
        }
        #[cfg(not(feature = "cuda"))]
        self.enqueue(parts)?;
        self.optimizer.finish()
    }

    pub(super) fn enqueue(&self, parts: &[Part]) -> Result<()> {
        let contexts =
            parts.iter().map(|(batch, _)| engine::context(&self.model, batch)).collect::<Result<Vec<_>>>()?;
        self.enqueue_in(parts, &contexts)
    }

    /// The passes of all micro-batches, and the optimizer.
    pub(super) fn enqueue_in(&self, parts: &[Part], contexts: &[Sequence]) -> Result<()> {
        let mut loss: Option<Tensor> = None;
        for (i, ((batch, scale), context)) in parts.iter().zip(contexts).enumerate() {
            self.model.drop_out(Some(self.pass(i)));
            let own = engine::forward_backward_in(&self.model, batch, context, *scale, self.recompute)?;
            loss = Some(match loss {
                None => own,
                Some(sum) => ops::add_tensors(&sum, &own)?,
            });
        }
        self.model.drop_out(None);
        let _span = profiler::span_in(Category::Optimizer, "optimizer");
        self.optimizer.enqueue(self.model.trained(), &loss.expect("a step has at least one micro-batch"))
    }

    /// The number of a micro-batch in the whole training, from 1.
    fn pass(&self, micro_batch: usize) -> u64 {
        (self.step * self.grad_accum + micro_batch + 1) as u64
    }

    fn not_finite(&mut self, step: usize, loss: f64, grad_norm: f64, parts: &[Part]) -> Result<()> {
        let why = format!("the loss is {loss} and the gradient norm {grad_norm}; {}", self.diagnosis(parts)?);
        match self.config.training.nan_policy {
            NanPolicy::Skip => self.guard.skipped(step, &why),
            NanPolicy::Stop => Err(Error::Training(format!(
                "step {step}: {why}; the step was not applied\n   = a lower optimizer.lr or longer lr_scheduler.warmup_steps \
                 may keep the run stable; training.nan_policy = \"skip\" goes on without the step\n   = {}",
                last_checkpoint(&self.config)
            ))),
        }
    }

    /// What went bad first, found by doing the step again, all but its last part.
    fn diagnosis(&self, parts: &[Part]) -> Result<String> {
        let stages = self.model.trained();
        let mut found = None;
        for (i, (batch, scale)) in parts.iter().enumerate() {
            self.model.drop_out(Some(self.pass(i)));
            if let Some(fault) = engine::diagnose(&self.model, stages, batch, *scale, self.recompute)? {
                let of_part = if parts.len() > 1 {
                    format!(" (micro-batch {} of {})", i + 1, parts.len())
                } else {
                    String::new()
                };
                found = Some(format!("{fault}{of_part}"));
                break;
            }
        }
        self.model.drop_out(None);
        let found = match found {
            Some(found) => found,
            None => engine::largest_gradient(stages)?.map_or(String::new(), |largest| format!("one by one {largest}")),
        };
        self.optimizer.discard(stages)?;
        Ok(found)
    }
}

/// Where the run can go on from, as a sentence without its full stop.
pub fn last_checkpoint(config: &JobConfig) -> String {
    let folder = config.job.dump_folder.join(&config.checkpoint.folder);
    let steps = if config.checkpoint.enable { steps_in(&folder).unwrap_or_default() } else { Vec::new() };
    match steps.last() {
        Some(step) => format!(
            "the last checkpoint is {}: the same command goes on from there",
            folder.join(step_name(*step)).display()
        ),
        None => "there is no checkpoint to go on from".to_owned(),
    }
}
