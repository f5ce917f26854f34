//! `config.json` of Hugging Face <-> [`DecoderArgs`].
//!
//! Both formats of that file are read: `rope_theta` and `rope_scaling` as transformers 4 has them, and
//! `rope_parameters` of transformers 5. The first is what is written, because both versions load it.

use candle_core::DType;
use serde_json::{Map, Value, json};

use super::Family;
use crate::models::args::{DecoderArgs, FeedForwardKind};
use crate::models::layer::{LayerArgs, Span};
use crate::{Error, Result};
use fields::Fields;

mod common;
mod deepseek;
mod fields;
mod gemma;
mod gpt_oss;
mod llama3;
mod llama4;
mod mistral;
mod olmo2;
mod qwen3;

/// The arguments of the model that a `config.json` describes.
///
/// # Errors
/// [`Error::Model`] naming every field that is missing, malformed, or asks for something that the decoder does not do.
pub fn args_from_config(config: &Value) -> Result<(Family, DecoderArgs)> {
    let model_type = config["model_type"].as_str().unwrap_or("none");
    let family =
        Family::ALL.into_iter().find(|family| family.model_types().contains(&model_type)).ok_or_else(|| {
            let known: Vec<_> = Family::ALL.into_iter().flat_map(|family| family.model_types()).copied().collect();
            Error::Model(format!(
                "config.json: model_type `{model_type}` is not known\n   = known: {}",
                known.join(", ")
            ))
        })?;
    // A model that also sees images describes its text model apart.
    let text_config = if config["text_config"].is_object() { &config["text_config"] } else { config };
    let mut fields = Fields { config: text_config, faults: Vec::new() };
    if let Err(fault) = quantized_block(config) {
        fields.fault(fault);
    }
    let args = match family {
        Family::Llama3 => llama3::args(&mut fields),
        Family::Llama4 => llama4::args(&mut fields),
        Family::Qwen3 => qwen3::args(&mut fields, model_type == "qwen3_moe"),
        Family::DeepSeekV3 => deepseek::v3_args(&mut fields),
        Family::DeepSeekV2 => deepseek::v2_args(&mut fields),
        Family::Mistral => mistral::mistral_args(&mut fields),
        Family::Mixtral => mistral::mixtral_args(&mut fields),
        Family::Olmo2 => olmo2::args(&mut fields),
        Family::Gemma2 => gemma::gemma2_args(&mut fields),
        Family::Gemma3 => gemma::gemma3_args(&mut fields),
        Family::GptOss => gpt_oss::args(&mut fields),
    };
    if fields.faults.is_empty() {
        fields.faults.extend(args.clashes().into_iter().map(|clash| format!("{}: {}", clash.what, clash.remedy)));
    }
    if fields.faults.is_empty() {
        return Ok((family, args));
    }
    Err(Error::Model(format!(
        "config.json describes a model that titan cannot load:\n  {}",
        fields.faults.join("\n  ")
    )))
}

/// The rows and columns that share a scale where a config says that the weights are quantised by blocks, as DeepSeek's
/// are; `None` if they are not quantised, or as GPT-OSS's, whose tensors tell by their names.
///
/// # Errors
/// What the config asks for, if that is another quantisation.
pub fn quantized_block(config: &Value) -> Result<Option<[usize; 2]>, String> {
    let quantization = &config["quantization_config"];
    if quantization.is_null() || quantization["quant_method"] == "mxfp4" {
        return Ok(None);
    }
    let refuse = |what: &str| {
        let known = "\"mxfp4\", and \"fp8\" with format \"e4m3\" and blocks";
        Err(format!("quantization_config: {what} is not supported, only {known}"))
    };
    if quantization["quant_method"] != "fp8" {
        return refuse(&format!("quant_method {}", quantization["quant_method"]));
    }
    if !quantization["fmt"].is_null() && quantization["fmt"] != "e4m3" {
        return refuse(&format!("fmt {}", quantization["fmt"]));
    }
    let size = |i: usize| quantization["weight_block_size"][i].as_u64().filter(|size| *size > 0);
    match (size(0), size(1)) {
        (Some(rows), Some(cols)) => Ok(Some([rows as usize, cols as usize])),
        _ => refuse(&format!("weight_block_size {}", quantization["weight_block_size"])),
    }
}

/// Where two models of equal shapes are different models: `name: here, there`.
pub fn different_structure(here: &DecoderArgs, there: &DecoderArgs) -> Vec<String> {
    differences(here, there, |name| !is_constant(name))
}

