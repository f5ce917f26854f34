//! One decoder, described by data.

use std::collections::BTreeMap;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::args::{DecoderArgs, RopeArgs};
use super::layer::Span;
use super::layers::{Block, ExpertLoad, LayerCache, Norm, Positions};
use super::lora::{self, Adapters, Lora};
use crate::autograd::{Init, Parameter, Precision, StageBuilder, Value};
use crate::engine::{Pass, Stages};
use crate::ops::{self, AttentionMask, LossAndGrad, RopeTable};
use crate::{Error, Result};

/// Tokens of a prompt that go through the model at once: enough for products at full speed, and activations stay small.
const PROMPT_CHUNK: usize = 2048;

/// Token embedding, transformer blocks, and an output layer with the loss.
#[derive(Debug)]
pub struct Decoder {
    args: DecoderArgs,
    tok_embeddings: Arc<Parameter>,
    layers: Vec<Layer>,
    norm: Norm,
    /// The embedding itself, where the two are tied.
    output: Arc<Parameter>,
    /// Memory of the embedding, of each block, of norm and output.
    stages: Vec<StageBuilder>,
    /// The token that ends a document, where masks separate documents.
    eos_id: Option<u32>,
    /// The kinds of rotary positions among the layers, and their tables once the model is allocated.
    ropes: Vec<RopeArgs>,
    rope_tables: Vec<RopeTable>,
    /// Factors on the queries of layers without rotary positions, `(max_seq_len)`.
    query_scales: Option<Tensor>,
    /// The spans of attention among the layers.
    spans: Vec<Span>,
    /// Adapters of the weights, which then are frozen.
    adapters: Option<Adapters>,
}

/// A block, and which of the rope tables and masks of a [`Sequence`] are its.
#[derive(Debug)]
struct Layer {
    block: Block,
    rope: Option<usize>,
    mask: usize,
}

/// What the blocks of one forward pass share: where its tokens stand and what they see.
#[derive(Debug)]
pub struct Sequence {
    ropes: Vec<RopeTable>,
    masks: Vec<AttentionMask>,
    /// Factors on the queries of layers without rotary positions.
    query_scales: Option<Tensor>,
}

/// What the layers keep of the tokens so far, for generation.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    len: usize,
}

impl Decoder {
    /// Describes the model. `eos_id` is needed where `args` mask documents.
    ///
    /// # Errors
    /// [`Error::Model`] if the arguments contradict each other.
    pub fn new(args: &DecoderArgs, eos_id: Option<u32>) -> Result<Self> {
        let clashes: Vec<_> = args.clashes().into_iter().map(|it| format!("{}: {}", it.what, it.remedy)).collect();
        if !clashes.is_empty() {
            return Err(Error::Model(clashes.join("\n")));
        }
        if args.masks_documents() && eos_id.is_none() {
            return Err(Error::Model(
                "attn_mask_type = \"block_causal\" separates documents, but the tokenizer names no end-of-text token; \
                 use \"causal\", or a tokenizer with an eos_token"
                    .into(),
            ));
        }
        let block_names = (0..args.n_layers).map(|layer| format!("layers.{layer}"));
        let names = iter::once("tok_embeddings".into()).chain(block_names).chain(iter::once("head".into()));
        let mut stages: Vec<StageBuilder> = names.map(StageBuilder::named).collect();
        let shape = [args.vocab_size, args.dim];
        let std = (args.dim as f64).powf(-0.5);
        let of_output = Init::Normal { std, limit: 3.0 * std };
        let of_embedding = Init::Normal { std: 1.0, limit: f64::INFINITY };
        let tied = args.enable_weight_tying;
        let init = if tied { of_output } else { of_embedding };
        let tok_embeddings = stages[0].parameter("tok_embeddings.weight", &shape, init);
        let (mut ropes, mut spans) = (Vec::new(), Vec::new());
        let layers = (0..args.n_layers).map(|index| {
            let layer = args.layer(index);
            Layer {
                block: Block::new(&mut stages[index + 1], index, args, &layer),
                rope: layer.rope.map(|rope| index_of(&mut ropes, rope)),
                mask: index_of(&mut spans, layer.span),
            }
        });
        let layers = layers.collect();
        let head = &mut stages[args.n_layers + 1];
        let norm = Norm::new(head, "norm", args).with_eps(args.final_norm_eps.unwrap_or(args.norm_eps));
        let output = if tied { tok_embeddings.clone() } else { head.parameter("output.weight", &shape, of_output) };
        Ok(Self {
            args: args.clone(),
            tok_embeddings,
            layers,
            norm,
            output,
            stages,
            eos_id,
            ropes,
            rope_tables: Vec::new(),
            query_scales: None,
            spans,
            adapters: None,
        })
    }

