//! `config.json` of Hugging Face <-> [`DecoderArgs`].
//!
//! Both formats of that file are read: `rope_theta` and `rope_scaling` as transformers 4 has them, and
//! `rope_parameters` of transformers 5. The first is what is written, because both versions load it.

use candle_core::DType;
use serde_json::{Value, json};

use super::Family;
use crate::models::args::{AttnType, DecoderArgs, MoeArgs, RopeScalingArgs, ScoreFunc};
use crate::{Error, Result};

/// Beyond any model, and small enough that products of two sizes stay exact.
const MAX_SIZE: u64 = 1 << 24;

/// The arguments of the model that a `config.json` describes.
///
/// # Errors
/// [`Error::Model`] naming every field that is missing, malformed, or asks for something that the decoder does not do.
pub fn args_from_config(config: &Value) -> Result<(Family, DecoderArgs)> {
    let model_type = config["model_type"].as_str().unwrap_or("none");
    let (family, text_config) = match model_type {
        "llama" => (Family::Llama3, config),
        "llama4_text" => (Family::Llama4, config),
        "llama4" => (Family::Llama4, &config["text_config"]),
        other => {
            return Err(Error::Model(format!(
                "config.json: model_type `{other}` is not known\n   = known: llama, llama4, llama4_text"
            )));
        }
    };
    let mut fields = Fields { config: text_config, faults: Vec::new() };
    if !config["quantization_config"].is_null() {
        fields.fault("quantization_config: quantised weights cannot be loaded");
    }
    let args = match family {
        Family::Llama3 => llama3_args(&mut fields),
        Family::Llama4 => llama4_args(&mut fields),
    };
    if fields.faults.is_empty() {
        return Ok((family, args));
    }
    Err(Error::Model(format!(
        "config.json describes a model that titan cannot load:\n  {}",
        fields.faults.join("\n  ")
    )))
}

/// Where two models of equal shapes are different models: `name: here, there`.
pub fn different_structure(here: &DecoderArgs, there: &DecoderArgs) -> Vec<String> {
    let kv_heads = |args: &DecoderArgs| args.n_kv_heads.unwrap_or(args.n_heads);
    let top_k = |args: &DecoderArgs| args.moe_args.as_ref().map(|moe| moe.top_k);
    differences([
        ("n_heads", json!(here.n_heads), json!(there.n_heads)),
        ("n_kv_heads", json!(kv_heads(here)), json!(kv_heads(there))),
        ("moe_args.top_k", json!(top_k(here)), json!(top_k(there))),
        ("every_n_layers_nope", json!(here.every_n_layers_nope), json!(there.every_n_layers_nope)),
    ])
}

/// Where they differ in a constant that one may want to change between two trainings: `name: here, there`.
pub fn different_constants(here: &DecoderArgs, there: &DecoderArgs) -> Vec<String> {
    differences([
        ("norm_eps", json!(here.norm_eps), json!(there.norm_eps)),
        ("rope_theta", json!(here.rope_theta), json!(there.rope_theta)),
        ("rope_scaling_args", json!(here.rope_scaling_args), json!(there.rope_scaling_args)),
    ])
}

fn differences<const N: usize>(pairs: [(&str, Value, Value); N]) -> Vec<String> {
    let different = pairs.into_iter().filter(|(_, here, there)| here != there);
    different.map(|(name, here, there)| format!("{name}: {here} here, {there} there")).collect()
}

fn llama3_args(fields: &mut Fields) -> DecoderArgs {
    let args = common_args(fields, 10_000.0);
    let hidden_dim = fields.size("intermediate_size", None);
    fields.expect("mlp_bias", &json!(false));
    with_widths(fields, args, Some(hidden_dim), None)
}

