//! Weights with their adapters added, made as they are read.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Tensor};

use super::weights::{Fitted, Parameters, Weights};
use crate::Result;
use crate::models::Decoder;

/// The weights of a model that was adapted, with what its adapters add to them.
pub struct Merged<'a> {
    base: Fitted<'a>,
    /// `A`, `B` and the scale of their product, by the name of the weight that they are for.
    adapters: HashMap<String, (Tensor, Tensor, f64)>,
}

impl<'a> Merged<'a> {
    /// `model` says which weights have adapters, and needs no memory for either. Adapters are read now, the weights of `base`
    /// when they are asked for.
    pub fn new(model: &Decoder, base: &'a Weights, adapters: &Weights) -> Result<Self> {
        let mut read = HashMap::new();
        adapters.load(&model.state_shapes(), |name, tensor| {
            read.insert(name.to_owned(), tensor.to_dtype(DType::F32)?);
            Ok(())
        })?;
        let adapted = model.parameters().filter_map(|weight| Some((weight.fqn().to_owned(), weight.adapter()?)));
        let adapters = adapted.map(|(name, it)| {
            let (a, b) = (read[it.a.fqn()].clone(), read[it.b.fqn()].clone());
            (name, (a, b, f64::from(it.scale)))
        });
        Ok(Self { base: base.fit(&model.base_shapes())?, adapters: adapters.collect() })
    }
}

impl Parameters for Merged<'_> {
    fn dtype(&self, name: &str) -> DType {
        self.base.dtype(name)
    }

    fn rows_together(&self, name: &str) -> usize {
        self.base.rows_together(name)
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let weight = self.base.rows(name, rows.clone())?;
        let Some((a, b, scale)) = self.adapters.get(name) else { return Ok(weight) };
        let update = (b.narrow(0, rows.start, rows.len())?.matmul(a)? * *scale)?;
        Ok((weight.to_dtype(DType::F32)? + update)?)
    }
}