    /// Freezes the weights, and gives adapters to those that `lora` names; nothing happens without a rank. `seed` decides
    /// what dropout leaves out. Comes before [`Decoder::allocate`].
    ///
    /// # Errors
    /// [`Error::Config`] if a target is no linear layer of the model.
    pub fn adapt(&mut self, lora: &Lora, seed: u64) -> Result<()> {
        self.adapters = lora.rank.map(|rank| Adapters::new(&self.stages, lora, rank, seed)).transpose()?;
        Ok(())
    }

    pub fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// From here on, adapters leave out what pass `pass` of the training does, counted from 1; `None`: nothing.
    pub fn drop_out(&self, pass: Option<u64>) {
        if let Some(adapters) = &self.adapters {
            adapters.dropout().set_pass(pass);
        }
    }

    /// Adds the adapters to their weights, and leaves a model that never had any.
    pub fn merge(&mut self) -> Result<()> {
        for parameter in self.parameters() {
            if let Some(adapter) = parameter.adapter() {
                parameter.set(&lora::merged(parameter, &adapter)?)?;
                parameter.set_adapter(None);
            }
        }
        self.adapters = None;
        Ok(())
    }

    /// What the optimizer updates: the adapters if there are any, else everything.
    pub fn trained(&self) -> &[StageBuilder] {
        self.adapters.as_ref().map_or(&self.stages, Adapters::stages)
    }

    /// The parameters of [`Decoder::trained`].
    pub fn trained_parameters(&self) -> impl Iterator<Item = &Arc<Parameter>> {
        self.trained().iter().flat_map(StageBuilder::parameters)
    }

    /// Takes the memory for weights, and for gradients if the model is to be trained. Frozen weights are held in the compute
    /// dtype only.
    pub fn allocate(&mut self, precision: Precision, device: &Device, with_grads: bool) -> Result<()> {
        self.allocate_apart(precision, device, device, with_grads)
    }

    /// As [`Decoder::allocate`], with what the optimizer updates in the memory of another device.
    pub fn allocate_apart(
        &mut self,
        precision: Precision,
        device: &Device,
        of_optimizer: &Device,
        with_grads: bool,
    ) -> Result<()> {
        let tables = self.ropes.iter().map(|rope| RopeTable::new(rope, self.args.max_seq_len, device));
        self.rope_tables = tables.collect::<Result<_>>()?;
        let scales = self.args.query_scales(self.args.max_seq_len);
        self.query_scales = scales.map(|scales| Tensor::new(scales, device)).transpose()?;
        self.expert_loads().values().try_for_each(|load| load.allocate(device))?;
        let Some(adapters) = &self.adapters else {
            let (embedding, others) = self.stages.split_first().expect("a model has an embedding");
            let is_copied = self.args.enable_weight_tying || !device.same_device(of_optimizer);
            let of_embedding = if is_copied { precision } else { precision.of_lookups() };
            embedding.allocate_apart(of_embedding, device, of_optimizer, with_grads)?;
            return others.iter().try_for_each(|it| it.allocate_apart(precision, device, of_optimizer, with_grads));
        };
        self.stages.iter().try_for_each(|stage| stage.allocate(precision.frozen(), device, false))?;
        let mut stages = adapters.stages().iter();
        stages.try_for_each(|stage| stage.allocate_apart(precision, device, of_optimizer, with_grads))
    }

    pub fn args(&self) -> &DecoderArgs {
        &self.args
    }

    /// All parameters but those of adapters, in the order of the stages.
    pub fn parameters(&self) -> impl Iterator<Item = &Arc<Parameter>> {
        self.stages.iter().flat_map(StageBuilder::parameters)
    }

    /// The expert loads, by layer.
    pub fn expert_loads(&self) -> BTreeMap<usize, &Arc<ExpertLoad>> {
        let layers = self.layers.iter().enumerate();
        layers.filter_map(|(index, layer)| Some((index, layer.block.expert_load()?))).collect()
    }

