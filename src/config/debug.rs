use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::TORCH;

/// Repeatable runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Debug {
    /// Seed of the initial weights and of the order of the data: the same seed gives the same run on the CPU, whatever
    /// the number of threads. "none": another one each time, logged at start.
    pub seed: Option<u64>,
    /// Only operations whose result never varies. On the CPU all of them are.
    pub deterministic: bool,
    /// Warn about PyTorch operations that vary, instead of stopping.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub deterministic_warn_only: bool,
    /// Send tokens to experts round robin, whatever the router says, so that speed does not depend on it.
    pub moe_force_load_balance: bool,
}