/// Where they differ in a constant that one may want to change between two trainings: `name: here, there`.
pub fn different_constants(here: &DecoderArgs, there: &DecoderArgs) -> Vec<String> {
    differences(here, there, is_constant)
}

/// Arguments that change what a model computes, but neither its shapes nor which weight does what.
fn is_constant(name: &str) -> bool {
    const NAMES: [&str; 11] = [
        "norm_eps",
        "final_norm_eps",
        "rope_theta",
        "rope_factor",
        "original_seq_len",
        "beta_fast",
        "beta_slow",
        "yarn_truncate",
        "mscale",
        "floor_scale",
        "attn_scale",
    ];
    NAMES.contains(&name) || name.starts_with("rope_scaling_args")
}

fn differences(here: &DecoderArgs, there: &DecoderArgs, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let (here, there) = (essence(here, here.max_seq_len), essence(there, here.max_seq_len));
    here.iter()
        .filter(|(name, value)| wanted(name) && there.get(*name) != Some(value))
        .map(|(name, value)| format!("{name}: {value} here, {} there", there.get(name).unwrap_or(&Value::Null)))
        .collect()
}

/// What decides the logits of sequences of at most `positions` tokens: arguments with defaults and rules worked out, by
/// name, those of `moe_args` and `rope_scaling_args` with a dot.
fn essence(args: &DecoderArgs, positions: usize) -> Map<String, Value> {
    let serialized = |args: &DecoderArgs| match serde_json::to_value(args) {
        Ok(Value::Object(map)) => map,
        _ => unreachable!("a struct of numbers, flags and names"),
    };
    let mut essence = serialized(args);
    let defaults = serialized(&DecoderArgs::default());
    let layers: Vec<LayerArgs> = (0..args.n_layers).map(|layer| args.layer(layer)).collect();
    let has_experts = layers.iter().any(|layer| layer.feed_forward == FeedForwardKind::Moe);
    let has_dense = layers.iter().any(|layer| layer.feed_forward != FeedForwardKind::Moe);
    let [has_latent, has_heads] = [true, false].map(|it| layers.iter().any(|layer| layer.latent_dim.is_some() == it));
    // What is out of reach makes no difference.
    let spans = layers.iter().map(|layer| match layer.span {
        Span::Sliding(size) if size < positions => json!({ "sliding": size }),
        Span::Chunked(size) if size < positions => json!({ "chunked": size }),
        _ => json!("full"),
    });
    let has_local = layers.iter().any(|layer| layer.span != Span::Full && layer.rope.is_some());
    let is_tuned = args.tunes_temperature(positions) && layers.iter().any(|layer| layer.rope.is_none());
    let worked_out = [
        ("hidden_dim", json!(has_dense.then(|| args.ffn_hidden_dim()))),
        ("moe_inter_dim", json!(has_experts.then(|| args.moe_hidden_dim()))),
        ("n_kv_heads", json!(if has_heads { args.n_kv_heads() } else { args.n_heads })),
        ("head_dim", json!(has_heads.then(|| args.head_dim()))),
        ("final_norm_eps", json!(args.final_norm_eps.unwrap_or(args.norm_eps))),
        ("query_pre_attn_scalar", json!(args.query_pre_attn_scalar.unwrap_or(args.qk_head_dim(has_latent) as f64))),
        ("attention_pattern", spans.collect()),
        ("latent_pattern", layers.iter().map(|layer| layer.latent_dim.is_some()).collect()),
        ("rope_pattern", layers.iter().map(|layer| layer.rope.is_some()).collect()),
        ("feed_forward_pattern", layers.iter().map(|layer| json!(layer.feed_forward)).collect()),
        ("local_rope_theta", json!(args.local_rope_theta.filter(|_| has_local))),
        ("rope_factor", json!(args.yarn_factor())),
        ("qk_unit_norm", json!(args.qk_unit_norm && layers.iter().any(|layer| layer.rope.is_some()))),
        ("attn_temperature_tuning", json!(is_tuned)),
    ];
    essence.extend(worked_out.map(|(name, value)| (name.to_owned(), value)));
    let mut unused = Vec::new();
    if args.yarn_factor().is_none() {
        unused.extend(["original_seq_len", "beta_fast", "beta_slow", "yarn_truncate", "mscale"]);
    }
    if !is_tuned {
        unused.extend(["floor_scale", "attn_scale"]);
    }
    if !has_latent {
        unused.extend(["q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]);
    }
    if !has_experts {
        unused.push("moe_args");
    }
    for name in unused {
        essence.insert(name.to_owned(), defaults[name].clone());
    }
    // Worked out above, or of no account outside of training.
    for name in [
        "inter_dim",
        "multiple_of",
        "ffn_dim_multiplier",
        "auto_scale_hidden_dim",
        "depth_init",
        "attn_type",
        "attn_mask_type",
        "max_seq_len",
        "yarn_always",
        "every_n_layers_nope",
        "fixed_attn_block_size",
        "sliding_window",
        "moe_enabled",
        "n_dense_layers",
        "interleave_moe_layer_step",
    ] {
        essence.remove(name);
    }
    flatten(essence)
}

fn flatten(map: Map<String, Value>) -> Map<String, Value> {
    let mut flat = Map::new();
    for (name, value) in map {
        match value {
            Value::Object(inner) => {
                let inner = inner
                    .into_iter()
                    .filter(|(it, _)| !["load_balance_coeff", "force_load_balance"].contains(&it.as_str()));
                flat.extend(inner.map(|(it, value)| (format!("{name}.{it}"), value)));
            }
            value => drop(flat.insert(name, value)),
        }
    }
    flat
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
    let (architecture, model_type, fields) = match family {
        Family::Llama3 => ("LlamaForCausalLM", "llama", llama3::config(args)),
        Family::Llama4 => ("Llama4ForCausalLM", "llama4_text", llama4::config(args)),
        Family::Qwen3 if !args.moe_layers().is_empty() => ("Qwen3MoeForCausalLM", "qwen3_moe", qwen3::config(args)),
        Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3", qwen3::config(args)),
        Family::DeepSeekV3 => ("DeepseekV3ForCausalLM", "deepseek_v3", deepseek::v3_config(args)),
        Family::DeepSeekV2 => ("DeepseekV2ForCausalLM", "deepseek_v2", deepseek::v2_config(args)),
        Family::Mistral => ("MistralForCausalLM", "mistral", mistral::config(args)),
        Family::Mixtral => ("MixtralForCausalLM", "mixtral", mistral::config(args)),
        Family::Olmo2 => ("Olmo2ForCausalLM", "olmo2", olmo2::config(args)),
        Family::Gemma2 => ("Gemma2ForCausalLM", "gemma2", gemma::gemma2_config(args)),
        Family::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text", gemma::gemma3_config(args)),
        Family::GptOss => ("GptOssForCausalLM", "gpt_oss", gpt_oss::config(args)),
    };
    let config = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": dtype_name(dtype),
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads(),
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len.max(stretched_positions(args)),
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope_scaling(args),
        "hidden_act": "silu",
        "attention_bias": false,
        "tie_word_embeddings": args.enable_weight_tying,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": null,
    });
    let config = common::with(config, fields);
    let faults = inexpressible(args, &config);
    if faults.is_empty() {
        return Ok(config);
    }
    Err(Error::Model(format!(
        "Hugging Face's {architecture} cannot express this model:\n  {}\n   = leave checkpoint.last_save_in_hf off",
        faults.join("\n  ")
    )))
}