    /// Everything that a checkpoint of the model holds: parameters, and the biases of experts. With adapters, these alone.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut state: Vec<(String, Tensor)> =
            self.trained_parameters().map(|p| Ok((p.fqn().to_owned(), p.weights()?))).collect::<Result<_>>()?;
        if self.adapters.is_some() {
            return Ok(state);
        }
        for load in self.expert_loads().values() {
            if let Some(bias) = load.bias() {
                state.push((load.fqn().to_owned(), bias.clone()));
            }
        }
        Ok(state)
    }

    /// Names and shapes of what [`Decoder::state`] holds; needs no memory.
    pub fn state_shapes(&self) -> Vec<(String, Vec<usize>)> {
        match &self.adapters {
            Some(_) => self.trained_parameters().map(|p| (p.fqn().to_owned(), p.shape().to_vec())).collect(),
            None => self.base_shapes(),
        }
    }

    /// Names and shapes of the weights that adapters are for, with the biases of experts.
    pub fn base_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let parameters = self.parameters().map(|p| (p.fqn().to_owned(), p.shape().to_vec()));
        let biases = self.expert_loads().into_values();
        let biases = biases.filter(|load| load.n_biases() > 0);
        let biases = biases.map(|load| (load.fqn().to_owned(), vec![load.n_biases()]));
        parameters.chain(biases).collect()
    }

    /// Overwrites one entry of what [`Decoder::state`] holds, or of [`Decoder::base_shapes`].
    ///
    /// # Errors
    /// [`Error::Model`] if there is no such entry.
    pub fn set(&self, fqn: &str, values: &Tensor) -> Result<()> {
        let mut parameters = self.parameters().chain(self.trained_parameters());
        if let Some(parameter) = parameters.find(|parameter| parameter.fqn() == fqn) {
            return parameter.set(values);
        }
        match self.expert_loads().values().find(|load| load.fqn() == fqn) {
            Some(load) => load.set_bias(values),
            None => Err(Error::Model(format!("the model has no parameter {fqn}"))),
        }
    }

    /// Number of parameters, without those of adapters. Biases of experts are not trained and do not count.
    pub fn n_params(&self) -> usize {
        self.stages.iter().map(StageBuilder::numel).sum()
    }

    /// What weights, gradients and optimizer state take in training. In floating point, where absurd sizes do not wrap around.
    pub fn training_bytes(&self, precision: Precision) -> f64 {
        let count = |stages: &[StageBuilder]| {
            stages.iter().flat_map(StageBuilder::parameters).map(|parameter| parameter.numel() as f64).sum::<f64>()
        };
        if self.adapters.is_some() {
            let frozen = count(&self.stages) * precision.frozen_bytes() as f64;
            return count(self.trained()) * precision.training_bytes() as f64 + frozen;
        }
        let looked_up = if self.args.enable_weight_tying { 0.0 } else { count(&self.stages[..1]) };
        (count(&self.stages) - looked_up) * precision.training_bytes() as f64
            + looked_up * precision.of_lookups().training_bytes() as f64
    }

    /// Number of parameters that a token meets: an expert's count as often as it is chosen.
    pub fn n_active_params(&self) -> usize {
        self.parameters().map(|p| self.n_active(p)).sum()
    }

    fn n_active(&self, parameter: &Parameter) -> usize {
        match &self.args.moe_args {
            Some(moe) if parameter.fqn().contains(".moe.experts.") => parameter.numel() * moe.top_k / moe.num_experts,
            _ => parameter.numel(),
        }
    }

    /// Floating-point operations to train on one token, forward and backward: 6 per weight that a token meets (an
    /// expert counts as often as it is chosen, the embedding only where it is the output layer too; a frozen weight 4, as
    /// it has no gradient), and in each layer `6 · n_heads · (width of a key + width of a value) · seq_len` for attention.
    ///
    /// # Source
    /// Chowdhery et al., arXiv:2204.02311, appendix B.
    pub fn flops_per_token(&self, seq_len: usize) -> u64 {
        let is_used = |p: &Parameter| self.args.enable_weight_tying || !std::ptr::eq(p, &*self.tok_embeddings);
        let active: usize = self.parameters().filter(|p| is_used(p)).map(|p| self.n_active(p)).sum();
        let head_dims = |index| {
            let is_latent = self.args.layer(index).latent_dim.is_some();
            self.args.qk_head_dim(is_latent) + self.args.value_head_dim(is_latent)
        };
        let attention = (0..self.args.n_layers).map(head_dims).sum::<usize>() * self.args.n_heads * seq_len;
        let of_weights = match &self.adapters {
            None => 6 * active,
            Some(adapters) => 4 * active + 6 * adapters.stages().iter().map(StageBuilder::numel).sum::<usize>(),
        };
        (of_weights + 6 * attention) as u64
    }

    /// The logits of all tokens, `(b, s, vocab_size)`, in f32.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let sequence = self.context(tokens, None)?;
        let mut x = self.embed(tokens)?;
        for layer in 0..self.n_blocks() {
            x = self.block(layer, &Value::constant(x), &sequence, Pass::Evaluation)?.tensor().clone();
        }
        self.output(x)
    }

    /// An empty cache.
    pub fn cache(&self) -> KvCache {
        KvCache { layers: self.layers.iter().map(|_| LayerCache::default()).collect(), len: 0 }
    }

    /// The logits that follow `tokens`, `(b, s)`, which continue what `cache` holds: `(b, vocab_size)`, in f32.
    ///
    /// # Errors
    /// [`Error::Model`] if that is more than `max_seq_len` positions.
    pub fn next_logits(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (_, s) = tokens.dims2()?;
        let last = (s - 1) / PROMPT_CHUNK * PROMPT_CHUNK;
        // On a thread of the pool parallel loops begin at once; from elsewhere each would have to wake the pool.
        rayon::scope(|_| {
            for first in (0..last).step_by(PROMPT_CHUNK) {
                self.extend(&tokens.narrow(1, first, PROMPT_CHUNK)?, cache)?;
            }
            let x = self.extend(&tokens.narrow(1, last, s - last)?, cache)?;
            Ok(self.output(x.narrow(1, s - last - 1, 1)?)?.squeeze(1)?)
        })
    }

    /// The residual stream after the last block, `(b, s, dim)`, for `tokens` that continue what `cache` holds.
    fn extend(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let (b, s) = tokens.dims2()?;
        let positions = cache.len..cache.len + s;
        // Generation continues one document, so that nothing separates its tokens.
        let sequence = self.positions(AttentionMask::causal(), b, positions.clone())?;
        cache.len = positions.end;
        let mut x = self.embed(tokens)?;
        for (layer, cache) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(&Value::constant(x), &sequence, Pass::Evaluation, Some(cache))?.tensor().clone();
        }
        Ok(x)
    }

    fn output(&self, x: Tensor) -> Result<Tensor> {
        ops::logits(self.norm.forward(&Value::constant(x))?.tensor(), &self.output, self.logit_softcap())
    }

    /// An embedding, or its gradient, times the embedding multiplier.
    fn scaled_embedding(&self, x: Tensor) -> Result<Tensor> {
        match self.args.embedding_multiplier {
            1.0 => Ok(x),
            factor => ops::scale_tensor(&x, factor as f32),
        }
    }

    fn logit_softcap(&self) -> Option<f32> {
        self.args.logit_softcap.map(|cap| cap as f32)
    }

    fn positions(&self, mask: AttentionMask, rows: usize, positions: Range<usize>) -> Result<Sequence> {
        let max_seq_len = self.args.max_seq_len;
        if positions.end > max_seq_len {
            return Err(Error::Model(format!(
                "{} positions are more than this model's max_seq_len of {max_seq_len}",
                positions.end
            )));
        }
        let masks = self.spans.iter().map(|span| match *span {
            Span::Full => mask.clone(),
            Span::Sliding(size) => mask.clone().within_window(size, rows, positions.clone()),
            Span::Chunked(size) => mask.clone().within_blocks(size, rows, positions.clone()),
        });
        let masks = masks.collect();
        let ropes = self.rope_tables.iter().map(|table| table.narrow(positions.start, positions.len()));
        let scales = self.query_scales.as_ref().filter(|_| self.args.tunes_temperature(positions.end));
        let query_scales = scales.map(|scales| scales.narrow(0, positions.start, positions.len())).transpose()?;
        Ok(Sequence { ropes: ropes.collect::<Result<_>>()?, masks, query_scales })
    }
}

