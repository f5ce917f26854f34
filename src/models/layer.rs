//! What one layer is made of, as the arguments of the whole model say.

use super::args::{AttentionKind, AttnMaskType, AttnType, DecoderArgs, FeedForwardKind, RopeArgs, Stretch, YarnArgs};

/// One layer of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerArgs {
    /// The tokens that attention sees.
    pub span: Span,
    /// Width of the latents that keys and values are made from; `None`: grouped-query attention.
    pub latent_dim: Option<usize>,
    /// `None`: attention knows no positions.
    pub rope: Option<RopeArgs>,
    /// Factor on attention's scores.
    pub score_scale: f64,
    pub feed_forward: FeedForwardKind,
}

/// How far attention sees, up to a token itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// From the first token.
    Full,
    /// So many positions.
    Sliding(usize),
    /// From the start of a token's own block of so many positions.
    Chunked(usize),
}

/// The entry of layer `index` in a list that repeats; `None` in an empty one.
fn of_layer<T: Copy>(pattern: &[T], index: usize) -> Option<T> {
    (!pattern.is_empty()).then(|| pattern[index % pattern.len()])
}

impl DecoderArgs {
    /// What layer `index` is made of.
    pub fn layer(&self, index: usize) -> LayerArgs {
        let by_rule = || self.every_n_layers_nope.is_none_or(|n| !index.is_multiple_of(n));
        let is_rotary = of_layer(&self.rope_pattern, index).unwrap_or_else(by_rule);
        let latent_dim = self.kv_lora_rank.filter(|_| of_layer(&self.latent_pattern, index).unwrap_or(true));
        let span = match of_layer(&self.attention_pattern, index) {
            Some(AttentionKind::Full) => Span::Full,
            Some(AttentionKind::Sliding) => self.sliding_window.map_or(Span::Full, Span::Sliding),
            Some(AttentionKind::Chunked) => self.fixed_attn_block_size.map_or(Span::Full, Span::Chunked),
            None => self.attn_block_size().filter(|_| is_rotary).map_or(Span::Full, Span::Chunked),
        };
        let rope = is_rotary.then(|| self.rope(span, latent_dim.is_some()));
        let feed_forward = match of_layer(&self.feed_forward_pattern, index) {
            Some(kind) => kind,
            None if self.is_moe_by_rule(index) => FeedForwardKind::Moe,
            None => FeedForwardKind::Swiglu,
        };
        let score_scale = self.score_scale(latent_dim.is_some(), rope.as_ref());
        LayerArgs { span, latent_dim, rope, score_scale, feed_forward }
    }

    fn rope(&self, span: Span, is_latent: bool) -> RopeArgs {
        let dim = self.rope_dim(is_latent);
        let layout = self.rope_layout;
        match self.local_rope_theta.filter(|_| span != Span::Full) {
            Some(theta) => RopeArgs { dim, theta, layout, stretch: Stretch::None },
            None => RopeArgs { dim, theta: self.rope_theta, layout, stretch: self.stretch() },
        }
    }

    fn stretch(&self) -> Stretch {
        let Self { original_seq_len, beta_fast, beta_slow, yarn_truncate: truncate, .. } = *self;
        // DeepSeek's goes with models that are to read more than the original length.
        let factor = self.rope_factor.filter(|_| self.yarn_always || self.max_seq_len > original_seq_len);
        match (factor, &self.rope_scaling_args) {
            (Some(factor), _) => Stretch::Yarn(YarnArgs { factor, original_seq_len, beta_fast, beta_slow, truncate }),
            (None, Some(scaling)) => Stretch::ByWavelength(scaling.clone()),
            (None, None) => Stretch::None,
        }
    }

    fn score_scale(&self, is_latent: bool, rope: Option<&RopeArgs>) -> f64 {
        let temperature = match rope.map(|rope| &rope.stretch) {
            Some(Stretch::Yarn(yarn)) => 0.1 * self.mscale * yarn.factor.ln() + 1.0,
            _ => 1.0,
        };
        let width = self.query_pre_attn_scalar.unwrap_or(self.qk_head_dim(is_latent) as f64);
        width.powf(-0.5) * temperature * temperature
    }

    /// Factors on the queries of layers without rotary positions, at so many positions; `None`: all are 1.
    ///
    /// # Source
    /// Nakanishi, arXiv:2501.19399, in Llama 4's steps.
    pub fn query_scales(&self, positions: usize) -> Option<Vec<f32>> {
        let steps = |position: usize| ((position + 1) / self.floor_scale) as f64;
        self.tunes_temperature(positions)
            .then(|| (0..positions).map(|it| (1.0 + self.attn_scale * steps(it).ln_1p()) as f32).collect())
    }

