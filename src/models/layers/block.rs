use std::sync::Arc;

use super::{ExpertLoad, FeedForward, GroupedAttention, LatentAttention, LayerCache, Moe};
use crate::Result;
use crate::autograd::{Init, Parameter, StageBuilder, Value};
use crate::engine::Pass;
use crate::models::args::DecoderArgs;
use crate::models::layer::LayerArgs;
use crate::ops::{self, AttentionMask, RopeTable};

/// `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`.
#[derive(Debug)]
pub struct Block {
    attention_norm: Arc<Parameter>,
    attention: Attention,
    ffn_norm: Arc<Parameter>,
    ffn: Ffn,
    norm_eps: f64,
}

#[derive(Debug)]
enum Attention {
    Grouped(GroupedAttention),
    Latent(LatentAttention),
}

#[derive(Debug)]
enum Ffn {
    Dense(FeedForward),
    Moe(Moe),
}

impl Block {
    pub fn new(stage: &mut StageBuilder, index: usize, args: &DecoderArgs, layer: &LayerArgs) -> Self {
        let prefix = format!("layers.{index}");
        let out_std = 0.02 / (2.0 * if args.depth_init { index + 1 } else { args.n_layers } as f64).sqrt();
        let attention = format!("{prefix}.attention");
        let scale = layer.score_scale;
        let mut norm = |name| stage.parameter(format!("{prefix}.{name}.weight"), &[args.dim], Init::Constant(1.0));
        Self {
            attention_norm: norm("attention_norm"),
            ffn_norm: norm("ffn_norm"),
            attention: match args.kv_lora_rank {
                None => Attention::Grouped(GroupedAttention::new(stage, &attention, args, scale, out_std)),
                Some(rank) => Attention::Latent(LatentAttention::new(stage, &attention, args, rank, scale, out_std)),
            },
            ffn: match &args.moe_args {
                Some(moe) if layer.is_moe => {
                    let hidden_dim = args.moe_hidden_dim();
                    Ffn::Moe(Moe::new(stage, &format!("{prefix}.moe"), moe, args.dim, hidden_dim, out_std))
                }
                _ => {
                    let hidden_dim = args.ffn_hidden_dim();
                    let prefix = format!("{prefix}.feed_forward");
                    Ffn::Dense(FeedForward::new(stage, &prefix, args.dim, hidden_dim, out_std))
                }
            },
            norm_eps: args.norm_eps,
        }
    }

    /// The load of its experts, if it has any.
    pub fn expert_load(&self) -> Option<&Arc<ExpertLoad>> {
        match &self.ffn {
            Ffn::Moe(moe) => Some(moe.load()),
            Ffn::Dense(_) => None,
        }
    }

    /// `(b, s, dim) -> (b, s, dim)`.
    pub fn forward(
        &self,
        x: &Value,
        rope: Option<&RopeTable>,
        mask: &AttentionMask,
        pass: Pass,
        cache: Option<&mut LayerCache>,
    ) -> Result<Value> {
        let normed = ops::rms_norm(x, &self.attention_norm, self.norm_eps)?;
        let attended = match &self.attention {
            Attention::Grouped(attention) => attention.forward(&normed, rope, mask, cache)?,
            Attention::Latent(attention) => attention.forward(&normed, rope, mask, cache)?,
        };
        drop(normed);
        let h = ops::add(x, &attended)?;
        let normed = ops::rms_norm(&h, &self.ffn_norm, self.norm_eps)?;
        let y = match &self.ffn {
            Ffn::Dense(feed_forward) => feed_forward.forward(&normed)?,
            Ffn::Moe(moe) => moe.forward(&normed, pass == Pass::Training)?,
        };
        ops::add(&h, &y)
    }
}
