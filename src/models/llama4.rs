//! Llama 4: a mixture of experts with one shared expert; the `_irope` flavors interleave layers without rotary
//! positions and attend in blocks elsewhere.

use super::args::{AttnMaskType, AttnType, DecoderArgs, MoeArgs, RopeScalingArgs};

pub const FLAVORS: &[&str] =
    &["debugmodel", "17bx16e", "17bx128e", "debugmodel_irope", "17bx16e_irope", "17bx128e_irope"];

pub fn family() -> DecoderArgs {
    DecoderArgs {
        vocab_size: 202_048,
        rope_theta: 500_000.0,
        max_seq_len: 1_048_576,
        auto_scale_hidden_dim: true,
        fixed_attn_block_size: Some(8192),
        moe_args: Some(MoeArgs::default()),
        interleave_moe_layer_step: 2,
        ..Default::default()
    }
}

pub fn flavor(name: &str) -> Option<DecoderArgs> {
    let stretched = RopeScalingArgs { scaling_factor: 16.0, high_freq_factor: 1.0, ..Default::default() };
    let large = DecoderArgs {
        dim: 5120,
        n_layers: 48,
        n_heads: 40,
        n_kv_heads: Some(8),
        ffn_dim_multiplier: Some(1.2),
        multiple_of: 2048,
        ..family()
    };
    let experts = |num_experts| Some(MoeArgs { num_experts, ..Default::default() });
    let debug = DecoderArgs { dim: 256, n_layers: 6, n_heads: 16, vocab_size: 2048, ..family() };
    let base = match name.strip_suffix("_irope").unwrap_or(name) {
        "debugmodel" => DecoderArgs { rope_scaling_args: Some(stretched), ..debug },
        "17bx16e" => DecoderArgs {
            max_seq_len: 10_485_760,
            rope_scaling_args: Some(stretched),
            moe_args: experts(16),
            interleave_moe_layer_step: 1,
            ..large
        },
        "17bx128e" => DecoderArgs { moe_args: experts(128), ..large },
        _ => return None,
    };
    Some(match name {
        "debugmodel_irope" => DecoderArgs { fixed_attn_block_size: Some(256), ..interleaved(base) },
        _ if name.ends_with("_irope") => interleaved(base),
        _ => base,
    })
}

/// Layers without rotary positions among layers that attend in blocks.
fn interleaved(base: DecoderArgs) -> DecoderArgs {
    DecoderArgs {
        attn_type: AttnType::Flex,
        attn_mask_type: AttnMaskType::BlockCausal,
        every_n_layers_nope: Some(4),
        ..base
    }
}
