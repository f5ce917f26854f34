use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How training text is read: titan's own keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// Read documents in an order that `debug.seed` decides, another one each time through the data, instead of as they
    /// lie in the files.
    pub shuffle: bool,
    /// Field or column that holds the text, in JSON and Parquet files.
    pub text_field: String,
    /// Field or column of `dataset = "chat"` that holds the messages, each with `role` and `content`.
    pub messages_field: String,
    /// Field or column of `dataset = "instruct"` that holds what is given.
    pub prompt_field: String,
    /// Field or column of `dataset = "instruct"` that holds what is learned.
    pub completion_field: String,
    /// Malformed records that are skipped and counted before the run stops. 0: the first one stops it.
    pub max_bad_records: usize,
    /// Threads that tokenize ahead of training. "none": as many as the machine allows.
    #[schemars(range(min = 1, max = 1000))]
    pub num_workers: Option<usize>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            shuffle: false,
            text_field: "text".into(),
            messages_field: "messages".into(),
            prompt_field: "prompt".into(),
            completion_field: "completion".into(),
            max_bad_records: 0,
            num_workers: None,
        }
    }
}
