use candle_core::Tensor;

use crate::Result;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    let device = device(x);
    let x = elements(x, x.dtype())?;
    let y = uninit(x.shape(), x.dtype(), device)?;
    let n = if by_eights(x.elem_count(), &[&x, &y])? { 8 } else { 1 };
    let groups = x.elem_count() / n;
    let kernel = format!("scale_{}_{n}", suffix(x.dtype()));
    launch!(device, "scale", &kernel, grid: blocks(groups), block: THREADS; &x, &y, factor, groups);
    Ok(y)
}

pub fn scale_positions(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let device = device(x);
    let (_, s, h, hd) = x.dims4()?;
    let x = elements(x, x.dtype())?;
    let y = uninit(x.shape(), x.dtype(), device)?;
    let n = if by_eights(h * hd, &[&x, &y])? { 8 } else { 1 };
    let groups = x.elem_count() / n;
    let kernel = format!("scale_positions_{}_{n}", suffix(x.dtype()));
    launch!(device, "scale", &kernel, grid: blocks(groups), block: THREADS; &x, &y, factors, groups, s, h * hd);
    Ok(y)
}
