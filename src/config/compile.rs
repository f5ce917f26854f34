use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::TORCH;

/// `torch.compile`. titan's operations are compiled already; what is left to gain on a GPU is their launches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Compile {
    /// On a GPU, record a step once and repeat it as a CUDA graph, which small models gain most from. Nothing on a CPU.
    pub enable: bool,
    /// What to compile: "model", "loss".
    #[schemars(extend("x-no-effect" = TORCH))]
    pub components: Vec<Component>,
    /// The compiler.
    #[schemars(extend("x-no-effect" = TORCH))]
    pub backend: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Component {
    Model,
    Loss,
}

impl Default for Compile {
    fn default() -> Self {
        Self { enable: false, components: vec![Component::Model, Component::Loss], backend: "inductor".into() }
    }
}
