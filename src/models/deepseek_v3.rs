//! DeepSeek V3 and the models on the way to it: multi-head latent attention, YaRN, and a mixture of many small experts
//! after the first dense layers.

use super::args::{AttnMaskType, AttnType, DecoderArgs, MoeArgs, ScoreFunc};

pub const FLAVORS: &[&str] = &["debugmodel", "debugmodel_flex_attn", "16B", "236B", "671B"];

pub fn family() -> DecoderArgs {
    DecoderArgs {
        vocab_size: 102_400,
        max_seq_len: 16_384,
        // PyTorch's own default, which TorchTitan leaves there.
        final_norm_eps: Some(f64::from(f32::EPSILON)),
        rope_factor: Some(40.0),
        kv_lora_rank: Some(512),
        moe_args: Some(MoeArgs {
            num_shared_experts: 2,
            score_func: ScoreFunc::Softmax,
            score_before_experts: false,
            ..Default::default()
        }),
        n_dense_layers: 1,
        ..Default::default()
    }
}

pub fn flavor(name: &str) -> Option<DecoderArgs> {
    let sized = |dim, n_layers, n_heads, inter_dim, moe_inter_dim| DecoderArgs {
        dim,
        n_layers,
        n_heads,
        inter_dim: Some(inter_dim),
        moe_inter_dim: Some(moe_inter_dim),
        ..family()
    };
    let experts = |num_experts, top_k, args: DecoderArgs| DecoderArgs {
        moe_args: args.moe_args.map(|moe| MoeArgs { num_experts, top_k, ..moe }),
        ..args
    };
    let documents = |args| DecoderArgs { attn_type: AttnType::Flex, attn_mask_type: AttnMaskType::BlockCausal, ..args };
    let debug = DecoderArgs { vocab_size: 2048, mscale: 0.7, ..experts(8, 3, sized(256, 6, 16, 1024, 256)) };
    Some(match name {
        "debugmodel" => debug,
        "debugmodel_flex_attn" => documents(debug),
        "16B" => documents(DecoderArgs { mscale: 0.7, ..experts(64, 6, sized(2048, 27, 16, 10_944, 1408)) }),
        "236B" => {
            let args = experts(160, 6, sized(5120, 60, 128, 12_288, 1536));
            let moe_args = args.moe_args.clone().map(|moe| MoeArgs { route_scale: 16.0, ..moe });
            documents(DecoderArgs { q_lora_rank: 1536, moe_args, ..args })
        }
        "671B" => documents(DecoderArgs {
            vocab_size: 129_280,
            q_lora_rank: 1536,
            n_dense_layers: 3,
            moe_args: Some(MoeArgs {
                num_experts: 256,
                num_shared_experts: 1,
                top_k: 8,
                score_func: ScoreFunc::Sigmoid,
                route_norm: true,
                route_scale: 2.5,
                score_before_experts: false,
                ..Default::default()
            }),
            ..sized(7168, 61, 128, 18_432, 2048)
        }),
        _ => return None,
    })
}