fn llama4_args(fields: &mut Fields) -> DecoderArgs {
    let mut args = common_args(fields, 500_000.0);
    fields.expect("use_qk_norm", &json!(false));
    args.auto_scale_hidden_dim = true;

    args.interleave_moe_layer_step = fields.size("interleave_moe_layer_step", Some(1));
    args.moe_args = Some(MoeArgs {
        num_experts: fields.size("num_local_experts", None),
        top_k: fields.size("num_experts_per_tok", None),
        ..Default::default()
    });
    match &fields.config["moe_layers"] {
        Value::Null => {}
        Value::Array(list) if list.is_empty() => args.moe_args = None,
        list if *list == json!(moe_layers(&args)) => {}
        list => {
            let step = args.interleave_moe_layer_step;
            fields.fault(format!("moe_layers: {list} is not every layer of interleave_moe_layer_step {step}"));
        }
    }

    read_rotary_layers(fields, &mut args);

    let n_moe_layers = moe_layers(&args).len();
    let dense = (n_moe_layers < args.n_layers).then(|| fields.size("intermediate_size_mlp", None));
    let expert = (n_moe_layers > 0).then(|| fields.size("intermediate_size", None));
    with_widths(fields, args, dense, expert)
}

fn common_args(fields: &mut Fields, default_theta: f64) -> DecoderArgs {
    let dim = fields.size("hidden_size", None);
    let n_heads = fields.size("num_attention_heads", None);
    let n_kv_heads = fields.size("num_key_value_heads", Some(n_heads));
    if !dim.is_multiple_of(n_heads) || !n_heads.is_multiple_of(n_kv_heads) {
        fields.fault(format!(
            "hidden_size {dim}, num_attention_heads {n_heads}, num_key_value_heads {n_kv_heads}: each must be a multiple of the next"
        ));
    }
    fields.expect("head_dim", &json!(dim / n_heads));
    fields.expect("hidden_act", &json!("silu"));
    fields.expect("attention_bias", &json!(false));
    fields.expect("tie_word_embeddings", &json!(false));
    let (rope_theta, rope_scaling_args) = fields.rope(default_theta);
    DecoderArgs {
        dim,
        n_layers: fields.size("num_hidden_layers", None),
        n_heads,
        n_kv_heads: Some(n_kv_heads),
        vocab_size: fields.size("vocab_size", None),
        norm_eps: fields.number("rms_norm_eps", 1e-5),
        rope_theta,
        max_seq_len: fields.size("max_position_embeddings", Some(2048)),
        rope_scaling_args,
        ..Default::default()
    }
}

fn moe_layers(args: &DecoderArgs) -> Vec<usize> {
    (0..args.n_layers).filter(|&layer| args.is_moe_layer(layer)).collect()
}

/// Llama 4's, where a config says nothing else.
const CHUNK_SIZE: usize = 8192;

/// `no_rope_layers` (0: no rotary positions), `layer_types` and `attention_chunk_size` of Llama 4.
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
        fields.expect("attn_temperature_tuning", &json!(false));
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

/// Sets `multiple_of` and `ffn_dim_multiplier` so that the feed-forward widths come out exactly.
fn with_widths(fields: &mut Fields, args: DecoderArgs, dense: Option<usize>, expert: Option<usize>) -> DecoderArgs {
    let common = gcd(dense.unwrap_or(0), expert.unwrap_or(0));
    let active = args.moe_args.as_ref().map_or(1, |moe| moe.top_k + moe.num_shared_experts);
    let natural = 8 * args.dim / 3;
    // Both widths round up from one `hidden`: the dense one directly, the expert's after division by `active`.
    let fit = |multiple_of: usize| {
        let (mut low, mut high) = (1, usize::MAX);
        if let Some(width) = dense {
            (low, high) = (width - multiple_of + 1, width);
        }
        if let Some(width) = expert {
            low = low.max((width - multiple_of + 1) * active);
            high = high.min(width * active + active - 1);
        }
        (low <= high).then(|| (multiple_of, natural.clamp(low, high)))
    };
    let Some((multiple_of, hidden)) = fit(gcd(common, 256)).or_else(|| fit(common)) else {
        fields.fault(format!(
            "intermediate_size {expert:?} beside intermediate_size_mlp {dense:?} with {active} active experts: no ffn_dim_multiplier gives both"
        ));
        return args;
    };
    // Half a unit more, so that truncation cannot fall below `hidden`.
    let ffn_dim_multiplier = (hidden != natural).then(|| (hidden as f64 + 0.5) / natural as f64);
    DecoderArgs { multiple_of, ffn_dim_multiplier, ..args }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Reads fields one by one and gathers what is wrong with them.
struct Fields<'a> {
    config: &'a Value,
    faults: Vec<String>,
}