/// Arguments that do not come back from a config. Of the last norm's epsilon the export only warns.
fn inexpressible(args: &DecoderArgs, config: &Value) -> Vec<String> {
    let understood = match args_from_config(config) {
        Ok((_, understood)) => essence(&understood, args.max_seq_len),
        Err(error) => return vec![error.to_string()],
    };
    let ours = essence(args, args.max_seq_len);
    let lost = ours.iter().filter(|(name, value)| *name != "final_norm_eps" && understood.get(*name) != Some(value));
    lost.map(|(name, value)| match understood.get(name) {
        Some(theirs) => format!("{name} = {value}, only {theirs}"),
        None => format!("{name} = {value}"),
    })
    .collect()
}

/// How far the scaling of rotary positions reaches; transformers complains of a model that claims less.
fn stretched_positions(args: &DecoderArgs) -> usize {
    let (factor, original) = match (&args.rope_scaling_args, args.yarn_factor()) {
        (Some(scaling), _) => (scaling.scaling_factor, scaling.original_max_position_embeddings),
        (None, Some(factor)) => (factor, args.original_seq_len),
        (None, None) => return 0,
    };
    (factor * original as f64) as usize
}

fn rope_scaling(args: &DecoderArgs) -> Value {
    let yarn = |factor| {
        let mut yarn = json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": args.original_seq_len,
            "beta_fast": args.beta_fast,
            "beta_slow": args.beta_slow,
            "truncate": args.yarn_truncate,
        });
        // Elsewhere transformers takes what is our 1.
        if args.kv_lora_rank.is_some() || args.mscale != 1.0 {
            yarn["mscale"] = json!(args.mscale);
            yarn["mscale_all_dim"] = json!(args.mscale);
        }
        yarn
    };
    match (&args.rope_scaling_args, args.yarn_factor()) {
        (Some(scaling), _) if *scaling == gemma::linear(scaling.scaling_factor) => {
            json!({ "rope_type": "linear", "factor": scaling.scaling_factor })
        }
        (Some(scaling), _) => json!({
            "rope_type": "llama3",
            "factor": scaling.scaling_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }),
        (None, Some(factor)) => yarn(factor),
        (None, None) => Value::Null,
    }
}

