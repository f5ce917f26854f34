//! Hugging Face's names and layouts for the models that have them, in both directions.
//!
//! A [`Mapping`] says how tensors of a Hugging Face checkpoint are made of titan's parameters; a model is a list of
//! them, made by [`mappings`]. `config.json` is translated by [`args_from_config`] and [`config_from_args`].

use std::collections::BTreeSet;

use candle_core::DType;

use crate::models::args::{DecoderArgs, NormPosition, RopeLayout};
use crate::{Error, Result};

mod config;
mod layout;

pub use config::{
    args_from_config, config_from_args, different_constants, different_structure, dtype_name, quantized_block,
};
pub use layout::{Layout, Mapping};

/// The model families that Hugging Face has a format for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama3,
    Llama4,
    Qwen3,
    DeepSeekV3,
    DeepSeekV2,
    Mistral,
    Mixtral,
    Olmo2,
    Gemma2,
    Gemma3,
    GptOss,
}

impl Family {
    pub const ALL: [Self; 11] = [
        Self::Llama3,
        Self::Llama4,
        Self::Qwen3,
        Self::DeepSeekV3,
        Self::DeepSeekV2,
        Self::Mistral,
        Self::Mixtral,
        Self::Olmo2,
        Self::Gemma2,
        Self::Gemma3,
        Self::GptOss,
    ];

    /// The family of a `model.name`; of several, the first that can express `args`.
    pub fn of(model_name: &str, args: &DecoderArgs) -> Result<Self> {
        let named: Vec<_> = Self::ALL.into_iter().filter(|family| family.is_named(model_name)).collect();
        match named[..] {
            [] => {
                let known: BTreeSet<&str> = Self::ALL.into_iter().map(Self::name).collect();
                let known = known.into_iter().collect::<Vec<_>>().join(", ");
                Err(Error::Model(format!(
                    "the Hugging Face format of model `{model_name}` is not known\n   = known: {known}"
                )))
            }
            [only] => Ok(only),
            [..] => {
                let mut refusals = Vec::new();
                for family in named {
                    match config_from_args(family, args, DType::F32, None, None) {
                        Ok(_) => return Ok(family),
                        Err(refusal) => refusals.push(refusal.to_string()),
                    }
                }
                let nearest = refusals.into_iter().min_by_key(|refusal| refusal.lines().count()).unwrap_or_default();
                Err(Error::Model(format!("no model of Hugging Face's is like this one. The nearest:\n{nearest}")))
            }
        }
    }

    /// Its `model.name`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama3 => "llama3",
            Self::Llama4 => "llama4",
            Self::Qwen3 => "qwen3",
            Self::DeepSeekV3 | Self::DeepSeekV2 => "deepseek_v3",
            _ => "decoder",
        }
    }

    /// Whether it is that of a `model.name`.
    pub fn is_named(self, model_name: &str) -> bool {
        self.name() == crate::models::family_name(model_name)
    }

    /// What a `config.json` calls it.
    fn model_types(self) -> &'static [&'static str] {
        match self {
            Self::Llama3 => &["llama"],
            Self::Llama4 => &["llama4", "llama4_text"],
            Self::Qwen3 => &["qwen3", "qwen3_moe"],
            Self::DeepSeekV3 => &["deepseek_v3"],
            Self::DeepSeekV2 => &["deepseek_v2"],
            Self::Mistral => &["mistral"],
            Self::Mixtral => &["mixtral"],
            Self::Olmo2 => &["olmo2"],
            Self::Gemma2 => &["gemma2"],
            Self::Gemma3 => &["gemma3_text"],
            Self::GptOss => &["gpt_oss"],
        }
    }

    /// Which numbers of a head its checkpoints rotate together.
    fn rope_layout(self, args: &DecoderArgs) -> RopeLayout {
        match self {
            Self::Llama4 | Self::DeepSeekV2 => RopeLayout::Pairs,
            // Its config says so.
            Self::DeepSeekV3 => args.rope_layout,
            _ => RopeLayout::Halves,
        }
    }
}

/// How a checkpoint stores the experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertTensors {
    /// Each apart, which every version of transformers reads.
    Apart,
    /// `gate_up_proj` and `down_proj` of all experts of a layer, as transformers 5 has them in memory.
    Fused,
}

impl ExpertTensors {
    /// How the checkpoint with these tensors does.
    pub fn of<'a>(mut names: impl Iterator<Item = &'a str>) -> Self {
        if names.any(|name| name.ends_with(".experts.gate_up_proj")) { Self::Fused } else { Self::Apart }
    }
}