impl Fields<'_> {
    fn fault(&mut self, fault: impl Into<String>) {
        self.faults.push(fault.into());
    }

    /// A positive integer; 1 where it is faulty, so that reading can go on.
    fn size(&mut self, name: &str, default: Option<usize>) -> usize {
        match (&self.config[name], default) {
            (Value::Null, Some(default)) => default,
            (value, _) => match value.as_u64() {
                Some(size @ 1..=MAX_SIZE) => size as usize,
                _ => {
                    self.fault(format!("{name}: {value} is not a size from 1 to {MAX_SIZE}"));
                    1
                }
            },
        }
    }

    fn number(&mut self, name: &str, default: f64) -> f64 {
        number_of(self.config, name, Some(default), &mut self.faults)
    }

    /// Only one value will do; an absent field stands for it.
    fn expect(&mut self, name: &str, only: &Value) {
        let value = &self.config[name];
        // What transformers takes where Llama 4's config says nothing.
        let absent_means_true = ["use_qk_norm", "attn_temperature_tuning"].contains(&name);
        if value.is_null() && !absent_means_true || value == only {
            return;
        }
        let found = if value.is_null() { "true, its default," } else { &value.to_string() };
        self.fault(format!("{name}: {found} is not supported, only {only}"));
    }

    fn rope(&mut self, default_theta: f64) -> (f64, Option<RopeScalingArgs>) {
        let config = self.config;
        let (theta, scaling) = match &config["rope_parameters"] {
            Value::Null => (config, &config["rope_scaling"]),
            parameters => (parameters, parameters),
        };
        let theta = number_of(theta, "rope_theta", Some(default_theta), &mut self.faults);
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
        let factor = &scaling["partial_rotary_factor"];
        if !factor.is_null() && factor.as_f64() != Some(1.0) {
            self.fault(format!("partial_rotary_factor: {factor} is not supported, only 1"));
        }
        match kind {
            "default" => (theta, None),
            "llama3" => {
                let mut number = |name| number_of(scaling, name, None, &mut self.faults);
                let scaling_args = RopeScalingArgs {
                    scaling_factor: number("factor"),
                    low_freq_factor: number("low_freq_factor"),
                    high_freq_factor: number("high_freq_factor"),
                    original_max_position_embeddings: number("original_max_position_embeddings") as usize,
                };
                (theta, Some(scaling_args))
            }
            other => {
                self.fault(format!("rope_type: \"{other}\" is not supported, only \"default\" and \"llama3\""));
                (theta, None)
            }
        }
    }
}

/// A positive number, or 1 and a fault.
fn number_of(object: &Value, name: &str, default: Option<f64>, faults: &mut Vec<String>) -> f64 {
    match (&object[name], default) {
        (Value::Null, Some(default)) => default,
        (value, _) => value.as_f64().filter(|number| *number > 0.0).unwrap_or_else(|| {
            faults.push(format!("{name}: {value} is not a positive number"));
            1.0
        }),
    }
}

