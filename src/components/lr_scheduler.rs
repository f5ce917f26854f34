//! The learning rate over a run: linear warmup, a stable stretch, decay.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::warn;

/// The curve by which the learning rate falls, over the decay's `progress` from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecayType {
    /// `1 - progress`
    #[default]
    Linear,
    /// `1 - sqrt(progress)`
    Sqrt,
    /// `(1 + cos(pi * progress)) / 2`
    Cosine,
}

/// Factors on the base learning rate, one per step of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct LrScheduler {
    total_steps: usize,
    warmup_steps: usize,
    decay_steps: usize,
    decay_type: DecayType,
    min_lr_factor: f64,
}

impl LrScheduler {
    /// The decay takes `decay_ratio` of all steps, or every step after the warmup where that is `None`, and ends at
    /// `min_lr_factor`. A warmup or decay that does not fit into `total_steps` is shortened, with a warning.
    pub fn new(
        total_steps: usize,
        warmup_steps: usize,
        decay_ratio: Option<f64>,
        decay_type: DecayType,
        min_lr_factor: f64,
    ) -> Self {
        if warmup_steps > total_steps {
            warn!("{warmup_steps} warmup steps exceed the {total_steps} training steps: warming up for {total_steps}");
        }
        let warmup_steps = warmup_steps.min(total_steps);

        let most = total_steps - warmup_steps;
        // Half to even, as Python rounds: 12.5 is 12.
        let wanted = decay_ratio.map_or(most, |ratio| (total_steps as f64 * ratio).round_ties_even() as usize);
        if wanted > most {
            warn!(
                "{warmup_steps} warmup steps and {wanted} decay steps exceed the {total_steps} training steps: \
                 decaying for {most}"
            );
        }
        Self { total_steps, warmup_steps, decay_steps: wanted.min(most), decay_type, min_lr_factor }
    }

    /// The factor of step `index + 1`, so that `factor(0)` is that of the first step: `1 / warmup_steps`.
    ///
    /// The decay reaches `min_lr_factor` one step after the last, so that the last step still learns; from there on the
    /// factor stays.
    pub fn factor(&self, index: usize) -> f64 {
        let index = index.min(self.total_steps);
        if index < self.warmup_steps {
            return (index + 1) as f64 / self.warmup_steps as f64;
        }
        let last_full_step = self.total_steps - self.decay_steps;
        if index <= last_full_step {
            return 1.0;
        }
        let progress = (index - last_full_step) as f64 / self.decay_steps as f64;
        let left = match self.decay_type {
            DecayType::Linear => 1.0 - progress,
            DecayType::Sqrt => 1.0 - progress.sqrt(),
            DecayType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.min_lr_factor + (1.0 - self.min_lr_factor) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by PyTorch's `LambdaLR`.
    #[derive(Deserialize)]
    struct Row {
        total_steps: usize,
        warmup_steps: usize,
        decay_ratio: Option<f64>,
        decay_type: DecayType,
        min_lr_factor: f64,
        factors: Vec<f64>,
        factor_after_last_step: f64,
    }

    #[test]
    fn factors_equal_those_of_pytorch() {
        let rows: Vec<Row> = serde_json::from_str(include_str!("../../tests/golden/lr_schedules.json")).unwrap();
        assert!(!rows.is_empty());
        for row in rows {
            let schedule =
                LrScheduler::new(row.total_steps, row.warmup_steps, row.decay_ratio, row.decay_type, row.min_lr_factor);
            let expected = row.factors.iter().chain([&row.factor_after_last_step]);
            for (index, expected) in expected.enumerate() {
                let found = schedule.factor(index);
                // Both sides take a handful of f64 operations; the cosine may come from another libm.
                assert!((found - expected).abs() < 1e-12, "{schedule:?} at {index}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn warmup_longer_than_the_run_is_cut_to_the_run() {
        let schedule = LrScheduler::new(10, 200, None, DecayType::Linear, 0.0);
        assert_eq!(schedule.factor(0), 0.1);
        assert_eq!(schedule.factor(9), 1.0);
    }

    #[test]
    fn decay_that_does_not_fit_after_the_warmup_is_shortened() {
        let shortened = LrScheduler::new(100, 40, Some(0.9), DecayType::Sqrt, 0.1);
        assert_eq!(shortened, LrScheduler::new(100, 40, None, DecayType::Sqrt, 0.1));
    }

    #[test]
    fn half_a_decay_step_rounds_to_even() {
        let schedule = LrScheduler::new(25, 0, Some(0.5), DecayType::Linear, 0.0);
        assert_eq!(schedule.decay_steps, 12);
    }

    #[test]
    fn a_run_longer_than_planned_stays_at_the_last_factor() {
        let schedule = LrScheduler::new(20, 5, None, DecayType::Cosine, 0.1);
        assert_eq!(schedule.factor(1000), schedule.factor(20));
        assert_eq!(LrScheduler::new(20, 5, Some(0.0), DecayType::Linear, 0.1).factor(1000), 1.0);
    }
}
