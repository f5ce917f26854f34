//! `olmo2`: norms after attention and feed-forward, and over all heads of queries and keys at once.

use serde_json::{Value, json};

use super::common::plain_args;
use super::fields::Fields;
use crate::models::args::{DecoderArgs, NormPosition, QkNormOver, RopeLayout};

pub fn args(fields: &mut Fields) -> DecoderArgs {
    DecoderArgs {
        hidden_dim: Some(fields.size("intermediate_size", None)),
        norm_eps: fields.number("rms_norm_eps", 1e-5),
        norm_position: NormPosition::After,
        qk_norm: true,
        qk_norm_over: QkNormOver::Projection,
        rope_layout: RopeLayout::Halves,
        ..plain_args(fields, 10_000.0)
    }
}

pub fn config(args: &DecoderArgs) -> Value {
    json!({ "intermediate_size": args.ffn_hidden_dim() })
}
