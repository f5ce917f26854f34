//! `llama`: Llama 2 and 3, and the many models of the same kind.

use serde_json::{Value, json};

use super::fields::Fields;
use crate::models::args::DecoderArgs;

pub fn args(fields: &mut Fields) -> DecoderArgs {
    let args = common_args(fields, 10_000.0);
    fields.expect("mlp_bias", false);
    DecoderArgs { hidden_dim: Some(fields.size("intermediate_size", None)), ..args }
}

/// What the configs of most families share: grouped-query attention, RMSNorm, SwiGLU, no biases.
pub fn common_args(fields: &mut Fields, default_theta: f64) -> DecoderArgs {
    fields.expect("hidden_act", "silu");
    fields.expect("attention_bias", false);
    let dim = fields.size("hidden_size", None);
    let n_heads = fields.size("num_attention_heads", None);
    let n_kv_heads = fields.size("num_key_value_heads", Some(n_heads));
    let head_dim = fields.size("head_dim", Some((dim / n_heads).max(1)));
    let mut args = DecoderArgs {
        dim,
        n_layers: fields.size("num_hidden_layers", None),
        n_heads,
        n_kv_heads: Some(n_kv_heads),
        head_dim: (head_dim * n_heads != dim).then_some(head_dim),
        vocab_size: fields.size("vocab_size", None),
        enable_weight_tying: fields.flag("tie_word_embeddings", false),
        norm_eps: fields.number("rms_norm_eps", 1e-6),
        max_seq_len: fields.size("max_position_embeddings", Some(2048)),
        ..Default::default()
    };
    if !n_heads.is_multiple_of(n_kv_heads) {
        fields.fault(format!("num_attention_heads: {n_heads} is no multiple of num_key_value_heads {n_kv_heads}"));
    }
    fields.rope(&mut args, default_theta);
    args
}

pub fn config(args: &DecoderArgs) -> Value {
    json!({ "head_dim": args.head_dim(), "intermediate_size": args.ffn_hidden_dim(), "mlp_bias": false })
}