/// The `config.json` with which `transformers` computes what titan does. `dtype` is that of the exported weights.
///
/// # Errors
/// [`Error::Model`] naming every argument that Hugging Face's model of this family does not have.
pub fn config_from_args(
    family: Family,
    args: &DecoderArgs,
    dtype: DType,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
) -> Result<Value> {
    let mut faults = Vec::new();
    match (family, &args.moe_args) {
        (Family::Llama3, Some(_)) => faults.push("moe_args".to_owned()),
        (Family::Llama4, Some(moe)) => refuse_other_routing(moe, &mut faults),
        (_, None) => {}
    }
    if let (Family::Llama3, Some(n)) = (family, args.every_n_layers_nope) {
        faults.push(format!("every_n_layers_nope = {n}"));
    }
    if !faults.is_empty() {
        let name = if family == Family::Llama3 { "Llama" } else { "Llama 4" };
        return Err(Error::Model(format!(
            "Hugging Face's {name} cannot express this model:\n  {}\n   = leave checkpoint.last_save_in_hf off",
            faults.join("\n  ")
        )));
    }

    let mut config = json!({
        "architectures": [if family == Family::Llama3 { "LlamaForCausalLM" } else { "Llama4ForCausalLM" }],
        "model_type": if family == Family::Llama3 { "llama" } else { "llama4_text" },
        "torch_dtype": dtype_name(dtype),
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads.unwrap_or(args.n_heads),
        "head_dim": args.dim / args.n_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len.max(stretched_positions(args)),
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": args.rope_scaling_args.as_ref().map(|scaling| json!({
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        })),
        "hidden_act": "silu",
        "attention_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": null,
    });
    let fields = match family {
        Family::Llama3 => json!({ "intermediate_size": args.ffn_hidden_dim(), "mlp_bias": false }),
        Family::Llama4 => llama4_fields(args),
    };
    if let (Value::Object(config), Value::Object(fields)) = (&mut config, fields) {
        config.extend(fields);
    }
    Ok(config)
}

/// How far the scaling of rotary positions reaches; transformers complains of a model that claims less.
fn stretched_positions(args: &DecoderArgs) -> usize {
    let positions =
        |scaling: &RopeScalingArgs| scaling.scaling_factor * scaling.original_max_position_embeddings as f64;
    args.rope_scaling_args.as_ref().map_or(0, |scaling| positions(scaling) as usize)
}

fn llama4_fields(args: &DecoderArgs) -> Value {
    let moe = args.moe_args.clone().unwrap_or_default();
    let layers = 0..args.n_layers;
    let is_rotary = |layer: usize| args.every_n_layers_nope.is_none_or(|n| !layer.is_multiple_of(n));
    let layer_types = layers.clone().map(|layer| match args.attn_block_size().is_some() && is_rotary(layer) {
        true => "chunked_attention",
        false => "full_attention",
    });
    json!({
        "intermediate_size": args.moe_hidden_dim(),
        "intermediate_size_mlp": args.ffn_hidden_dim(),
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": args.interleave_moe_layer_step,
        "moe_layers": moe_layers(args),
        "no_rope_layers": layers.map(|layer| is_rotary(layer) as u8).collect::<Vec<_>>(),
        "layer_types": layer_types.collect::<Vec<_>>(),
        // Asked for even where no layer is chunked.
        "attention_chunk_size": args.attn_block_size().unwrap_or(CHUNK_SIZE),
        "use_qk_norm": false,
        "attn_temperature_tuning": false,
    })
}

/// Hugging Face's Llama 4 multiplies each expert's input by a sigmoid score, and has one shared expert.
fn refuse_other_routing(moe: &MoeArgs, faults: &mut Vec<String>) {
    if moe.score_func != ScoreFunc::Sigmoid {
        faults.push("moe_args.score_func other than \"sigmoid\"".to_owned());
    }
    if moe.route_norm {
        faults.push("moe_args.route_norm = true".to_owned());
    }
    if moe.route_scale != 1.0 {
        faults.push(format!("moe_args.route_scale = {}", moe.route_scale));
    }
    if !moe.score_before_experts {
        faults.push("moe_args.score_before_experts = false".to_owned());
    }
    if moe.num_shared_experts != 1 {
        faults.push(format!("moe_args.num_shared_experts = {}", moe.num_shared_experts));
    }
}

