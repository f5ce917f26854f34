//! Hugging Face's names and layouts for the models that have them, in both directions.
//!
//! A [`Mapping`] says how one tensor of a Hugging Face checkpoint is made of titan's parameters; a model is a list of
//! them. `config.json` is translated by [`args_from_config`] and [`config_from_args`].

use candle_core::{D, Tensor};

use crate::models::args::DecoderArgs;
use crate::{Error, Result};

mod config;

pub use config::{args_from_config, config_from_args, different_constants, different_structure, dtype_name};

/// The model families that Hugging Face has a format for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama3,
    Llama4,
}

impl Family {
    /// The family of a `model.name`.
    pub fn of(model_name: &str) -> Result<Self> {
        match model_name {
            "llama3" | "llama3_ft" => Ok(Self::Llama3),
            "llama4" => Ok(Self::Llama4),
            _ => Err(Error::Model(format!(
                "the Hugging Face format of model `{model_name}` is not known\n   = known: llama3, llama4"
            ))),
        }
    }
}

/// One tensor of a file, and the parameters of titan that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The tensor's name in the file.
    pub file: String,
    /// Names of the parameters: one, or for [`Layout::GateUp`] `w1` and `w3`.
    pub parameters: Vec<String>,
    pub layout: Layout,
}

/// How a file's tensor is laid out, seen from titan's parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As titan has it.
    Same,
    /// Rows of each of `n_heads` heads sorted by half of the rotary pair instead of by pair.
    RotaryHalves { n_heads: usize },
    /// `(e, out, in)` as `(e, in, out)`.
    Transposed,
    /// Two parameters `(e, h, d)` as `(e, d, 2 * h)`.
    GateUp,
}

impl Mapping {
    pub fn same(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { file: name.clone(), parameters: vec![name], layout: Layout::Same }
    }

    /// The file tensor's shape, from that of its (first) parameter.
    pub fn file_shape(&self, parameter: &[usize]) -> Vec<usize> {
        match (self.layout, parameter) {
            (Layout::Transposed, &[e, out, input]) => vec![e, input, out],
            (Layout::GateUp, &[e, h, d]) => vec![e, d, 2 * h],
            _ => parameter.to_vec(),
        }
    }

    /// The file's tensor, from its parameters in order.
    pub fn to_file(&self, parameters: &[Tensor]) -> Result<Tensor> {
        let first = &parameters[0];
        Ok(match self.layout {
            Layout::Same => first.clone(),
            Layout::RotaryHalves { n_heads } => swap_rows(first, n_heads, first.dim(0)? / n_heads / 2, 2)?,
            Layout::Transposed => first.transpose(1, 2)?.contiguous()?,
            Layout::GateUp => Tensor::cat(parameters, 1)?.transpose(1, 2)?.contiguous()?,
        })
    }

    /// The parameters, in order, from the file's tensor.
    pub fn to_parameters(&self, file: &Tensor) -> Result<Vec<Tensor>> {
        Ok(match self.layout {
            Layout::Same => vec![file.clone()],
            Layout::RotaryHalves { n_heads } => vec![swap_rows(file, n_heads, 2, file.dim(0)? / n_heads / 2)?],
            Layout::Transposed => vec![file.transpose(1, 2)?.contiguous()?],
            Layout::GateUp => {
                let h = file.dim(D::Minus1)? / 2;
                [0, h]
                    .into_iter()
                    .map(|start| file.narrow(2, start, h)?.transpose(1, 2)?.contiguous())
                    .collect::<candle_core::Result<_>>()?
            }
        })
    }
}

