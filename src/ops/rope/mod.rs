//! Rotary position embedding.

mod cpu;
#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

use candle_core::{Device, Tensor};

use crate::Result;
use crate::autograd::Value;
use crate::models::args::{RopeArgs, RopeLayout, RopeScalingArgs, Stretch, YarnArgs};
use crate::tools::profiler;

/// Cosines and sines of `position · frequency`, `(positions, dim / 2)`, f32.
#[derive(Clone, Debug)]
pub struct RopeTable {
    cos: Tensor,
    sin: Tensor,
    layout: RopeLayout,
}

impl RopeTable {
    /// The table for positions `0..positions`. Angles are f32 products, as the models that are exchanged were trained
    /// with; their cosines are rounded from f64.
    pub fn new(args: &RopeArgs, positions: usize, device: &Device) -> Result<Self> {
        let frequencies = frequencies(args);
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|a| (libm::sin(a) as f32, libm::cos(a) as f32)).unzip();
        let table = |values| Tensor::from_vec(values, (positions, frequencies.len()), device);
        Ok(Self { cos: table(cos)?, sin: table(sin)?, layout: args.layout })
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.dims()[0]
    }

    /// The rows of positions `start..start + len`.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self { cos: self.cos.narrow(0, start, len)?, sin: self.sin.narrow(0, start, len)?, layout: self.layout })
    }
}

/// `1 / theta^(2i / dim)`, stretched as `args` say.
///
/// # Source
/// Su et al., arXiv:2104.09864.
fn frequencies(args: &RopeArgs) -> Vec<f32> {
    let frequency = |i: usize| 1.0 / libm::powf(args.theta as f32, (2 * i) as f32 / args.dim as f32);
    let frequencies = (0..args.dim / 2).map(frequency);
    match &args.stretch {
        Stretch::None => frequencies.collect(),
        Stretch::ByWavelength(scaling) => frequencies.map(|frequency| stretched(frequency, scaling)).collect(),
        Stretch::Yarn(yarn) => {
            let (low, high) = yarn_range(args, yarn);
            let stretched = |(i, frequency): (usize, f32)| {
                let ramp = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                frequency / yarn.factor as f32 * ramp + frequency * (1.0 - ramp)
            };
            frequencies.enumerate().map(stretched).collect()
        }
    }
}

/// Wavelengths above `original_max_position_embeddings / low_freq_factor` are multiplied by `scaling_factor`, those below
/// `… / high_freq_factor` are kept, and those between are interpolated.
///
/// # Source
/// Llama 3.1's.
fn stretched(frequency: f32, scaling: &RopeScalingArgs) -> f32 {
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
}

/// The indices of frequencies between which YaRN goes over from keeping to stretching: those that turn `beta_fast` and
/// `beta_slow` times in the original length.
///
/// # Source
/// Peng et al., arXiv:2309.00071, as DeepSeek computes it.
fn yarn_range(args: &RopeArgs, yarn: &YarnArgs) -> (f32, f32) {
    let index = |turns: f64| {
        let wavelength = yarn.original_seq_len as f64 / (turns * 2.0 * std::f64::consts::PI);
        args.dim as f64 * wavelength.ln() / (2.0 * args.theta.ln())
    };
    let (low, high) = (index(yarn.beta_fast), index(yarn.beta_slow));
    let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
    let (low, high) = (low.max(0.0), high.min((args.dim - 1) as f64));
    (low as f32, if low == high { high as f32 + 0.001 } else { high as f32 })
}

/// Rotates the last numbers of each head, as many as `table` has angles for twice over, by the angles of its position:
/// adjacent pairs, or number `i` of their first half with number `i` of the second, as the table's layout says. The
/// numbers before them stay. Rotation runs in f32.
///
/// Backward rotates the gradient by the negative angle.
///
/// # Shapes
/// `x`: `(b, s, h, hd)`; `table` holds the `s` positions of the sequence.
pub fn rope(x: &Value, table: &RopeTable) -> Result<Value> {
    let _span = profiler::span("rope").shapes(&[x.tensor().dims()]);
    let rotated = |x: &Tensor, table: &RopeTable, direction| on_device!(x, rotate(x, table, direction));
    let y = rotated(x.tensor(), table, 1.0)?;
    let table = table.clone();
    Ok(Value::record("rope", y, [x], move |dy| Ok([Some(rotated(&dy, &table, -1.0)?)])))
}

