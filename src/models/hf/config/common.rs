//! What the configs of most families share.

use serde_json::{Value, json};

use super::fields::Fields;
use crate::models::args::{AttentionKind, DecoderArgs, MoeArgs, ScoreFunc};

/// Grouped-query attention, SwiGLU, no biases.
pub fn plain_args(fields: &mut Fields, default_theta: f64) -> DecoderArgs {
    fields.expect("hidden_act", "silu");
    fields.expect("attention_bias", false);
    let mut args = sizes(fields);
    fields.rope(&mut args, default_theta);
    args
}

pub fn sizes(fields: &mut Fields) -> DecoderArgs {
    let dim = fields.size("hidden_size", None);
    let n_heads = fields.size("num_attention_heads", None);
    let n_kv_heads = fields.size("num_key_value_heads", Some(n_heads));
    let head_dim = fields.size("head_dim", Some((dim / n_heads).max(1)));
    if !n_heads.is_multiple_of(n_kv_heads) {
        fields.fault(format!("num_attention_heads: {n_heads} is no multiple of num_key_value_heads {n_kv_heads}"));
    }
    DecoderArgs {
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
    }
}

/// The shortest list that gives `pattern` when it repeats.
pub fn shortest<T: PartialEq>(mut pattern: Vec<T>) -> Vec<T> {
    let repeats = |n: &usize| pattern.iter().skip(*n).eq(&pattern[..pattern.len() - n]);
    pattern.truncate((1..pattern.len()).find(repeats).unwrap_or(pattern.len()));
    pattern
}

/// `layer_types` and `sliding_window`. `by_rule`: whether a layer slides, where the types are not given.
pub fn read_sliding_layers(fields: &mut Fields, args: &mut DecoderArgs, window: usize, by_rule: fn(usize) -> bool) {
    args.attention_pattern = match fields.config["layer_types"].as_array() {
        None => (0..args.n_layers).map(|layer| kind(by_rule(layer))).collect(),
        Some(types) => {
            let known = ["sliding_attention", "full_attention"];
            if types.len() != args.n_layers || types.iter().any(|it| !known.contains(&it.as_str().unwrap_or_default()))
            {
                fields.fault(format!("layer_types: must be {} of {known:?}", args.n_layers));
            }
            types.iter().map(|it| kind(*it == json!("sliding_attention"))).collect()
        }
    };
    if args.attention_pattern.contains(&AttentionKind::Sliding) {
        args.sliding_window = Some(fields.size("sliding_window", Some(window)));
    }
}

fn kind(slides: bool) -> AttentionKind {
    if slides { AttentionKind::Sliding } else { AttentionKind::Full }
}

pub fn layer_types(args: &DecoderArgs) -> Vec<&'static str> {
    let slides = |layer| args.slides(layer);
    (0..args.n_layers).map(|layer| if slides(layer) { "sliding_attention" } else { "full_attention" }).collect()
}

/// Experts that are chosen by the softmax of the chosen ones' logits, as in Mixtral.
pub fn softmax_experts(fields: &mut Fields, top_k: usize) -> MoeArgs {
    MoeArgs {
        num_experts: fields.size("num_local_experts", None),
        num_shared_experts: 0,
        top_k: fields.size("num_experts_per_tok", Some(top_k)),
        score_func: ScoreFunc::Softmax,
        route_norm: true,
        score_before_experts: false,
        load_balance_coeff: None,
        ..Default::default()
    }
}

pub fn softmax_experts_config(args: &DecoderArgs) -> Value {
    let moe = args.moe_args.clone().unwrap_or_default();
    json!({
        "intermediate_size": args.moe_hidden_dim(),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
    })
}

/// `fields` over `base`.
pub fn with(mut base: Value, fields: Value) -> Value {
    if let (Value::Object(base), Value::Object(fields)) = (&mut base, fields) {
        base.extend(fields);
    }
    base
}
