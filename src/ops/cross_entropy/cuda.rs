use candle_core::{D, DType, Tensor};

use crate::Result;
use crate::ops::gpu::{self, launch, suffix};
use crate::ops::matmul::cuda::{Mat, Store, multiply};

/// Logits that may exist at a time in any model, in bytes.
const LOGITS_BYTES: usize = 320 << 20;

/// Chunks of rows of equal size, a multiple of what tensor cores take at a time. Each chunk reads and writes the weight's
/// gradient whole, so logits may take as much memory as that: chunks are then long enough that it does not set the time.
fn rows_per_chunk(rows: usize, vocab_size: usize, dim: usize, dtype: DType) -> usize {
    const TILE: usize = 128;
    let bytes = LOGITS_BYTES.max(vocab_size * dim * size_of::<f32>());
    let most = (bytes / (vocab_size * dtype.size_in_bytes())).max(1);
    let most = if most > TILE { most / TILE * TILE } else { most };
    let chunks = rows.div_ceil(most);
    rows.div_ceil(chunks).next_multiple_of(TILE).min(rows).min(most.max(TILE))
}

/// The mean of the losses, `()` f32.
pub fn forward(x: &Tensor, weight: &Tensor, softcap: Option<f32>, targets: &Tensor) -> Result<Tensor> {
    Head::new(x, weight, softcap, targets, 1.0)?.run(None, None)
}

/// `scale` times that mean, and the gradient of `x`; that of the weight is added to `grad`, if it is wanted.
pub fn forward_backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    softcap: Option<f32>,
    targets: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let dx = gpu::uninit(x.shape(), x.dtype(), gpu::device(x))?;
    let loss = Head::new(x, weight, softcap, targets, scale)?.run(Some(&dx), grad)?;
    Ok((loss, dx))
}

struct Head<'a> {
    x: Tensor,
    weight: &'a Tensor,
    softcap: Option<f32>,
    targets: Tensor,
    scale: f64,
}

impl<'a> Head<'a> {
    fn new(x: &Tensor, weight: &'a Tensor, softcap: Option<f32>, targets: &Tensor, scale: f64) -> Result<Self> {
        let rows = x.elem_count() / x.dim(D::Minus1)?;
        let x = gpu::elements(x, weight.dtype())?.reshape((rows, ()))?;
        Ok(Self { x, weight, softcap, targets: targets.contiguous()?.reshape(rows)?, scale })
    }

    fn run(&self, dx: Option<&Tensor>, grad: Option<&Tensor>) -> Result<Tensor> {
        let Self { x, weight, targets, .. } = self;
        let (rows, dim) = x.dims2()?;
        let vocab_size = weight.dim(0)?;
        let device = gpu::device(x);
        let (scalars, losses) = (gpu::uninit(2, DType::F32, device)?, gpu::uninit(rows, DType::F32, device)?);
        let loss = gpu::uninit((), DType::F32, device)?;
        // These read `rows` targets or losses, and write what is made for them above.
        launch!(device, "cross_entropy", "count_targets", grid: [1, 1, 1], block: 1024;
            targets, rows, self.scale as f32, &scalars);
        let kernel = format!(
            "loss{}{}_{}",
            if dx.is_some() { "_grad" } else { "" },
            if self.softcap.is_some() { "_capped" } else { "" },
            suffix(weight.dtype())
        );
        let size = rows_per_chunk(rows, vocab_size, dim, weight.dtype());
        let buffer = gpu::uninit((size, vocab_size), weight.dtype(), device)?;
        let weight_rows = Mat::new(weight, vocab_size)?;
        for first in (0..rows).step_by(size) {
            let n = size.min(rows - first);
            let x = Mat::new(&x.narrow(0, first, n)?, n)?;
            let logits = buffer.narrow(0, 0, n)?;
            let chunk = Mat::new(&logits, n)?;
            multiply(device, x, weight_rows.t(), chunk, Store::Overwrite(1.0))?;
            // One block for each of the `n` rows of the chunk.
            launch!(device, "cross_entropy", &kernel, grid: [n, 1, 1], block: 512;
                &logits, &targets.narrow(0, first, n)?, vocab_size as i32, self.softcap.unwrap_or(1.0), &scalars,
                &losses.narrow(0, first, n)?);
            if let Some(dx) = dx {
                let dx = Mat::strided(dx, first * dim, n, dim, dim)?;
                multiply(device, chunk, weight_rows, dx, Store::Overwrite(1.0))?;
            }
            if let Some(grad) = grad {
                multiply(device, chunk.t(), x, Mat::new(grad, vocab_size)?, Store::Add(1.0))?;
            }
        }
        launch!(device, "cross_entropy", "sum_losses", grid: [1, 1, 1], block: 1024; &losses, rows, &scalars, &loss);
        Ok(loss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_few_even_and_within_their_memory() {
        assert_eq!(rows_per_chunk(4096, 202_048, 256, DType::BF16), 768);
        assert_eq!(rows_per_chunk(16_384, 128_256, 2048, DType::BF16), 4096);
        assert_eq!(rows_per_chunk(16_384, 2048, 256, DType::BF16), 16_384);
        assert_eq!(rows_per_chunk(19, 53, 16, DType::F32), 19);
        for rows in [1, 127, 129, 5000, 100_000] {
            let size = rows_per_chunk(rows, 50_304, 768, DType::BF16);
            assert!(size >= 1 && size <= rows && size * 50_304 * 2 <= LOGITS_BYTES, "{rows}: {size}");
        }
    }
}