impl DecoderArgs {
    /// Fits the model to sequences of `longest` tokens. Whether YaRN applies, which depends on `max_seq_len`, stays as it is.
    pub fn fit_to(&mut self, longest: usize) {
        self.rope_factor = self.yarn_factor();
        self.yarn_always = true;
        self.max_seq_len = longest;
    }

    /// YaRN's factor where it applies.
    fn yarn_factor(&self) -> Option<f64> {
        self.rope_factor.filter(|_| self.yarn_always || self.max_seq_len > self.original_seq_len)
    }

    fn slides(&self, layer: usize) -> bool {
        matches!(self.layer(layer).span, Span::Sliding(_))
    }

    fn moe_layers(&self) -> Vec<usize> {
        (0..self.n_layers).filter(|&layer| self.is_moe_layer(layer)).collect()
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
    use crate::models::args::{MoeArgs, RopeScalingArgs, ScoreFunc};
    use crate::models::{FAMILIES, flavor};

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
    fn everything_the_decoder_cannot_do_is_refused_at_once_and_by_name() {
        let message = faults(|config| {
            config["use_qk_norm"] = json!("l2");
            config["no_rope_layers"] = json!([1, 1, 0]);
            config["floor_scale"] = json!(0);
            config["attention_bias"] = json!(true);
            config["tie_word_embeddings"] = json!("yes");
            config["rope_scaling"] = json!({ "rope_type": "longrope" });
            config["num_key_value_heads"] = json!(7);
            config["moe_layers"] = json!([1, 2]);
            config["quantization_config"] = json!({ "quant_method": "gptq" });
            config["vocab_size"] = json!(-1);
        });
        for name in [
            "use_qk_norm: \"l2\"",
            "no_rope_layers: 3 entries for 4 layers",
            "floor_scale: 0",
            "attention_bias: true",
            "tie_word_embeddings: \"yes\"",
            "rope_type: \"longrope\"",
            "num_attention_heads: 40 is no multiple of num_key_value_heads 7",
            "moe_layers: [1,2]",
            "quant_method \"gptq\"",
            "vocab_size: -1",
        ] {
            assert!(message.contains(name), "{name} is not in\n{message}");
        }
    }

    /// As transformers takes a Llama 4 whose config says nothing of it.
    #[test]
    fn every_fourth_layer_of_llama_4_has_no_rotary_positions_and_the_others_attend_in_chunks() {
        let mut config = scout();
        config["num_hidden_layers"] = json!(10);
        for name in ["no_rope_layers", "use_qk_norm"] {
            config[name] = Value::Null;
        }
        let (_, args) = args_from_config(&config).unwrap();
        assert_eq!(args.rope_pattern, [true, true, true, false]);
        let spans: Vec<_> = (2..5).map(|layer| args.layer(layer).span).collect();
        assert_eq!(spans, [Span::Chunked(8192), Span::Full, Span::Chunked(8192)]);
        assert!(args.qk_unit_norm && args.attn_temperature_tuning);
        assert_eq!((args.floor_scale, args.attn_scale), (8192, 0.1));

        // What only layers without rotary positions would have is as good as off.
        config["no_rope_layers"] = json!(vec![1; 10]);
        config["attn_temperature_tuning"] = json!(4);
        assert!(!args_from_config(&config).unwrap().1.attn_temperature_tuning);
        config["no_rope_layers"][1] = json!(0);
        assert!(args_from_config(&config).unwrap().1.attn_temperature_tuning);
    }

    #[test]
    fn yarn_is_read_in_both_forms_and_only_where_its_scale_is_ours() {
        let scaling = json!({
            "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7,
            "mscale_all_dim": 0.7
        });
        let args = DecoderArgs { max_seq_len: 64, ..flavor("deepseek_v3", "671B").unwrap() };
        let mut old = config_from_args(Family::DeepSeekV3, &args, DType::F32, None, None).unwrap();
        let mut new = old.clone();
        old["rope_scaling"] = scaling.clone();
        old["rope_scaling"]["type"] = json!("yarn");
        new["rope_parameters"] = scaling;
        new["rope_parameters"]["rope_type"] = json!("yarn");
        new["rope_parameters"]["rope_theta"] = json!(10_000.0);
        let [read, as_new] = [&old, &new].map(|config| args_from_config(config).unwrap().1);
        assert_eq!(read, as_new);
        assert_eq!((read.rope_factor, read.mscale, read.original_seq_len), (Some(40.0), 0.7, 4096));
        assert!(read.yarn_always, "or short sequences would go without");

        old["rope_scaling"]["mscale"] = json!(1.0);
        let message = args_from_config(&old).unwrap_err().to_string();
        assert!(message.contains("mscale must be given and equal to mscale_all_dim"), "{message}");
        // Without latents whole heads rotate, and are scaled by what is our mscale of 1.
        let mut llama = scout();
        llama["rope_scaling"] = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8 });
        assert_eq!(args_from_config(&llama).unwrap().1.mscale, 1.0);
        llama["rope_scaling"]["mscale"] = json!(1.0);
        assert!(args_from_config(&llama).unwrap_err().to_string().contains("mscale is not supported"));
    }

    #[test]
    fn blocks_of_scales_are_those_of_the_config() {
        let config = |quantization: Value| json!({ "quantization_config": quantization });
        assert_eq!(quantized_block(&json!({})), Ok(None));
        assert_eq!(quantized_block(&config(json!({ "quant_method": "mxfp4" }))), Ok(None));
        let fp8 = config(json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 64] }));
        assert_eq!(quantized_block(&fp8), Ok(Some([128, 64])));
        for other in [
            json!({ "quant_method": "fp8", "fmt": "e4m3" }),
            json!({ "quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128] }),
            json!({ "quant_method": "gptq" }),
        ] {
            assert!(quantized_block(&config(other)).is_err());
        }
    }

    /// Every flavor whose model Hugging Face has.
    #[test]
    fn flavors_survive_the_way_through_config_json() {
        let mut n_flavors = 0;
        for &(name, flavors) in FAMILIES {
            for args in flavors.iter().filter_map(|it| flavor(name, it)) {
                let Ok(family) = Family::of(name, &args) else { continue };
                let config = config_from_args(family, &args, DType::F32, Some(1), Some(2)).unwrap();
                let (found, described) = args_from_config(&config).unwrap();
                assert_eq!(found, family);
                assert_eq!(different_structure(&args, &described), Vec::<String>::new());
                n_flavors += 1;
            }
        }
        assert!(n_flavors > 20, "{n_flavors}");
    }

    #[test]
    fn what_hugging_face_does_not_have_is_refused_by_name() {
        let refusal = |family, args: &DecoderArgs| {
            config_from_args(family, args, DType::F32, None, None).unwrap_err().to_string()
        };
        let moe = MoeArgs { score_func: ScoreFunc::Softmax, route_scale: 2.5, ..Default::default() };
        let args = DecoderArgs { moe_args: Some(moe), ..Default::default() };
        let message = refusal(Family::Llama4, &args);
        assert!(message.contains("moe_args.score_func = \"softmax\", only \"sigmoid\""), "{message}");
        assert!(message.contains("moe_args.route_scale = 2.5, only 1"), "{message}");
        assert!(refusal(Family::Llama3, &args).contains("feed_forward_pattern"));
        let args = DecoderArgs { qk_norm: true, every_n_layers_nope: Some(4), ..Default::default() };
        let message = refusal(Family::Llama3, &args);
        assert!(message.contains("qk_norm = true, only false") && message.contains("rope_pattern"), "{message}");
    }

    #[test]
    fn arguments_that_decide_no_logit_are_no_difference() {
        let here = DecoderArgs { multiple_of: 512, depth_init: false, max_seq_len: 64, ..Default::default() };
        let there = DecoderArgs { hidden_dim: Some(here.ffn_hidden_dim()), n_kv_heads: Some(32), ..Default::default() };
        assert_eq!(different_structure(&here, &there), Vec::<String>::new());
        let there = DecoderArgs { rope_scaling_args: Some(RopeScalingArgs::default()), qk_norm: true, ..there };
        assert_eq!(different_structure(&here, &there), ["qk_norm: false here, true there"]);
        assert_eq!(different_constants(&here, &there).len(), 1);
    }
}
