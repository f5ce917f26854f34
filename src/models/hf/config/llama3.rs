//! `llama`: Llama 2 and 3, SmolLM, and the many models of the same kind.

use serde_json::{Value, json};

use super::common::plain_args;
use super::fields::Fields;
use crate::models::args::DecoderArgs;

pub fn args(fields: &mut Fields) -> DecoderArgs {
    fields.expect("mlp_bias", false);
    DecoderArgs { hidden_dim: Some(fields.size("intermediate_size", None)), ..plain_args(fields, 10_000.0) }
}

pub fn config(args: &DecoderArgs) -> Value {
    json!({ "head_dim": args.head_dim(), "intermediate_size": args.ffn_hidden_dim(), "mlp_bias": false })
}
