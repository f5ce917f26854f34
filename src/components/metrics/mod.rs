//! What a run tells about itself: a console line, TensorBoard events, `metrics.jsonl`, a progress bar.

mod append_file;
mod console;
mod jsonl;
mod tensorboard;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use chrono::{Local, SecondsFormat};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use serde::Serialize;
use tracing::{info, warn};

pub use console::grouped;

use crate::Result;
use crate::tools::device::DeviceFacts;
use crate::tools::logging;
use jsonl::JsonLines;
use tensorboard::EventFile;

/// The keys of `[metrics]` that the logger follows.
#[derive(Clone, Debug)]
pub struct MetricsSettings {
    /// Steps from one line to the next; step 1 always has one.
    pub log_freq: u64,
    pub enable_tensorboard: bool,
    /// Folder of the TensorBoard events, inside the dump folder.
    pub save_tb_folder: String,
    pub disable_color_printing: bool,
}

/// What the logger must know of a run.
#[derive(Clone, Debug)]
pub struct RunFacts {
    /// Training FLOPs per token, forward and backward.
    pub flops_per_token: f64,
    pub device: DeviceFacts,
    /// The step that the run ends with.
    pub total_steps: u64,
    /// The step that the run goes on after, 0 for a fresh one.
    pub start_step: u64,
}

/// One optimizer step.
#[derive(Clone, Debug, Default)]
pub struct StepRecord {
    /// From 1.
    pub step: u64,
    /// Mean over the tokens of all ranks.
    pub loss: f32,
    /// Of the rank where it is highest.
    pub max_loss: f32,
    /// Before clipping.
    pub grad_norm: f32,
    pub lr: f64,
    /// Tokens that this step trained on.
    pub n_tokens: u64,
    /// Tokens since the first step of all, over resumptions.
    pub n_tokens_seen: u64,
    /// Time that the step waited for its data.
    pub data_loading_s: f64,
    /// By layer, for layers with a mixture of experts: the tokens that each expert was given in this step. Needed where
    /// [`MetricsLogger::is_due`].
    pub tokens_per_expert: BTreeMap<usize, Vec<u64>>,
}

/// A logged step. The fields are the keys of `metrics.jsonl`. Rates and times are means over the steps since the
/// last line; loss, norm, learning rate and expert counts are the step's own.
#[derive(Debug, Serialize)]
struct StepMetrics {
    step: u64,
    time: String,
    loss: f32,
    max_loss: f32,
    grad_norm: f32,
    lr: f64,
    tps: f64,
    tflops: f64,
    mfu_pct: f64,
    end_to_end_s: f64,
    data_loading_s: f64,
    data_loading_pct: f64,
    mem_bytes: u64,
    peak_mem_bytes: u64,
    peak_mem_pct: f64,
    peak_reserved_bytes: u64,
    peak_reserved_pct: f64,
    n_tokens_seen: u64,
    tokens_per_expert: BTreeMap<usize, Vec<u64>>,
}

/// A validation. Its keys differ from a step's, so that whoever plots `loss` plots training.
#[derive(Debug, Serialize)]
struct ValidationMetrics {
    step: u64,
    time: String,
    validation_loss: f32,
    validation_tps: f64,
    validation_n_tokens: u64,
    validation_s: f64,
    mem_bytes: u64,
    peak_mem_bytes: u64,
    peak_mem_pct: f64,
    peak_reserved_bytes: u64,
    peak_reserved_pct: f64,
}

/// The steps that the next line will speak of.
struct Window {
    start: Instant,
    n_steps: u64,
    n_tokens: u64,
    data_loading_s: f64,
}

impl Window {
    fn starting_now() -> Self {
        Self { start: Instant::now(), n_steps: 0, n_tokens: 0, data_loading_s: 0.0 }
    }
}

/// Measures a run and writes down how it goes.
///
/// Time runs from `new` on. A run's first step, slower than the others, counts only in its own line; time spent in
/// validation counts nowhere.
pub struct MetricsLogger {
    settings: MetricsSettings,
    facts: RunFacts,
    window: Window,
    first_step_done: bool,
    json_lines: JsonLines,
    events: Option<EventFile>,
    bar: ProgressBar,
}

impl MetricsLogger {
    /// Make it right before the first step.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if `dump_folder` cannot be written. Once a run is on its way, failed writes are tried again
    /// with the next line, and only a warning.
    pub fn new(settings: MetricsSettings, dump_folder: &Path, facts: RunFacts) -> Result<Self> {
        let json_lines = JsonLines::open(dump_folder, facts.start_step)?;
        let tb_folder = dump_folder.join(&settings.save_tb_folder);
        let events = match settings.enable_tensorboard {
            true => Some(EventFile::create(&tb_folder, facts.start_step)?),
            false => None,
        };
        let bar = progress_bar(facts.start_step, facts.total_steps);
        let window = Window::starting_now();
        Ok(Self { settings, facts, window, first_step_done: false, json_lines, events, bar })
    }

    /// Whether [`Self::step_done`] will log `step`.
    pub fn is_due(&self, step: u64) -> bool {
        step == 1 || step.is_multiple_of(self.settings.log_freq)
    }

    pub fn step_done(&mut self, record: StepRecord) {
        self.window.n_steps += 1;
        self.window.n_tokens += record.n_tokens;
        self.window.data_loading_s += record.data_loading_s;
        self.bar.set_position(record.step);
        self.bar.set_message(format!("loss {:.4}", record.loss));

        let due = self.is_due(record.step);
        if due {
            self.log_step(record);
        }
        if due || !self.first_step_done {
            self.window = Window::starting_now();
        }
        self.first_step_done = true;
    }

