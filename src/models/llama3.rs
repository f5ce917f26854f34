//! Llama 3: dense, grouped-query attention, stretched rotary positions.

use super::args::{AttnMaskType, AttnType, DecoderArgs, RopeScalingArgs};

pub const FLAVORS: &[&str] =
    &["debugmodel", "debugmodel_flex_attn", "debugmodel_varlen_attn", "8B", "8B_flex", "8B_varlen", "70B", "405B"];

pub fn family() -> DecoderArgs {
    DecoderArgs {
        vocab_size: 128_256,
        rope_theta: 500_000.0,
        rope_scaling_args: Some(RopeScalingArgs::default()),
        ..Default::default()
    }
}

pub fn flavor(name: &str) -> Option<DecoderArgs> {
    let debug = DecoderArgs { dim: 256, n_layers: 6, n_heads: 16, vocab_size: 2048, ..family() };
    let grouped = DecoderArgs { n_kv_heads: Some(8), ffn_dim_multiplier: Some(1.3), ..family() };
    let small = DecoderArgs { dim: 4096, n_layers: 32, n_heads: 32, multiple_of: 1024, ..grouped.clone() };
    let documents = |attn_type, args| DecoderArgs { attn_type, attn_mask_type: AttnMaskType::BlockCausal, ..args };
    Some(match name {
        "debugmodel" => debug,
        "debugmodel_flex_attn" => documents(AttnType::Flex, debug),
        "debugmodel_varlen_attn" => documents(AttnType::Varlen, debug),
        "8B" => small,
        "8B_flex" => documents(AttnType::Flex, small),
        "8B_varlen" => documents(AttnType::Varlen, small),
        "70B" => DecoderArgs { dim: 8192, n_layers: 80, n_heads: 64, multiple_of: 4096, ..grouped },
        "405B" => DecoderArgs {
            dim: 16_384,
            n_layers: 126,
            n_heads: 128,
            multiple_of: 4096,
            ffn_dim_multiplier: Some(1.2),
            ..grouped
        },
        _ => return None,
    })
}
