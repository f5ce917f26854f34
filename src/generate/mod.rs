//! Continuing text, one token at a time.

mod chat;
mod pretrained;
mod sampling;

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;

pub use chat::Chat;
pub use pretrained::Pretrained;
pub use sampling::Sampling;

use crate::autograd::Precision;
use crate::data::tokenizer::Tokenizer;
use crate::models::Decoder;
use crate::models::decoder::KvCache;
use crate::tools::device::Choice;
use crate::{Error, Result};

/// More than any model was trained with; tables of positions take memory.
const MAX_POSITIONS: usize = 1 << 24;

/// A trained model with its tokenizer, from a checkpoint alone.
pub struct Generator {
    model: Decoder,
    tokenizer: Tokenizer,
    device: Device,
}

/// How fast text came.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Tokens of the prompt, and the time to read them.
    pub prompt_tokens: usize,
    pub prompt: Duration,
    /// Tokens made, and the time to make them.
    pub new_tokens: usize,
    pub decode: Duration,
}

impl Generator {
    /// `longest`: the most positions that will be asked for, given those that the model was trained with. Adapters are
    /// merged.
    pub fn load(pretrained: &Pretrained, longest: impl Fn(&Tokenizer, usize) -> Result<usize>) -> Result<Self> {
        let tokenizer = pretrained.tokenizer()?;
        let mut args = pretrained.args.clone();
        let longest = longest(&tokenizer, args.max_seq_len)?;
        if longest > MAX_POSITIONS {
            return Err(Error::Usage(format!(
                "{longest} positions are too many\n   = prompt and new tokens together may be {MAX_POSITIONS}"
            )));
        }
        if longest > args.max_seq_len {
            tracing::warn!(
                "{longest} positions are more than the {} that the model was trained with: the text may fall apart",
                args.max_seq_len
            );
        }
        // No table for the millions of positions that a model could have.
        args.fit_to(longest);
        let mut model = Decoder::new(&args, tokenizer.eos_id())?;
        let choice = Choice::of_environment()?;
        tracing::info!("Device: {}; {choice}", choice.name());
        let device = choice.device;
        if let Some((lora, _)) = &pretrained.adapters {
            model.adapt(lora, 0)?;
        }
        // Before memory is taken for a model that the files do not hold.
        pretrained.weights.fit(&model.state_shapes())?;
        // To generate, nothing more precise need be kept.
        let precision = Precision { storage: pretrained.compute, compute: pretrained.compute };
        model.allocate(precision, &device, false)?;
        if let Some((_, base)) = &pretrained.adapters {
            base.load(&model.base_shapes(), |name, tensor| model.set(name, &tensor))?;
        }
        pretrained.weights.load(&model.state_shapes(), |name, tensor| model.set(name, &tensor))?;
        model.merge()?;
        Ok(Self { model, tokenizer, device })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The longest sequence that it takes.
    pub fn max_seq_len(&self) -> usize {
        self.model.args().max_seq_len
    }

    /// Continues `prompt` by at most `max_new_tokens`, until the model ends the text. Hands on each piece of text as
    /// soon as it is whole characters.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no token to begin with; whatever `emit` returns.
    pub fn generate(
        &self,
        prompt: &str,
        max_new_tokens: usize,
        sampling: &Sampling,
        rng: &mut ChaCha8Rng,
        emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<Pace> {
        let ids = self.tokenizer.encode(prompt, true, false)?;
        if ids.is_empty() {
            return Err(Error::Usage("the prompt is empty, and the tokenizer has no token that begins a text".into()));
        }
        let ends = Vec::from_iter(self.tokenizer.eos_id());
        let (_, pace) = self.extend(&mut self.model.cache(), &ids, max_new_tokens, &ends, sampling, rng, emit)?;
        Ok(pace)
    }

    /// Reads `ids`, which continue what `cache` holds, and continues them until one of the tokens `ends` comes. Returns what
    /// it made; all but the last of it is in the cache.
    #[expect(clippy::too_many_arguments, reason = "each is a part of its own of what generation depends on")]
    fn extend(
        &self,
        cache: &mut KvCache,
        ids: &[u32],
        max_new_tokens: usize,
        ends: &[u32],
        sampling: &Sampling,
        rng: &mut ChaCha8Rng,
        mut emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<(Vec<u32>, Pace)> {
        let mut pace = Pace { prompt_tokens: ids.len(), ..Pace::default() };
        let mut text = self.tokenizer.stream();
        let mut next_logits = |ids: &[u32]| -> Result<Vec<f32>> {
            let tokens = Tensor::from_slice(ids, (1, ids.len()), &self.device)?;
            Ok(self.model.next_logits(&tokens, cache)?.squeeze(0)?.to_vec1()?)
        };
        let mut made = Vec::new();

        let start = Instant::now();
        let mut logits = next_logits(ids)?;
        pace.prompt = start.elapsed();
        let start = Instant::now();
        while made.len() < max_new_tokens {
            let id = sampling.sample(&logits, rng);
            made.push(id);
            if ends.contains(&id) {
                break;
            }
            if let Some(piece) = text.push(id)? {
                emit(&piece)?;
            }
            if made.len() < max_new_tokens {
                logits = next_logits(&[id])?;
            }
        }
        if let Some(piece) = text.finish()? {
            emit(&piece)?;
        }
        pace.decode = start.elapsed();
        pace.new_tokens = made.len();
        Ok((made, pace))
    }
}
