use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::minus_one;
use super::schema::{ONE_DEVICE, PYTHON};

/// What is trained on, for how long, in which precision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Training {
    /// "c4_test": the stories that titan ships. "c4": Hugging Face's `allenai/c4`, fetched as it is needed. Your own
    /// files by their kind: "text", "json" (JSONL, also compressed), "parquet", "tokens" (written by `titan tokenize`);
    /// `dataset_path` says where. To fine-tune: "chat" (JSONL or Parquet of `messages`, of which those of the assistant are
    /// learned), "instruct" (JSONL or Parquet of `prompt` and `completion`, which is learned). Anything with a slash is a
    /// dataset of the Hugging Face hub.
    pub dataset: String,
    /// A file, a folder or a glob such as "data/*.jsonl.zst". "none": the dataset's own place.
    pub dataset_path: Option<String>,
    /// Sequences that go through the model at once. Memory grows with it.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub local_batch_size: usize,
    /// Sequences per optimizer step, a multiple of `local_batch_size`: gradients are accumulated over that many
    /// batches. -1: one batch.
    #[serde(with = "minus_one")]
    #[schemars(with = "minus_one::OrAtLeastOne")]
    pub global_batch_size: Option<usize>,
    /// Tokens per sequence.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub seq_len: usize,
    /// Gradients are scaled down so that their norm over all parameters is at most this. `inf`: never.
    #[schemars(extend("exclusiveMinimum" = 0, "x-infinite" = true))]
    pub max_norm: f64,
    /// Optimizer steps of the run. Running again with more goes on from the last checkpoint.
    #[schemars(range(min = 1))]
    pub steps: usize,
    /// What becomes of a step whose loss or gradient norm is not finite, which is never applied: "stop" ends the run and
    /// says what went bad first, "skip" says so and goes on with the next step.
    pub nan_policy: NanPolicy,
    /// What becomes of a step whose loss is out of line with the last `spike_window` losses: "log" says so, "skip" does
    /// not apply it.
    pub spike_policy: SpikePolicy,
    /// A loss is out of line if it is more than so many standard deviations above the mean.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub spike_z_score: f64,
    /// Losses of applied steps that a loss is compared with. Before there are as many, none is out of line.
    #[schemars(range(min = 2))]
    pub spike_window: usize,
    /// Steps that `nan_policy` and `spike_policy` may skip in the whole run before it stops.
    pub max_skipped_steps: usize,
    /// Of a run on a GPU, keep the weights that the optimizer updates, and its moments, in the host's memory, and update them
    /// there. On a CPU they are there anyway.
    pub enable_cpu_offload: bool,
    /// Type in which weights, gradients and optimizer state are stored.
    pub dtype: Dtype,
    /// Type in which matrix products are computed. Norms, softmax, router scores and the loss are float32 always.
    pub mixed_precision_param: Dtype,
    /// Type in which gradients are summed over devices. On one device nothing is summed, so either will do.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub mixed_precision_reduce: Dtype,
    /// Steps from one run of Python's garbage collector to the next.
    #[schemars(range(min = 1), extend("x-no-effect" = PYTHON))]
    pub gc_freq: usize,
    /// Look for reference cycles in Python's objects.
    #[schemars(extend("x-no-effect" = PYTHON))]
    pub gc_debug: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NanPolicy {
    Stop,
    Skip,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SpikePolicy {
    Off,
    Log,
    Skip,
}

/// A number type for training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    Bfloat16,
    Float32,
}

impl From<Dtype> for candle_core::DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bfloat16 => Self::BF16,
            Dtype::Float32 => Self::F32,
        }
    }
}

impl Default for Training {
    fn default() -> Self {
        Self {
            dataset: "c4_test".into(),
            dataset_path: None,
            local_batch_size: 8,
            global_batch_size: None,
            seq_len: 2048,
            max_norm: 1.0,
            steps: 10_000,
            nan_policy: NanPolicy::Stop,
            spike_policy: SpikePolicy::Off,
            spike_z_score: 6.0,
            spike_window: 100,
            max_skipped_steps: 10,
            enable_cpu_offload: false,
            dtype: Dtype::Float32,
            mixed_precision_param: Dtype::Bfloat16,
            mixed_precision_reduce: Dtype::Float32,
            gc_freq: 50,
            gc_debug: false,
        }
    }
}
