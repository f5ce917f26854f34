//! Steps that are not to be trusted: counts those that are skipped, and knows a loss that is out of line.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use crate::config::{self, SpikePolicy};
use crate::{Error, Result};

/// What a run remembers of its losses.
pub struct LossGuard {
    spike_policy: SpikePolicy,
    z_score: f64,
    window: usize,
    max_skipped: usize,
    memory: Memory,
}

/// What a checkpoint keeps.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Memory {
    /// Steps of the whole run that were not applied.
    skipped_steps: usize,
    /// The last losses of applied steps, the newest last; none where nothing is compared with them.
    losses: VecDeque<f32>,
}

impl LossGuard {
    pub fn new(keys: &config::Training) -> Self {
        Self {
            spike_policy: keys.spike_policy,
            z_score: keys.spike_z_score,
            window: keys.spike_window,
            max_skipped: keys.max_skipped_steps,
            memory: Memory::default(),
        }
    }

    /// Why `loss` is out of line with those before it, if it is, and if anybody asked.
    pub fn spike(&self, loss: f64) -> Option<String> {
        let (mean, deviation) = self.past()?;
        (loss > self.bound(mean, deviation)).then(|| {
            let (window, z_score) = (self.window, (loss - mean) / deviation);
            format!(
                "the loss of {loss:.4} is {z_score:.1} standard deviations above that of the last {window} steps, {mean:.4} ± \
                 {deviation:.4}"
            )
        })
    }

    /// The largest loss whose step is applied.
    pub fn max_loss(&self) -> f64 {
        match self.past() {
            Some((mean, deviation)) if self.spike_policy == SpikePolicy::Skip => self.bound(mean, deviation),
            _ => f64::INFINITY,
        }
    }

    /// The largest loss that is in line with others.
    fn bound(&self, mean: f64, deviation: f64) -> f64 {
        mean + self.z_score * deviation
    }

    /// Mean and standard deviation of the losses so far, if a loss is to be compared with them and there are enough.
    fn past(&self) -> Option<(f64, f64)> {
        let losses = &self.memory.losses;
        if self.spike_policy == SpikePolicy::Off || losses.len() < self.window {
            return None;
        }
        let n = losses.len() as f64;
        let losses = || losses.iter().map(|loss| f64::from(*loss));
        let mean = losses().sum::<f64>() / n;
        let variance = losses().map(|loss| (loss - mean).powi(2)).sum::<f64>() / n;
        Some((mean, variance.sqrt()))
    }

    /// Remembers the loss of a step that was applied.
    pub fn applied(&mut self, loss: f64) {
        if self.spike_policy != SpikePolicy::Off {
            self.memory.losses.push_back(loss as f32);
            let beyond = self.memory.losses.len().saturating_sub(self.window);
            self.memory.losses.drain(..beyond);
        }
    }

    /// Counts a step that was not applied, and says why it was not.
    ///
    /// # Errors
    /// [`Error::Training`] if that is one too many.
    pub fn skipped(&mut self, step: usize, why: &str) -> Result<()> {
        let max = self.max_skipped;
        if self.memory.skipped_steps == max {
            return Err(Error::Training(format!(
                "step {step}: {why}; the step was not applied, and training.max_skipped_steps = {max} are skipped already"
            )));
        }
        self.memory.skipped_steps += 1;
        warn!("step {step} is skipped, {} of at most {max}: {why}", self.memory.skipped_steps);
        Ok(())
    }

    pub fn state(&self) -> Value {
        serde_json::to_value(&self.memory).expect("numbers only")
    }

    /// Goes on from what [`LossGuard::state`] was.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if `state` is no guard's.
    pub fn load_state(&mut self, state: &Value) -> Result<()> {
        self.memory = Memory::deserialize(state)
            .map_err(|error| Error::Checkpoint(format!("the saved losses cannot be read: {error}")))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(spike_policy: SpikePolicy) -> LossGuard {
        let keys = config::Training {
            spike_policy,
            spike_window: 4,
            spike_z_score: 3.0,
            max_skipped_steps: 1,
            ..Default::default()
        };
        LossGuard::new(&keys)
    }

    #[test]
    fn a_loss_far_above_a_full_window_is_out_of_line_and_one_below_is_not() {
        let mut guard = guard(SpikePolicy::Log);
        for loss in [9.0, 2.0, 2.2, 1.8] {
            guard.applied(loss);
            assert_eq!(guard.spike(100.0).is_some(), loss == 1.8, "a window of 4 after {loss}");
        }
        // Now 2.0, 2.2, 1.8, 2.0: mean 2, deviation 0.1414.
        guard.applied(2.0);
        assert_eq!([2.4, 2.43, 0.0].map(|loss| guard.spike(loss).is_some()), [false, true, false]);
        assert_eq!(guard.max_loss(), f64::INFINITY);
        guard.spike_policy = SpikePolicy::Skip;
        assert!((2.4..2.43).contains(&guard.max_loss()));
    }

    #[test]
    fn what_is_off_compares_and_remembers_nothing() {
        let mut guard = guard(SpikePolicy::Off);
        (0..9).for_each(|_| guard.applied(2.0));
        assert_eq!(guard.spike(100.0), None);
        assert_eq!(guard.memory, Memory::default());
    }

    #[test]
    fn a_resumed_guard_goes_on_counting_and_comparing() {
        let mut first = guard(SpikePolicy::Skip);
        [2.0, 2.2, 1.8, 0.1 + 0.2].into_iter().for_each(|loss| first.applied(loss));
        first.skipped(5, "a spike").unwrap();
        let mut second = guard(SpikePolicy::Skip);
        second.load_state(&serde_json::from_str(&first.state().to_string()).unwrap()).unwrap();
        assert_eq!(second.memory, first.memory);
        let message = second.skipped(7, "a spike").unwrap_err().to_string();
        assert!(message.contains("step 7: a spike") && message.contains("max_skipped_steps = 1"), "{message}");
    }
}