#[cfg(test)]
pub(in crate::ops) mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use candle_core::{D, DType};
    use serde::Deserialize;

    use super::*;
    use crate::models::{self, args::DecoderArgs};
    use crate::ops::testing::{Case, golden, random_tensor};

    /// `x`, `(b, s, h, hd)` f64, rotated.
    pub(in crate::ops) fn reference(x: &Tensor, table: &RopeTable) -> Result<Tensor> {
        let ((b, s, h, hd), half) = (x.dims4()?, table.cos.dim(1)?);
        let angles = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((1, s, 1, half));
        let (cos, sin) = (angles(&table.cos)?, angles(&table.sin)?);
        let (shape, halves_at) = match table.layout {
            RopeLayout::Pairs => ((b, s, h, half, 2), 4),
            RopeLayout::Halves => ((b, s, h, 2, half), 3),
        };
        let rotary = x.narrow(D::Minus1, hd - 2 * half, 2 * half)?.contiguous()?.reshape(shape)?;
        let part = |i| rotary.narrow(halves_at, i, 1)?.squeeze(halves_at);
        let (first, second) = (part(0)?, part(1)?);
        let real = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let imag = (first.broadcast_mul(&sin)? + second.broadcast_mul(&cos)?)?;
        let rotated = Tensor::stack(&[real, imag], halves_at)?.reshape((b, s, h, 2 * half))?;
        Ok(Tensor::cat(&[x.narrow(D::Minus1, 0, hd - 2 * half)?, rotated], D::Minus1)?)
    }

    #[test]
    fn rope_matches_its_reference() -> Result<()> {
        let (s, h) = (9, 5);
        for (dtype, layout, hd, dim) in [
            (DType::F32, RopeLayout::Pairs, 10, 10),
            (DType::BF16, RopeLayout::Pairs, 10, 10),
            (DType::F32, RopeLayout::Pairs, 10, 6),
            (DType::BF16, RopeLayout::Pairs, 24, 16),
            (DType::F32, RopeLayout::Pairs, 16, 16),
            (DType::BF16, RopeLayout::Halves, 10, 10),
            (DType::F32, RopeLayout::Halves, 10, 6),
            (DType::BF16, RopeLayout::Halves, 24, 16),
            (DType::F32, RopeLayout::Halves, 16, 16),
        ] {
            let args = RopeArgs { dim, theta: 100.0, layout, stretch: Stretch::None };
            let table = |device: &Device| RopeTable::new(&args, s + 3, device)?.narrow(3, s);
            let x = |dims: &[usize]| -> Result<_> { Ok(random_tensor("x", dims)?.to_dtype(dtype)?) };
            for x in [x(&[2, s, h, hd])?, x(&[2, h, s, hd])?.transpose(1, 2)?] {
                Case::new("rope").input(x).check(
                    |v| rope(&v[0], &table(v[0].tensor().device())?),
                    |t| reference(&t[0], &table(&Device::Cpu)?),
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
            model: String,
            far_positions: Vec<usize>,
            config: serde_json::Value,
        }
        let entries: BTreeMap<String, Entry> = serde_json::from_slice(&golden("rope.json")).unwrap();
        let tensors = candle_core::safetensors::load_buffer(&golden("rope.safetensors"), &Device::Cpu)?;
        let mut families = BTreeSet::new();
        for (name, entry) in entries {
            let mut args = serde_json::to_value(models::family(&entry.model).unwrap()).unwrap();
            args.as_object_mut().unwrap().extend(entry.config.as_object().unwrap().clone());
            let args: DecoderArgs = serde_json::from_value(args).unwrap();
            let args = args.layer(1).rope.expect("a layer with rotary positions");
            let ours = frequencies(&args);
            let theirs = tensors[&format!("{name}.freqs")].to_vec1::<f32>()?;
            for (a, b) in ours.iter().zip(&theirs) {
                assert!((a - b).abs() <= 5e-7 * b, "{name}: frequency {a}, expected {b}");
            }
            let table = RopeTable::new(&args, 64, &Device::Cpu)?;
            for (table, what) in [(&table.cos, "cos"), (&table.sin, "sin")] {
                let theirs = tensors[&format!("{name}.{what}")].to_vec2::<f32>()?;
                for (p, (table, theirs)) in table.to_vec2::<f32>()?.iter().zip(&theirs).enumerate() {
                    for ((a, b), f) in table.iter().zip(theirs).zip(&ours) {
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
            families.insert(entry.model);
        }
        assert_eq!(families.len(), 4);
        Ok(())
    }
}
