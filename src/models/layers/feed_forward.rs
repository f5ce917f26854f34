use std::sync::Arc;

use super::{STD, normal};
use crate::Result;
use crate::autograd::{Parameter, StageBuilder, Value};
use crate::ops;

/// SwiGLU feed-forward: `W₂ (silu(W₁ x) · W₃ x)`.
#[derive(Debug)]
pub struct FeedForward {
    w1: Arc<Parameter>,
    w2: Arc<Parameter>,
    w3: Arc<Parameter>,
}

impl FeedForward {
    pub fn new(stage: &mut StageBuilder, prefix: &str, dim: usize, hidden_dim: usize, out_std: f64) -> Self {
        let mut weight = |name, shape, std| stage.parameter(format!("{prefix}.{name}.weight"), shape, normal(std));
        Self {
            w1: weight("w1", &[hidden_dim, dim], STD),
            w2: weight("w2", &[dim, hidden_dim], out_std),
            w3: weight("w3", &[hidden_dim, dim], out_std),
        }
    }

    /// `(…, dim) -> (…, dim)`.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        ops::swiglu(&ops::linear(x, &self.w1)?, &ops::linear(x, &self.w3)?, &self.w2)
    }
}
