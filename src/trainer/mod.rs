//! The training loop: owns the parts, and the order in which they act.

mod build;
mod continuation;
mod convert;
mod memory;
mod profile;
#[cfg(feature = "cuda")]
mod recorder;
mod step;

pub use build::model_args;

use std::time::Instant;

use candle_core::Device;
use tracing::{info, warn};

use crate::components::checkpoint::{CheckpointManager, Progress, State, TrainState, Why};
use crate::components::loss_guard::LossGuard;
use crate::components::lr_scheduler::LrScheduler;
use crate::components::metrics::{MetricsLogger, StepRecord};
use crate::components::optimizer::Optimizer;
use crate::components::validate::Validator;
use crate::config::JobConfig;
use crate::data::Loader;
use crate::engine::Recompute;
use crate::models::Decoder;
use crate::ops::magnitude;
use crate::tools::bugs;
use crate::tools::profiler::{self, Category};
use crate::tools::signals::Interrupt;
use crate::{Error, Result};
use profile::StepProfiler;
use step::Step;

/// One run of training, from the job config to the last checkpoint.
pub struct Trainer {
    config: JobConfig,
    device: Device,
    model: Decoder,
    recompute: Recompute,
    optimizer: Optimizer,
    schedule: LrScheduler,
    guard: LossGuard,
    loader: Loader,
    /// Micro-batches per optimizer step.
    grad_accum: usize,
    validator: Option<Validator>,
    checkpoints: CheckpointManager,
    profiler: Option<StepProfiler>,
    /// Steps done, those that were skipped included.
    step: usize,
    n_tokens_seen: u64,
    seed: u64,
    classes: memory::Classes,
    #[cfg(feature = "cuda")]
    recorder: Option<recorder::Recorder>,
    run: build::RunFacts,
}

impl Trainer {
    /// Trains until `training.steps`, or until the user asks to stop. Either way the state is saved first, if
    /// checkpoints are on.
    ///
    /// # Errors
    /// [`Error::Interrupted`] if the user stopped the run; [`Error::Training`] if the loss is no longer a number.
    pub fn run(mut self, interrupt: &Interrupt) -> Result<()> {
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

        let (model, optimizer) = (self.model.state()?, self.optimizer.state(self.model.trained())?);
        self.checkpoints.rehearse(self.step, last_step, model.iter().chain(&optimizer))?;
        let mut metrics = self.run.metrics(&self.config, self.step)?;
        let config = self.config.clone();
        bugs::advise(move || step::last_checkpoint(&config));
        #[cfg(feature = "cuda")]
        {
            self.recorder = recorder::Recorder::new(&self);
        }
        interrupt.begin();
        info!("Training starts at step {}.", self.step + 1);
        while self.step < last_step {
            if let Some(profiler) = &mut self.profiler {
                profiler.step_begins(self.step + 1);
            }
            let span = profiler::span_in(Category::Step, format_args!("step {}", self.step + 1));
            match span.around(|| self.step_and_save(&mut metrics, interrupt)) {
                // Given up before the step had begun: all is as after the last one.
                Ok(()) | Err(Error::AskedToStop) => {}
                Err(error) => return Err(error),
            }
            let signal = interrupt.requested().filter(|_| self.step < last_step);
            if let Some(profiler) = &mut self.profiler {
                profiler.step_ends(self.step, signal.is_some() || self.step == last_step, &self.classes);
            }
            if let Some(signal) = signal {
                drop(metrics); // The progress bar leaves the terminal before the last words.
                self.save_what_was_done(Why::Interrupt)?;
                return Err(Error::Interrupted { signal, step: self.step, saved: self.checkpoints.saves() });
            }
        }
        drop(metrics);
        info!("Training completed: {} steps, {} tokens.", self.step, self.n_tokens_seen);
        Ok(())
    }

