use std::sync::Arc;

use super::{LayerCache, STD, normal};
use crate::Result;
use crate::autograd::{Init, Parameter, StageBuilder, Value};
use crate::models::args::DecoderArgs;
use crate::ops::{self, AttentionMask, RopeTable};

/// Grouped-query self-attention.
#[derive(Debug)]
pub struct GroupedAttention {
    wq: Arc<Parameter>,
    wk: Arc<Parameter>,
    wv: Arc<Parameter>,
    wo: Arc<Parameter>,
    /// Of each query head, and of each key head.
    qk_norm: Option<[Arc<Parameter>; 2]>,
    norm_eps: f64,
    head_dim: usize,
    scale: f32,
}

impl GroupedAttention {
    /// `scale`: the factor on scores. `out_std`: standard deviation of the weights that write to the residual stream.
    pub fn new(stage: &mut StageBuilder, prefix: &str, args: &DecoderArgs, scale: f64, out_std: f64) -> Self {
        let head_dim = args.head_dim();
        let (q, kv) = (args.n_heads * head_dim, args.n_kv_heads() * head_dim);
        let mut weight = |name, shape: &[usize], init| stage.parameter(format!("{prefix}.{name}.weight"), shape, init);
        Self {
            wq: weight("wq", &[q, args.dim], normal(STD)),
            wk: weight("wk", &[kv, args.dim], normal(STD)),
            wv: weight("wv", &[kv, args.dim], normal(STD)),
            wo: weight("wo", &[args.dim, q], normal(out_std)),
            qk_norm: args
                .qk_norm
                .then(|| ["q_norm", "k_norm"].map(|name| weight(name, &[head_dim], Init::Constant(1.0)))),
            norm_eps: args.norm_eps,
            head_dim,
            scale: scale as f32,
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
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            q = ops::rms_norm(&q, q_norm, self.norm_eps)?;
            k = ops::rms_norm(&k, k_norm, self.norm_eps)?;
        }
        if let Some(rope) = rope {
            q = ops::rope(&q, rope)?;
            k = ops::rope(&k, rope)?;
        }
        if let Some(cache) = cache {
            [k, v] = cache.extend([&k, &v])?;
        }
        let y = ops::attention(&q, &k, &v, mask, self.scale)?;
        let (b, s, h, hd) = y.tensor().dims4()?;
        ops::linear(&y.reshape(&[b, s, h * hd])?, &self.wo)
    }

    /// `(b, s, h * hd) -> (b, s, h, hd)`.
    fn split_heads(&self, x: Value) -> Result<Value> {
        let (b, s, width) = x.tensor().dims3()?;
        x.reshape(&[b, s, width / self.head_dim, self.head_dim])
    }
}
