//! How large the elements of a tensor are.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use crate::Result;

/// `max |x|`; NaN where any element is, so that it is finite only where all of them are. 0 of no elements.
pub fn magnitude(x: &Tensor) -> Result<f32> {
    on_device!(x, magnitude(x))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ops::testing::{devices, random};

    #[test]
    fn one_element_that_is_not_finite_shows_wherever_it_is() -> Result<()> {
        let values = random("x", 40_001);
        for device in devices() {
            let of = |values: &[f32], dtype| {
                magnitude(&Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
            };
            let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert_eq!(of(&values, DType::F32)?, largest);
            assert_eq!(of(&[], DType::F32)?, 0.0);
            for at in [0, 1, 16_384, 40_000] {
                for dtype in [DType::F32, DType::BF16] {
                    let with = |x: f32| {
                        let mut values = values.clone();
                        values[at] = x;
                        of(&values, dtype)
                    };
                    assert!(with(f32::NAN)?.is_nan() && with(-f32::NAN)?.is_nan(), "{dtype:?} {at}");
                    assert_eq!(
                        [with(f32::INFINITY)?, with(f32::NEG_INFINITY)?, with(-64.0)?],
                        [f32::INFINITY, f32::INFINITY, 64.0]
                    );
                }
            }
        }
        Ok(())
    }
}
