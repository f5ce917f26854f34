//! Initial weights, the same for a seed on any device and any number of threads.

use std::array::from_fn;

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use rayon::prelude::*;

use crate::Result;
use crate::autograd::{Init, Parameter};
use crate::ops::host::vectorized;
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

/// Elements that are drawn together, and the words of the generator that they take.
const BLOCK: usize = 64;
/// Elements per task.
const SPAN: usize = 1 << 14;

fn normal(stream: &ChaCha8Rng, n: usize, std: f64, limit: f64) -> Vec<f32> {
    let (std, limit) = (std as f32, limit as f32);
    let mut values = vec![0f32; n];
    values.par_chunks_mut(SPAN).enumerate().for_each(|(span, values)| {
        let mut rng = stream.clone();
        rng.set_word_pos((span * SPAN) as u128);
        for (i, values) in values.chunks_mut(BLOCK).enumerate() {
            let mut draws = standard_normals(&mut rng).map(|x| std * x);
            // What is beyond the limit is redrawn, at the same place of other streams, so that no other element moves.
            for attempt in 1.. {
                if draws.iter().all(|x| x.abs() <= limit) {
                    break;
                }
                let mut rng = stream.clone();
                rng.set_stream(attempt);
                rng.set_word_pos((span * SPAN + i * BLOCK) as u128);
                for (draw, again) in draws.iter_mut().zip(standard_normals(&mut rng)) {
                    if draw.abs() > limit {
                        *draw = std * again;
                    }
                }
            }
            values.copy_from_slice(&draws[..values.len()]);
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

/// By Box and Muller's transform: a word for the radius and one for the turn make two numbers. By additions, products,
/// quotients and square roots of f32 alone, whose bits are the same on every system.
fn standard_normals(rng: &mut ChaCha8Rng) -> [f32; BLOCK] {
    const HALF: usize = BLOCK / 2;
    let words: [u32; BLOCK] = from_fn(|_| rng.next_u32());
    vectorized!({
        let mut normals = [0f32; BLOCK];
        for i in 0..HALF {
            let radius = (-2.0 * log((words[i] as f32 + 0.5) * 2f32.powi(-32))).sqrt();
            let (sin, cos) = sin_cos(words[HALF + i]);
            (normals[i], normals[HALF + i]) = (radius * cos, radius * sin);
        }
        normals
    })
}

/// The natural logarithm of a normal positive number within 2e-7 of its value, or of 1 if that is more.
///
/// `e ln 2 + ln m` with `√½ <= m < √2`; `ln m = 2 artanh s` with `s = (m - 1) / (m + 1)`, by its series.
#[inline(always)]
fn log(x: f32) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    let exponent = (bits as i32 >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff) + SQRT_HALF);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0))));
    exponent * std::f32::consts::LN_2 + 2.0 * s * series
}

/// Sine and cosine of `(word + ½) / 2³² - ⅛` turns, each within 2e-7.
///
/// The upper two bits choose a multiple of π/2, the others an angle of at most π/4 around it, for which Taylor's series are
/// short.
#[inline(always)]
fn sin_cos(word: u32) -> (f32, f32) {
    let quarters = ((word & 0x3fff_ffff) as f32 + 0.5) * 2f32.powi(-30) - 0.5;
    let a = quarters * std::f32::consts::FRAC_PI_2;
    let z = a * a;
    let sin = a * (1.0 - z * (1.0 / 6.0 - z * (1.0 / 120.0 - z * (1.0 / 5040.0 - z * (1.0 / 362_880.0)))));
    let cos = 1.0 - z * (0.5 - z * (1.0 / 24.0 - z * (1.0 / 720.0 - z * (1.0 / 40_320.0 - z * (1.0 / 3_628_800.0)))));
    let is_odd = word & 1 << 30 != 0;
    let sign = word & 1 << 31;
    let (sin, cos) = if is_odd { (cos, -sin) } else { (sin, cos) };
    (f32::from_bits(sin.to_bits() ^ sign), f32::from_bits(cos.to_bits() ^ sign))
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
    fn logarithms_sines_and_cosines_are_near_their_values() {
        for i in 0..200_000_u32 {
            let x = (i * 21_474 + 1) as f32 * 2f32.powi(-32);
            let (ours, exact) = (f64::from(log(x)), f64::from(x).ln());
            assert!((ours - exact).abs() <= 2e-7 * exact.abs().max(1.0), "log({x}) = {ours}, expected {exact}");

            let word = i.wrapping_mul(2_654_435_761);
            let turn = (f64::from(word) + 0.5) / f64::from(1 << 30) - 0.5;
            let (sin, cos) = (turn * std::f64::consts::FRAC_PI_2).sin_cos();
            let ours = sin_cos(word);
            assert!((f64::from(ours.0) - sin).abs() <= 2e-7, "sin({turn} / 4) = {}, expected {sin}", ours.0);
            assert!((f64::from(ours.1) - cos).abs() <= 2e-7, "cos({turn} / 4) = {}, expected {cos}", ours.1);
        }
        for word in (u32::MAX - 1000..=u32::MAX).chain(0..1000) {
            let log = log((word as f32 + 0.5) * 2f32.powi(-32));
            assert!((-22.9..=0.0).contains(&log), "{log} for {word}");
        }
    }

    /// So that a seed means the same weights on every system, and in every version.
    #[test]
    fn the_weights_of_a_seed_are_these() {
        let weights = draw(0, "a.weight", 1000, Init::Normal { std: 0.02, limit: 0.05 });
        let bits = [0, 1, 63, 64, 500, 999].map(|i| weights[i].to_bits());
        assert_eq!(bits, [3_164_486_130, 989_944_566, 1_017_764_583, 3_164_152_702, 3_159_733_826, 3_146_461_294]);
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