    fn log_step(&mut self, record: StepRecord) {
        let elapsed_s = self.window.start.elapsed().as_secs_f64();
        let tps = self.window.n_tokens as f64 / elapsed_s;
        let flops = self.facts.flops_per_token * tps;
        let memory = self.facts.device.memory_use();
        let metrics = StepMetrics {
            step: record.step,
            time: now(),
            loss: record.loss,
            max_loss: record.max_loss,
            grad_norm: record.grad_norm,
            lr: record.lr,
            tps,
            tflops: flops / 1e12,
            mfu_pct: 100.0 * flops / self.facts.device.peak_flops,
            end_to_end_s: elapsed_s / self.window.n_steps as f64,
            data_loading_s: self.window.data_loading_s / self.window.n_steps as f64,
            data_loading_pct: 100.0 * self.window.data_loading_s / elapsed_s,
            mem_bytes: memory.current_bytes,
            peak_mem_bytes: memory.peak_bytes,
            peak_mem_pct: self.memory_pct(memory.peak_bytes),
            peak_reserved_bytes: memory.peak_reserved_bytes,
            peak_reserved_pct: self.memory_pct(memory.peak_reserved_bytes),
            n_tokens_seen: record.n_tokens_seen,
            tokens_per_expert: record.tokens_per_expert,
        };
        info!("{}", console::step_line(&metrics, self.colors()));
        warn_if_failed("metrics.jsonl", self.json_lines.append(&metrics));
        if let Some(events) = &mut self.events {
            warn_if_failed("TensorBoard events", events.step(&metrics));
        }
    }

    /// Logs the mean loss of a validation after `step`, over `n_tokens` tokens in `elapsed`.
    pub fn validation(&mut self, step: u64, loss: f32, n_tokens: u64, elapsed: Duration) {
        let memory = self.facts.device.memory_use();
        let metrics = ValidationMetrics {
            step,
            time: now(),
            validation_loss: loss,
            validation_tps: n_tokens as f64 / elapsed.as_secs_f64(),
            validation_n_tokens: n_tokens,
            validation_s: elapsed.as_secs_f64(),
            mem_bytes: memory.current_bytes,
            peak_mem_bytes: memory.peak_bytes,
            peak_mem_pct: self.memory_pct(memory.peak_bytes),
            peak_reserved_bytes: memory.peak_reserved_bytes,
            peak_reserved_pct: self.memory_pct(memory.peak_reserved_bytes),
        };
        info!("{}", console::validation_line(&metrics, self.colors()));
        warn_if_failed("metrics.jsonl", self.json_lines.append(&metrics));
        if let Some(events) = &mut self.events {
            warn_if_failed("TensorBoard events", events.validation(&metrics));
        }
        self.window = Window::starting_now();
    }

    fn colors(&self) -> bool {
        !self.settings.disable_color_printing && logging::colors()
    }

    /// 0 where the device does not say how much it has.
    fn memory_pct(&self, bytes: u64) -> f64 {
        match self.facts.device.total_memory_bytes {
            0 => 0.0,
            total => 100.0 * bytes as f64 / total as f64,
        }
    }
}

/// Waits until what a run logged in `dump_folder/metrics.jsonl` is on the disk, for a checkpoint to build on.
pub fn sync(dump_folder: &Path) {
    warn_if_failed("metrics.jsonl", jsonl::sync(dump_folder));
}

fn now() -> String {
    Local::now().to_rfc3339_opts(SecondsFormat::Millis, false)
}

fn warn_if_failed(what: &str, result: std::io::Result<()>) {
    if let Err(error) = result {
        warn!("{what} cannot be written, trying again with the next line: {error}");
    }
}

/// Draws on a terminal, nowhere else, and leaves it when dropped.
fn progress_bar(start_step: u64, total_steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len}  {msg}  {eta_precise} left")
        .expect("the template is valid");
    let bar = ProgressBar::new(total_steps).with_style(style).with_finish(ProgressFinish::AndClear);
    // Steps of an earlier run took none of this run's time.
    let bar = logging::bars().add(bar.with_position(start_step));
    bar.reset_eta();
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn step_metrics() -> StepMetrics {
        StepMetrics {
            step: 1,
            time: now(),
            loss: 8.13758,
            max_loss: 8.2,
            grad_norm: 1.40212,
            lr: 8e-4,
            tps: 1_234_567.8,
            tflops: 1092.827,
            mfu_pct: 43.661,
            end_to_end_s: 0.5,
            data_loading_s: 0.001,
            data_loading_pct: 0.2,
            mem_bytes: 1 << 30,
            peak_mem_bytes: 3 << 29,
            peak_mem_pct: 18.75,
            peak_reserved_bytes: 3 << 29,
            peak_reserved_pct: 18.75,
            n_tokens_seen: 16_384,
            tokens_per_expert: BTreeMap::from([(1, vec![3, 5])]),
        }
    }

    pub(super) fn validation_metrics() -> ValidationMetrics {
        ValidationMetrics {
            step: 20,
            time: now(),
            validation_loss: 3.25,
            validation_tps: 999.4,
            validation_n_tokens: 4096,
            validation_s: 4.1,
            mem_bytes: 1 << 30,
            peak_mem_bytes: 3 << 29,
            peak_mem_pct: 18.75,
            peak_reserved_bytes: 3 << 29,
            peak_reserved_pct: 18.75,
        }
    }
}
