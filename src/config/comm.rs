use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::ONE_DEVICE;

/// Messages between devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Comm {
    /// Seconds that a message may take at the start of the run.
    #[schemars(range(min = 1), extend("x-no-effect" = ONE_DEVICE))]
    pub init_timeout_seconds: usize,
    /// Seconds that a message may take after the first step.
    #[schemars(range(min = 1), extend("x-no-effect" = ONE_DEVICE))]
    pub train_timeout_seconds: usize,
    /// Messages that the flight recorder remembers.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub trace_buf_size: usize,
    /// Folder of the flight recorder's files, in `job.dump_folder`.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub save_traces_folder: PathBuf,
    /// How the names of these files begin.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub save_traces_file_prefix: String,
    /// "default": real messages. The others check a config for many devices without having them.
    #[schemars(extend("x-not-yet" = "titan does not simulate other devices yet"))]
    pub mode: CommMode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CommMode {
    Default,
    FakeBackend,
    LocalTensor,
}

impl Default for Comm {
    fn default() -> Self {
        Self {
            init_timeout_seconds: 300,
            train_timeout_seconds: 100,
            trace_buf_size: 20_000,
            save_traces_folder: "comm_traces".into(),
            save_traces_file_prefix: "rank_".into(),
            mode: CommMode::Default,
        }
    }
}
