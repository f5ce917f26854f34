use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::PYTHON_CODE;

/// The run as a whole: where its files go and what is said about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Job {
    /// The job file itself. `--job.config_file FILE` is another name of `--config FILE`.
    pub config_file: Option<PathBuf>,
    /// Folder for everything that the run writes: checkpoints, metrics, TensorBoard files.
    pub dump_folder: PathBuf,
    /// A sentence about the run, logged at its start.
    pub description: String,
    /// Log the merged config at start, with the origin of each value.
    pub print_config: bool,
    /// Write the merged config as TOML to this file in `dump_folder`. "none": do not.
    pub save_config_file: Option<PathBuf>,
    /// A Python module with config classes of one's own.
    #[schemars(extend("x-not-yet" = PYTHON_CODE))]
    pub custom_config_module: String,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            config_file: None,
            dump_folder: "./outputs".into(),
            description: "default job".into(),
            print_config: false,
            save_config_file: None,
            custom_config_module: String::new(),
        }
    }
}
