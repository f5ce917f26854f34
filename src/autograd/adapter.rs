use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand_chacha::ChaCha8Rng;

use super::Parameter;
use crate::tools::random::keyed;

/// A trainable addition of low rank to a frozen weight `W`: `x` meets `W + scale · B A`, and on its way to `A` loses what
/// `dropout` says.
///
/// # Source
/// Hu et al., arXiv:2106.09685.
#[derive(Debug)]
pub struct Adapter {
    /// `(rank, in)`.
    pub a: Arc<Parameter>,
    /// `(out, rank)`.
    pub b: Arc<Parameter>,
    pub scale: f32,
    pub dropout: Arc<Dropout>,
}

/// Which elements are left out in the pass under way: by random numbers that depend on seed, pass and place alone, so that a
/// stage that is computed again leaves out the same.
#[derive(Debug)]
pub struct Dropout {
    probability: f64,
    seed: u64,
    /// 0: nothing is left out.
    pass: AtomicU64,
}

impl Dropout {
    /// Leaves nothing out until the first pass begins.
    pub fn new(probability: f64, seed: u64) -> Self {
        Self { probability, seed, pass: AtomicU64::new(0) }
    }

    /// From here on, what pass `pass` of the training leaves out, counted from 1; `None`: nothing, as in evaluation.
    pub fn set_pass(&self, pass: Option<u64>) {
        self.pass.store(pass.unwrap_or(0), Ordering::Relaxed);
    }

    /// Whether anything is ever left out.
    pub fn is_on(&self) -> bool {
        self.threshold() > 0
    }

    fn threshold(&self) -> u32 {
        (self.probability * (f64::from(u32::MAX) + 1.0)) as u32
    }

    /// The words that decide over the input of the adapter called `name`, one per element: it stays where its word is at
    /// least the threshold, which comes with the factor that makes up for the others. `None`: all stay.
    pub fn words(&self, name: &str) -> Option<(ChaCha8Rng, u32, f32)> {
        let pass = self.pass.load(Ordering::Relaxed);
        let threshold = self.threshold();
        (pass > 0 && threshold > 0).then(|| {
            let factor = 1.0 / (1.0 - self.probability);
            (keyed(self.seed, "dropout", &format!("{name} {pass}")), threshold, factor as f32)
        })
    }
}
