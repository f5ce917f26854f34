use std::path::{Path, PathBuf};
use std::time::Instant;

use tracing::{info, warn};

use super::memory::Classes;
use crate::config::Profiling;
use crate::tools::profiler::{self, Event, MemoryTable, Table, trace};

/// Records some of a run's steps, and writes them down.
pub struct StepProfiler {
    /// Where traces of time go, and where those of memory.
    traces: Option<PathBuf>,
    snapshots: Option<PathBuf>,
    /// Of every `freq` steps the last `active` are recorded.
    freq: usize,
    active: usize,
    recording: bool,
}

impl StepProfiler {
    /// `None` if there is nothing to record.
    pub fn new(keys: &Profiling, dump_folder: &Path) -> Option<Self> {
        let folder = |is_on: bool, folder, what| {
            let folder = is_on.then(|| dump_folder.join(folder))?;
            info!("Profiling every {} steps. {what} will be saved at {}", keys.profile_freq, folder.display());
            Some(folder)
        };
        let traces = folder(keys.enable_profiling, &keys.save_traces_folder, "Traces");
        let snapshots = folder(keys.enable_memory_snapshot, &keys.save_memory_snapshot_folder, "Memory snapshots");
        (traces.is_some() || snapshots.is_some()).then_some(Self {
            traces,
            snapshots,
            freq: keys.profile_freq,
            active: keys.profiler_active,
            recording: false,
        })
    }

    /// Call it before each step, numbered from 1.
    pub fn step_begins(&mut self, step: usize) {
        if !self.recording && (step - 1) % self.freq >= self.freq - self.active {
            profiler::start(self.snapshots.is_some());
            self.recording = true;
        }
    }

    /// Call it after each step; `is_last`: the run ends here. A trace that cannot be written is only a warning.
    pub fn step_ends(&mut self, step: usize, is_last: bool, classes: &Classes) {
        if !self.recording || !(is_last || step.is_multiple_of(self.freq)) {
            return;
        }
        self.recording = false;
        let events = profiler::stop();
        if let Some(folder) = &self.traces {
            info!("{}", Table::of(&events));
            dump(folder, "trace", "profiler traces", step, &events);
        }
        if let Some(folder) = &self.snapshots {
            if let Some(table) = MemoryTable::of(&events, &classes.held()) {
                info!("{table}");
            }
            dump(folder, "memory_snapshot", "a memory snapshot", step, &events);
        }
    }
}

fn dump(folder: &Path, kind: &str, what: &str, step: usize, events: &[Event]) {
    info!("Dumping {what} at step {step}");
    let start = Instant::now();
    let path = folder.join(format!("iteration_{step}/rank0_{kind}.json"));
    match trace::write(&path, events, 0) {
        Ok(()) => info!("Finished dumping {what} in {:.2} seconds", start.elapsed().as_secs_f64()),
        Err(error) => warn!("{} cannot be written: {error}", path.display()),
    }
}
