use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Traces of where time and memory go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Profiling {
    /// Log where the time goes, by op, and write a Chrome trace, every `profile_freq` steps.
    pub enable_profiling: bool,
    /// Folder of the traces, in `job.dump_folder`.
    pub save_traces_folder: PathBuf,
    /// Steps from one trace to the next.
    #[schemars(range(min = 1))]
    pub profile_freq: usize,
    /// Steps that a trace covers: the last of each `profile_freq`.
    #[schemars(range(min = 1))]
    pub profiler_active: usize,
    /// Steps that the profiler runs before a trace, so that its own start does not show.
    #[schemars(extend("x-no-effect" = "titan's profiler is warm at once"))]
    pub profiler_warmup: usize,
    /// Log what holds memory at the peak of a step, and write a Chrome trace with the memory held before, during and after
    /// each op, of the same steps.
    pub enable_memory_snapshot: bool,
    /// Folder of the memory snapshots, in `job.dump_folder`.
    pub save_memory_snapshot_folder: PathBuf,
}

impl Default for Profiling {
    fn default() -> Self {
        Self {
            enable_profiling: false,
            save_traces_folder: "profile_traces".into(),
            profile_freq: 10,
            profiler_active: 1,
            profiler_warmup: 3,
            enable_memory_snapshot: false,
            save_memory_snapshot_folder: "memory_snapshot".into(),
        }
    }
}
