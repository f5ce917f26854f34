//! The loss on data that is not trained on.

use std::time::{Duration, Instant};

use candle_core::Device;

use crate::data::Loader;
use crate::engine::{self, Stages};
use crate::tools::profiler;
use crate::{Error, Result};

/// Measures a model on the same batches every time. Nothing of the training state changes.
pub struct Validator {
    loader: Loader,
    /// Batches to measure on; `None`: all that there are.
    steps: Option<usize>,
}

/// What a validation found.
#[derive(Clone, Copy, Debug)]
pub struct Validated {
    /// Mean over all tokens that are learned, in nats.
    pub loss: f32,
    pub n_tokens: u64,
    pub elapsed: Duration,
}

impl Validator {
    /// `loader` does not repeat.
    pub fn new(loader: Loader, steps: Option<usize>) -> Self {
        Self { loader, steps }
    }

    /// Gives up when `goes_on`, which is asked now and then, fails.
    pub fn run<M: Stages>(
        &mut self,
        model: &M,
        device: &Device,
        vocab_size: usize,
        goes_on: &dyn Fn() -> Result<()>,
    ) -> Result<Validated> {
        let start = Instant::now();
        self.loader.rewind();
        let (mut sum, mut batches, mut n_tokens, mut n_targets) = (0.0, 0, 0, 0);
        while self.steps.is_none_or(|steps| batches < steps) {
            goes_on()?;
            let batch = profiler::span("data_loading").around(|| self.loader.next_batch_while(goes_on))?;
            let Some(batch) = batch else { break };
            n_tokens += batch.labels.len() as u64;
            let counted = batch.n_targets();
            sum += f64::from(engine::evaluate(model, &batch.micro_batch(device, vocab_size)?)?) * counted as f64;
            n_targets += counted;
            batches += 1;
        }
        if batches == 0 {
            return Err(Error::Data("the validation dataset does not fill one batch".into()));
        }
        Ok(Validated { loss: (sum / n_targets as f64) as f32, n_tokens, elapsed: start.elapsed() })
    }
}
