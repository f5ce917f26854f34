//! `mistral` and `mixtral`: all layers slide, or none.

use serde_json::{Value, json};

use super::common::{plain_args, softmax_experts, softmax_experts_config, with};
use super::fields::Fields;
use crate::models::args::{AttentionKind, DecoderArgs, RopeLayout};

pub fn mistral_args(fields: &mut Fields) -> DecoderArgs {
    let args = plain_args(fields, 10_000.0);
    // An absent window is not the same as none.
    let window = if fields.config.get("sliding_window").is_none() { Some(4096) } else { None };
    DecoderArgs { hidden_dim: Some(fields.size("intermediate_size", None)), ..sliding(fields, args, window) }
}

pub fn mixtral_args(fields: &mut Fields) -> DecoderArgs {
    let args = plain_args(fields, 1_000_000.0);
    DecoderArgs {
        moe_inter_dim: Some(fields.size("intermediate_size", None)),
        moe_args: Some(softmax_experts(fields, 2)),
        norm_eps: fields.number("rms_norm_eps", 1e-5),
        ..sliding(fields, args, None)
    }
}

fn sliding(fields: &mut Fields, args: DecoderArgs, default: Option<usize>) -> DecoderArgs {
    let is_there = !fields.config["sliding_window"].is_null() || default.is_some();
    let sliding_window = is_there.then(|| fields.size("sliding_window", default));
    DecoderArgs {
        rope_layout: RopeLayout::Halves,
        attention_pattern: if is_there { vec![AttentionKind::Sliding] } else { Vec::new() },
        sliding_window,
        ..args
    }
}

pub fn config(args: &DecoderArgs) -> Value {
    let ffn = match args.moe_layers().is_empty() {
        true => json!({ "intermediate_size": args.ffn_hidden_dim() }),
        false => softmax_experts_config(args),
    };
    with(json!({ "head_dim": args.head_dim(), "sliding_window": args.sliding_window }), ffn)
}
