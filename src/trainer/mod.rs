//! The training loop: owns the parts, and the order in which they act.

mod build;
mod profile;

pub use build::model_args;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use candle_core::Device;
use tracing::info;

use crate::components::checkpoint::{CheckpointManager, Progress, State, TrainState, Why};
use crate::components::lr_scheduler::LrScheduler;
use crate::components::metrics::{MetricsLogger, StepRecord};
use crate::components::optimizer::Optimizer;
use crate::components::validate::Validator;
use crate::config::JobConfig;
use crate::data::{Batch, Loader};
use crate::engine::{self, Recompute};
use crate::models::Decoder;
use crate::tools::profiler::{self, Category};
use crate::tools::signals::Interrupt;
use crate::{Error, Result};
use profile::StepProfiler;

/// One run of training, from the job config to the last checkpoint.
pub struct Trainer {
    config: JobConfig,
    device: Device,
    model: Decoder,
    recompute: Recompute,
    optimizer: Optimizer,
    schedule: LrScheduler,
    loader: Loader,
    /// Micro-batches per optimizer step.
    grad_accum: usize,
    validator: Option<Validator>,
    checkpoints: CheckpointManager,
    profiler: Option<StepProfiler>,
    /// Optimizer steps taken.
    step: usize,
    n_tokens_seen: u64,
    seed: u64,
    run: build::RunFacts,
}

/// What a step found out.
struct Step {
    loss: f32,
    grad_norm: f64,
    lr: f64,
    n_tokens: u64,
    data_loading: Duration,
    tokens_per_expert: BTreeMap<usize, Vec<u64>>,
}

impl Trainer {
    /// Trains until `training.steps`, or until the user asks to stop. Either way the state is saved first, if
    /// checkpoints are on.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if the user stopped the run; [`Error::Training`] if the loss is no longer a number.
    pub fn run(mut self) -> Result<()> {
        if self.config.checkpoint.create_seed_checkpoint {
            self.save(Why::Seed)?;
            info!("Stopping after the seed checkpoint, as checkpoint.create_seed_checkpoint asks.");
            return Ok(());
        }
        let last_step = self.config.training.steps;
        if self.step >= last_step {
            info!("Nothing to train: step {} is reached. A larger training.steps goes on from here.", self.step);
            if self.checkpoints.saves() {
                self.save(Why::Last)?;
            }
            return Ok(());
        }

        let interrupt = Interrupt::install()?;
        let mut metrics = self.run.metrics(&self.config, self.step)?;
        info!("Training starts at step {}.", self.step + 1);
        while self.step < last_step {
            if let Some(profiler) = &mut self.profiler {
                profiler.step_begins(self.step + 1);
            }
            let span = profiler::span_in(Category::Step, format_args!("step {}", self.step + 1));
            span.around(|| self.step_and_save(&mut metrics))?;
            let signal = interrupt.requested().filter(|_| self.step < last_step);
            if let Some(profiler) = &mut self.profiler {
                profiler.step_ends(self.step, signal.is_some() || self.step == last_step);
            }
            if let Some(signal) = signal {
                drop(metrics); // The progress bar leaves the terminal before the last words.
                self.save(Why::Interrupt)?; // does nothing if this step is saved already
                return Err(Error::Interrupted { signal, step: self.step, saved: self.checkpoints.saves() });
            }
        }
        drop(metrics);
        info!("Training completed: {} steps, {} tokens.", self.step, self.n_tokens_seen);
        Ok(())
    }

    /// A step, and all that is due after it.
    fn step_and_save(&mut self, metrics: &mut MetricsLogger) -> Result<()> {
        let step = self.train_step()?;
        profiler::span_in(Category::Metrics, "metrics").around(|| self.log(metrics, step));
        if self.validates() {
            profiler::span_in(Category::Validation, "validation").around(|| self.validate(metrics))?;
        }
        if let Some(why) = self.checkpoints.due(self.step, self.config.training.steps) {
            profiler::span_in(Category::Checkpoint, "checkpoint").around(|| self.save(why))?;
        }
        Ok(())
    }

