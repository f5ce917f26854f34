use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::{MEMORY_BUDGET, TORCH};

/// Memory for time: activations that are computed again in backward instead of being kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ActivationCheckpoint {
    /// "none" keeps everything, "full" keeps only the input of each layer, "selective" is between them.
    pub mode: AcMode,
    /// What "selective" recomputes: "op", the cheap operations of every layer; or a number n, every n-th layer in full.
    pub selective_ac_option: String,
    /// Matrix products that "op" recomputes although they are expensive. titan recomputes none.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub per_op_sac_force_recompute_mm_shapes_by_fqns: Vec<String>,
    /// Stop recomputing a layer once everything that backward needs is there.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub early_stop: bool,
    /// Share of the activations that the mode "memory_budget" keeps.
    #[schemars(range(min = 0, max = 1), extend("x-no-effect" = MEMORY_BUDGET))]
    pub memory_budget: f64,
    /// Draw what each memory budget would cost.
    #[schemars(extend("x-no-effect" = MEMORY_BUDGET))]
    pub visualize_memory_budget_pareto: bool,
    /// Recompute with the random numbers of the first time. titan's layers draw none.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub preserve_rng_state: bool,
    /// How PyTorch compares recomputed tensors with the first ones. titan's are equal bit for bit.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub determinism_check: String,
    /// Log PyTorch's operations while recomputing.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub debug: bool,
}

/// How much of a layer's activations backward computes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AcMode {
    Selective,
    Full,
    MemoryBudget,
    None,
}

impl ActivationCheckpoint {
    /// `Some(n)`: "selective" recomputes every n-th layer in full. `None`: it goes by operation.
    pub fn selective_every(&self) -> Option<usize> {
        self.selective_ac_option.parse().ok()
    }
}

impl Default for ActivationCheckpoint {
    fn default() -> Self {
        Self {
            mode: AcMode::Selective,
            selective_ac_option: "2".into(),
            per_op_sac_force_recompute_mm_shapes_by_fqns: vec!["moe.router.gate".into()],
            early_stop: false,
            memory_budget: 0.5,
            visualize_memory_budget_pareto: false,
            preserve_rng_state: false,
            determinism_check: "default".into(),
            debug: false,
        }
    }
}