/// Every tensor of a Hugging Face checkpoint of such a model.
pub fn mappings(family: Family, args: &DecoderArgs, experts: ExpertTensors) -> Vec<Mapping> {
    let mut mappings =
        Mappings { prefix: if family == Family::Llama4 { "language_model." } else { "" }, list: Vec::new() };
    mappings.same("model.embed_tokens.weight", "tok_embeddings.weight");
    for layer in 0..args.n_layers {
        let theirs = |name: &str| format!("model.layers.{layer}.{name}");
        let ours = |name: &str| format!("layers.{layer}.{name}");
        match args.kv_lora_rank {
            None => mappings.attention(&theirs("self_attn"), &ours("attention"), family, args),
            Some(_) => mappings.latent_attention(&theirs("self_attn"), &ours("attention"), args),
        }
        for (norm, parameter) in norms(args.norm_position) {
            mappings.same(theirs(&format!("{norm}.weight")), ours(&format!("{parameter}.weight")));
        }
        let is_moe = args.is_moe_layer(layer);
        let ffn = theirs(match family {
            Family::Llama4 => "feed_forward",
            Family::Mixtral if is_moe => "block_sparse_moe",
            _ => "mlp",
        });
        match is_moe {
            true => mappings.moe(&ffn, &ours("moe"), family, args, experts),
            false => mappings.feed_forward(&ffn, &ours("feed_forward"), args.mlp_bias),
        }
    }
    mappings.same("model.norm.weight", "norm.weight");
    if !args.enable_weight_tying {
        mappings.same("lm_head.weight", "output.weight");
    }
    mappings.list
}

/// Tensors that such a checkpoint has at least: one for each layer, and for each expert that is stored apart.
pub fn least_tensors(family: Family, args: &DecoderArgs, experts: ExpertTensors) -> usize {
    let apart = experts == ExpertTensors::Apart && !matches!(family, Family::Llama4 | Family::GptOss);
    let moe_layers = (0..args.n_layers).filter(|&layer| args.is_moe_layer(layer)).count();
    let num_experts = args.moe_args.as_ref().map_or(0, |moe| moe.num_experts);
    args.n_layers + if apart { moe_layers * num_experts } else { 0 }
}

/// The norms of a layer, as the file and as titan call them: the same names mean others where there are more of them.
fn norms(position: NormPosition) -> &'static [(&'static str, &'static str)] {
    match position {
        NormPosition::Before => &[("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")],
        NormPosition::After => {
            &[("post_attention_layernorm", "post_attention_norm"), ("post_feedforward_layernorm", "post_ffn_norm")]
        }
        NormPosition::Both => &[
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffn_norm"),
        ],
    }
}

/// The layers of a feed-forward, as files and as titan call them.
const PROJECTIONS: [(&str, &str); 3] = [("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")];

struct Mappings {
    /// Of every name in the file.
    prefix: &'static str,
    list: Vec<Mapping>,
}

impl Mappings {
    fn add(&mut self, files: Vec<String>, parameters: Vec<String>, layout: Layout) {
        let files = files.into_iter().map(|file| format!("{}{file}", self.prefix)).collect();
        self.list.push(Mapping { files, parameters, layout });
    }

    fn one(&mut self, file: impl Into<String>, parameter: impl Into<String>, layout: Layout) {
        self.add(vec![file.into()], vec![parameter.into()], layout);
    }

    fn same(&mut self, file: impl Into<String>, parameter: impl Into<String>) {
        self.one(file, parameter, Layout::Same);
    }

    fn attention(&mut self, theirs: &str, ours: &str, family: Family, args: &DecoderArgs) {
        let rotary = match family.rope_layout(args) == args.rope_layout {
            true => Layout::Same,
            false => Layout::RotaryHalves { head_dim: args.head_dim() },
        };
        let (bias, out_bias) = (args.attention_bias, args.attention_out_bias);
        for (projection, linear, layout, has_bias) in [
            ("q_proj", "wq", rotary, bias),
            ("k_proj", "wk", rotary, bias),
            ("v_proj", "wv", Layout::Same, bias),
            ("o_proj", "wo", Layout::Same, out_bias),
        ] {
            for part in ["weight", "bias"].into_iter().take(1 + usize::from(has_bias)) {
                self.one(format!("{theirs}.{projection}.{part}"), format!("{ours}.{linear}.{part}"), layout);
            }
        }
        if args.attention_sinks {
            self.same(format!("{theirs}.sinks"), format!("{ours}.sinks"));
        }
        if args.qk_norm {
            for norm in ["q_norm", "k_norm"] {
                self.one(format!("{theirs}.{norm}.weight"), format!("{ours}.{norm}.weight"), rotary);
            }
        }
    }

