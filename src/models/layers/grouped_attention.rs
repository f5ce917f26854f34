use super::{LayerCache, Linear, Norm, Positions, STD};
use crate::Result;
use crate::autograd::{StageBuilder, Value};
use crate::models::args::{DecoderArgs, QkNormOver};
use crate::ops::{self, Residual, Scores};

/// Grouped-query self-attention.
#[derive(Debug)]
pub struct GroupedAttention {
    wq: Linear,
    wk: Linear,
    wv: Linear,
    wo: Linear,
    qk_norm: Option<QkNorm>,
    /// Epsilon of the norm of queries and keys that have rotated, if there is one.
    unit_norm_eps: Option<f64>,
    head_dim: usize,
    scores: Scores,
}

#[derive(Debug)]
struct QkNorm {
    q: Norm,
    k: Norm,
    over: QkNormOver,
}

impl GroupedAttention {
    /// `out_std`: standard deviation of the weights that write to the residual stream.
    pub fn new(stage: &mut StageBuilder, prefix: &str, args: &DecoderArgs, scores: Scores, out_std: f64) -> Self {
        let head_dim = args.head_dim();
        let (q, kv) = (args.n_heads * head_dim, args.n_kv_heads() * head_dim);
        let mut linear = |name, shape, std, bias| Linear::new(stage, format!("{prefix}.{name}"), shape, std, bias);
        let (wq, wk, wv) = (
            linear("wq", [q, args.dim], STD, args.attention_bias),
            linear("wk", [kv, args.dim], STD, args.attention_bias),
            linear("wv", [kv, args.dim], STD, args.attention_bias),
        );
        let wo = linear("wo", [args.dim, q], out_std, args.attention_out_bias);
        let over = args.qk_norm_over;
        let mut norm = |name, projection| {
            let dim = if over == QkNormOver::Head { head_dim } else { projection };
            Norm::rms(stage, &format!("{prefix}.{name}"), dim, args)
        };
        let qk_norm = args.qk_norm.then(|| QkNorm { q: norm("q_norm", q), k: norm("k_norm", kv), over });
        let unit_norm_eps = args.qk_unit_norm.then_some(args.norm_eps);
        Self { wq, wk, wv, wo, qk_norm, unit_norm_eps, head_dim, scores }
    }

    /// `(b, s, dim) -> (b, s, dim)`, added to `residual` if there is one. With a `cache`, the keys and values before `x` are
    /// taken from it, and those of `x` added to it.
    pub fn forward(
        &self,
        residual: Option<Residual>,
        x: &Value,
        positions: &Positions,
        cache: Option<&mut LayerCache>,
    ) -> Result<Value> {
        let y = self.attend(x, positions, cache)?;
        let (b, s, h, hd) = y.tensor().dims4()?;
        self.wo.forward_onto(residual, &y.reshape(&[b, s, h * hd])?)
    }

    /// `(b, s, dim) -> (b, s, h, hd)`.
    fn attend(&self, x: &Value, positions: &Positions, cache: Option<&mut LayerCache>) -> Result<Value> {
        let Positions { rope, mask, query_scales } = *positions;
        let norms = self.qk_norm.is_some() || self.unit_norm_eps.is_some();
        let weights = [&self.wq, &self.wk, &self.wv].map(Linear::plain);
        if let ([Some(wq), Some(wk), Some(wv)], false, None, None) = (weights, norms, query_scales, &cache) {
            return ops::projected_attention(x, [wq, wk, wv], self.head_dim, rope, mask, &self.scores);
        }
        let mut q = self.normed_heads(self.wq.forward(x)?, |norm| &norm.q)?; // (b, s, h, hd)
        let mut k = self.normed_heads(self.wk.forward(x)?, |norm| &norm.k)?; // (b, s, kv, hd)
        let mut v = self.split_heads(self.wv.forward(x)?)?;
        if let Some(rope) = rope {
            q = ops::rope(&q, rope)?;
            k = ops::rope(&k, rope)?;
            if let Some(eps) = self.unit_norm_eps {
                q = ops::unit_norm(&q, eps)?;
                k = ops::unit_norm(&k, eps)?;
            }
        }
        q = positions.scale_queries(q)?;
        if let Some(cache) = cache {
            [k, v] = cache.extend([&k, &v])?;
        }
        ops::attention(&q, &k, &v, mask, &self.scores)
    }

    fn normed_heads(&self, x: Value, norm: impl Fn(&QkNorm) -> &Norm) -> Result<Value> {
        match &self.qk_norm {
            None => self.split_heads(x),
            Some(both) if both.over == QkNormOver::Head => norm(both).forward(&self.split_heads(x)?),
            Some(both) => self.split_heads(norm(both).forward(&x)?),
        }
    }

    /// `(b, s, h * hd) -> (b, s, h, hd)`.
    fn split_heads(&self, x: Value) -> Result<Value> {
        let (b, s, width) = x.tensor().dims3()?;
        x.reshape(&[b, s, width / self.head_dim, self.head_dim])
    }
}
