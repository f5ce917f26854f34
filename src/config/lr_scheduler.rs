use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::components::lr_scheduler::DecayType;

/// The learning rate over the run: a rise, a plateau, a fall.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LrScheduler {
    /// Steps in which the rate rises linearly to `optimizer.lr`; the first step already has `1 / warmup_steps` of it.
    /// More than `training.steps` counts as `training.steps`.
    pub warmup_steps: usize,
    /// Share of `training.steps` in which the rate falls, at the end of the run; between warmup and fall it stays at the
    /// top. "none": it falls from the end of warmup on. 0: it never falls.
    #[schemars(range(min = 0, max = 1))]
    pub decay_ratio: Option<f64>,
    /// Shape of the fall: "linear", "sqrt" (1 - sqrt(progress): steep first, then flat) or "cosine" (half a wave).
    pub decay_type: DecayType,
    /// Where the fall ends, as a share of `optimizer.lr`.
    #[schemars(range(min = 0, max = 1))]
    pub min_lr_factor: f64,
}

impl Default for LrScheduler {
    fn default() -> Self {
        Self { warmup_steps: 200, decay_ratio: None, decay_type: DecayType::Linear, min_lr_factor: 0.0 }
    }
}
