use std::path::{Path, PathBuf};
use std::time::Instant;

use tracing::{info, warn};

use crate::config::Profiling;
use crate::tools::profiler::{self, Table, trace};

/// Records some of a run's steps, and writes them down.
pub struct StepProfiler {
    folder: PathBuf,
    /// Of every `freq` steps the last `active` are recorded.
    freq: usize,
    active: usize,
    recording: bool,
}

impl StepProfiler {
    pub fn new(keys: &Profiling, dump_folder: &Path) -> Self {
        let folder = dump_folder.join(&keys.save_traces_folder);
        info!("Profiling every {} steps. Traces will be saved at {}", keys.profile_freq, folder.display());
        Self { folder, freq: keys.profile_freq, active: keys.profiler_active, recording: false }
    }

    /// Call it before each step, numbered from 1.
    pub fn step_begins(&mut self, step: usize) {
        if !self.recording && (step - 1) % self.freq >= self.freq - self.active {
            profiler::start();
            self.recording = true;
        }
    }

    /// Call it after each step; `is_last`: the run ends here. A trace that cannot be written is only a warning.
    pub fn step_ends(&mut self, step: usize, is_last: bool) {
        if !self.recording || !(is_last || step.is_multiple_of(self.freq)) {
            return;
        }
        self.recording = false;
        let events = profiler::stop();
        info!("{}", Table::of(&events));
        info!("Dumping profiler traces at step {step}");
        let start = Instant::now();
        let path = self.folder.join(format!("iteration_{step}/rank0_trace.json"));
        match trace::write(&path, &events, 0) {
            Ok(()) => info!("Finished dumping profiler traces in {:.2} seconds", start.elapsed().as_secs_f64()),
            Err(error) => warn!("{} cannot be written: {error}", path.display()),
        }
    }
}
