//! `gpt_oss`: attention sinks, biases everywhere, and clamped experts.

use serde_json::{Value, json};

use super::common::{layer_types, read_sliding_layers, sizes, softmax_experts, softmax_experts_config, with};
use super::fields::Fields;
use crate::models::args::{DecoderArgs, MoeArgs, RopeLayout};

pub fn args(fields: &mut Fields) -> DecoderArgs {
    fields.expect("hidden_act", "silu");
    fields.expect("attention_bias", true);
    fields.expect("swiglu_alpha", 1.702);
    let moe_args = MoeArgs {
        use_bias: true,
        swiglu_limit: Some(fields.number("swiglu_limit", 7.0)),
        ..softmax_experts(fields, 4)
    };
    let mut args = DecoderArgs {
        moe_inter_dim: Some(fields.size("intermediate_size", None)),
        moe_args: Some(moe_args),
        norm_eps: fields.number("rms_norm_eps", 1e-5),
        rope_layout: RopeLayout::Halves,
        attention_bias: true,
        attention_out_bias: true,
        attention_sinks: true,
        ..sizes(fields)
    };
    read_sliding_layers(fields, &mut args, 128, |layer| layer.is_multiple_of(2));
    fields.rope(&mut args, 150_000.0);
    args
}

pub fn config(args: &DecoderArgs) -> Value {
    let limit = args.moe_args.as_ref().and_then(|moe| moe.swiglu_limit);
    with(
        softmax_experts_config(args),
        json!({
            "head_dim": args.head_dim(),
            "attention_bias": true,
            "swiglu_limit": limit,
            "layer_types": layer_types(args),
            "sliding_window": args.sliding_window,
        }),
    )
}