impl Layer {
    fn forward(&self, x: &Value, sequence: &Sequence, pass: Pass, cache: Option<&mut LayerCache>) -> Result<Value> {
        let positions = Positions {
            rope: self.rope.map(|rope| &sequence.ropes[rope]),
            mask: &sequence.masks[self.mask],
            query_scales: sequence.query_scales.as_ref().filter(|_| self.rope.is_none()),
        };
        self.block.forward(x, &positions, pass, cache)
    }
}

impl Stages for Decoder {
    type Context = Sequence;

    fn stages(&self) -> &[StageBuilder] {
        &self.stages
    }

    fn context(&self, tokens: &Tensor, document_starts: Option<&[u32]>) -> Result<Sequence> {
        let (b, s) = tokens.dims2()?;
        let mask = AttentionMask::causal();
        let mask = match (document_starts, self.eos_id) {
            (Some(starts), _) => mask.raised_to(starts.to_vec()),
            (None, Some(eos_id)) if self.args.masks_documents() => {
                mask.within_documents(&tokens.flatten_all()?.to_vec1::<u32>()?, s, eos_id)
            }
            (None, _) => mask,
        };
        self.positions(mask, b, 0..s)
    }

    fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let x = ops::embedding(tokens, &self.tok_embeddings)?;
        self.scaled_embedding(x)
    }

    fn embed_backward(&self, tokens: &Tensor, dy: &Tensor) -> Result<()> {
        ops::embedding_backward(tokens, &self.tok_embeddings, &self.scaled_embedding(dy.clone())?)
    }

    fn n_blocks(&self) -> usize {
        self.layers.len()
    }

    fn block(&self, layer: usize, x: &Value, sequence: &Sequence, pass: Pass) -> Result<Value> {
        self.layers[layer].forward(x, sequence, pass, None)
    }

    fn loss(&self, x: Tensor, labels: &Tensor) -> Result<Tensor> {
        let x = self.norm.forward(&Value::constant(x))?;
        ops::cross_entropy_loss(x.tensor(), &self.output, self.logit_softcap(), labels)
    }

    fn loss_grad(&self, x: Tensor, labels: &Tensor, scale: f64) -> Result<LossAndGrad> {
        let x = self.norm.forward(&Value::input(x))?;
        let LossAndGrad { loss, dx } =
            ops::cross_entropy_grad(x.tensor(), &self.output, self.logit_softcap(), labels, scale)?;
        Ok(LossAndGrad { loss, dx: x.backward(dx)? })
    }
}

