use std::sync::Arc;

use candle_core::{D, Tensor};

use super::{LayerCache, Norm, Positions, STD, normal};
use crate::Result;
use crate::autograd::{Parameter, StageBuilder, Value};
use crate::models::args::DecoderArgs;
use crate::ops::{self, AttentionMask, Residual, Scores};

/// Multi-head latent attention: the keys and values of all heads are made from one latent per token. Only a part of each
/// query head rotates, against one rotary key that all heads share.
///
/// # Source
/// DeepSeek-V2, arXiv:2405.04434, section 2.1.
#[derive(Debug)]
pub struct LatentAttention {
    query: Query,
    /// To the latent, and the rotary key behind it.
    wkv_a: Arc<Parameter>,
    kv_norm: Norm,
    /// From the latent to the key and the value of each head.
    wkv_b: Arc<Parameter>,
    wo: Arc<Parameter>,
    n_heads: usize,
    latent_dim: usize,
    /// Widths of a head: of the part of a key that does not rotate, of the part that does, of a value.
    nope_dim: usize,
    rope_dim: usize,
    v_dim: usize,
    scores: Scores,
}

/// Queries are made from the residual stream, or from a latent of their own.
#[derive(Debug)]
enum Query {
    Direct { wq: Arc<Parameter> },
    Latent { wq_a: Arc<Parameter>, q_norm: Norm, wq_b: Arc<Parameter> },
}

impl LatentAttention {
    /// `latent_dim`: `kv_lora_rank`. The rest as for [`super::GroupedAttention::new`].
    pub fn new(
        stage: &mut StageBuilder,
        prefix: &str,
        args: &DecoderArgs,
        latent_dim: usize,
        scores: Scores,
        out_std: f64,
    ) -> Self {
        let DecoderArgs { dim, n_heads, q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } = *args;
        let weight = |stage: &mut StageBuilder, name, shape: [usize; 2], std| {
            stage.parameter(format!("{prefix}.{name}.weight"), &shape, normal(std))
        };
        let norm = |stage: &mut StageBuilder, name, dim| Norm::rms(stage, &format!("{prefix}.{name}"), dim, args);
        let q = n_heads * (qk_nope_head_dim + qk_rope_head_dim);
        let query = match q_lora_rank {
            0 => Query::Direct { wq: weight(stage, "wq", [q, dim], STD) },
            rank => Query::Latent {
                wq_a: weight(stage, "wq_a", [rank, dim], STD),
                q_norm: norm(stage, "q_norm", rank),
                wq_b: weight(stage, "wq_b", [q, rank], STD),
            },
        };
        let kv = n_heads * (qk_nope_head_dim + v_head_dim);
        Self {
            query,
            wkv_a: weight(stage, "wkv_a", [latent_dim + qk_rope_head_dim, dim], STD),
            kv_norm: norm(stage, "kv_norm", latent_dim),
            wkv_b: weight(stage, "wkv_b", [kv, latent_dim], STD),
            wo: weight(stage, "wo", [dim, n_heads * v_head_dim], out_std),
            n_heads,
            latent_dim,
            nope_dim: qk_nope_head_dim,
            rope_dim: qk_rope_head_dim,
            v_dim: v_head_dim,
            scores,
        }
    }

    /// `(b, s, dim) -> (b, s, dim)`, added to `residual` if there is one. With a `cache`, the latents and rotary keys before `x`
    /// are taken from it, and those of `x` added to it.
    pub fn forward(
        &self,
        residual: Option<Residual>,
        x: &Value,
        positions: &Positions,
        cache: Option<&mut LayerCache>,
    ) -> Result<Value> {
        let (b, s, _) = x.tensor().dims3()?;
        let mut q = self.queries(x)?.reshape(&[b, s, self.n_heads, self.nope_dim + self.rope_dim])?;
        let kv = ops::linear(x, &self.wkv_a)?; // (b, s, latent + rope)
        let latent = self.kv_norm.forward(&ops::narrow(&kv, 0, self.latent_dim)?)?;
        let mut k_rope = ops::narrow(&kv, self.latent_dim, self.rope_dim)?.reshape(&[b, s, 1, self.rope_dim])?;
        if let Some(rope) = positions.rope {
            q = ops::rope(&q, rope)?; // the last numbers of each head
            k_rope = ops::rope(&k_rope, rope)?;
        }
        q = positions.scale_queries(q)?;
        let y = match cache {
            None => self.attend(&q, &latent, &k_rope, positions.mask)?,
            Some(cache) => {
                let latent = latent.reshape(&[b, s, 1, self.latent_dim])?;
                let [latents] = cache.extend([&ops::join_shared(&latent, &k_rope)?])?;
                Value::constant(self.attend_to_latents(q.tensor(), &latents, positions.mask)?)
            }
        };
        ops::linear_onto(residual, &y.reshape(&[b, s, self.n_heads * self.v_dim])?, &self.wo)
    }

    /// `(b, s, dim) -> (b, s, h * (nope + rope))`.
    fn queries(&self, x: &Value) -> Result<Value> {
        match &self.query {
            Query::Direct { wq } => ops::linear(x, wq),
            Query::Latent { wq_a, q_norm, wq_b } => ops::linear(&q_norm.forward(&ops::linear(x, wq_a)?)?, wq_b),
        }
    }

    /// Makes keys and values of the latents. Returns `(b, s, h, v)`.
    fn attend(&self, q: &Value, latent: &Value, k_rope: &Value, mask: &AttentionMask) -> Result<Value> {
        let (b, s, h, _) = q.tensor().dims4()?;
        let kv = ops::linear(latent, &self.wkv_b)?.reshape(&[b, s, h, self.nope_dim + self.v_dim])?;
        let k = ops::join_shared(&ops::narrow(&kv, 0, self.nope_dim)?, k_rope)?;
        let v = ops::narrow(&kv, self.nope_dim, self.v_dim)?;
        ops::attention(q, &k, &v, mask, &self.scores)
    }

    /// The same without making keys or values: queries go to where the latents are, and results come back from there.
    /// One key/value head, that of the latents, is shared by all query heads.
    ///
    /// # Shapes
    /// `q`: `(b, s, h, nope + rope)`. `latents`: `(b, len, 1, latent + rope)`. Returns `(b, s, h, v)`.
    fn attend_to_latents(&self, q: &Tensor, latents: &Value, mask: &AttentionMask) -> Result<Tensor> {
        let (nope, rope) = (q.narrow(D::Minus1, 0, self.nope_dim)?, q.narrow(D::Minus1, self.nope_dim, self.rope_dim)?);
        let nope = ops::by_head(&nope, &self.wkv_b, 0..self.nope_dim, true)?; // (b, s, h, latent)
        let q = Value::constant(Tensor::cat(&[nope, rope], D::Minus1)?);
        let y = ops::attention(&q, latents, latents, mask, &self.scores)?; // (b, s, h, latent + rope)
        let y = y.tensor().narrow(D::Minus1, 0, self.latent_dim)?;
        ops::by_head(&y, &self.wkv_b, self.nope_dim..self.nope_dim + self.v_dim, false)
    }
}
