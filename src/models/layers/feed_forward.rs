use super::{Linear, STD};
use crate::Result;
use crate::autograd::{StageBuilder, Value};
use crate::models::args::FeedForwardKind;
use crate::ops::{self, Gate, Residual};

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
            // One behind the other, so that one product can make both.
            w1: linear("w1", [hidden_dim, dim], STD),
            w3: (gate != Gate::Relu).then(|| linear("w3", [hidden_dim, dim], out_std)),
            w2: linear("w2", [dim, hidden_dim], out_std),
            gate,
        }
    }

    /// `(…, dim) -> (…, dim)`, added to `residual` if there is one.
    pub fn forward(&self, residual: Option<Residual>, x: &Value) -> Result<Value> {
        let w3 = self.w3.as_ref();
        if let (Some(w1), Some(w2), Some(w3)) = (self.w1.plain(), self.w2.plain(), w3.and_then(Linear::plain)) {
            return ops::feed_forward(x, [w1, w2, w3], self.gate, residual);
        }
        let gate = self.w1.forward(x)?;
        let up = w3.map_or_else(|| Ok(gate.clone()), |w3| w3.forward(x))?;
        let y = ops::glu(&gate, &up, self.w2.weight(), self.gate, None)?;
        ops::add_onto(residual, self.w2.add_bias(y)?)
    }
}
