use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::minus_one;

/// The loss on text that is not trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Validation {
    /// Validate during training. The same batches every time; training is not touched by it.
    pub enable: bool,
    /// As `training.dataset`.
    pub dataset: String,
    /// As `training.dataset_path`.
    pub dataset_path: Option<String>,
    /// Sequences that go through the model at once.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub local_batch_size: usize,
    /// Tokens per sequence.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub seq_len: usize,
    /// Training steps from one validation to the next.
    #[schemars(range(min = 1))]
    pub freq: usize,
    /// Batches of one validation. -1: the whole dataset, which is long for "c4_validation".
    #[serde(with = "minus_one")]
    #[schemars(with = "minus_one::OrAtLeastOne")]
    pub steps: Option<usize>,
}

impl Default for Validation {
    fn default() -> Self {
        Self {
            enable: false,
            dataset: "c4_validation".into(),
            dataset_path: None,
            local_batch_size: 8,
            seq_len: 2048,
            freq: 10,
            steps: None,
        }
    }
}
