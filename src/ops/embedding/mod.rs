//! Rows of a table by index.

mod cpu;

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
/// If a token is not in the table.
pub fn embedding(tokens: &Tensor, table: &Parameter) -> Result<Tensor> {
    let _span = profiler::span("embedding").shapes(&[tokens.dims(), table.shape()]);
    cpu::forward(tokens, &table.weights()?)
}

/// Adds the gradient of the looked-up rows to the table's accumulator, if it has one; only rows that occur are touched.
pub fn embedding_backward(tokens: &Tensor, table: &Parameter, dy: &Tensor) -> Result<()> {
    let _span = profiler::span("embedding").shapes(&[dy.dims()]);
    match table.accumulator()? {
        Some(grad) => cpu::backward(tokens, &grad, dy),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::testing::{assert_close, on_threads, parameters, random_tensor};

    #[test]
    fn embedding_matches_its_reference() -> Result<()> {
        let table = random_tensor("table", &[11, 37])?;
        let tokens = Tensor::new(&[[3u32, 0, 10], [3, 3, 7]], &Device::Cpu)?;
        let parameter = &parameters(std::slice::from_ref(&table), DType::BF16)?[0];
        let dy = random_tensor("dy", &[2, 37, 3])?.transpose(1, 2)?;

        let wide = Var::from_tensor(&table.to_dtype(DType::F64)?)?;
        let expected = wide.embedding(&tokens.flatten_all()?)?.reshape((2, 3, 37))?;
        assert_close("embedding", &embedding(&tokens, parameter)?, &expected, 0.0)?;
        embedding_backward(&tokens, parameter, &dy)?;
        let grads = (expected * dy.to_dtype(DType::F64)?)?.sum_all()?.backward()?;
        assert_close("gradient of the table", &parameter.grad()?, grads.get(&wide).unwrap(), 1e-6)
    }

    #[test]
    fn gradients_are_the_same_bits_on_one_thread_and_on_three() -> Result<()> {
        let tokens: Vec<u32> = (0..3000).map(|i| i * i % 97).collect();
        let (tokens, dy) = (Tensor::from_vec(tokens, (1, 3000), &Device::Cpu)?, random_tensor("dy", &[1, 3000, 37])?);
        let run = || -> Result<_> {
            let table = &parameters(&[random_tensor("table", &[100, 37])?], DType::F32)?[0];
            embedding_backward(&tokens, table, &dy)?;
            Ok(table.grad()?.to_vec2::<f32>()?)
        };
        assert!(on_threads(1, run)? == on_threads(3, run)?);
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
