//! Products with a weight matrix in 8-bit floats: each operand is scaled by its largest magnitude as it is now, rounded, and
//! what comes out is scaled back.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::{Float8, Scaling};

/// `y = x Wᵀ` of 8-bit floats, with f32 sums, in the dtype of `weight`.
///
/// # Shapes
/// `x`: `(…, in)`. `weight`: `(out, in)`. Returns `(…, out)`. `in` and `out` are multiples of 16.
///
/// # Source
/// torchao 0.14, `torchao/float8`: the recipes, and how scales come about.
pub fn forward(x: &Tensor, weight: &Tensor, how: Float8) -> Result<Tensor> {
    on_device!(x, forward(x, weight, how))
}

/// `dx = dy W`, added to `sum` if there is one, in the dtype of `x`. `dW = dyᵀ x` is added to `grad`, if it is wanted.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    dy: &Tensor,
    sum: Option<&Tensor>,
    how: Float8,
) -> Result<Tensor> {
    on_device!(x, backward(x, weight, grad, dy, sum, how))
}

/// A kind of 8-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Four bits of exponent, three of mantissa.
    E4m3,
    /// Five and two.
    E5m2,
}

impl Format {
    const fn largest(self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::E5m2 => 57344.0,
        }
    }

    /// Below it numbers lie as far apart as they do above.
    const fn least_normal(self) -> f32 {
        match self {
            Self::E4m3 => 1.0 / 64.0,
            Self::E5m2 => 1.0 / 16384.0,
        }
    }

    /// What added to a number below `least_normal` leaves, in f32, as many bits as it is to keep.
    const fn shift(self) -> f32 {
        match self {
            Self::E4m3 => 16384.0,
            Self::E5m2 => 128.0,
        }
    }

    /// How many bits fewer than the mantissa of an f32.
    const fn dropped_bits(self) -> u32 {
        match self {
            Self::E4m3 => 20,
            Self::E5m2 => 21,
        }
    }

    /// The nearest number of this kind, of two the even one; the largest one of what is larger. NaN stays. For `vectorized!`.
    #[inline(always)]
    pub fn round(self, x: f32) -> f32 {
        let dropped = self.dropped_bits();
        let magnitude = x.abs().min(self.largest());
        let bits = magnitude.to_bits();
        let bits = (bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)) & (u32::MAX << dropped);
        let small = (magnitude + self.shift()) - self.shift();
        let rounded = if magnitude < self.least_normal() { small } else { f32::from_bits(bits) };
        if x.is_nan() { x } else { rounded.copysign(x) }
    }
}

/// How an operand of a product becomes 8-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cast {
    format: Format,
    /// A scale for each line, which is what is summed over; else one for all.
    by_line: bool,
    power_of_two: bool,
}

impl Cast {
    /// Magnitudes up to here are scaled as if they were it.
    const LEAST: f64 = 1e-12;

    /// What numbers are multiplied by, the largest magnitude of which is `largest`. NaN of NaN.
    pub fn scale(self, largest: f32) -> f32 {
        let scale = if largest <= Self::LEAST as f32 {
            (f64::from(self.format.largest()) / Self::LEAST) as f32
        } else {
            self.format.largest() / largest
        };
        // The power of two below it has the same exponent.
        if self.power_of_two && !scale.is_nan() { f32::from_bits(scale.to_bits() & 0x7f80_0000) } else { scale }
    }
}

impl Scaling {
    fn cast(self, format: Format) -> Cast {
        let by_line = self != Self::Tensorwise;
        Cast { format, by_line, power_of_two: by_line }
    }

    /// Of `x` and `W`, for `y`.
    pub(self) fn forward(self) -> [Cast; 2] {
        [self.cast(Format::E4m3); 2]
    }

    /// Of `dy` and `W`, for `dx`.
    pub(self) fn input_gradient(self) -> [Cast; 2] {
        let of_weight = self.cast(Format::E4m3);
        [self.of_gradient(), Cast { by_line: self == Self::Rowwise, ..of_weight }]
    }

    /// Of `dy` and `x`, for `dW`; `None`: they stay as they are.
    pub(self) fn weight_gradient(self) -> Option<[Cast; 2]> {
        (self != Self::RowwiseWithGwHp).then(|| [self.of_gradient(), self.cast(Format::E4m3)])
    }

