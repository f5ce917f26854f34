use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::minus_one;
use super::schema::ONE_DEVICE;

/// How a run is spread over devices. A degree is a number of devices; 1 means "not split this way".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Parallelism {
    /// Copies of the model that see different batches.
    #[schemars(range(min = 1), extend("x-not-yet" = "titan trains on one device so far, without data parallelism"))]
    pub data_parallel_replicate_degree: usize,
    /// Devices that share one copy of the weights, each seeing different batches (FSDP). -1: all that are left.
    #[serde(with = "minus_one")]
    #[schemars(with = "minus_one::OrAtLeastOne")]
    pub data_parallel_shard_degree: Option<usize>,
    /// Whether a layer's gathered weights are let go after its forward pass.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub fsdp_reshard_after_forward: ReshardAfterForward,
    /// Devices that split every matrix product.
    #[schemars(range(min = 1), extend("x-not-yet" = "titan trains on one device so far, without tensor parallelism"))]
    pub tensor_parallel_degree: usize,
    /// Gather the logits of all devices before the loss.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub disable_loss_parallel: bool,
    /// Overlap tensor parallelism's messages with its products.
    #[schemars(extend("x-not-yet" = "titan trains on one device so far, without tensor parallelism"))]
    pub enable_async_tensor_parallel: bool,
    /// Devices that each hold some of the layers.
    #[schemars(range(min = 1), extend("x-not-yet" = "titan trains on one device so far, without pipeline parallelism"))]
    pub pipeline_parallel_degree: usize,
    /// The modules of each pipeline part, by name. "none": cut evenly.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub module_fqns_per_model_part: Option<Vec<Vec<String>>>,
    /// Layers that the first pipeline part has less, for the embedding's sake.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub pipeline_parallel_first_stage_less_layers: usize,
    /// Layers that the last pipeline part has less, for the head's sake.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub pipeline_parallel_last_stage_less_layers: usize,
    /// Layers of one pipeline part. "none": as the schedule wants.
    #[schemars(range(min = 1), extend("x-no-effect" = ONE_DEVICE))]
    pub pipeline_parallel_layers_per_stage: Option<usize>,
    /// Order in which microbatches pass through the pipeline, such as "1F1B" or "Interleaved1F1B".
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub pipeline_parallel_schedule: String,
    /// A file with an order of one's own.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub pipeline_parallel_schedule_csv: Option<String>,
    /// Sequences of one pipeline microbatch.
    #[schemars(range(min = 1), extend("x-no-effect" = ONE_DEVICE))]
    pub pipeline_parallel_microbatch_size: usize,
    /// Devices that split every sequence.
    #[schemars(range(min = 1), extend("x-not-yet" = "titan trains on one device so far, without context parallelism"))]
    pub context_parallel_degree: usize,
    /// How keys and values travel under context parallelism.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub context_parallel_rotate_method: RotateMethod,
    /// Devices that split the experts.
    #[schemars(range(min = 1), extend("x-not-yet" = "titan trains on one device so far, without expert parallelism"))]
    pub expert_parallel_degree: usize,
    /// Devices that split the matrix products of each expert.
    #[schemars(range(min = 1), extend("x-not-yet" = "titan trains on one device so far, without expert parallelism"))]
    pub expert_tensor_parallel_degree: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReshardAfterForward {
    Default,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RotateMethod {
    Allgather,
    Alltoall,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self {
            data_parallel_replicate_degree: 1,
            data_parallel_shard_degree: None,
            fsdp_reshard_after_forward: ReshardAfterForward::Default,
            tensor_parallel_degree: 1,
            disable_loss_parallel: false,
            enable_async_tensor_parallel: false,
            pipeline_parallel_degree: 1,
            module_fqns_per_model_part: None,
            pipeline_parallel_first_stage_less_layers: 1,
            pipeline_parallel_last_stage_less_layers: 1,
            pipeline_parallel_layers_per_stage: None,
            pipeline_parallel_schedule: "1F1B".into(),
            pipeline_parallel_schedule_csv: Some(String::new()),
            pipeline_parallel_microbatch_size: 1,
            context_parallel_degree: 1,
            context_parallel_rotate_method: RotateMethod::Allgather,
            expert_parallel_degree: 1,
            expert_tensor_parallel_degree: 1,
        }
    }
}
