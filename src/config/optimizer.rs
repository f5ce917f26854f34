use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::TORCH;

/// How gradients become steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// "AdamW" decays weights directly; "Adam" adds the decay to the gradient.
    pub name: OptimizerName,
    /// Learning rate at the top of the schedule that `[lr_scheduler]` describes.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// How slowly the running mean of gradients forgets: it looks back about `1 / (1 - beta1)` steps.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub beta1: f64,
    /// How slowly the running mean of squared gradients forgets.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub beta2: f64,
    /// Added to the root of the mean squared gradient before dividing by it.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub eps: f64,
    /// How strongly weights are pulled to zero: AdamW takes `lr * weight_decay` of each per step. All parameters decay,
    /// norms and embeddings too.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// How PyTorch runs the update. titan always makes one pass over flat buffers.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub implementation: Implementation,
    /// Update each parameter as soon as its gradient is known.
    #[schemars(extend("x-not-yet" = "titan does not step the optimizer during backward yet"))]
    pub early_step_in_backward: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OptimizerName {
    Adam,
    AdamW,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Implementation {
    ForLoop,
    Foreach,
    Fused,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            name: OptimizerName::AdamW,
            lr: 8e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            implementation: Implementation::Fused,
            early_step_in_backward: false,
        }
    }
}
