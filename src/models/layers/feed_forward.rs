use super::{Linear, STD};
use crate::Result;
use crate::autograd::{StageBuilder, Value};
use crate::models::args::FeedForwardKind;
use crate::ops::{self, Gate};

/// A dense feed-forward: `W₂ (act(W₁ x) · W₃ x)`, or `W₂ max(W₁ x, 0)²`.
#[derive(Debug)]
pub struct FeedForward {
    w1: Linear,
    w2: Linear,
    /// `None`: the gate multiplies itself.
    w3: Option<Linear>,
    gate: Gate,
}

impl FeedForward {
    /// `kind`: any but a mixture of experts.
    pub fn new(
        stage: &mut StageBuilder,
        prefix: &str,
        kind: FeedForwardKind,
        [dim, hidden_dim]: [usize; 2],
        has_bias: bool,
        out_std: f64,
    ) -> Self {
        let gate = match kind {
            FeedForwardKind::Swiglu | FeedForwardKind::Moe => Gate::Silu,
            FeedForwardKind::Geglu => Gate::GeluTanh,
            FeedForwardKind::ReluSquared => Gate::Relu,
        };
        let mut linear = |name, shape, std| Linear::new(stage, format!("{prefix}.{name}"), shape, std, has_bias);
        Self {
            w1: linear("w1", [hidden_dim, dim], STD),
            w2: linear("w2", [dim, hidden_dim], out_std),
            w3: (gate != Gate::Relu).then(|| linear("w3", [hidden_dim, dim], out_std)),
            gate,
        }
    }

    /// `(…, dim) -> (…, dim)`.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        let gate = self.w1.forward(x)?;
        let y = match &self.w3 {
            Some(w3) => ops::glu(&gate, &w3.forward(x)?, self.w2.weight(), self.gate)?,
            None => ops::glu(&gate, &gate, self.w2.weight(), self.gate)?,
        };
        self.w2.add_bias(y)
    }
}
