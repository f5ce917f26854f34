//! Initial weights, the same for a seed on any device and any number of threads.

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Init, Parameter};
use crate::tools::random::keyed;

/// Writes the initial values of a parameter: element `i` depends on `(seed, fqn, i)` alone.
pub fn initialize(parameter: &Parameter, seed: u64) -> Result<()> {
    let n = parameter.numel();
    let values = match parameter.init() {
        Init::Constant(value) => vec![value as f32; n],
        Init::Uniform { limit } => uniform(&keyed(seed, "init", parameter.fqn()), n, limit),
        Init::Normal { std, limit } => normal(&keyed(seed, "init", parameter.fqn()), n, std, limit),
    };
    parameter.set(&Tensor::from_vec(values, parameter.shape(), &Device::Cpu)?)
}

/// Words of the generator that one attempt at an element takes.
const WORDS: u128 = 2;
/// Elements per task.
const SPAN: usize = 1 << 14;

fn normal(stream: &ChaCha8Rng, n: usize, std: f64, limit: f64) -> Vec<f32> {
    let mut values = vec![0f32; n];
    values.par_chunks_mut(SPAN).enumerate().for_each(|(span, values)| {
        let mut rng = stream.clone();
        rng.set_word_pos((span * SPAN) as u128 * WORDS);
        for (i, value) in values.iter_mut().enumerate() {
            let mut draw = std * standard_normal(&mut rng);
            // Redrawn from streams of their own, at the element's place, so that no other element moves.
            for attempt in 1.. {
                if draw.abs() <= limit {
                    break;
                }
                let mut rng = stream.clone();
                rng.set_stream(attempt);
                rng.set_word_pos((span * SPAN + i) as u128 * WORDS);
                draw = std * standard_normal(&mut rng);
            }
            *value = draw as f32;
        }
    });
    values
}

fn uniform(stream: &ChaCha8Rng, n: usize, limit: f64) -> Vec<f32> {
    let mut rng = stream.clone();
    (0..n).map(|_| (limit * (2.0 * unit(rng.next_u32()) - 1.0)) as f32).collect()
}

/// In (0, 1).
fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) / (f64::from(u32::MAX) + 1.0)
}

/// By Box and Muller's transform of two words, with libm's functions, whose bits are the same on every system.
fn standard_normal(rng: &mut ChaCha8Rng) -> f64 {
    let (radius, turn) = (unit(rng.next_u32()), unit(rng.next_u32()));
    libm::sqrt(-2.0 * libm::log(radius)) * libm::cos(2.0 * std::f64::consts::PI * turn)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::autograd::{Precision, StageBuilder};
    use crate::ops::testing::{golden, on_threads};

    fn draw(seed: u64, fqn: &str, n: usize, init: Init) -> Vec<f32> {
        let mut stage = StageBuilder::default();
        let parameter = stage.parameter(fqn, &[n], init);
        stage.allocate(Precision { storage: DType::F32, compute: DType::F32 }, &Device::Cpu, false).unwrap();
        initialize(&parameter, seed).unwrap();
        parameter.weights().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn weights_depend_on_seed_and_name_but_not_on_threads_or_length() {
        let init = Init::Normal { std: 1.0, limit: 1.5 };
        let n = 3 * SPAN + 5;
        let weights = on_threads(1, || draw(7, "a.weight", n, init));
        assert_eq!(weights, on_threads(3, || draw(7, "a.weight", n, init)));
        assert_eq!(weights[..100], draw(7, "a.weight", 100, init));
        assert_ne!(weights, draw(8, "a.weight", n, init));
        assert_ne!(weights, draw(7, "b.weight", n, init));
        assert!(weights.iter().all(|w| w.abs() <= 1.5));
    }

    /// Standard deviations computed by PyTorch's formula of the truncated normal.
    #[test]
    fn truncated_draws_have_the_moments_they_should() {
        let rows: serde_json::Value = serde_json::from_slice(&golden("init_moments.json")).unwrap();
        let n = 400_000;
        for row in rows["truncated_std"].as_array().unwrap() {
            let (std, high, expected) =
                (row["std"].as_f64().unwrap(), row["high"].as_f64().unwrap(), row["expected_std"].as_f64().unwrap());
            let weights = draw(1, &row.to_string(), n, Init::Normal { std, limit: high });
            let mean = weights.iter().map(|w| f64::from(*w)).sum::<f64>() / n as f64;
            let variance = weights.iter().map(|w| (f64::from(*w) - mean).powi(2)).sum::<f64>() / n as f64;
            assert!(mean.abs() < 5.0 * expected / (n as f64).sqrt(), "{row}: mean {mean}");
            assert!((variance.sqrt() / expected - 1.0).abs() < 5.0 / (2.0 * n as f64).sqrt(), "{row}: {variance}");
        }
    }
}
