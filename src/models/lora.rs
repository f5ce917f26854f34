//! Low-rank adapters: a model is trained by small additions to weights that stay as they are.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::autograd::{Adapter, Dropout, Init, Parameter, StageBuilder};
use crate::{Error, Result};

/// Fine-tune by low-rank adapters (LoRA): only they are trained and saved, and they merge into the weights on export.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// Rank of the adapters, such as 8 or 16. "none": no adapters, all weights are trained.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rank: Option<usize>,
    /// Adapters count `alpha / rank` times.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub alpha: f64,
    /// Which linear layers get one: "all-linear" (all in the blocks but routers), names such as "wq" or "w1", or patterns of
    /// full names such as "layers.1?.attention.*". The routed experts of a mixture keep their weights.
    pub targets: Vec<String>,
    /// Part of an adapter's inputs that is left out at random in each step.
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub dropout: f64,
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: None, alpha: 16.0, targets: vec!["all-linear".into()], dropout: 0.0 }
    }
}

/// The adapters of a model.
#[derive(Debug)]
pub struct Adapters {
    stages: Vec<StageBuilder>,
    dropout: Arc<Dropout>,
}

impl Adapters {
    /// Gives adapters of `rank` to the targets among the weights of `stages`, with `A` drawn from `U(-1/√in, 1/√in)` (He's
    /// initialisation as PyTorch has it for linear layers) and `B` zero, so that at first nothing changes.
    ///
    /// # Errors
    /// [`Error::Config`] if a target is no linear layer of the model.
    pub fn new(stages: &[StageBuilder], lora: &Lora, rank: usize, seed: u64) -> Result<Self> {
        let linear = |p: &&Arc<Parameter>| p.shape().len() == 2 && p.fqn().starts_with("layers.") && !is_of_experts(p);
        let weights = || stages.iter().flat_map(|stage| stage.parameters());
        let names: Vec<&str> = weights().filter(linear).map(|p| layer_name(p)).collect();
        for target in &lora.targets {
            if !names.iter().any(|name| is_named(target, name)) {
                let known: BTreeSet<&str> = names.iter().map(|name| last_part(name)).collect();
                let known: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
                let is_part = |p: &Parameter| p.fqn().split('.').any(|part| is_named(target, part));
                let names_experts = weights().any(|p| is_of_experts(p) && (is_part(p) || is_named(target, p.fqn())));
                let what = match names_experts {
                    true => "names weights of routed experts, which take no adapters",
                    false => "is no linear layer in this model's blocks",
                };
                return Err(Error::Config(format!(
                    "error: `model.lora.targets`: {target:?} {what}\n   = allowed: \"all-linear\", {}, or patterns of \
                     full names such as {:?}",
                    known.join(", "),
                    names.first().unwrap_or(&"layers.0.attention.wq")
                )));
            }
        }

        let dropout = Arc::new(Dropout::new(lora.dropout, seed));
        let adapters_of = |stage: &StageBuilder| {
            let mut adapters = StageBuilder::named(stage.name());
            for weight in stage.parameters().iter().filter(linear) {
                let name = layer_name(weight);
                if !lora.targets.iter().any(|target| is_named(target, name)) {
                    continue;
                }
                let [outer, inner] = [weight.shape()[0], weight.shape()[1]];
                let limit = (inner as f64).powf(-0.5);
                let a = adapters.parameter(format!("{name}.lora_a.weight"), &[rank, inner], Init::Uniform { limit });
                let b = adapters.parameter(format!("{name}.lora_b.weight"), &[outer, rank], Init::Constant(0.0));
                let scale = (lora.alpha / rank as f64) as f32;
                weight.set_adapter(Some(Arc::new(Adapter { a, b, scale, dropout: dropout.clone() })));
            }
            adapters
        };
        let stages = stages.iter().map(adapters_of).filter(|stage| stage.numel() > 0).collect();
        Ok(Self { stages, dropout })
    }

    /// The memory of the adapters, a stage for each of the model's that has some.
    pub fn stages(&self) -> &[StageBuilder] {
        &self.stages
    }

    pub fn dropout(&self) -> &Dropout {
        &self.dropout
    }
}

/// `W + scale · B A`, in f32.
pub fn merged(weight: &Parameter, adapter: &Adapter) -> Result<Tensor> {
    let f32 = |p: &Parameter| -> Result<Tensor> { Ok(p.weights()?.to_dtype(DType::F32)?) };
    let update = (f32(&adapter.b)?.matmul(&f32(&adapter.a)?)? * f64::from(adapter.scale))?;
    Ok((f32(weight)? + update)?)
}

/// The layer that a weight belongs to: `layers.0.attention.wq`.
fn layer_name(weight: &Parameter) -> &str {
    weight.fqn().trim_end_matches(".weight")
}

/// Whether it is a matrix, or a bias, of each routed expert of a layer.
fn is_of_experts(weight: &Parameter) -> bool {
    weight.fqn().contains(".moe.experts.")
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn is_named(target: &str, name: &str) -> bool {
    let is_like = |name| glob::Pattern::new(target).is_ok_and(|pattern| pattern.matches(name));
    match target {
        "all-linear" => !name.contains(".router."),
        _ => is_like(last_part(name)) || is_like(name),
    }
}
