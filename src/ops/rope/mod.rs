//! Rotary position embedding.

mod cpu;

use candle_core::{Device, Tensor};

use crate::Result;
use crate::autograd::Value;
use crate::models::args::RopeScalingArgs;
use crate::tools::profiler;

/// Cosines and sines of `position · frequency`, `(positions, head_dim / 2)`, f32.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    /// The table for positions `0..positions`. Angles are f32 products, as the models that are exchanged were trained
    /// with; their cosines are rounded from f64.
    pub fn new(
        head_dim: usize,
        theta: f64,
        scaling: Option<&RopeScalingArgs>,
        positions: usize,
        device: &Device,
    ) -> Result<Self> {
        let frequencies = frequencies(head_dim, theta, scaling);
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|a| (libm::sin(a) as f32, libm::cos(a) as f32)).unzip();
        let shape = (positions, head_dim / 2);
        Ok(Self { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.dims()[0]
    }

    /// The rows of positions `start..start + len`.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, start, len)?, sin: self.sin.narrow(0, start, len)? })
    }
}

/// `1 / theta^(2i / head_dim)`, stretched as `scaling` says: wavelengths above
/// `original_max_position_embeddings / low_freq_factor` are multiplied by `scaling_factor`, those below
/// `… / high_freq_factor` are kept, and those between are interpolated.
///
/// # Source
/// Su et al., arXiv:2104.09864; the stretching is Llama 3.1's.
fn frequencies(head_dim: usize, theta: f64, scaling: Option<&RopeScalingArgs>) -> Vec<f32> {
    let frequency = |i: usize| 1.0 / libm::powf(theta as f32, (2 * i) as f32 / head_dim as f32);
    let stretch = |frequency: f32| {
        let Some(scaling) = scaling else { return frequency };
        let factor = scaling.scaling_factor as f32;
        let (low, high) = (scaling.low_freq_factor as f32, scaling.high_freq_factor as f32);
        let original = scaling.original_max_position_embeddings as f32;
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength < original / high {
            frequency
        } else if wavelength > original / low {
            frequency / factor
        } else if low == high {
            frequency // the one wavelength on the border: there is nothing to interpolate
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    };
    (0..head_dim / 2).map(|i| stretch(frequency(i))).collect()
}

/// Rotates the adjacent pairs `(x[2i], x[2i+1])` of each head by the angle of its position; rotation runs in f32.
///
/// Backward rotates the gradient by the negative angle.
///
/// # Shapes
/// `x`: `(b, s, h, hd)`; `table` holds the `s` positions of the sequence.
pub fn rope(x: &Value, table: &RopeTable) -> Result<Value> {
    let _span = profiler::span("rope").shapes(&[x.tensor().dims()]);
    let y = cpu::rotate(x.tensor(), &table.cos, &table.sin, 1.0)?;
    let table = table.clone();
    Ok(Value::record("rope", y, [x], move |dy| Ok([Some(cpu::rotate(&dy, &table.cos, &table.sin, -1.0)?)])))
}

#[cfg(test)]
mod tests {
    use candle_core::{D, DType};
    use serde::Deserialize;

    use super::*;
    use crate::ops::testing::{Case, golden, random_tensor};

    #[test]
    fn rope_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            let (s, h, hd) = (9, 5, 6);
            let table = RopeTable::new(hd, 100.0, None, s + 3, &Device::Cpu)?.narrow(3, s)?;
            let angles = |t: &Tensor| t.to_dtype(DType::F64).unwrap().reshape((1, s, 1, hd / 2)).unwrap();
            let (cos, sin) = (angles(&table.cos), angles(&table.sin));
            let x = |dims: &[usize]| -> Result<_> { Ok(random_tensor("x", dims)?.to_dtype(dtype)?) };
            for x in [x(&[2, s, h, hd])?, x(&[2, h, s, hd])?.transpose(1, 2)?] {
                Case::new("rope").input(x).check(
                    |v| rope(&v[0], &table),
                    |t| {
                        let pairs = t[0].reshape((2, s, h, hd / 2, 2))?;
                        let (a, b) =
                            (pairs.narrow(D::Minus1, 0, 1)?.squeeze(4)?, pairs.narrow(D::Minus1, 1, 1)?.squeeze(4)?);
                        let real = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
                        let imag = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
                        Ok(Tensor::stack(&[real, imag], D::Minus1)?.reshape((2, s, h, hd))?)
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Computed by PyTorch; tolerances as its readme gives them.
    #[test]
    fn tables_match_pytorchs() -> Result<()> {
        #[derive(Deserialize)]
        struct Entry {
            layout: String,
            model: String,
            far_positions: Vec<usize>,
            config: Args,
        }
        #[derive(Deserialize)]
        struct Args {
            dim: usize,
            n_heads: usize,
            rope_theta: f64,
            rope_scaling_args: Option<RopeScalingArgs>,
        }
        let json: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&golden("rope.json")).unwrap();
        let tensors = candle_core::safetensors::load_buffer(&golden("rope.safetensors"), &Device::Cpu)?;
        let mut checked = 0;
        for (name, entry) in json.into_iter().filter(|(_, e)| e["model"].as_str().unwrap().starts_with("llama")) {
            let entry: Entry = serde_json::from_value(entry).unwrap();
            assert!(entry.layout == "interleaved" && entry.model.starts_with("llama"));
            let head_dim = entry.config.dim / entry.config.n_heads;
            let scaling = entry.config.rope_scaling_args.as_ref();
            let ours = frequencies(head_dim, entry.config.rope_theta, scaling);
            let theirs = tensors[&format!("{name}.freqs")].to_vec1::<f32>()?;
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 5e-7 * b, "{name}: frequency {a}, expected {b}");
            }
            let table = RopeTable::new(head_dim, entry.config.rope_theta, scaling, 64, &Device::Cpu)?;
            for (ours, what) in [(&table.cos, "cos"), (&table.sin, "sin")] {
                let theirs = tensors[&format!("{name}.{what}")].to_vec2::<f32>()?;
                for (p, (ours, theirs)) in ours.to_vec2::<f32>()?.iter().zip(&theirs).enumerate() {
                    for ((a, b), f) in
                        ours.iter().zip(theirs).zip(&frequencies(head_dim, entry.config.rope_theta, scaling))
                    {
                        assert!((a - b).abs() <= 1e-6 + 5e-7 * p as f32 * f, "{name}.{what} at {p}: {a}, expected {b}");
                    }
                }
            }
            for (row, position) in entry.far_positions.iter().enumerate() {
                let theirs = tensors[&format!("{name}.far_cos")].to_vec2::<f32>()?;
                for (f, b) in ours.iter().zip(&theirs[row]) {
                    let angle = *position as f32 * f;
                    assert!((angle.cos() - b).abs() <= 1e-6 + 5e-7 * angle, "{name} far {position}");
                }
            }
            checked += 1;
        }
        assert!(checked >= 4);
        Ok(())
    }
}
