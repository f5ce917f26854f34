use std::sync::Arc;

use crate::Result;
use crate::autograd::{Init, Parameter, StageBuilder, Value};
use crate::models::args::{DecoderArgs, NormType};
use crate::ops;

/// A norm over the last dimension.
#[derive(Debug)]
pub struct Norm {
    weight: Arc<Parameter>,
    /// That of LayerNorm; `None`: RMSNorm.
    bias: Option<Arc<Parameter>>,
    /// What is added to RMSNorm's weight.
    offset: f32,
    eps: f64,
}

impl Norm {
    /// Of the residual stream. `name`: the field path, as in `layers.0.attention_norm`.
    pub fn new(stage: &mut StageBuilder, name: &str, args: &DecoderArgs) -> Self {
        match args.norm_type {
            NormType::RmsNorm => Self::rms(stage, name, args.dim, args),
            NormType::LayerNorm => Self {
                weight: stage.parameter(format!("{name}.weight"), &[args.dim], Init::Constant(1.0)),
                bias: Some(stage.parameter(format!("{name}.bias"), &[args.dim], Init::Constant(0.0))),
                offset: 0.0,
                eps: args.norm_eps,
            },
        }
    }

    /// RMSNorm over `dim` numbers, whatever the norms of the residual stream are.
    pub fn rms(stage: &mut StageBuilder, name: &str, dim: usize, args: &DecoderArgs) -> Self {
        let offset = if args.zero_centered_norms { 1.0 } else { 0.0 };
        let weight = stage.parameter(format!("{name}.weight"), &[dim], Init::Constant(1.0 - offset));
        Self { weight, bias: None, offset: offset as f32, eps: args.norm_eps }
    }

    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    pub fn forward(&self, x: &Value) -> Result<Value> {
        match &self.bias {
            None => ops::rms_norm(x, &self.weight, self.offset, self.eps),
            Some(bias) => ops::layer_norm(x, &self.weight, bias, self.eps),
        }
    }
}
