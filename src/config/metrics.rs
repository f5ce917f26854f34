use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is logged during training, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Steps from one log line to the next. Step 1 is always logged.
    #[schemars(range(min = 1))]
    pub log_freq: usize,
    /// Write TensorBoard files too; `tensorboard --logdir outputs/tb` shows them.
    pub enable_tensorboard: bool,
    /// Log lines without colours. Outside a terminal they have none anyway.
    pub disable_color_printing: bool,
    /// Folder of the TensorBoard files, in `job.dump_folder`.
    pub save_tb_folder: String,
    /// Write metrics from every rank, instead of from the first alone. One device is one rank.
    pub save_for_all_ranks: bool,
    /// Log to Weights & Biases.
    #[schemars(extend("x-not-yet" =
        "titan does not send metrics itself; set `enable_tensorboard` and send its folder with `wandb sync`"))]
    pub enable_wandb: bool,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            log_freq: 10,
            enable_tensorboard: false,
            disable_color_printing: false,
            save_tb_folder: "tb".into(),
            save_for_all_ranks: false,
            enable_wandb: false,
        }
    }
}
