//! Rows of a table by index.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use crate::Result;
use crate::autograd::Parameter;
use crate::tools::profiler;

/// The rows of `table` at `tokens`, in f32: the residual stream begins here.
///
/// # Shapes
/// `tokens`: `(b, s)`, u32, all below `vocab_size`. `table`: `(vocab_size, dim)`. Returns `(b, s, dim)`.
///
/// # Errors
/// If a token is not in the table. On a GPU, which cannot return an error, its row is NaN instead.
pub fn embedding(tokens: &Tensor, table: &Parameter) -> Result<Tensor> {
    let _span = profiler::span("embedding").shapes(&[tokens.dims(), table.shape()]);
    on_device!(tokens, forward(tokens, &table.precise()?))
}

/// Adds the gradient of the looked-up rows to the table's accumulator, if it has one; only rows that occur are touched.
pub fn embedding_backward(tokens: &Tensor, table: &Parameter, dy: &Tensor) -> Result<()> {
    let _span = profiler::span("embedding").shapes(&[dy.dims()]);
    match table.accumulator()? {
        Some(grad) => on_device!(tokens, backward(tokens, &grad, dy)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, devices, on_threads, parameters, parameters_on, random_tensor};

    #[test]
    fn embedding_matches_its_reference() -> Result<()> {
        let few = Tensor::new(&[[3u32, 0, 10], [3, 3, 7]], &Device::Cpu)?;
        // Tokens that occur hundreds of times, and some that do not.
        let many: Vec<u32> = (0..1000).map(|i| if i % 3 == 0 { 5 } else { i * i % 301 }).collect();
        let many = Tensor::from_vec(many, (2, 500), &Device::Cpu)?;
        for device in devices() {
            for (tokens, dim) in [(&few, 37), (&many, 24), (&many, 7)] {
                let (b, s) = tokens.dims2()?;
                let table = random_tensor("table", &[303, dim])?;
                let parameter = &parameters_on(device, std::slice::from_ref(&table), DType::BF16)?[0];
                let dy = random_tensor("dy", &[b, dim, s])?.transpose(1, 2)?;

                let wide = Var::from_tensor(&table.to_dtype(DType::F64)?)?;
                let expected = wide.embedding(&tokens.flatten_all()?)?.reshape((b, s, dim))?;
                let ids = tokens.to_device(device)?;
                assert_close("embedding", &embedding(&ids, parameter)?, &expected, 0.0)?;
                let grads = (expected * dy.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
                let expected = grads.get(&wide).unwrap();
                for (dtype, times, tolerance) in [(DType::F32, 1.0, 1e-6), (DType::BF16, 2.0, 1e-2)] {
                    // Added to what is there.
                    embedding_backward(&ids, parameter, &dy.to_dtype(dtype)?.to_device(device)?)?;
                    assert_close("gradient of the table", &parameter.grad()?, &(expected * times)?, tolerance)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_are_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        let tokens: Vec<u32> = (0..3000).map(|i| i * i % 97).collect();
        let (tokens, dy) = (Tensor::from_vec(tokens, (1, 3000), &Device::Cpu)?, random_tensor("dy", &[1, 3000, 37])?);
        for device in devices() {
            let (tokens, dy) = (tokens.to_device(device)?, dy.to_device(device)?);
            let run = || -> Result<_> {
                let table = &parameters_on(device, &[random_tensor("table", &[100, 37])?], DType::F32)?[0];
                embedding_backward(&tokens, table, &dy)?;
                Ok(table.grad()?.to_vec2::<f32>()?)
            };
            assert!(on_threads(1, run)? == on_threads(3, run)?);
        }
        Ok(())
    }

    #[test]
    fn a_token_outside_the_table_has_a_row_of_nan_on_a_gpu_and_no_gradient() -> Result<()> {
        for device in devices().iter().filter(|device| device.is_cuda()) {
            let parameter = &parameters_on(device, &[random_tensor("table", &[4, 2])?], DType::F32)?[0];
            let tokens = Tensor::new(&[[3u32, 4]], device)?;
            let y = embedding(&tokens, parameter)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!([0, 1, 2, 3].map(|i| y[i].is_nan()), [false, false, true, true]);
            embedding_backward(
                &tokens,
                parameter,
                &Tensor::ones((1, 2, 2), DType::F32, &Device::Cpu)?.to_device(device)?,
            )?;
            let grad = parameter.grad()?.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
            assert_eq!(grad, [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]);
        }
        Ok(())
    }

    #[test]
    fn a_token_outside_the_table_is_an_error() -> Result<()> {
        let parameter = &parameters(&[random_tensor("table", &[4, 2])?], DType::F32)?[0];
        let error = embedding(&Tensor::new(&[[4u32]], &Device::Cpu)?, parameter).unwrap_err().to_string();
        assert!(error.contains("token 4") && error.contains("vocab_size 4"), "{error}");
        Ok(())
    }
}
