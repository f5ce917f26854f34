//! `deepseek_v3`, and `deepseek_v2`, whose router takes a softmax and chooses without groups and biases.

use serde_json::{Value, json};

use super::common::with;
use super::fields::Fields;
use crate::models::args::{DecoderArgs, MoeArgs, RopeLayout, ScoreFunc};

pub fn v3_args(fields: &mut Fields) -> DecoderArgs {
    fields.expect("scoring_func", "sigmoid");
    fields.expect("topk_method", "noaux_tc");
    let groups = Some(fields.size("n_group", Some(8))).filter(|groups| *groups > 1);
    let moe_args = MoeArgs {
        num_shared_experts: fields.size("n_shared_experts", Some(1)),
        top_k: fields.size("num_experts_per_tok", Some(8)),
        score_func: ScoreFunc::Sigmoid,
        route_norm: fields.flag("norm_topk_prob", true),
        route_scale: fields.number("routed_scaling_factor", 2.5),
        num_expert_groups: groups,
        num_limited_groups: groups.map(|_| fields.size("topk_group", Some(4))),
        ..Default::default()
    };
    DecoderArgs { n_dense_layers: fields.count("first_k_dense_replace", 3), ..common_args(fields, moe_args) }
}

pub fn v2_args(fields: &mut Fields) -> DecoderArgs {
    fields.expect("scoring_func", "softmax");
    fields.expect("topk_method", "greedy");
    fields.expect("norm_topk_prob", false);
    fields.expect("mlp_bias", false);
    fields.expect("rope_interleave", true);
    let moe_args = MoeArgs {
        num_shared_experts: fields.size("n_shared_experts", Some(2)),
        top_k: fields.size("num_experts_per_tok", None),
        score_func: ScoreFunc::Softmax,
        route_scale: fields.number("routed_scaling_factor", 1.0),
        load_balance_coeff: None,
        ..Default::default()
    };
    DecoderArgs { n_dense_layers: fields.count("first_k_dense_replace", 0), ..common_args(fields, moe_args) }
}

fn common_args(fields: &mut Fields, moe_args: MoeArgs) -> DecoderArgs {
    fields.expect("hidden_act", "silu");
    fields.expect("attention_bias", false);
    fields.expect("moe_layer_freq", 1);
    let n_heads = fields.size("num_attention_heads", None);
    fields.expect("num_key_value_heads", n_heads);
    let mut args = DecoderArgs {
        dim: fields.size("hidden_size", None),
        n_layers: fields.size("num_hidden_layers", None),
        n_heads,
        vocab_size: fields.size("vocab_size", None),
        enable_weight_tying: fields.flag("tie_word_embeddings", false),
        inter_dim: Some(fields.size("intermediate_size", None)),
        moe_inter_dim: Some(fields.size("moe_intermediate_size", None)),
        norm_eps: fields.number("rms_norm_eps", 1e-6),
        max_seq_len: fields.size("max_position_embeddings", Some(4096)),
        rope_layout: if fields.flag("rope_interleave", true) { RopeLayout::Pairs } else { RopeLayout::Halves },
        q_lora_rank: fields.count("q_lora_rank", 0),
        kv_lora_rank: Some(fields.size("kv_lora_rank", None)),
        qk_nope_head_dim: fields.size("qk_nope_head_dim", None),
        qk_rope_head_dim: fields.size("qk_rope_head_dim", None),
        v_head_dim: fields.size("v_head_dim", None),
        moe_args: Some(MoeArgs {
            num_experts: fields.size_of(["n_routed_experts", "num_local_experts"]),
            score_before_experts: false,
            ..moe_args
        }),
        ..Default::default()
    };
    fields.rope(&mut args, 10_000.0);
    args
}

pub fn v3_config(args: &DecoderArgs) -> Value {
    let moe = args.moe_args.clone().unwrap_or_default();
    with(
        common_config(args),
        json!({
            "rope_interleave": args.rope_layout == RopeLayout::Pairs,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "norm_topk_prob": moe.route_norm,
            "n_group": moe.num_expert_groups.unwrap_or(1),
            "topk_group": moe.num_limited_groups.unwrap_or(1),
            // Further tokens at once, which titan does not predict.
            "num_nextn_predict_layers": 0,
        }),
    )
}

pub fn v2_config(args: &DecoderArgs) -> Value {
    with(
        common_config(args),
        json!({ "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": false, "mlp_bias": false }),
    )
}

fn common_config(args: &DecoderArgs) -> Value {
    let moe = args.moe_args.clone().unwrap_or_default();
    json!({
        "num_key_value_heads": args.n_heads,
        "intermediate_size": args.ffn_hidden_dim(),
        "moe_intermediate_size": args.moe_hidden_dim(),
        "first_k_dense_replace": (0..args.n_layers).take_while(|&layer| !args.is_moe_layer(layer)).count(),
        "q_lora_rank": Some(args.q_lora_rank).filter(|rank| *rank > 0),
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_nope_head_dim,
        "qk_rope_head_dim": args.qk_rope_head_dim,
        "v_head_dim": args.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "routed_scaling_factor": moe.route_scale,
    })
}