/// Reorders the rows of each head from `(a, b)` to `(b, a)`.
fn swap_rows(weight: &Tensor, n_heads: usize, a: usize, b: usize) -> Result<Tensor> {
    let shape = weight.dims().to_vec();
    Ok(weight.reshape((n_heads, a, b, ()))?.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}

/// Every tensor of a Hugging Face checkpoint of such a model. `expert_bias` has no place there.
pub fn mappings(family: Family, args: &DecoderArgs) -> Vec<Mapping> {
    let prefix = match family {
        Family::Llama3 => "",
        Family::Llama4 => "language_model.",
    };
    let mut mappings = Vec::new();
    let mut add = |file: String, parameters: &[String], layout| {
        let file = format!("{prefix}{file}");
        mappings.push(Mapping { file, parameters: parameters.to_vec(), layout });
    };

    add("model.embed_tokens.weight".into(), &["tok_embeddings.weight".into()], Layout::Same);
    for layer in 0..args.n_layers {
        let theirs = |name: &str| format!("model.layers.{layer}.{name}");
        let ours = |name: &str| format!("layers.{layer}.{name}");
        let halves = |n_heads| match family {
            Family::Llama3 => Layout::RotaryHalves { n_heads },
            Family::Llama4 => Layout::Same,
        };

        add(theirs("input_layernorm.weight"), &[ours("attention_norm.weight")], Layout::Same);
        add(theirs("self_attn.q_proj.weight"), &[ours("attention.wq.weight")], halves(args.n_heads));
        let n_kv_heads = args.n_kv_heads.unwrap_or(args.n_heads);
        add(theirs("self_attn.k_proj.weight"), &[ours("attention.wk.weight")], halves(n_kv_heads));
        add(theirs("self_attn.v_proj.weight"), &[ours("attention.wv.weight")], Layout::Same);
        add(theirs("self_attn.o_proj.weight"), &[ours("attention.wo.weight")], Layout::Same);
        add(theirs("post_attention_layernorm.weight"), &[ours("ffn_norm.weight")], Layout::Same);

        let mut add_feed_forward = |theirs: String, ours: String| {
            for (projection, weight) in [("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")] {
                add(format!("{theirs}.{projection}.weight"), &[format!("{ours}.{weight}.weight")], Layout::Same);
            }
        };
        match family {
            Family::Llama3 => add_feed_forward(theirs("mlp"), ours("feed_forward")),
            Family::Llama4 if !args.is_moe_layer(layer) => {
                add_feed_forward(theirs("feed_forward"), ours("feed_forward"));
            }
            Family::Llama4 => {
                add_feed_forward(theirs("feed_forward.shared_expert"), ours("moe.shared_experts"));
                add(theirs("feed_forward.router.weight"), &[ours("moe.router.gate.weight")], Layout::Same);
                let gate_up = [ours("moe.experts.w1"), ours("moe.experts.w3")];
                add(theirs("feed_forward.experts.gate_up_proj"), &gate_up, Layout::GateUp);
                add(theirs("feed_forward.experts.down_proj"), &[ours("moe.experts.w2")], Layout::Transposed);
            }
        }
    }
    add("model.norm.weight".into(), &["norm.weight".into()], Layout::Same);
    add("lm_head.weight".into(), &["output.weight".into()], Layout::Same);
    mappings
}

/// Tensors of Hugging Face checkpoints that are no part of the text model, or derived from its arguments.
pub fn is_ignored(name: &str) -> bool {
    name.starts_with("vision_model.")
        || name.starts_with("multi_modal_projector.")
        || name.ends_with(".rotary_emb.inv_freq")
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn numbers(shape: &[usize]) -> Tensor {
        let n = shape.iter().product::<usize>() as u32;
        Tensor::arange(0, n, &Device::Cpu).unwrap().reshape(shape).unwrap()
    }

    fn mapping(layout: Layout, parameters: &[&str]) -> Mapping {
        Mapping { file: "x".into(), parameters: parameters.iter().map(|p| p.to_string()).collect(), layout }
    }

    #[test]
    fn row_j_of_pair_i_goes_to_j_halves_plus_i() {
        // One head of 4 rows: pairs (0, 1) and (2, 3).
        let q = mapping(Layout::RotaryHalves { n_heads: 2 }, &["wq"]);
        let weight = numbers(&[8, 1]);
        let stored = q.to_file(std::slice::from_ref(&weight)).unwrap();
        assert_eq!(stored.flatten_all().unwrap().to_vec1::<u32>().unwrap(), [0, 2, 1, 3, 4, 6, 5, 7]);
        let back = &q.to_parameters(&stored).unwrap()[0];
        assert_eq!(back.to_vec2::<u32>().unwrap(), weight.to_vec2::<u32>().unwrap());
    }

    #[test]
    fn gate_and_up_lie_side_by_side_and_transposed() {
        let gate_up = mapping(Layout::GateUp, &["w1", "w3"]);
        let (w1, w3) = (numbers(&[1, 2, 3]), numbers(&[1, 2, 3]).affine(1.0, 100.0).unwrap());
        let stored = gate_up.to_file(&[w1.clone(), w3.clone()]).unwrap();
        assert_eq!(stored.dims(), gate_up.file_shape(w1.dims()));
        assert_eq!(stored.to_vec3::<u32>().unwrap()[0], [[0, 3, 100, 103], [1, 4, 101, 104], [2, 5, 102, 105]]);
        let back = gate_up.to_parameters(&stored).unwrap();
        assert_eq!(back[0].to_vec3::<u32>().unwrap(), w1.to_vec3::<u32>().unwrap());
        assert_eq!(back[1].to_vec3::<u32>().unwrap(), w3.to_vec3::<u32>().unwrap());
    }
}
