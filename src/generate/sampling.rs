use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How a token is drawn from logits.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only the `k` likeliest tokens.
    pub top_k: Option<usize>,
    /// Of those, only the likeliest that together have this probability.
    pub top_p: Option<f32>,
}

impl Sampling {
    /// The id of one token.
    pub fn sample(&self, logits: &[f32], rng: &mut ChaCha8Rng) -> u32 {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        // Of equals the first, so that a seed gives the same text everywhere.
        ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if self.temperature == 0.0 {
            return ids[0];
        }
        ids.truncate(self.top_k.unwrap_or(ids.len()).max(1));
        let max = logits[ids[0] as usize];
        let weight = |id: &u32| f64::from((logits[*id as usize] - max) / self.temperature).exp();
        let mut weights: Vec<f64> = ids.iter().map(weight).collect();
        if let Some(top_p) = self.top_p {
            let total: f64 = weights.iter().sum();
            let mut sum = 0.0;
            let enough = weights.iter().position(|w| {
                sum += w;
                sum >= f64::from(top_p) * total
            });
            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }
        let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
        for (id, weight) in ids.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        ids[weights.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::random::keyed;

    fn counts(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut rng = keyed(1, "test", "sampling");
        let mut counts = vec![0; logits.len()];
        (0..20_000).for_each(|_| counts[sampling.sample(logits, &mut rng) as usize] += 1);
        counts
    }

    #[test]
    fn tokens_come_as_often_as_their_probability_says() {
        let logits = [1f32, 3.0, 2.0, f32::NEG_INFINITY];
        for temperature in [0.5f32, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
            let counts = counts(Sampling { temperature, top_k: None, top_p: None }, &logits);
            for (count, weight) in counts.iter().zip(&weights) {
                let expected = 20_000.0 * weight / weights.iter().sum::<f64>();
                // Five standard deviations of a binomial.
                assert!((*count as f64 - expected).abs() <= 5.0 * expected.sqrt(), "{counts:?} at {temperature}");
            }
        }
    }

    #[test]
    fn a_temperature_of_zero_takes_the_likeliest() {
        let sampling = Sampling { temperature: 0.0, top_k: None, top_p: None };
        assert_eq!(counts(sampling, &[0.0, 5.0, 5.0]), [0, 20_000, 0]);
    }

    #[test]
    fn top_k_and_top_p_leave_out_the_unlikely() {
        let logits = [0f32, 3.0, 2.9, 2.8, -1.0];
        let is_drawn = |top_k, top_p| -> Vec<bool> {
            counts(Sampling { temperature: 1.0, top_k, top_p }, &logits).iter().map(|n| *n > 0).collect()
        };
        assert_eq!(is_drawn(Some(2), None), [false, true, true, false, false]);
        assert_eq!(is_drawn(None, Some(0.3)), [false, true, false, false, false]);
        assert_eq!(is_drawn(Some(4), Some(0.9)), [false, true, true, true, false]);
        assert_eq!(is_drawn(None, Some(1.0)), [true; 5]);
    }
}
