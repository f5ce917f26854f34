use std::sync::Arc;

use candle_core::Tensor;

use super::{STD, normal};
use crate::Result;
use crate::autograd::{Parameter, StageBuilder, Value};
use crate::models::args::DecoderArgs;
use crate::ops::{self, AttentionMask, RopeTable};

/// Grouped-query self-attention.
#[derive(Debug)]
pub struct Attention {
    wq: Arc<Parameter>,
    wk: Arc<Parameter>,
    wv: Arc<Parameter>,
    wo: Arc<Parameter>,
    head_dim: usize,
}

impl Attention {
    /// `out_std`: standard deviation of the weights that write to the residual stream.
    pub fn new(stage: &mut StageBuilder, prefix: &str, args: &DecoderArgs, out_std: f64) -> Self {
        let head_dim = args.head_dim();
        let (q, kv) = (args.n_heads * head_dim, args.n_kv_heads() * head_dim);
        let mut weight = |name, shape, std| stage.parameter(format!("{prefix}.{name}.weight"), shape, normal(std));
        Self {
            wq: weight("wq", &[q, args.dim], STD),
            wk: weight("wk", &[kv, args.dim], STD),
            wv: weight("wv", &[kv, args.dim], STD),
            wo: weight("wo", &[args.dim, q], out_std),
            head_dim,
        }
    }

    /// `(b, s, dim) -> (b, s, dim)`. `rope` holds the angles of the `s` positions, `None` in a layer without rotary
    /// positions. With a `cache`, the keys and values before `x` are taken from it, and those of `x` added to it.
    pub fn forward(
        &self,
        x: &Value,
        rope: Option<&RopeTable>,
        mask: &AttentionMask,
        cache: Option<&mut LayerCache>,
    ) -> Result<Value> {
        let mut q = self.split_heads(ops::linear(x, &self.wq)?)?; // (b, s, h, hd)
        let mut k = self.split_heads(ops::linear(x, &self.wk)?)?; // (b, s, kv, hd)
        let mut v = self.split_heads(ops::linear(x, &self.wv)?)?;
        if let Some(rope) = rope {
            q = ops::rope(&q, rope)?;
            k = ops::rope(&k, rope)?;
        }
        if let Some(cache) = cache {
            (k, v) = cache.extend(&k, &v)?;
        }
        let y = ops::attention(&q, &k, &v, mask, (self.head_dim as f32).powf(-0.5))?;
        let (b, s, h, hd) = y.tensor().dims4()?;
        ops::linear(&y.reshape(&[b, s, h * hd])?, &self.wo)
    }

    /// `(b, s, h * hd) -> (b, s, h, hd)`.
    fn split_heads(&self, x: Value) -> Result<Value> {
        let (b, s, width) = x.tensor().dims3()?;
        x.reshape(&[b, s, width / self.head_dim, self.head_dim])
    }
}

/// The keys and values of one layer for the tokens so far.
#[derive(Debug, Default)]
pub struct LayerCache {
    /// `(b, capacity, kv, hd)` each, filled up to `len`; grown by doubling. Of a single sequence, what is held is
    /// contiguous, and attention reads it where it lies.
    buffers: Option<(Tensor, Tensor)>,
    len: usize,
}

impl LayerCache {
    /// Appends `k` and `v`, `(b, s, kv, hd)`, and returns all that is held.
    fn extend(&mut self, k: &Value, v: &Value) -> Result<(Value, Value)> {
        let (k, v) = (k.tensor(), v.tensor());
        let needed = self.len + k.dim(1)?;
        let grown = |old: Option<&Tensor>, new: &Tensor| -> Result<Tensor> {
            let (b, _, kv, hd) = new.dims4()?;
            let buffer = Tensor::zeros((b, needed.next_power_of_two(), kv, hd), new.dtype(), new.device())?;
            if let Some(old) = old {
                buffer.slice_set(&old.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
            }
            Ok(buffer)
        };
        let (keys, values) = match self.buffers.take() {
            Some((keys, values)) if keys.dim(1)? >= needed => (keys, values),
            Some((keys, values)) => (grown(Some(&keys), k)?, grown(Some(&values), v)?),
            None => (grown(None, k)?, grown(None, v)?),
        };
        keys.slice_set(&k.contiguous()?, 1, self.len)?;
        values.slice_set(&v.contiguous()?, 1, self.len)?;
        self.len = needed;
        let held = (Value::constant(keys.narrow(1, 0, needed)?), Value::constant(values.narrow(1, 0, needed)?));
        self.buffers = Some((keys, values));
        Ok(held)
    }
}
