use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::FAULT_TOLERANCE;

/// Training that goes on while some of its replicas are down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FaultTolerance {
    /// Let replicas leave and join during the run.
    #[schemars(extend("x-not-yet" = "titan does not train with replicas yet"))]
    pub enable: bool,
    /// Library for messages between replicas: "gloo" or "nccl".
    #[schemars(extend("x-no-effect" = FAULT_TOLERANCE))]
    pub process_group: String,
    /// Milliseconds that a message between replicas may take.
    #[schemars(extend("x-no-effect" = FAULT_TOLERANCE))]
    pub process_group_timeout_ms: usize,
    /// Number of this replica, from 0.
    #[schemars(extend("x-no-effect" = FAULT_TOLERANCE))]
    pub replica_id: usize,
    /// Number of replicas.
    #[schemars(extend("x-no-effect" = FAULT_TOLERANCE))]
    pub group_size: usize,
    /// Replicas that must be up for a step.
    #[schemars(extend("x-no-effect" = FAULT_TOLERANCE))]
    pub min_replica_size: usize,
    /// Synchronise replicas only now and then: "local_sgd" or "diloco". "none": at every step.
    #[schemars(extend("x-not-yet" = "titan does not train with replicas yet"))]
    pub semi_sync_method: Option<String>,
}

impl Default for FaultTolerance {
    fn default() -> Self {
        Self {
            enable: false,
            process_group: "gloo".into(),
            process_group_timeout_ms: 10_000,
            replica_id: 0,
            group_size: 0,
            min_replica_size: 1,
            semi_sync_method: None,
        }
    }
}
