//! [`DecoderArgs`]: every choice that tells one decoder from another, under the names that job files use.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The model's arguments, as in `[model.args]`. A flavor fills all of them; a job file overrides any.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DecoderArgs {
    /// Width of the residual stream.
    #[schemars(range(min = 1))]
    pub dim: usize,
    /// Number of transformer blocks.
    #[schemars(range(min = 1))]
    pub n_layers: usize,
    /// Number of query heads; must divide `dim`, unless `head_dim` is given.
    #[schemars(range(min = 1))]
    pub n_heads: usize,
    /// Number of key/value heads, each shared by `n_heads / n_kv_heads` query heads. "none": as many as `n_heads`.
    #[schemars(range(min = 1))]
    pub n_kv_heads: Option<usize>,
    /// Width of a head. "none": `dim / n_heads`.
    #[schemars(range(min = 1))]
    pub head_dim: Option<usize>,
    /// Rows of the embedding table and of the output layer. Left alone, the tokenizer's size is taken where that is larger.
    #[schemars(range(min = 1))]
    pub vocab_size: usize,
    /// One table for the embedding and the output layer.
    pub enable_weight_tying: bool,
    /// Width of a dense feed-forward. "none": made from `dim`, `ffn_dim_multiplier` and `multiple_of`.
    #[schemars(range(min = 1))]
    pub hidden_dim: Option<usize>,
    /// DeepSeek's name of `hidden_dim`.
    #[schemars(range(min = 1))]
    pub inter_dim: Option<usize>,
    /// Width of one expert. "none": that of a dense feed-forward, shared as `auto_scale_hidden_dim` says.
    #[schemars(range(min = 1))]
    pub moe_inter_dim: Option<usize>,
    /// The feed-forward width is rounded up to a multiple of this.
    #[schemars(range(min = 1))]
    pub multiple_of: usize,
    /// Factor on the feed-forward width of `8 / 3 * dim`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub ffn_dim_multiplier: Option<f64>,
    /// Epsilon inside the square root of norms.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub norm_eps: f64,
    /// Epsilon of the norm before the output layer. "none": `norm_eps`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub final_norm_eps: Option<f64>,
    /// "rms_norm", or "layer_norm": with its mean taken away, and a bias.
    pub norm_type: NormType,
    /// Where a block norms the residual stream: "before" attention and feed-forward, or "after" what they give, or "both".
    pub norm_position: NormPosition,
    /// RMSNorm multiplies by 1 + its weight, so that weights begin at 0 and decay towards a plain norm.
    pub zero_centered_norms: bool,
    /// RMSNorm of queries and keys, before they rotate.
    pub qk_norm: bool,
    /// What `qk_norm` norms at a time: each "head", or the whole "projection" to all heads.
    pub qk_norm_over: QkNormOver,
    /// Queries and keys are divided by their root mean square after they have rotated, in the layers where they do.
    pub qk_unit_norm: bool,
    /// Queries grow with their position in layers without rotary positions: by the factor
    /// `1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))`, positions counted from 0.
    pub attn_temperature_tuning: bool,
    /// With `attn_temperature_tuning`: positions from one step of the factor to the next.
    #[schemars(range(min = 1))]
    pub floor_scale: usize,
    /// With `attn_temperature_tuning`: how much the factor grows.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub attn_scale: f64,
    /// Queries, keys and values have biases.
    pub attention_bias: bool,
    /// The layer after attention has a bias.
    pub attention_out_bias: bool,
    /// The layers of a dense feed-forward have biases.
    pub mlp_bias: bool,
    /// Scores of attention are divided by the square root of this. "none": by that of a head's width.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub query_pre_attn_scalar: Option<f64>,
    /// Scores of attention become `c * tanh(score / c)`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub attention_softcap: Option<f64>,
    /// Each head has a learned score that takes its share of attention and gives nothing.
    pub attention_sinks: bool,
    /// Logits become `c * tanh(logit / c)`.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub logit_softcap: Option<f64>,
    /// Factor on embeddings.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub embedding_multiplier: f64,
    /// Factor on what attention and feed-forward add to the residual stream.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub residual_multiplier: f64,
    /// How far attention sees, layer by layer: "full", "sliding" (`sliding_window` positions), "chunked" (blocks of
    /// `fixed_attn_block_size`). A short list repeats. []: as `attn_type` and `every_n_layers_nope` say.
    pub attention_pattern: Vec<AttentionKind>,
    /// Which layers have latent attention, in place of grouped-query attention. A short list repeats. []: all, where there
    /// is a `kv_lora_rank`.
    pub latent_pattern: Vec<bool>,
    /// Which layers have rotary positions. A short list repeats. []: as `every_n_layers_nope` says.
    pub rope_pattern: Vec<bool>,
    /// The feed-forward of each layer: "swiglu", "geglu", "relu_squared" or "moe". A short list repeats. []: "swiglu", and
    /// "moe" as `interleave_moe_layer_step` and `n_dense_layers` say.
    pub feed_forward_pattern: Vec<FeedForwardKind>,
    /// Positions that sliding layers see, a token's own among them.
    #[schemars(range(min = 1))]
    pub sliding_window: Option<usize>,
    /// Base of the rotary frequencies in sliding and chunked layers, where nothing stretches them. "none": as in the others.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub local_rope_theta: Option<f64>,
    /// Base of the rotary frequencies.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub rope_theta: f64,
    /// Which numbers of a head rotate together: "pairs" (0, 1), (2, 3), ..., or "halves": number i of the first half with
    /// number i of the second.
    pub rope_layout: RopeLayout,
    /// Longest sequence that the model takes. Training sets it to `training.seq_len`.
    #[schemars(range(min = 1))]
    pub max_seq_len: usize,
    /// Scale the initial weights of a layer's outputs by its depth, instead of by the number of layers.
    pub depth_init: bool,
    /// "sdpa": causal attention over the whole sequence. "flex" and "varlen": also the masks that
    /// `attn_mask_type` and `fixed_attn_block_size` name.
    pub attn_type: AttnType,
    /// "causal", or "block_causal": attention stays inside a document (needs `attn_type` "flex" or "varlen").
    pub attn_mask_type: AttnMaskType,
    /// Stretching of rotary wavelengths for long contexts. "none": none.
    pub rope_scaling_args: Option<RopeScalingArgs>,
    /// YaRN: long wavelengths are multiplied by this where `max_seq_len` is above `original_seq_len`, or `yarn_always` is
    /// set. "none": no YaRN.
    #[schemars(range(min = 1))]
    pub rope_factor: Option<f64>,
    /// YaRN: context length before the stretching.
    #[schemars(range(min = 1))]
    pub original_seq_len: usize,
    /// YaRN: wavelengths that turn more often than this in `original_seq_len` are left alone.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub beta_fast: f64,
    /// YaRN: wavelengths that turn less often than this in `original_seq_len` are stretched in full.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub beta_slow: f64,
    /// YaRN: whatever `max_seq_len` is, as models need that were trained so.
    pub yarn_always: bool,
    /// YaRN: go over from keeping to stretching at a whole number of frequencies.
    pub yarn_truncate: bool,
    /// YaRN: scores are multiplied by the square of `0.1 * mscale * ln(rope_factor) + 1`.
    #[schemars(range(min = 0))]
    pub mscale: f64,
    /// Multi-head latent attention: keys and values are made from a latent of this width. "none": grouped-query attention.
    #[schemars(range(min = 1))]
    pub kv_lora_rank: Option<usize>,
    /// Width of the latent that queries are made from. 0: they are made from the residual stream.
    pub q_lora_rank: usize,
    /// With `kv_lora_rank`: width of a head's part without rotary positions.
    #[schemars(range(min = 1))]
    pub qk_nope_head_dim: usize,
    /// With `kv_lora_rank`: width of a head's rotary part, whose key all heads share.
    #[schemars(range(min = 1))]
    pub qk_rope_head_dim: usize,
    /// With `kv_lora_rank`: width of a head's value.
    #[schemars(range(min = 1))]
    pub v_head_dim: usize,
    /// Let `top_k` routed and the shared experts together be as wide as one dense feed-forward.
    pub auto_scale_hidden_dim: bool,
    /// Layers 0, n, 2n, ... have no rotary positions and attend without blocks. "none": all layers rotate.
    #[schemars(range(min = 1))]
    pub every_n_layers_nope: Option<usize>,
    /// With `attn_type` "flex", rotary layers attend only within blocks of this many positions. "none": no blocks.
    #[schemars(range(min = 1))]
    pub fixed_attn_block_size: Option<usize>,
    /// The mixture of experts. "none": every feed-forward is dense.
    pub moe_args: Option<MoeArgs>,
    /// Whether there is a mixture of experts, where `moe_args` describes one.
    pub moe_enabled: bool,
    /// The first layers are dense, this many.
    pub n_dense_layers: usize,
    /// Every n-th layer is a mixture of experts (layers n - 1, 2n - 1, ...).
    #[schemars(range(min = 1))]
    pub interleave_moe_layer_step: usize,
}

