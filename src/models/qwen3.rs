//! Qwen 3: normed query and key heads whose width is their own choice, rotation in halves; small models tie their
//! embeddings, and the `A` flavors are mixtures of experts.

use super::args::{DecoderArgs, MoeArgs, RopeLayout, ScoreFunc};

pub const FLAVORS: &[&str] =
    &["debugmodel", "0.6B", "1.7B", "4B", "8B", "14B", "32B", "debugmodel_moe", "30B-A3B", "235B-A22B"];

pub fn family() -> DecoderArgs {
    DecoderArgs {
        vocab_size: 151_936,
        n_kv_heads: Some(8),
        head_dim: Some(128),
        hidden_dim: Some(3072),
        norm_eps: 1e-6,
        qk_norm: true,
        rope_theta: 1_000_000.0,
        rope_layout: RopeLayout::Halves,
        max_seq_len: 4096,
        moe_args: Some(MoeArgs::default()),
        moe_enabled: false,
        moe_inter_dim: Some(768),
        ..Default::default()
    }
}

pub fn flavor(name: &str) -> Option<DecoderArgs> {
    let sized = |dim, n_layers, n_heads, hidden_dim| DecoderArgs {
        dim,
        n_layers,
        n_heads,
        hidden_dim: Some(hidden_dim),
        ..family()
    };
    let tied = |args| DecoderArgs { enable_weight_tying: true, ..args };
    let experts = |num_experts, args| DecoderArgs {
        moe_enabled: true,
        moe_args: Some(MoeArgs {
            num_experts,
            num_shared_experts: 0,
            top_k: 8,
            score_func: ScoreFunc::Softmax,
            route_norm: true,
            score_before_experts: false,
            ..Default::default()
        }),
        ..args
    };
    let debug = DecoderArgs { vocab_size: 2048, ..sized(256, 8, 16, 3072) };
    Some(match name {
        "debugmodel" => tied(debug),
        "0.6B" => tied(sized(1024, 28, 16, 3072)),
        "1.7B" => tied(sized(2048, 28, 16, 6144)),
        "4B" => tied(sized(2560, 36, 32, 9728)),
        "8B" => sized(4096, 36, 32, 12_288),
        "14B" => sized(5120, 40, 40, 17_408),
        "32B" => sized(5120, 64, 64, 25_600),
        "debugmodel_moe" => experts(64, debug),
        "30B-A3B" => {
            DecoderArgs { n_kv_heads: Some(4), max_seq_len: 262_144, ..experts(128, sized(2048, 48, 32, 6144)) }
        }
        "235B-A22B" => DecoderArgs {
            n_kv_heads: Some(4),
            moe_inter_dim: Some(1536),
            rope_theta: 5_000_000.0,
            ..experts(128, sized(4096, 94, 64, 12_288))
        },
        _ => return None,
    })
}
