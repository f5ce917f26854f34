//! Tensors in row-major order, and in another dtype.

#[cfg(feature = "cuda")]
pub(in crate::ops) mod cuda;

use candle_core::{DType, Tensor};

use super::host as cpu;
use crate::Result;

/// `tensor` in `dtype`, rounded where need be.
pub fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    on_device!(tensor, cast(tensor, dtype))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::testing::{devices, random_tensor};

    #[test]
    fn a_cast_rounds_as_candle_does_whatever_the_order_of_the_elements() -> Result<()> {
        type View = fn(&Tensor) -> candle_core::Result<Tensor>;
        let views: [View; 9] = [
            |x| Ok(x.clone()),
            |x| x.transpose(1, 2),
            |x| x.transpose(0, 3),
            |x| x.transpose(2, 3),
            |x| x.narrow(3, 8, 16),
            |x| x.narrow(3, 5, 7),
            |x| x.narrow(1, 1, 1)?.transpose(0, 2),
            |x| x.get(1)?.narrow(1, 3, 2),
            |x| x.narrow(0, 0, 0),
        ];
        let x = random_tensor("x", &[4, 3, 16, 24])?;
        for device in devices() {
            for (i, view) in views.iter().enumerate() {
                for (from, to) in [(DType::F32, DType::BF16), (DType::BF16, DType::F32)] {
                    let x = x.to_dtype(from)?;
                    let expected = view(&x)?.to_dtype(to)?.to_dtype(DType::F32)?;
                    let ours = cast(&view(&x.to_device(device)?)?, to)?.to_device(&Device::Cpu)?;
                    assert_eq!((ours.dims(), ours.dtype()), (expected.dims(), to), "view {i}");
                    let numbers = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                    assert_eq!(numbers(&ours)?, numbers(&expected)?, "view {i}");
                }
            }
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_copy_keeps_the_bits_of_every_kind() -> Result<()> {
        let numbers = Tensor::arange(0u32, 48, &Device::Cpu)?.reshape((6, 8))?;
        for device in devices().iter().filter(|device| device.is_cuda()) {
            for dtype in [DType::U32, DType::F32, DType::BF16] {
                let x = numbers.to_dtype(dtype)?;
                let ours = cuda::elements(&x.to_device(device)?.t()?, dtype)?.to_device(&Device::Cpu)?;
                assert!(ours.is_contiguous() && ours.dtype() == dtype);
                let numbers = |x: &Tensor| x.to_dtype(DType::U32)?.to_vec2::<u32>();
                assert_eq!(numbers(&ours)?, numbers(&x.t()?)?);
            }
        }
        Ok(())
    }
}
