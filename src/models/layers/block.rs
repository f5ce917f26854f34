use std::sync::Arc;

use super::{ExpertLoad, FeedForward, GroupedAttention, LatentAttention, LayerCache, Moe, Norm, Positions};
use crate::Result;
use crate::autograd::{Init, StageBuilder, Value};
use crate::engine::Pass;
use crate::models::args::{DecoderArgs, FeedForwardKind, NormPosition};
use crate::models::layer::LayerArgs;
use crate::ops::{self, Residual, Scores};

/// `h = x + attention(norm(x))`, `y = h + feed_forward(norm(h))`; the norms may also come after, or after as well.
#[derive(Debug)]
pub struct Block {
    attention_norm: Option<Norm>,
    attention: Attention,
    post_attention_norm: Option<Norm>,
    ffn_norm: Option<Norm>,
    ffn: Ffn,
    post_ffn_norm: Option<Norm>,
    residual_multiplier: f32,
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
        let mut norm = |name, is_there: bool| is_there.then(|| Norm::new(stage, &format!("{prefix}.{name}"), args));
        let before = args.norm_position != NormPosition::After;
        let after = args.norm_position != NormPosition::Before;
        let attention_norm = norm("attention_norm", before);
        let post_attention_norm = norm("post_attention_norm", after);
        let ffn_norm = norm("ffn_norm", before);
        let post_ffn_norm = norm("post_ffn_norm", after);

        let attention = format!("{prefix}.attention");
        let sinks = || stage.parameter(format!("{attention}.sinks"), &[args.n_heads], Init::Constant(0.0));
        let scores = Scores {
            scale: layer.score_scale as f32,
            softcap: args.attention_softcap.map(|cap| cap as f32),
            sinks: args.attention_sinks.then(sinks),
        };
        let attention = match layer.latent_dim {
            None => Attention::Grouped(GroupedAttention::new(stage, &attention, args, scores, out_std)),
            Some(dim) => Attention::Latent(LatentAttention::new(stage, &attention, args, dim, scores, out_std)),
        };
        let ffn = match (&args.moe_args, layer.feed_forward) {
            (Some(moe), FeedForwardKind::Moe) => {
                let dims = [args.dim, args.moe_hidden_dim()];
                Ffn::Moe(Moe::new(stage, &format!("{prefix}.moe"), moe, dims, out_std))
            }
            (_, kind) => {
                let dims = [args.dim, args.ffn_hidden_dim()];
                let prefix = format!("{prefix}.feed_forward");
                Ffn::Dense(FeedForward::new(stage, &prefix, kind, dims, args.mlp_bias, out_std))
            }
        };
        let residual_multiplier = args.residual_multiplier as f32;
        Self { attention_norm, attention, post_attention_norm, ffn_norm, ffn, post_ffn_norm, residual_multiplier }
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
        positions: &Positions,
        pass: Pass,
        cache: Option<&mut LayerCache>,
    ) -> Result<Value> {
        let normed = self::normed(&self.attention_norm, x)?;
        let attention = |residual: Option<Residual>| match &self.attention {
            Attention::Grouped(attention) => attention.forward(residual, &normed, positions, cache),
            Attention::Latent(attention) => attention.forward(residual, &normed, positions, cache),
        };
        let h = self.add(Residual { stream: x, is_read: true }, &self.post_attention_norm, attention)?;
        let normed = self::normed(&self.ffn_norm, &h)?;
        let ffn = |residual: Option<Residual>| match &self.ffn {
            Ffn::Dense(feed_forward) => feed_forward.forward(residual, &normed),
            Ffn::Moe(moe) => moe.forward(residual, &normed, pass == Pass::Training),
        };
        self.add(Residual { stream: &h, is_read: pass != Pass::Recompute }, &self.post_ffn_norm, ffn)
    }

    /// The residual stream with what a layer adds to it, after a norm if there is one.
    fn add(
        &self,
        residual: Residual,
        norm: &Option<Norm>,
        layer: impl FnOnce(Option<Residual>) -> Result<Value>,
    ) -> Result<Value> {
        if norm.is_none() && self.residual_multiplier == 1.0 {
            return layer(Some(residual));
        }
        let y = normed(norm, &layer(None)?)?;
        match self.residual_multiplier {
            1.0 => ops::add_onto(Some(residual), y),
            factor => ops::add_onto(Some(residual), ops::scale(&y, factor)?),
        }
    }
}

/// `x` after a norm, if there is one.
fn normed(norm: &Option<Norm>, x: &Value) -> Result<Value> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
}