/// The index of `item` in `items`, to which it is added if it is new.
fn index_of<T: PartialEq>(items: &mut Vec<T>, item: T) -> usize {
    items.iter().position(|it| *it == item).unwrap_or_else(|| {
        items.push(item);
        items.len() - 1
    })
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::models::args::{AttnMaskType, AttnType};
    use crate::models::{self, initialize};
    use crate::ops::testing::assert_close;

    /// Prompts on both sides of the sizes at which kernels change, then single tokens.
    #[test]
    fn tokens_that_come_bit_by_bit_have_the_logits_of_the_whole_sequence() -> Result<()> {
        for (family, flavor) in [
            ("llama3", "debugmodel"),
            ("llama4", "debugmodel_irope"),
            ("qwen3", "debugmodel"),
            ("deepseek_v3", "debugmodel"),
        ] {
            let base = models::flavor(family, flavor).expect("a known flavor");
            let args = DecoderArgs {
                dim: 64,
                n_layers: 4,
                n_heads: 4,
                n_kv_heads: base.kv_lora_rank.is_none().then_some(2),
                head_dim: base.head_dim.map(|_| 24),
                kv_lora_rank: base.kv_lora_rank.map(|_| 40),
                qk_rope_head_dim: 16,
                vocab_size: 500,
                max_seq_len: PROMPT_CHUNK + 20,
                fixed_attn_block_size: Some(50),
                attn_type: AttnType::Flex,
                attn_mask_type: AttnMaskType::Causal,
                every_n_layers_nope: Some(4),
                ..base
            };
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 5e-2)] {
                let mut model = Decoder::new(&args, None)?;
                model.allocate(Precision { storage: dtype, compute: dtype }, &Device::Cpu, false)?;
                model.parameters().try_for_each(|parameter| initialize(parameter, 0))?;
                for prompt in [1, 5, 40, PROMPT_CHUNK + 3] {
                    let s = prompt + 10;
                    let ids: Vec<u32> = (0..s).map(|i| (i * 7919 % 500) as u32).collect();
                    let tokens = Tensor::from_vec(ids, (1, s), &Device::Cpu)?;
                    let expected = model.logits(&tokens)?;
                    let mut cache = model.cache();
                    let mut end = 0;
                    for n in [prompt, 1, 1, 1, 7] {
                        let logits = model.next_logits(&tokens.narrow(1, end, n)?, &mut cache)?;
                        end += n;
                        let what = format!("{family} in {dtype:?}, token {end} after a prompt of {prompt}");
                        if let Some(latent) = args.kv_lora_rank {
                            let width = latent + args.qk_rope_head_dim;
                            assert!(cache.layers.iter().all(|layer| layer.width() == width), "{what}");
                        }
                        assert_close(&what, &logits, &expected.narrow(1, end - 1, 1)?.squeeze(1)?, tolerance)?;
                    }
                }
            }
        }
        Ok(())
    }
}