/// Llama 3 and Llama 4's stretching of rotary wavelengths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RopeScalingArgs {
    /// Long wavelengths are multiplied by this.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub scaling_factor: f64,
    /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched in full.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are left alone.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub high_freq_factor: f64,
    /// Context length before the stretching.
    #[schemars(range(min = 1))]
    pub original_max_position_embeddings: usize,
}

/// The rotary positions of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeArgs {
    /// Numbers of a head that rotate.
    pub dim: usize,
    pub theta: f64,
    pub layout: RopeLayout,
    pub stretch: Stretch,
}

/// What becomes of the wavelengths that `theta` gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Stretch {
    None,
    ByWavelength(RopeScalingArgs),
    Yarn(YarnArgs),
}

/// YaRN's arguments, as in [`DecoderArgs`].
#[derive(Clone, Debug, PartialEq)]
pub struct YarnArgs {
    pub factor: f64,
    pub original_seq_len: usize,
    pub beta_fast: f64,
    pub beta_slow: f64,
    pub truncate: bool,
}

/// Token-choice mixture of experts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MoeArgs {
    /// Number of routed experts.
    #[schemars(range(min = 1))]
    pub num_experts: usize,
    /// Experts that see every token, built as one feed-forward of their joint width.
    pub num_shared_experts: usize,
    /// Routed experts per token.
    #[schemars(range(min = 1))]
    pub top_k: usize,
    /// How router logits become scores.
    pub score_func: ScoreFunc,
    /// Divide a token's chosen scores by their sum.
    pub route_norm: bool,
    /// Factor on the chosen scores.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub route_scale: f64,
    /// Experts fall into this many groups, and a token's experts come from its `num_limited_groups` best groups: those
    /// whose two highest scores sum to most. "none": a token's experts come from anywhere.
    #[schemars(range(min = 1))]
    pub num_expert_groups: Option<usize>,
    /// Groups that a token's experts come from.
    #[schemars(range(min = 1))]
    pub num_limited_groups: Option<usize>,
    /// Multiply by the score before the expert (else after it).
    pub score_before_experts: bool,
    /// Step by which each expert's bias follows its load. "none": no bias.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub load_balance_coeff: Option<f64>,
    /// Experts and router have biases.
    pub use_bias: bool,
    /// GPT-OSS's SwiGLU in the routed experts, clamped to this. "none": plain SwiGLU.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub swiglu_limit: Option<f64>,
    /// Send tokens round robin, for timing.
    pub force_load_balance: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AttnType {
    Sdpa,
    Flex,
    Varlen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttnMaskType {
    Causal,
    BlockCausal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RopeLayout {
    Pairs,
    Halves,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormType {
    RmsNorm,
    LayerNorm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NormPosition {
    Before,
    After,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QkNormOver {
    Head,
    Projection,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    Full,
    Sliding,
    Chunked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardKind {
    Swiglu,
    Geglu,
    ReluSquared,
    Moe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScoreFunc {
    Sigmoid,
    Softmax,
}

impl Default for DecoderArgs {
    /// A dense decoder of Llama 3's kind.
    fn default() -> Self {
        Self {
            dim: 4096,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: None,
            head_dim: None,
            vocab_size: 128_256,
            enable_weight_tying: false,
            hidden_dim: None,
            inter_dim: None,
            moe_inter_dim: None,
            multiple_of: 256,
            ffn_dim_multiplier: None,
            norm_eps: 1e-5,
            final_norm_eps: None,
            norm_type: NormType::RmsNorm,
            norm_position: NormPosition::Before,
            zero_centered_norms: false,
            qk_norm: false,
            qk_norm_over: QkNormOver::Head,
            qk_unit_norm: false,
            attn_temperature_tuning: false,
            floor_scale: 8192,
            attn_scale: 0.1,
            attention_bias: false,
            attention_out_bias: false,
            mlp_bias: false,
            query_pre_attn_scalar: None,
            attention_softcap: None,
            attention_sinks: false,
            logit_softcap: None,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            attention_pattern: Vec::new(),
            latent_pattern: Vec::new(),
            rope_pattern: Vec::new(),
            feed_forward_pattern: Vec::new(),
            sliding_window: None,
            local_rope_theta: None,
            rope_theta: 10_000.0,
            rope_layout: RopeLayout::Pairs,
            max_seq_len: 131_072,
            depth_init: true,
            attn_type: AttnType::Sdpa,
            attn_mask_type: AttnMaskType::Causal,
            rope_scaling_args: None,
            rope_factor: None,
            original_seq_len: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            yarn_always: false,
            yarn_truncate: true,
            mscale: 1.0,
            kv_lora_rank: None,
            q_lora_rank: 0,
            qk_nope_head_dim: 128,
            qk_rope_head_dim: 64,
            v_head_dim: 128,
            auto_scale_hidden_dim: false,
            every_n_layers_nope: None,
            fixed_attn_block_size: None,
            moe_args: None,
            moe_enabled: true,
            n_dense_layers: 0,
            interleave_moe_layer_step: 1,
        }
    }
}

impl Default for RopeScalingArgs {
    fn default() -> Self {
        Self {
            scaling_factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }
    }
}

impl Default for MoeArgs {
    fn default() -> Self {
        Self {
            num_experts: 8,
            num_shared_experts: 1,
            top_k: 1,
            score_func: ScoreFunc::Sigmoid,
            route_norm: false,
            route_scale: 1.0,
            num_expert_groups: None,
            num_limited_groups: None,
            score_before_experts: true,
            load_balance_coeff: Some(1e-3),
            use_bias: false,
            swiglu_limit: None,
            force_load_balance: false,
        }
    }
}
