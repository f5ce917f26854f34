use std::sync::Arc;

use super::normal;
use crate::Result;
use crate::autograd::{Init, Parameter, StageBuilder, Value};
use crate::ops::{self, Residual};

/// A product with a weight matrix, and a bias if it has one.
#[derive(Debug)]
pub struct Linear {
    weight: Arc<Parameter>,
    bias: Option<Arc<Parameter>>,
}

impl Linear {
    /// `name`: the field path, as in `layers.0.attention.wq`. `shape`: `[out, in]`. `std`: of the initial weights.
    pub fn new(stage: &mut StageBuilder, name: String, shape: [usize; 2], std: f64, has_bias: bool) -> Self {
        let weight = stage.parameter(format!("{name}.weight"), &shape, normal(std));
        let bias = has_bias.then(|| stage.parameter(format!("{name}.bias"), &shape[..1], Init::Constant(0.0)));
        Self { weight, bias }
    }

    pub fn weight(&self) -> &Arc<Parameter> {
        &self.weight
    }

    /// The weight, if there is nothing else.
    pub fn plain(&self) -> Option<&Arc<Parameter>> {
        self.bias.is_none().then_some(&self.weight)
    }

    /// `(…, in) -> (…, out)`.
    pub fn forward(&self, x: &Value) -> Result<Value> {
        self.add_bias(ops::linear(x, &self.weight)?)
    }

    /// As [`Linear::forward`], added to `residual` if there is one.
    pub fn forward_onto(&self, residual: Option<Residual>, x: &Value) -> Result<Value> {
        match self.plain() {
            Some(weight) => ops::linear_onto(residual, x, weight),
            None => ops::add_onto(residual, self.forward(x)?),
        }
    }

    /// What is left to do after an op that has multiplied by the weight.
    pub fn add_bias(&self, product: Value) -> Result<Value> {
        match &self.bias {
            None => Ok(product),
            Some(bias) => ops::add_bias(&product, bias),
        }
    }
}
