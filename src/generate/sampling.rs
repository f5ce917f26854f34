use std::cmp::Ordering;

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
        // Of equals the first, so that a seed gives the same text everywhere.
        let likelier = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        let likeliest = (0..logits.len() as u32).min_by(likelier).expect("a vocabulary has tokens");
        if self.temperature == 0.0 {
            return likeliest;
        }
        let max = logits[likeliest as usize];
        let weight = |id: &u32| f64::from(((logits[*id as usize] - max) / self.temperature).exp());
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        if let Some(top_k) = self.top_k {
            let n = bring_forward(&mut ids, top_k.max(1), likelier);
            ids.truncate(n);
        }
        if let Some(top_p) = self.top_p {
            let enough = f64::from(top_p) * ids.iter().map(weight).sum::<f64>();
            let (mut n, mut sum) = (0, 0.0);
            // Few tokens have most of the probability, and only those need to be in order.
            let mut ordered = 0;
            while n < ids.len() && sum < enough {
                if n == ordered {
                    ordered += bring_forward(&mut ids[n..], 64 + 3 * n, likelier);
                }
                sum += weight(&ids[n]);
                n += 1;
            }
            ids.truncate(n);
        }
        let weights: Vec<f64> = ids.iter().map(weight).collect();
        let mut left = rng.random::<f64>() * weights.iter().sum::<f64>();
        for (id, weight) in ids.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        likeliest // the draw was 1 but for rounding
    }
}

/// Puts the first `n` in order at the front, the others behind them in any order. Returns how many are at the front.
fn bring_forward(ids: &mut [u32], n: usize, order: impl Fn(&u32, &u32) -> Ordering) -> usize {
    let n = n.min(ids.len());
    if n < ids.len() {
        ids.select_nth_unstable_by(n, &order);
    }
    ids[..n].sort_unstable_by(order);
    n
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

    #[test]
    fn a_nucleus_of_any_size_is_that_of_the_sorted_vocabulary() {
        // Of 1,000 tokens of almost equal weight, the likeliest have the highest ids.
        let logits: Vec<f32> = (0..1000).map(|i| i as f32 * 1e-6).collect();
        for n in [1, 63, 64, 65, 257, 999] {
            let counts =
                counts(Sampling { temperature: 1.0, top_k: None, top_p: Some((n as f32 - 0.5) / 1000.0) }, &logits);
            let drawn: Vec<usize> = (0..1000).filter(|id| counts[*id] > 0).collect();
            assert!(drawn.iter().all(|id| *id >= 1000 - n), "{n}: {drawn:?}");
            assert!(drawn.len() * 100 >= n * 99, "{n}: {}", drawn.len());
        }
    }
}
