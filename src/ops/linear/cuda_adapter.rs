//! What an adapter adds to a product, on a GPU: as `adapter.rs` says.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::cuda;
use crate::Result;
use crate::autograd::Adapter;
use crate::ops::gpu::{self, launch, suffix};
use crate::ops::matmul::cuda::{Mat, Store, multiply};

pub fn forward(x: &Tensor, adapter: &Adapter, name: &str) -> Result<Tensor> {
    let b = adapter.b.compute()?;
    let narrow = narrow(&dropped(x, adapter, name, b.dtype())?, adapter)?;
    cuda::forward(&narrow, &b)
}

pub fn backward(x: &Tensor, adapter: &Adapter, name: &str, dy: &Tensor) -> Result<Tensor> {
    let (a, b) = (adapter.a.compute()?, adapter.b.compute()?);
    let ([rank, inner], outer, dtype) = ([adapter.a.shape()[0], adapter.a.shape()[1]], adapter.b.shape()[0], a.dtype());
    let device = gpu::device(x);
    let rows = x.elem_count() / inner;
    let dy = gpu::elements(dy, dtype)?;

    let dropped = dropped(x, adapter, name, dtype)?;
    let narrow = narrow(&dropped, adapter)?;
    let dy = Mat::new(&dy, rows)?;
    multiply(device, dy.t(), Mat::new(&narrow, rows)?, Mat::new(&adapter.b.grad()?, outer)?, Store::Add(1.0))?;
    let dnarrow = gpu::uninit((rows, rank), dtype, device)?;
    let dnarrow_rows = Mat::new(&dnarrow, rows)?;
    multiply(device, dy, Mat::new(&b, outer)?, dnarrow_rows, Store::Overwrite(adapter.scale))?;
    let input = Mat::new(&dropped, rows)?;
    multiply(device, dnarrow_rows.t(), input, Mat::new(&adapter.a.grad()?, rank)?, Store::Add(1.0))?;
    let dx = gpu::uninit(x.shape(), dtype, device)?;
    multiply(device, dnarrow_rows, Mat::new(&a, rank)?, Mat::new(&dx, rows)?, Store::Overwrite(1.0))?;
    // What did not go in has no gradient.
    self::dropped(&dx, adapter, name, x.dtype())
}

pub fn by_head(x: &Tensor, adapter: &Adapter, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    let (b, s, h, _) = x.dims4()?;
    let [rank, inner] = [adapter.a.shape()[0], adapter.a.shape()[1]];
    let weight = adapter.b.compute()?;
    if !transposed {
        let narrow = narrow(&gpu::elements(x, weight.dtype())?, adapter)?.reshape((b, s, h, rank))?;
        return cuda::by_head(&narrow, &weight, rows, false);
    }
    let narrow = cuda::by_head(x, &weight, rows, true)?; // (b, s, h, rank)
    let device = gpu::device(x);
    let y = gpu::uninit((b, s, h, inner), weight.dtype(), device)?;
    let (a, n) = (adapter.a.compute()?, b * s * h);
    multiply(device, Mat::new(&narrow, n)?, Mat::new(&a, rank)?, Mat::new(&y, n)?, Store::Overwrite(adapter.scale))?;
    Ok(y)
}

/// `scale · x Aᵀ`, `(…, rank)`.
fn narrow(x: &Tensor, adapter: &Adapter) -> Result<Tensor> {
    let [rank, inner] = [adapter.a.shape()[0], adapter.a.shape()[1]];
    let (device, rows) = (gpu::device(x), x.elem_count() / inner);
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = rank;
    let y = gpu::uninit(shape, x.dtype(), device)?;
    let a = adapter.a.compute()?;
    multiply(
        device,
        Mat::new(x, rows)?,
        Mat::new(&a, rank)?.t(),
        Mat::new(&y, rows)?,
        Store::Overwrite(adapter.scale),
    )?;
    Ok(y)
}

/// The elements of `x` without those that the adapter's dropout takes, and the rest larger to make up for them: the same
/// that the host leaves out.
fn dropped(x: &Tensor, adapter: &Adapter, name: &str, dtype: DType) -> Result<Tensor> {
    let x = gpu::elements(x, dtype)?;
    let Some((words, threshold, factor)) = adapter.dropout.words(name) else { return Ok(x) };
    let (device, n) = (gpu::device(&x), x.elem_count());
    let y = gpu::uninit(x.shape(), dtype, device)?;
    let seed = words.get_seed();
    let key: [u64; 4] = std::array::from_fn(|i| u64::from_le_bytes(std::array::from_fn(|j| seed[8 * i + j])));
    // One thread for each 16 words of the stream, below `n`, the length of both tensors.
    launch!(device, "linear", &format!("dropout_{}", suffix(dtype)), grid: [n.div_ceil(16 * 128), 1, 1], block: 128;
        &x, &y, n, key[0], key[1], key[2], key[3], words.get_stream(), threshold, factor);
    Ok(y)
}
