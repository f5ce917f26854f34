//! `qwen3` and `qwen3_moe`.

use serde_json::{Value, json};

use super::common::plain_args;
use super::fields::Fields;
use crate::models::args::{DecoderArgs, MoeArgs, RopeLayout, ScoreFunc};

pub fn args(fields: &mut Fields, has_experts: bool) -> DecoderArgs {
    let mut args = plain_args(fields, 10_000.0);
    if fields.config["head_dim"].is_null() && !has_experts {
        // What transformers takes, whatever hidden_size / num_attention_heads is.
        args.head_dim = Some(128);
    }
    args.qk_norm = true;
    args.rope_layout = RopeLayout::Halves;
    fields.expect("use_sliding_window", false);
    if !has_experts {
        args.hidden_dim = Some(fields.size("intermediate_size", None));
        return args;
    }
    args.moe_inter_dim = Some(fields.size("moe_intermediate_size", None));
    args.interleave_moe_layer_step = fields.size("decoder_sparse_step", Some(1));
    args.moe_args = Some(MoeArgs {
        num_experts: fields.size_of(["num_experts", "num_local_experts"]),
        num_shared_experts: 0,
        top_k: fields.size("num_experts_per_tok", None),
        score_func: ScoreFunc::Softmax,
        route_norm: fields.flag("norm_topk_prob", false),
        score_before_experts: false,
        ..Default::default()
    });
    read_dense_layers(fields, &mut args);
    if args.moe_layers().len() < args.n_layers {
        args.hidden_dim = Some(fields.size("intermediate_size", None));
    }
    args
}

/// `mlp_only_layers`, of which titan has those at the beginning.
fn read_dense_layers(fields: &mut Fields, args: &mut DecoderArgs) {
    let Some(list) = fields.config["mlp_only_layers"].as_array() else { return };
    args.n_dense_layers = list.len();
    if list.iter().enumerate().any(|(i, layer)| *layer != json!(i)) {
        fields.fault(format!("mlp_only_layers: {} must be 0, 1, 2, ...", fields.config["mlp_only_layers"]));
    }
}

pub fn config(args: &DecoderArgs) -> Value {
    let mut config = json!({
        "head_dim": args.head_dim(),
        "intermediate_size": args.ffn_hidden_dim(),
        "use_sliding_window": false,
        "sliding_window": null,
    });
    let (false, Some(moe)) = (args.moe_layers().is_empty(), &args.moe_args) else { return config };
    for (name, value) in [
        ("moe_intermediate_size", json!(args.moe_hidden_dim())),
        ("num_experts", json!(moe.num_experts)),
        ("num_experts_per_tok", json!(moe.top_k)),
        ("norm_topk_prob", json!(moe.route_norm)),
        ("decoder_sparse_step", json!(args.interleave_moe_layer_step)),
        ("mlp_only_layers", json!((0..args.n_dense_layers).collect::<Vec<_>>())),
    ] {
        config[name] = value;
    }
    config
}