    /// Gradient accumulation, expert biases, clipping, and the optimizer.
    fn train_step(&mut self) -> Result<Step> {
        let waiting = Instant::now();
        let read = || (0..self.grad_accum).map(|_| self.next_batch()).collect::<Result<Vec<_>>>();
        let batches = profiler::span_in(Category::Data, "data_loading").around(read)?;
        let data_loading = waiting.elapsed();
        let n_tokens = batches.iter().map(|batch| batch.labels.len() as u64).sum();
        let n_targets: usize = batches.iter().map(Batch::n_targets).sum();

        let mut loss = 0.0;
        for (i, batch) in batches.into_iter().enumerate() {
            // Each token that is learned weighs the same, however many of them its batch has.
            let scale = batch.n_targets() as f64 / n_targets as f64;
            let batch = batch.micro_batch(&self.device)?;
            self.model.drop_out(Some((self.step * self.grad_accum + i + 1) as u64));
            loss += f64::from(engine::forward_backward(&self.model, &batch, scale, self.recompute)?);
        }
        self.model.drop_out(None);
        let step = self.step + 1;
        let _span = profiler::span_in(Category::Optimizer, "optimizer");
        let loads = self.model.expert_loads().into_iter();
        let moves = self.model.adapters().is_none();
        let tokens_per_expert = loads.map(|(layer, load)| (layer, load.rebalance(moves))).collect();

        let lr = self.config.optimizer.lr * self.schedule.factor(self.step);
        let grad_norm = self.optimizer.step(self.model.trained(), lr, self.config.training.max_norm)?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(Error::Training(format!(
                "step {step}: the loss is {loss} and the gradient norm {grad_norm}; the step was not applied, nothing \
                 was saved\n   = a lower optimizer.lr or longer lr_scheduler.warmup_steps may keep the run stable; \
                 it goes on from its last checkpoint"
            )));
        }
        self.step = step;
        self.n_tokens_seen += n_tokens;
        Ok(Step { loss: loss as f32, grad_norm, lr, n_tokens, data_loading, tokens_per_expert })
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let batch = self.loader.next_batch()?;
        batch.ok_or_else(|| Error::Data("the training data ended, though it should repeat".into()))
    }

    fn log(&self, metrics: &mut MetricsLogger, step: Step) {
        metrics.step_done(StepRecord {
            step: self.step as u64,
            loss: step.loss,
            max_loss: step.loss, // the largest of all data-parallel ranks: there is one
            grad_norm: step.grad_norm as f32,
            lr: step.lr,
            n_tokens: step.n_tokens,
            n_tokens_seen: self.n_tokens_seen,
            data_loading_s: step.data_loading.as_secs_f64(),
            tokens_per_expert: step.tokens_per_expert,
        });
    }

    /// At the first step, and every `validation.freq`.
    fn validates(&self) -> bool {
        self.validator.is_some() && (self.step == 1 || self.step.is_multiple_of(self.config.validation.freq))
    }

    fn validate(&mut self, metrics: &mut MetricsLogger) -> Result<()> {
        if let Some(validator) = &mut self.validator {
            let found = validator.run(&self.model, &self.device)?;
            metrics.validation(self.step as u64, found.loss, found.n_tokens, found.elapsed);
        }
        Ok(())
    }

    fn save(&mut self, why: Why) -> Result<()> {
        let (step, n_tokens_seen, seed) = (self.step, self.n_tokens_seen, self.seed);
        let progress = Progress {
            train_state: TrainState { step, n_tokens_seen, seed },
            lr_scheduler: serde_json::json!({ "steps": step }),
            dataloader: self.loader.state(),
        };
        let (model, optimizer) = (self.model.state()?, self.optimizer.state(self.model.trained())?);
        self.checkpoints.save(step, why, &State { model: &model, optimizer: &optimizer, progress: &progress })?;
        if why == Why::Last && self.model.adapters().is_some() && self.checkpoints.exports() {
            self.model.merge()?;
            self.checkpoints.export(step, &self.model.state()?)?;
        }
        Ok(())
    }
}
