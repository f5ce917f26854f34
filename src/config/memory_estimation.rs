use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::TORCH;

/// What memory a run would need, without running it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryEstimation {
    /// Print the estimate and stop.
    #[schemars(extend("x-not-yet" = "titan does not estimate memory yet"))]
    pub enable: bool,
    /// Estimate with real instead of fake tensors.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub disable_fake_mode: bool,
}
