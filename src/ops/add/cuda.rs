use candle_core::Tensor;

use crate::Result;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let device = device(x);
    let (x, y) = (elements(x, x.dtype())?, elements(y, y.dtype())?);
    let sum = uninit(x.shape(), x.dtype(), device)?;
    let n = if by_eights(x.elem_count(), &[&x, &y, &sum])? { 8 } else { 1 };
    let groups = x.elem_count() / n;
    let kernel = format!("add_{}_{}_{n}", suffix(x.dtype()), suffix(y.dtype()));
    launch!(device, "add", &kernel, grid: blocks(groups), block: THREADS; &x, &y, &sum, groups);
    Ok(sum)
}