/// A floating-point type as PyTorch and job files name it.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scout() -> Value {
        json!({
            "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 4, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 202048, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "num_local_experts": 16, "num_experts_per_tok": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "use_qk_norm": false, "no_rope_layers": [1, 1, 1, 1]
        })
    }

    fn faults(change: impl Fn(&mut Value)) -> String {
        let mut config = scout();
        change(&mut config);
        args_from_config(&config).unwrap_err().to_string()
    }

    #[test]
    fn widths_of_published_models_come_out_exactly() {
        for (dim, dense, expert) in
            [(5120, Some(16_384), Some(8192)), (32, Some(88), Some(48)), (5120, None, Some(8192))]
        {
            let mut fields = Fields { config: &Value::Null, faults: Vec::new() };
            let args = DecoderArgs {
                dim,
                auto_scale_hidden_dim: true,
                moe_args: Some(MoeArgs::default()),
                ..Default::default()
            };
            let args = with_widths(&mut fields, args, dense, expert);
            assert_eq!(args.ffn_hidden_dim(), dense.unwrap_or(args.ffn_hidden_dim()));
            assert_eq!(args.moe_hidden_dim(), expert.unwrap());
        }
        for (dim, dense) in [(4096, 14_336), (8192, 28_672), (16_384, 53_248), (48, 176), (2048, 8191), (64, 1)] {
            let mut fields = Fields { config: &Value::Null, faults: Vec::new() };
            let args = with_widths(&mut fields, DecoderArgs { dim, ..Default::default() }, Some(dense), None);
            assert_eq!((args.ffn_hidden_dim(), fields.faults), (dense, vec![]));
        }
    }

    #[test]
    fn everything_the_decoder_cannot_do_is_refused_at_once_and_by_name() {
        let message = faults(|config| {
            config["use_qk_norm"] = Value::Null;
            config["no_rope_layers"] = json!([1, 1, 1, 0]);
            config["attention_bias"] = json!(true);
            config["tie_word_embeddings"] = json!(true);
            config["rope_scaling"] = json!({ "rope_type": "yarn" });
            config["head_dim"] = json!(64);
            config["moe_layers"] = json!([1, 2]);
            config["quantization_config"] = json!({ "quant_method": "fp8" });
            config["vocab_size"] = json!(-1);
        });
        for name in [
            "use_qk_norm: true, its default,",
            "no_rope_layers: layers [3]",
            "attn_temperature_tuning: true, its default,",
            "attention_bias: true",
            "tie_word_embeddings: true",
            "rope_type: \"yarn\"",
            "head_dim: 64 is not supported, only 128",
            "moe_layers: [1,2]",
            "quantization_config",
            "vocab_size: -1",
        ] {
            assert!(message.contains(name), "{name} is not in\n{message}");
        }
    }

    #[test]
    fn rotary_positions_missing_in_layers_0_n_2n_become_every_n_layers_nope() {
        let mut config = scout();
        config["no_rope_layers"] = json!([0, 1, 0, 1]);
        config["attn_temperature_tuning"] = json!(false);
        config["attention_chunk_size"] = json!(64);
        let (_, args) = args_from_config(&config).unwrap();
        assert_eq!(
            (args.every_n_layers_nope, args.attn_type, args.fixed_attn_block_size),
            (Some(2), AttnType::Flex, Some(64))
        );
    }

    #[test]
    fn arguments_survive_the_way_through_config_json() {
        let args = DecoderArgs {
            dim: 256,
            n_layers: 6,
            n_heads: 16,
            n_kv_heads: Some(16),
            vocab_size: 2048,
            max_seq_len: 1 << 20,
            attn_type: AttnType::Flex,
            every_n_layers_nope: Some(4),
            fixed_attn_block_size: Some(256),
            auto_scale_hidden_dim: true,
            rope_scaling_args: Some(RopeScalingArgs {
                scaling_factor: 16.0,
                high_freq_factor: 1.0,
                ..Default::default()
            }),
            moe_args: Some(MoeArgs::default()),
            interleave_moe_layer_step: 2,
            ..Default::default()
        };
        let config = config_from_args(Family::Llama4, &args, DType::F32, Some(1), Some(2)).unwrap();
        assert_eq!(args_from_config(&config).unwrap(), (Family::Llama4, args));
    }

    #[test]
    fn routing_that_hugging_face_does_not_have_is_refused_by_name() {
        let moe = MoeArgs { score_func: ScoreFunc::Softmax, route_scale: 2.5, ..Default::default() };
        let args = DecoderArgs { moe_args: Some(moe), ..Default::default() };
        let message = config_from_args(Family::Llama4, &args, DType::F32, None, None).unwrap_err().to_string();
        assert!(message.contains("score_func") && message.contains("route_scale = 2.5"), "{message}");
    }
}
