//! Continuing text, one token at a time.

mod pretrained;
mod sampling;

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;

pub use pretrained::Pretrained;
pub use sampling::Sampling;

use crate::autograd::Precision;
use crate::data::tokenizer::Tokenizer;
use crate::models::Decoder;
use crate::{Error, Result};

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
    /// `longest`: the most positions that will be asked for.
    pub fn load(pretrained: &Pretrained, longest: impl Fn(&Tokenizer) -> Result<usize>) -> Result<Self> {
        let tokenizer = pretrained.tokenizer()?;
        let mut args = pretrained.args.clone();
        let longest = longest(&tokenizer)?;
        if longest > args.max_seq_len {
            tracing::warn!(
                "{longest} positions are more than the {} that the model was trained with: the text may fall apart",
                args.max_seq_len
            );
        }
        // No table for the millions of positions that a model could have; but where YaRN applies, it must go on to.
        args.rope_factor = args.rope_factor.filter(|_| args.max_seq_len > args.original_seq_len);
        args.max_seq_len = longest.max(args.rope_factor.map_or(1, |_| args.original_seq_len + 1));
        let mut model = Decoder::new(&args, tokenizer.eos_id())?;
        let device = Device::Cpu;
        // To generate, nothing more precise need be kept.
        let precision = Precision { storage: pretrained.compute, compute: pretrained.compute };
        model.allocate(precision, &device, false)?;
        pretrained.weights.load(&model.state_shapes(), |name, tensor| model.set(name, &tensor))?;
        Ok(Self { model, tokenizer, device })
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
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
        mut emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<Pace> {
        let ids = self.tokenizer.encode(prompt, true, false)?;
        if ids.is_empty() {
            return Err(Error::Usage("the prompt is empty, and the tokenizer has no token that begins a text".into()));
        }
        let mut pace = Pace { prompt_tokens: ids.len(), ..Pace::default() };
        let mut cache = self.model.cache();
        let mut text = self.tokenizer.stream();
        let mut next_logits = |ids: &[u32]| -> Result<Vec<f32>> {
            let tokens = Tensor::from_slice(ids, (1, ids.len()), &self.device)?;
            Ok(self.model.next_logits(&tokens, &mut cache)?.squeeze(0)?.to_vec1()?)
        };

        let start = Instant::now();
        let mut logits = next_logits(&ids)?;
        pace.prompt = start.elapsed();
        let start = Instant::now();
        while pace.new_tokens < max_new_tokens {
            let id = sampling.sample(&logits, rng);
            pace.new_tokens += 1;
            if Some(id) == self.tokenizer.eos_id() {
                break;
            }
            if let Some(piece) = text.push(id)? {
                emit(&piece)?;
            }
            if pace.new_tokens < max_new_tokens {
                logits = next_logits(&[id])?;
            }
        }
        if let Some(piece) = text.finish()? {
            emit(&piece)?;
        }
        pace.decode = start.elapsed();
        Ok(pace)
    }
}
