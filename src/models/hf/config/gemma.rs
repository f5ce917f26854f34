//! `gemma2` and `gemma3_text`: norms around attention and feed-forward whose weights lie around 0, GeGLU, and layers that
//! slide among layers that do not.

use serde_json::{Value, json};

use super::common::{layer_types, read_sliding_layers, sizes, with};
use super::fields::Fields;
use crate::models::args::{DecoderArgs, FeedForwardKind, NormPosition, RopeLayout, RopeScalingArgs};

const ACTIVATION: &str = "gelu_pytorch_tanh";

pub fn gemma2_args(fields: &mut Fields) -> DecoderArgs {
    let mut args = common_args(fields);
    args.attention_softcap = fields.optional_number("attn_logit_softcapping", Some(50.0));
    args.logit_softcap = fields.optional_number("final_logit_softcapping", Some(30.0));
    read_sliding_layers(fields, &mut args, 4096, |layer| layer.is_multiple_of(2));
    fields.rope(&mut args, 10_000.0);
    args
}

pub fn gemma3_args(fields: &mut Fields) -> DecoderArgs {
    let mut args = common_args(fields);
    args.qk_norm = true;
    args.attention_softcap = fields.optional_number("attn_logit_softcapping", None);
    args.logit_softcap = fields.optional_number("final_logit_softcapping", None);
    fields.expect("sliding_window_pattern", 6);
    read_sliding_layers(fields, &mut args, 4096, |layer| !(layer + 1).is_multiple_of(6));
    read_two_ropes(fields, &mut args);
    args
}

fn common_args(fields: &mut Fields) -> DecoderArgs {
    for name in ["hidden_activation", "hidden_act"] {
        fields.expect(name, ACTIVATION);
    }
    fields.expect("attention_bias", false);
    fields.expect("use_bidirectional_attention", false);
    let args = sizes(fields);
    DecoderArgs {
        hidden_dim: Some(fields.size("intermediate_size", None)),
        enable_weight_tying: fields.flag("tie_word_embeddings", true),
        // Not that of dim / n_heads, which `sizes` takes where none is given.
        head_dim: Some(fields.size("head_dim", Some(256))).filter(|width| width * args.n_heads != args.dim),
        norm_position: NormPosition::Both,
        zero_centered_norms: true,
        rope_layout: RopeLayout::Halves,
        feed_forward_pattern: vec![FeedForwardKind::Geglu],
        query_pre_attn_scalar: Some(fields.number("query_pre_attn_scalar", 256.0)),
        embedding_multiplier: (args.dim as f64).sqrt(),
        ..args
    }
}

/// One base for layers that slide, and another, perhaps stretched, for those that do not.
fn read_two_ropes(fields: &mut Fields, args: &mut DecoderArgs) {
    let config = fields.config;
    let local = match &config["rope_parameters"] {
        Value::Null => {
            fields.rope(args, 1_000_000.0);
            config["rope_local_base_freq"].as_f64()
        }
        both => {
            let full = &both["full_attention"];
            fields.rope_of(full, full, args, 1_000_000.0);
            let sliding = &both["sliding_attention"];
            if !sliding["rope_type"].is_null() && sliding["rope_type"] != "default" {
                fields.fault(format!("rope_type: {} in sliding layers is not supported", sliding["rope_type"]));
            }
            sliding["rope_theta"].as_f64()
        }
    };
    args.local_rope_theta = args.sliding_window.map(|_| local.unwrap_or(10_000.0));
}

pub fn gemma2_config(args: &DecoderArgs) -> Value {
    with(
        common_config(args),
        json!({
            "attn_logit_softcapping": args.attention_softcap,
            "final_logit_softcapping": args.logit_softcap,
        }),
    )
}

pub fn gemma3_config(args: &DecoderArgs) -> Value {
    with(
        common_config(args),
        json!({
            "attn_logit_softcapping": args.attention_softcap,
            "final_logit_softcapping": args.logit_softcap,
            "rope_local_base_freq": args.local_rope_theta,
        }),
    )
}

fn common_config(args: &DecoderArgs) -> Value {
    json!({
        "head_dim": args.head_dim(),
        "intermediate_size": args.ffn_hidden_dim(),
        "hidden_act": ACTIVATION,
        "hidden_activation": ACTIVATION,
        "query_pre_attn_scalar": args.query_pre_attn_scalar.map(as_integer),
        "layer_types": layer_types(args),
        "sliding_window": args.sliding_window,
    })
}

/// transformers insists on an integer.
fn as_integer(number: f64) -> Value {
    if number.fract() == 0.0 { json!(number as u64) } else { json!(number) }
}

/// Every wavelength times `factor`: all are longer than a context of one position.
pub fn linear(factor: f64) -> RopeScalingArgs {
    RopeScalingArgs {
        scaling_factor: factor,
        low_freq_factor: 1.0,
        high_freq_factor: 1.0,
        original_max_position_embeddings: 1,
    }
}
