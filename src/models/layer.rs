//! What one layer is made of, as the arguments of the whole model say.

use super::args::{AttnMaskType, AttnType, DecoderArgs, RopeArgs, Stretch, YarnArgs};

/// One layer of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerArgs {
    /// The tokens that attention sees.
    pub span: Span,
    /// `None`: attention knows no positions.
    pub rope: Option<RopeArgs>,
    /// Factor on attention's scores.
    pub score_scale: f64,
    /// Whether the feed-forward is a mixture of experts.
    pub is_moe: bool,
}

/// How far attention sees, up to a token itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// From the first token.
    Full,
    /// From the start of a token's own block of so many positions.
    Chunked(usize),
}

impl DecoderArgs {
    /// What layer `index` is made of.
    pub fn layer(&self, index: usize) -> LayerArgs {
        let is_rotary = self.every_n_layers_nope.is_none_or(|n| !index.is_multiple_of(n));
        LayerArgs {
            span: self.attn_block_size().filter(|_| is_rotary).map_or(Span::Full, Span::Chunked),
            rope: is_rotary.then(|| self.rope()),
            score_scale: self.score_scale(),
            is_moe: self.is_moe_layer(index),
        }
    }

    /// The blocks of positions that rotary layers attend within.
    pub fn attn_block_size(&self) -> Option<usize> {
        self.fixed_attn_block_size.filter(|_| self.attn_type == AttnType::Flex)
    }

    fn rope(&self) -> RopeArgs {
        let stretch = match (self.yarn(), &self.rope_scaling_args) {
            (Some(yarn), _) => Stretch::Yarn(yarn),
            (None, Some(scaling)) => Stretch::ByWavelength(scaling.clone()),
            (None, None) => Stretch::None,
        };
        RopeArgs { dim: self.rope_dim(), theta: self.rope_theta, layout: self.rope_layout, stretch }
    }

    /// Numbers of a head that rotate.
    pub fn rope_dim(&self) -> usize {
        if self.kv_lora_rank.is_some() { self.qk_rope_head_dim } else { self.head_dim() }
    }

    /// YaRN, for models that are to read more than the original length.
    fn yarn(&self) -> Option<YarnArgs> {
        let Self { original_seq_len, beta_fast, beta_slow, .. } = *self;
        let factor = self.rope_factor.filter(|_| self.max_seq_len > original_seq_len)?;
        Some(YarnArgs { factor, original_seq_len, beta_fast, beta_slow })
    }

    fn score_scale(&self) -> f64 {
        let temperature = self.yarn().map_or(1.0, |yarn| 0.1 * self.mscale * yarn.factor.ln() + 1.0);
        (self.qk_head_dim() as f64).powf(-0.5) * temperature * temperature
    }

    /// Width of a head of grouped-query attention.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.dim / self.n_heads)
    }

    /// Width of a query.
    pub fn qk_head_dim(&self) -> usize {
        match self.kv_lora_rank {
            Some(_) => self.qk_nope_head_dim + self.qk_rope_head_dim,
            None => self.head_dim(),
        }
    }

    /// Width of a value.
    pub fn value_head_dim(&self) -> usize {
        if self.kv_lora_rank.is_some() { self.v_head_dim } else { self.head_dim() }
    }

    /// Number of key/value heads.
    pub fn n_kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    /// Whether attention stays inside documents.
    pub fn masks_documents(&self) -> bool {
        self.attn_type != AttnType::Sdpa && self.attn_mask_type == AttnMaskType::BlockCausal
    }

    /// Layers `n - 1, 2n - 1, ...` of an `interleave_moe_layer_step` of `n`, except for the first `n_dense_layers`, where
    /// there are experts at all.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        let has_experts = self.moe_enabled && self.moe_args.is_some();
        has_experts && layer >= self.n_dense_layers && (layer + 1).is_multiple_of(self.interleave_moe_layer_step)
    }

    /// Width of a dense feed-forward: `hidden_dim`, else two thirds of `4 * dim`, times `ffn_dim_multiplier`, up to a
    /// multiple of `multiple_of`.
    pub fn ffn_hidden_dim(&self) -> usize {
        let made = || self.unrounded_hidden_dim().next_multiple_of(self.multiple_of);
        self.hidden_dim.or(self.inter_dim).unwrap_or_else(made)
    }

    /// Width of one expert: `moe_inter_dim`, else that of a dense feed-forward, shared among the active experts if
    /// `auto_scale_hidden_dim`.
    pub fn moe_hidden_dim(&self) -> usize {
        let active = match &self.moe_args {
            Some(moe) if self.auto_scale_hidden_dim => moe.top_k + moe.num_shared_experts,
            _ => 1,
        };
        let made = || (self.unrounded_hidden_dim() / active).next_multiple_of(self.multiple_of);
        self.moe_inter_dim.unwrap_or_else(made)
    }

    fn unrounded_hidden_dim(&self) -> usize {
        let hidden_dim = 8 * self.dim / 3;
        match self.ffn_dim_multiplier {
            Some(factor) => (factor * hidden_dim as f64) as usize,
            None => hidden_dim,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::args::MoeArgs;

    #[test]
    fn feed_forward_widths_are_those_of_the_published_models() {
        let llama3_8b = DecoderArgs { multiple_of: 1024, ffn_dim_multiplier: Some(1.3), ..Default::default() };
        assert_eq!(llama3_8b.ffn_hidden_dim(), 14_336);

        let llama4_scout = DecoderArgs {
            dim: 5120,
            multiple_of: 2048,
            ffn_dim_multiplier: Some(1.2),
            auto_scale_hidden_dim: true,
            moe_args: Some(MoeArgs { num_experts: 16, ..Default::default() }),
            ..Default::default()
        };
        assert_eq!((llama4_scout.ffn_hidden_dim(), llama4_scout.moe_hidden_dim()), (16_384, 8192));
    }
}