    /// A step, and all that is due after it.
    fn step_and_save(&mut self, metrics: &mut MetricsLogger, interrupt: &Interrupt) -> Result<()> {
        self.checkpoints.check()?;
        let waiting = Instant::now();
        let read = || self.loader.next_batches(self.grad_accum, &|| interrupt.check_patience());
        let batches = profiler::span_in(Category::Data, "data_loading").around(read);
        let batches = batches.inspect_err(|error| self.rescue(error))?;
        let step = self.train_step(batches, waiting.elapsed());
        let step = step.map_err(|error| self.classes.explain(error, "activations", &self.config, &self.run.device))?;
        profiler::span_in(Category::Metrics, "metrics").around(|| self.log(metrics, step))?;
        if self.validates() {
            let span = profiler::span_in(Category::Validation, "validation");
            span.around(|| self.validate(metrics, interrupt)).inspect_err(|error| self.rescue(error))?;
        }
        let asked = interrupt.takes_save_request().then_some(Why::Asked);
        if asked.is_some() && !self.checkpoints.saves() {
            warn!("SIGUSR1: nothing is saved, as this run saves no checkpoints");
        }
        if let Some(why) = self.checkpoints.due(self.step, self.config.training.steps).or(asked) {
            profiler::span_in(Category::Checkpoint, "checkpoint").around(|| self.save(why))?;
        }
        Ok(())
    }

    /// Saves before the run ends by a fault that has spoilt nothing.
    fn rescue(&mut self, error: &Error) {
        let is_fault = !matches!(error, Error::AskedToStop);
        if is_fault && let Err(another) = self.save_what_was_done(Why::Fault) {
            warn!("{another}");
        }
    }

    /// Of a run that has not begun there is nothing worth saving; nor is there if this step is saved already.
    fn save_what_was_done(&mut self, why: Why) -> Result<()> {
        if self.step > 0 { self.save(why) } else { Ok(()) }
    }

    fn log(&self, metrics: &mut MetricsLogger, step: Step) -> Result<()> {
        // To ask for them is to wait for the device, so they are asked for where they are logged.
        let loads = self.model.expert_loads().into_iter().filter(|_| metrics.is_due(self.step as u64));
        let tokens_per_expert = loads.map(|(layer, load)| Ok((layer, load.tokens_per_expert()?)));
        let tokens_per_expert = tokens_per_expert.collect::<Result<_>>()?;
        metrics.step_done(StepRecord {
            step: self.step as u64,
            loss: step.loss,
            max_loss: step.loss, // the largest of all data-parallel ranks: there is one
            grad_norm: step.grad_norm as f32,
            lr: step.lr,
            n_tokens: step.n_tokens,
            n_tokens_seen: self.n_tokens_seen,
            data_loading_s: step.data_loading.as_secs_f64(),
            tokens_per_expert,
        });
        Ok(())
    }

    /// At the first step, and every `validation.freq`.
    fn validates(&self) -> bool {
        self.validator.is_some() && (self.step == 1 || self.step.is_multiple_of(self.config.validation.freq))
    }

    fn validate(&mut self, metrics: &mut MetricsLogger, interrupt: &Interrupt) -> Result<()> {
        let Some(validator) = &mut self.validator else { return Ok(()) };
        match validator.run(&self.model, &self.device, self.model.args().vocab_size, &|| interrupt.check_patience()) {
            Ok(found) => metrics.validation(self.step as u64, found.loss, found.n_tokens, found.elapsed),
            Err(Error::AskedToStop) => warn!("the validation after step {} is given up", self.step),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn save(&mut self, why: Why) -> Result<()> {
        if self.checkpoints.saves() {
            self.check_weights()?;
        }
        let (step, n_tokens_seen, seed) = (self.step, self.n_tokens_seen, self.seed);
        let progress = Progress {
            train_state: TrainState { step, n_tokens_seen, seed },
            lr_scheduler: serde_json::json!({ "steps": step }),
            dataloader: self.loader.state(),
            optimizer_steps: self.optimizer.steps(),
            loss_guard: self.guard.state(),
        };
        let (model, optimizer) = (self.model.state()?, self.optimizer.state(self.model.trained())?);
        self.checkpoints.save(step, why, &State { model: &model, optimizer: &optimizer, progress: &progress })?;
        if why == Why::Last && self.model.adapters().is_some() && self.checkpoints.exports() {
            self.model.merge()?;
            self.checkpoints.export(step, &self.model.state()?)?;
        }
        Ok(())
    }

    /// A step may poison weights that its loss and its gradients did not show.
    fn check_weights(&self) -> Result<()> {
        for parameter in self.model.trained_parameters() {
            let largest = magnitude(&parameter.weights()?)?;
            if !largest.is_finite() {
                return Err(Error::Training(format!(
                    "after step {} the weight of `{}` holds {largest}; nothing is saved\n   = a lower optimizer.lr may keep \
                     the run stable\n   = {}",
                    self.step,
                    parameter.fqn(),
                    step::last_checkpoint(&self.config)
                )));
            }
        }
        Ok(())
    }
}