    fn latent_attention(&mut self, theirs: &str, ours: &str, args: &DecoderArgs) {
        let queries: &[_] = match args.q_lora_rank {
            0 => &[("q_proj", "wq")],
            _ => &[("q_a_proj", "wq_a"), ("q_a_layernorm", "q_norm"), ("q_b_proj", "wq_b")],
        };
        let others =
            [("kv_a_proj_with_mqa", "wkv_a"), ("kv_a_layernorm", "kv_norm"), ("kv_b_proj", "wkv_b"), ("o_proj", "wo")];
        for (projection, weight) in queries.iter().chain(&others) {
            self.same(format!("{theirs}.{projection}.weight"), format!("{ours}.{weight}.weight"));
        }
    }

    fn feed_forward(&mut self, theirs: &str, ours: &str, has_bias: bool) {
        for (projection, linear) in PROJECTIONS {
            for part in ["weight", "bias"].into_iter().take(1 + usize::from(has_bias)) {
                self.same(format!("{theirs}.{projection}.{part}"), format!("{ours}.{linear}.{part}"));
            }
        }
    }

    fn moe(&mut self, theirs: &str, ours: &str, family: Family, args: &DecoderArgs, experts: ExpertTensors) {
        let Some(moe) = &args.moe_args else { return };
        let (router, shared) = match family {
            Family::Llama4 => ("router", "shared_expert"),
            Family::GptOss => ("router", "shared_experts"),
            _ => ("gate", "shared_experts"),
        };
        self.same(format!("{theirs}.{router}.weight"), format!("{ours}.router.gate.weight"));
        if family == Family::DeepSeekV3 && moe.load_balance_coeff.is_some() {
            self.same(format!("{theirs}.{router}.e_score_correction_bias"), format!("{ours}.expert_bias"));
        }
        if moe.num_shared_experts > 0 {
            self.feed_forward(&format!("{theirs}.{shared}"), &format!("{ours}.shared_experts"), false);
        }

        let router_bias = format!("{ours}.router.gate.bias");
        let fused = |name: &str| vec![format!("{theirs}.experts.{name}")];
        let ours = |names: &[&str]| names.iter().map(|name| format!("{ours}.experts.{name}")).collect::<Vec<_>>();
        let (gate_up, down) = match (family, experts) {
            (Family::Llama4, _) => (Layout::GateUpTransposed, Layout::Transposed),
            (Family::GptOss, _) => (Layout::GateUpInterleaved, Layout::Transposed),
            (_, ExpertTensors::Fused) => (Layout::GateUp, Layout::Same),
            (_, ExpertTensors::Apart) => {
                for (projection, weight) in PROJECTIONS {
                    let projection = if family == Family::Mixtral { weight } else { projection };
                    let each = 0..moe.num_experts;
                    let files = each.map(|expert| format!("{theirs}.experts.{expert}.{projection}.weight"));
                    self.add(files.collect(), ours(&[weight]), Layout::Experts);
                }
                return;
            }
        };
        self.add(fused("gate_up_proj"), ours(&["w1", "w3"]), gate_up);
        self.add(fused("down_proj"), ours(&["w2"]), down);
        if moe.use_bias {
            self.same(format!("{theirs}.{router}.bias"), router_bias);
            self.add(fused("gate_up_proj_bias"), ours(&["b1", "b3"]), gate_up);
            self.add(fused("down_proj_bias"), ours(&["b2"]), Layout::Same);
        }
    }
}

/// Tensors of Hugging Face checkpoints that are no part of the text model, or derived from its arguments.
pub fn is_ignored(name: &str, args: &DecoderArgs) -> bool {
    // DeepSeek's checkpoints hold layers behind the last, which predict further tokens.
    let beyond_last_layer = || {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        args.kv_lora_rank.is_some() && layer.is_some_and(|layer| layer >= args.n_layers)
    };
    name.starts_with("vision_model.")
        || name.starts_with("multi_modal_projector.")
        || name.ends_with(".rotary_emb.inv_freq")
        || args.enable_weight_tying && name.ends_with("lm_head.weight")
        || beyond_last_layer()
}
