use std::path::PathBuf;

use schemars::{JsonSchema, Schema};
use serde::{Deserialize, Serialize};

use super::minus_one;
use super::schema::FAULT_TOLERANCE;

/// Saving the run, resuming it, and starting from other weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Checkpoint {
    /// Write checkpoints, and resume from the newest one in `folder` when there is one.
    pub enable: bool,
    /// Save the data position of each replica when fault tolerance is on.
    #[schemars(extend("x-no-effect" = FAULT_TOLERANCE))]
    pub enable_ft_dataloader_checkpoints: bool,
    /// Folder of the checkpoints, in `job.dump_folder`. Step 500 is in `step-500` there.
    pub folder: String,
    /// Steps from one checkpoint to the next. The last step is always saved.
    #[schemars(range(min = 1))]
    pub interval: usize,
    /// Weights to start from: a titan checkpoint, or any folder of safetensors with the model's parameter names. The
    /// run's own checkpoints in `folder` win over it.
    pub initial_load_path: Option<PathBuf>,
    /// Take only the weights from `initial_load_path`, not its optimizer, step and data position.
    pub initial_load_model_only: bool,
    /// `initial_load_path` is a Hugging Face checkpoint (`model.hf_assets_path` if that path is "none").
    pub initial_load_in_hf: bool,
    /// The Hugging Face checkpoint holds 8-bit weights with a scale for each block of 128 x 128, as DeepSeek's do: they
    /// are dequantized. A `config.json` that says so makes up for this key.
    pub initial_load_in_hf_quantized: bool,
    /// Export the last step as weights alone, in `export_dtype`. A resumable checkpoint of it stays as well.
    pub last_save_model_only: bool,
    /// Export the last step in Hugging Face's format. Needs `last_save_model_only`.
    pub last_save_in_hf: bool,
    /// Number type of the exported weights.
    pub export_dtype: ExportDtype,
    /// Save while training goes on: "async" copies the state to host memory and writes it from there, on another thread.
    /// "async_with_pinned_mem" is the same where the device is the CPU, whose copy needs no pinned memory.
    pub async_mode: AsyncMode,
    /// Checkpoints that stay; older ones are removed. 0: all. 1 is refused, for then a fault while saving loses all.
    pub keep_latest_k: usize,
    /// Resume from this step, instead of from the newest. -1: the newest.
    #[serde(with = "minus_one")]
    #[schemars(with = "i64", range(min = -1))]
    pub load_step: Option<usize>,
    /// Parts of a checkpoint that start afresh instead of being loaded.
    pub exclude_from_loading: Vec<CheckpointState>,
    /// Save step 1 as well, to find out early whether saving works.
    pub enable_first_step_checkpoint: bool,
    /// Write the initial weights as `step-0` and stop.
    pub create_seed_checkpoint: bool,
    /// Resume, but never save.
    pub load_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ExportDtype {
    Float16,
    Bfloat16,
    Float32,
}

impl From<ExportDtype> for candle_core::DType {
    fn from(dtype: ExportDtype) -> Self {
        match dtype {
            ExportDtype::Float16 => Self::F16,
            ExportDtype::Bfloat16 => Self::BF16,
            ExportDtype::Float32 => Self::F32,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AsyncMode {
    Disabled,
    Async,
    AsyncWithPinnedMem,
}

impl Checkpoint {
    /// Whether training goes on while checkpoints are written.
    pub fn in_background(&self) -> bool {
        self.enable && !self.load_only && self.async_mode != AsyncMode::Disabled
    }
}

/// A part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(transform = also_data_loader)]
pub enum CheckpointState {
    Model,
    Optimizer,
    LrScheduler,
    #[serde(alias = "data_loader")]
    Dataloader,
    TrainState,
}

/// schemars leaves out serde's aliases.
fn also_data_loader(schema: &mut Schema) {
    if let Some(names) = schema.get_mut("enum").and_then(|names| names.as_array_mut()) {
        names.push("data_loader".into());
    }
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self {
            enable: false,
            enable_ft_dataloader_checkpoints: true,
            folder: "checkpoint".into(),
            interval: 500,
            initial_load_path: None,
            initial_load_model_only: true,
            initial_load_in_hf: false,
            initial_load_in_hf_quantized: false,
            last_save_model_only: true,
            last_save_in_hf: false,
            export_dtype: ExportDtype::Float32,
            async_mode: AsyncMode::Disabled,
            keep_latest_k: 10,
            load_step: None,
            exclude_from_loading: Vec::new(),
            enable_first_step_checkpoint: false,
            create_seed_checkpoint: false,
            load_only: false,
        }
    }
}
