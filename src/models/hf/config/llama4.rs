//! `llama4_text`, and the text model of `llama4`.

use serde_json::{Value, json};

use super::common::{plain_args, shortest};
use super::fields::Fields;
use crate::models::args::{AttentionKind, DecoderArgs, MoeArgs};
use crate::models::layer::Span;

/// Positions that attend to each other, where a config says nothing else.
const CHUNK_SIZE: usize = 8192;

pub fn args(fields: &mut Fields) -> DecoderArgs {
    let mut args = plain_args(fields, 500_000.0);
    args.norm_eps = fields.number("rms_norm_eps", 1e-5);
    args.qk_unit_norm = fields.flag("use_qk_norm", true);
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

/// `no_rope_layers` (0: no rotary positions), `layer_types`, and what goes with layers of either kind.
fn read_rotary_layers(fields: &mut Fields, args: &mut DecoderArgs) {
    let n_layers = args.n_layers;
    let interval = fields.size("no_rope_layer_interval", Some(4));
    let rotary: Vec<bool> = match fields.config["no_rope_layers"].as_array() {
        Some(list) if !list.is_empty() => list.iter().map(|flag| *flag != json!(0)).collect(),
        _ => (0..n_layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect(),
    };
    let is_chunked: Vec<bool> = match fields.config["layer_types"].as_array() {
        Some(types) => types.iter().map(|kind| *kind == json!("chunked_attention")).collect(),
        None => rotary.clone(),
    };
    for (name, n) in [("no_rope_layers", rotary.len()), ("layer_types", is_chunked.len())] {
        if n != n_layers {
            fields.fault(format!("{name}: {n} entries for {n_layers} layers"));
        }
    }
    if is_chunked.contains(&true) {
        args.fixed_attn_block_size = Some(fields.size("attention_chunk_size", Some(CHUNK_SIZE)));
        let kind = |chunked: &bool| if *chunked { AttentionKind::Chunked } else { AttentionKind::Full };
        args.attention_pattern = shortest(is_chunked.iter().map(kind).collect());
    }
    args.qk_unit_norm &= rotary.contains(&true);
    // Some checkpoints of the hub have a number there.
    let tuning = &fields.config["attn_temperature_tuning"];
    let is_off = *tuning == json!(false) || *tuning == json!(0);
    args.attn_temperature_tuning = !is_off && rotary.contains(&false);
    args.floor_scale = fields.size("floor_scale", Some(args.floor_scale));
    args.attn_scale = fields.number("attn_scale", args.attn_scale);
    if rotary.contains(&false) {
        args.rope_pattern = shortest(rotary);
    }
}

pub fn config(args: &DecoderArgs) -> Value {
    let moe = args.moe_args.clone().unwrap_or_default();
    let layers = || (0..args.n_layers).map(|layer| args.layer(layer));
    let chunk = layers().find_map(|layer| if let Span::Chunked(size) = layer.span { Some(size) } else { None });
    let layer_types = layers().map(|layer| match layer.span {
        Span::Chunked(_) => "chunked_attention",
        _ => "full_attention",
    });
    json!({
        "head_dim": args.head_dim(),
        "intermediate_size": args.moe_hidden_dim(),
        "intermediate_size_mlp": args.ffn_hidden_dim(),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": args.interleave_moe_layer_step,
        "moe_layers": args.moe_layers(),
        "no_rope_layers": layers().map(|layer| u8::from(layer.rope.is_some())).collect::<Vec<_>>(),
        "layer_types": layer_types.collect::<Vec<_>>(),
        // Asked for even where no layer is chunked.
        "attention_chunk_size": chunk.unwrap_or(CHUNK_SIZE),
        "use_qk_norm": args.qk_unit_norm,
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": args.floor_scale,
        "attn_scale": args.attn_scale,
    })
}
