use candle_core::{D, Tensor};

use crate::Result;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

/// Rows whose number `i` is number `start + i` of the rows of `x`, and zero where there is none.
pub fn resized(x: &Tensor, start: isize, width: usize) -> Result<Tensor> {
    let device = device(x);
    let (x, old) = (elements(x, x.dtype())?, x.dim(D::Minus1)?);
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = width;
    let y = uninit(shape, x.dtype(), device)?;
    let n = if by_eights(old | width | start.unsigned_abs(), &[&x, &y])? { 8 } else { 1 };
    let groups = y.elem_count() / n;
    let kernel = format!("resized_{}_{n}", suffix(x.dtype()));
    launch!(device, "narrow", &kernel, grid: blocks(groups), block: THREADS; &x, &y, groups, old, width, start);
    Ok(y)
}

pub fn join_shared(x: &Tensor, shared: &Tensor) -> Result<Tensor> {
    let device = device(x);
    let (b, s, h, n) = x.dims4()?;
    let m = shared.dim(D::Minus1)?;
    let (x, shared) = (elements(x, x.dtype())?, elements(shared, x.dtype())?);
    let y = uninit((b, s, h, n + m), x.dtype(), device)?;
    let numbers = if by_eights(n | m, &[&x, &shared, &y])? { 8 } else { 1 };
    let groups = y.elem_count() / numbers;
    let kernel = format!("join_shared_{}_{numbers}", suffix(x.dtype()));
    launch!(device, "narrow", &kernel, grid: blocks(groups), block: THREADS; &x, &shared, &y, groups, h, n, m);
    Ok(y)
}

/// The sum over heads of the numbers `start..start + len`, `(b, s, 1, len)`, summed in f32.
pub fn sum_of_heads(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    let device = device(x);
    let (b, s, h, width) = x.dims4()?;
    let x = elements(x, x.dtype())?;
    let y = uninit((b, s, 1, len), x.dtype(), device)?;
    let n = if by_eights(width | start | len, &[&x, &y])? { 8 } else { 1 };
    let groups = y.elem_count() / n;
    let kernel = format!("sum_of_heads_{}_{n}", suffix(x.dtype()));
    launch!(device, "narrow", &kernel, grid: blocks(groups), block: THREADS; &x, &y, groups, h, width, start, len);
    Ok(y)
}