    fn of_gradient(self) -> Cast {
        self.cast(if self == Self::Tensorwise { Format::E5m2 } else { Format::E4m3 })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::testing::{assert_close, devices, on_threads, random, random_tensor};

    const SCALINGS: [Scaling; 3] = [Scaling::Tensorwise, Scaling::Rowwise, Scaling::RowwiseWithGwHp];

    /// The finite numbers of a format that are not negative, by their codes: read off bit by bit.
    fn magnitudes(format: Format) -> Vec<f64> {
        let (mantissa_bits, bias, n) = match format {
            Format::E4m3 => (3, 7, 0x7f),  // one code stands for NaN
            Format::E5m2 => (2, 15, 0x7c), // the last exponent is for infinity and NaN
        };
        let number = |code: i32| {
            let (exponent, mantissa) = (code >> mantissa_bits, code & ((1 << mantissa_bits) - 1));
            let fraction = f64::from(mantissa) / f64::from(1 << mantissa_bits);
            if exponent == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(exponent - bias) }
        };
        (0..n).map(number).collect()
    }

    /// The nearest of these, by looking at all; of two the one with an even code.
    fn nearest(magnitudes: &[f64], x: f32) -> f64 {
        let wanted = f64::from(x.abs());
        let after = magnitudes.partition_point(|magnitude| *magnitude < wanted);
        let Some(above) = magnitudes.get(after) else { return magnitudes[after - 1].copysign(x.into()) };
        let below = magnitudes[after.saturating_sub(1)];
        let takes_above = match (above - wanted).partial_cmp(&(wanted - below)).expect("numbers") {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => after % 2 == 0,
            std::cmp::Ordering::Greater => false,
        };
        (if takes_above { *above } else { below }).copysign(x.into())
    }

    /// Numbers at which rounding could go wrong: each of a format, the middles between them, and what is next to those.
    fn delicate(format: Format) -> Vec<f32> {
        let magnitudes = magnitudes(format);
        let middles = magnitudes.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
        let beyond = [format.largest() * 1.04, format.largest() * 1.2, 1e30, f32::MAX, f32::INFINITY].map(f64::from);
        let around = magnitudes.iter().copied().chain(middles).chain(beyond).flat_map(|x| {
            let x = x as f32;
            [x, x.next_up(), x.next_down(), x * 1.01]
        });
        around.chain([1e-30, f32::MIN_POSITIVE]).flat_map(|x| [x, -x]).filter(|x| !x.is_nan()).collect()
    }

    #[test]
    fn rounding_finds_the_nearest_float8_and_saturates() {
        for format in [Format::E4m3, Format::E5m2] {
            let magnitudes = magnitudes(format);
            assert_eq!(magnitudes.last().copied(), Some(f64::from(format.largest())));
            for x in delicate(format).into_iter().chain(random("x", 10_000).into_iter().map(|x| x * 500.0)) {
                let (ours, expected) = (format.round(x), nearest(&magnitudes, x));
                assert_eq!(f64::from(ours).to_bits(), expected.to_bits(), "{format:?}: {x} to {ours}, not {expected}");
            }
            assert!(format.round(f32::NAN).is_nan());
        }
    }