    /// Whether some of so many positions have another factor than 1 on their queries, in layers without rotary positions.
    pub fn tunes_temperature(&self, positions: usize) -> bool {
        self.attn_temperature_tuning && positions >= self.floor_scale
    }

    /// Numbers of a head that rotate.
    pub fn rope_dim(&self, is_latent: bool) -> usize {
        if is_latent { self.qk_rope_head_dim } else { self.head_dim() }
    }

    /// Width of a query.
    pub fn qk_head_dim(&self, is_latent: bool) -> usize {
        if is_latent { self.qk_nope_head_dim + self.qk_rope_head_dim } else { self.head_dim() }
    }

    /// Width of a value.
    pub fn value_head_dim(&self, is_latent: bool) -> usize {
        if is_latent { self.v_head_dim } else { self.head_dim() }
    }

    /// The blocks of positions that rotary layers attend within.
    pub fn attn_block_size(&self) -> Option<usize> {
        self.fixed_attn_block_size.filter(|_| self.attn_type == AttnType::Flex)
    }

    /// Width of a head of grouped-query attention.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.dim / self.n_heads)
    }

    /// Number of key/value heads.
    pub fn n_kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    /// Whether attention stays inside documents.
    pub fn masks_documents(&self) -> bool {
        self.attn_type != AttnType::Sdpa && self.attn_mask_type == AttnMaskType::BlockCausal
    }

    /// Whether the feed-forward of a layer is a mixture of experts.
    pub fn is_moe_layer(&self, layer: usize) -> bool {
        self.layer(layer).feed_forward == FeedForwardKind::Moe
    }

    /// Layers `n - 1, 2n - 1, ...` of an `interleave_moe_layer_step` of `n`, except for the first `n_dense_layers`, where
    /// there are experts at all.
    fn is_moe_by_rule(&self, layer: usize) -> bool {
        let has_experts = self.moe_enabled && self.moe_args.is_some();
        has_experts && layer >= self.n_dense_layers && (layer + 1).is_multiple_of(self.interleave_moe_layer_step)
    }

    /// Width of a dense feed-forward: `hidden_dim`, else two thirds of `4 * dim`, times `ffn_dim_multiplier`, up to a
    /// multiple of `multiple_of`.
    pub fn ffn_hidden_dim(&self) -> usize {
        let made = || rounded_up(self.unrounded_hidden_dim(), self.multiple_of);
        self.hidden_dim.or(self.inter_dim).unwrap_or_else(made)
    }

    /// Width of one expert: `moe_inter_dim`, else that of a dense feed-forward, shared among the active experts if
    /// `auto_scale_hidden_dim`.
    pub fn moe_hidden_dim(&self) -> usize {
        let active = match &self.moe_args {
            Some(moe) if self.auto_scale_hidden_dim => moe.top_k + moe.num_shared_experts,
            _ => 1,
        };
        let made = || rounded_up(self.unrounded_hidden_dim() / active, self.multiple_of);
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

/// The multiple of `step` from `width` on; of a width that is no number, the largest there is.
fn rounded_up(width: usize, step: usize) -> usize {
    width.checked_next_multiple_of(step).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::args::{MoeArgs, RopeScalingArgs};

    #[test]
    fn short_patterns_repeat_over_the_layers() {
        use AttentionKind::{Full, Sliding};
        let args = DecoderArgs {
            attention_pattern: vec![Sliding, Sliding, Full],
            sliding_window: Some(64),
            rope_pattern: vec![true, false],
            feed_forward_pattern: vec![FeedForwardKind::Geglu, FeedForwardKind::Moe],
            local_rope_theta: Some(7.0),
            rope_scaling_args: Some(RopeScalingArgs::default()),
            ..Default::default()
        };
        let layers: Vec<_> = (0..6).map(|index| args.layer(index)).collect();
        let (near, far) = (Span::Sliding(64), Span::Full);
        assert_eq!(layers.iter().map(|it| it.span).collect::<Vec<_>>(), [near, near, far, near, near, far]);
        let thetas: Vec<_> = layers.iter().map(|it| it.rope.as_ref().map(|rope| rope.theta)).collect();
        assert_eq!(thetas, [Some(7.0), None, Some(args.rope_theta), None, Some(7.0), None]);
        assert_eq!(layers[0].rope.as_ref().unwrap().stretch, Stretch::None);
        assert_ne!(layers[2].rope.as_ref().unwrap().stretch, Stretch::None);
        assert_eq!(
            layers.iter().map(|it| it.feed_forward == FeedForwardKind::Moe).collect::<Vec<_>>(),
            [false, true, false, true, false, true]
        );
    }

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
