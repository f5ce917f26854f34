//! `llama4_text`, and the text model of `llama4`.

use serde_json::{Value, json};

use super::common::plain_args;
use super::fields::Fields;
use crate::models::args::{AttnType, DecoderArgs, MoeArgs};

/// Positions that attend to each other, where a config says nothing else.
const CHUNK_SIZE: usize = 8192;

pub fn args(fields: &mut Fields) -> DecoderArgs {
    let mut args = plain_args(fields, 500_000.0);
    args.norm_eps = fields.number("rms_norm_eps", 1e-5);
    fields.expect_off("use_qk_norm");
    args.interleave_moe_layer_step = fields.size("interleave_moe_layer_step", Some(1));
    args.moe_args = Some(MoeArgs {
        num_experts: fields.size("num_local_experts", None),
        top_k: fields.size("num_experts_per_tok", None),
        ..Default::default()
    });
    match &fields.config["moe_layers"] {
        Value::Null => {}
        Value::Array(list) if list.is_empty() => args.moe_args = None,
        list if *list == json!(args.moe_layers()) => {}
        list => {
            let step = args.interleave_moe_layer_step;
            fields.fault(format!("moe_layers: {list} is not every layer of interleave_moe_layer_step {step}"));
        }
    }
    read_rotary_layers(fields, &mut args);

    let n_moe_layers = args.moe_layers().len();
    args.hidden_dim = (n_moe_layers < args.n_layers).then(|| fields.size("intermediate_size_mlp", None));
    args.moe_inter_dim = (n_moe_layers > 0).then(|| fields.size("intermediate_size", None));
    args
}

/// `no_rope_layers` (0: no rotary positions), `layer_types` and `attention_chunk_size`.
fn read_rotary_layers(fields: &mut Fields, args: &mut DecoderArgs) {
    let interval = fields.size("no_rope_layer_interval", Some(4));
    let rotary: Vec<bool> = match fields.config["no_rope_layers"].as_array() {
        Some(list) if !list.is_empty() => list.iter().map(|flag| *flag != json!(0)).collect(),
        _ => (0..args.n_layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect(),
    };
    let nope: Vec<usize> = (0..rotary.len()).filter(|&layer| !rotary[layer]).collect();
    args.every_n_layers_nope = match nope[..] {
        [] => None,
        [0] => Some(args.n_layers),
        [0, n, ..] if nope.iter().copied().eq((0..args.n_layers).step_by(n)) => Some(n),
        _ => {
            fields.fault(format!(
                "no_rope_layers: layers {nope:?} have no rotary positions; titan's every_n_layers_nope = n means 0, n, 2n, ..."
            ));
            None
        }
    };
    if !nope.is_empty() {
        fields.expect_off("attn_temperature_tuning");
    }

    let is_chunked: Vec<bool> = match fields.config["layer_types"].as_array() {
        Some(types) => types.iter().map(|kind| *kind == json!("chunked_attention")).collect(),
        None => rotary.clone(),
    };
    let chunk = fields.size("attention_chunk_size", Some(CHUNK_SIZE));
    if !is_chunked.contains(&true) {
        return;
    }
    if is_chunked != rotary {
        fields.fault("layer_types: chunked attention must be that of all rotary layers, or of none");
    }
    if args.every_n_layers_nope.is_some() {
        args.attn_type = AttnType::Flex;
        args.fixed_attn_block_size = Some(chunk);
    } else {
        // One block is all that the model sees: chunked and plain attention are the same there.
        args.max_seq_len = args.max_seq_len.min(chunk);
    }
}

pub fn config(args: &DecoderArgs) -> Value {
    let moe = args.moe_args.clone().unwrap_or_default();
    let layers = 0..args.n_layers;
    let is_rotary = |layer: usize| args.every_n_layers_nope.is_none_or(|n| !layer.is_multiple_of(n));
    let layer_types = layers.clone().map(|layer| match args.attn_block_size().is_some() && is_rotary(layer) {
        true => "chunked_attention",
        false => "full_attention",
    });
    json!({
        "head_dim": args.head_dim(),
        "intermediate_size": args.moe_hidden_dim(),
        "intermediate_size_mlp": args.ffn_hidden_dim(),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": args.interleave_moe_layer_step,
        "moe_layers": args.moe_layers(),
        "no_rope_layers": layers.map(|layer| is_rotary(layer) as u8).collect::<Vec<_>>(),
        "layer_types": layer_types.collect::<Vec<_>>(),
        // Asked for even where no layer is chunked.
        "attention_chunk_size": args.attn_block_size().unwrap_or(CHUNK_SIZE),
        "use_qk_norm": false,
        "attn_temperature_tuning": false,
    })
}