    #[test]
    fn rounding_is_that_of_candle_where_candle_saturates_nothing() -> Result<()> {
        let numbers: Vec<f32> = delicate(Format::E4m3).into_iter().filter(|x| x.abs() <= 448.0).collect();
        let theirs = Tensor::new(numbers.as_slice(), &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
        for (x, theirs) in numbers.iter().zip(theirs.to_dtype(DType::F32)?.to_vec1::<f32>()?) {
            assert_eq!(Format::E4m3.round(*x).to_bits(), theirs.to_bits(), "{x}");
        }
        Ok(())
    }

    #[test]
    fn scales_are_those_of_torchao() {
        let cast = |format, power_of_two| Cast { format, by_line: false, power_of_two };
        // torchao.float8.float8_utils.amax_to_scale of these, with and without round_scales_to_power_of_2.
        for (largest, e4m3, power, e5m2) in [
            (1.0, 448.0, 256.0, 57344.0),
            (3.0, 149.333_33, 128.0, 19_114.666),
            (448.0, 1.0, 1.0, 128.0),
            (1e-20, 4.48e14, 281_474_976_710_656.0, 5.7344e16),
            (0.0, 4.48e14, 281_474_976_710_656.0, 5.7344e16),
            (f32::INFINITY, 0.0, 0.0, 0.0),
        ] {
            let scales = [(Format::E4m3, false), (Format::E4m3, true), (Format::E5m2, false)];
            let scales = scales.map(|(format, power_of_two)| cast(format, power_of_two).scale(largest));
            assert_eq!(scales, [e4m3, power, e5m2], "{largest}");
        }
        assert!(cast(Format::E4m3, true).scale(f32::NAN).is_nan());
    }

    /// A matrix in row-major order, in f64.
    struct Reference {
        values: Vec<f64>,
        dims: [usize; 2],
    }

    impl Reference {
        /// As the numbers of `dtype`.
        fn new(tensor: &Tensor, dtype: DType) -> Result<Self> {
            let tensor = tensor.to_dtype(dtype)?.to_dtype(DType::F64)?;
            let rows = tensor.elem_count() / tensor.dims().last().expect("a matrix");
            Ok(Self { dims: [rows, tensor.elem_count() / rows], values: tensor.flatten_all()?.to_vec1()? })
        }

        fn t(&self) -> Self {
            let [rows, cols] = self.dims;
            let values = (0..rows * cols).map(|i| self.values[i % rows * cols + i / rows]).collect();
            Self { values, dims: [cols, rows] }
        }

        /// Rounded to 8-bit floats, and scaled back: with a scale for each row, or one for all.
        fn quantized(&self, format: Format, by_row: bool) -> Self {
            let (magnitudes, [_, cols]) = (magnitudes(format), self.dims);
            let largest = |values: &[f64]| values.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            let largest_of_all = largest(&self.values);
            let rows = self.values.chunks(cols).flat_map(|row| {
                let mut scale = f64::from(format.largest()) / if by_row { largest(row) } else { largest_of_all };
                if by_row {
                    scale = scale.log2().floor().exp2();
                }
                let scale = scale as f32;
                let magnitudes = &magnitudes;
                row.iter().map(move |x| nearest(magnitudes, *x as f32 * scale) / f64::from(scale))
            });
            Self { values: rows.collect(), dims: self.dims }
        }

        /// `self otherᵀ`.
        fn product(&self, other: &Self) -> Result<Tensor> {
            let [rows, k] = self.dims;
            let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let rows = (0..rows).flat_map(|i| other.values.chunks(k).map(move |b| sum(&self.values[i * k..][..k], b)));
            Ok(Tensor::from_vec(rows.collect(), (self.dims[0], other.dims[0]), &Device::Cpu)?)
        }
    }

    /// `values` where a tensor of the device begins `offset` numbers into its memory.
    fn placed(values: &Tensor, offset: usize, device: &Device) -> Result<Tensor> {
        let before = Tensor::zeros(offset, values.dtype(), &Device::Cpu)?;
        let flat = Tensor::cat(&[before, values.flatten_all()?], 0)?.to_device(device)?;
        Ok(flat.narrow(0, offset, values.elem_count())?.reshape(values.shape())?)
    }

    #[test]
    fn products_match_those_of_quantized_operands_in_f64() -> Result<()> {
        let cases = [([33, 48, 32], 0), ([64, 64, 80], 0), ([1, 16, 16], 0), ([130, 272, 144], 1)];
        for (([rows, inner, outer], offset), dtype) in
            cases.into_iter().flat_map(|case| [DType::F32, DType::BF16].map(|dtype| (case, dtype)))
        {
            // Some numbers far larger than the others, as they come.
            let spread = |name: &str, dims: &[usize]| -> Result<Tensor> { Ok(random_tensor(name, dims)?.powf(5.0)?) };
            let (x, weight) = (spread("x", &[1, rows, inner])?, spread("w", &[outer, inner])?);
            let (dy, grad) = ((spread("dy", &[1, rows, outer])? * 1e-4)?, random_tensor("grad", &[outer, inner])?);
            let sum = random_tensor("sum", &[1, rows, inner])?;
            let [x_r, w_r, dy_r] = [&x, &weight, &dy].map(|tensor| Reference::new(tensor, dtype));
            let (x_r, w_r, dy_r) = (x_r?, w_r?, dy_r?);
            for scaling in SCALINGS {
                let by_row = scaling != Scaling::Tensorwise;
                let of_gradients = if by_row { Format::E4m3 } else { Format::E5m2 };
                let e4m3 = |of: &Reference, by_row| of.quantized(Format::E4m3, by_row);
                let y = e4m3(&x_r, by_row).product(&e4m3(&w_r, by_row))?.reshape((1, rows, outer))?;
                let dy_8 = dy_r.quantized(of_gradients, by_row);
                let w_t = match scaling {
                    // One scale, but a power of two.
                    Scaling::RowwiseWithGwHp => {
                        let flat = Reference { values: w_r.t().values, dims: [1, inner * outer] };
                        Reference { values: e4m3(&flat, true).values, dims: [inner, outer] }
                    }
                    _ => e4m3(&w_r.t(), by_row),
                };
                let dx = dy_8.product(&w_t)?.reshape((1, rows, inner))?;
                let dw = match scaling {
                    Scaling::RowwiseWithGwHp => dy_r.t().product(&x_r.t())?,
                    _ => dy_r.t().quantized(of_gradients, by_row).product(&e4m3(&x_r.t(), by_row))?,
                };
                for (device, emulate) in devices().iter().flat_map(|it| [(it, true), (it, false)]) {
                    let how = Float8 { scaling, emulate };
                    let what = |of| format!("{of} of {rows} x {inner} x {outer}, {dtype:?}, {how:?} on {device:?}");
                    // GPUs cut what they sum of 8-bit floats.
                    let of_sums = if emulate || device.is_cpu() { 2e-6 } else { 2e-3 };
                    let tolerance = if dtype == DType::BF16 { 5e-3 } else { of_sums };
                    let on_device = |x: &Tensor| placed(&x.to_dtype(dtype)?, offset, device);
                    let (x, weight, dy, sum_8) =
                        (on_device(&x)?, on_device(&weight)?, on_device(&dy)?, on_device(&sum)?);
                    assert_close(&what("y"), &forward(&x, &weight, how)?, &y, tolerance)?;

                    let own = placed(&grad, offset, device)?;
                    let ours = backward(&x, &weight, Some(&own), &dy, None, how)?;
                    assert_close(&what("dx"), &ours, &dx, tolerance)?;
                    let added = (own.to_device(&Device::Cpu)? - &grad)?;
                    // What was there has a rounding of its own.
                    let of_grad = 2e-7 / dw.abs()?.max_all()?.to_scalar::<f64>()?;
                    assert_close(&what("dW"), &added, &dw, of_sums.max(2e-5) + of_grad)?;

                    let ours = backward(&x, &weight, None, &dy, Some(&sum_8), how)?;
                    let with_sum = (&dx + sum.to_dtype(dtype)?.to_dtype(DType::F64)?)?;
                    assert_close(&what("dx and a sum"), &ours, &with_sum, tolerance)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_no_number_stays_none() -> Result<()> {
        let (mut x, weight) = (random("x", 32 * 16), random_tensor("w", &[16, 16])?);
        x[5 * 16 + 3] = f32::NAN;
        for (device, scaling) in devices().iter().flat_map(|device| SCALINGS.map(|scaling| (device, scaling))) {
            let x = Tensor::from_vec(x.clone(), (32, 16), device)?;
            let how = Float8 { scaling, emulate: true };
            let y = forward(&x, &weight.to_device(device)?, how)?.to_vec2::<f32>()?;
            for (row, y) in y.iter().enumerate() {
                let expected = scaling == Scaling::Tensorwise || row == 5;
                assert!(y.iter().all(|y| y.is_nan() == expected), "{scaling:?}, row {row}: {y:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn results_are_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        let (x, weight) = (random_tensor("x", &[301, 272])?, random_tensor("w", &[144, 272])?);
        let dy = random_tensor("dy", &[301, 144])?;
        for scaling in SCALINGS {
            let how = Float8 { scaling, emulate: true };
            let run = || -> Result<_> {
                let grad = Tensor::zeros((144, 272), DType::F32, &Device::Cpu)?;
                let y = forward(&x, &weight, how)?.to_vec2::<f32>()?;
                let dx = backward(&x, &weight, Some(&grad), &dy, None, how)?.to_vec2::<f32>()?;
                Ok((y, dx, grad.to_vec2::<f32>()?))
            };
            assert_eq!(on_threads(1, run)?, on_threads(3, run)?, "{scaling:?}");
        }
        Ok(())
    }
}
