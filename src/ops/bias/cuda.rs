use candle_core::{D, DType, Tensor};

use crate::Result;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

/// Parts of the rows that are summed on their own, at most, and the rows that a part has at least.
const PARTS: usize = 256;
const ROWS: usize = 32;

pub fn forward(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let device = device(x);
    let (x, dim) = (elements(x, x.dtype())?, x.dim(D::Minus1)?);
    let y = uninit(x.shape(), x.dtype(), device)?;
    let n = if by_eights(dim, &[&x, bias, &y])? { 8 } else { 1 };
    let groups = x.elem_count() / n;
    let kernel = format!("add_bias_{}_{}_{n}", suffix(x.dtype()), suffix(bias.dtype()));
    launch!(device, "bias", &kernel, grid: blocks(groups), block: THREADS; &x, bias, &y, groups, dim);
    Ok(y)
}

/// `grad += Σ dy` over rows.
pub fn accumulate(grad: &Tensor, dy: &Tensor) -> Result<()> {
    let device = device(dy);
    let (dy, dim) = (elements(dy, dy.dtype())?, dy.dim(D::Minus1)?);
    let rows = dy.elem_count() / dim;
    let parts = rows.div_ceil(ROWS).min(PARTS);
    let partials = uninit((parts, dim), DType::F32, device)?;
    let n = if by_eights(dim, &[&dy])? { 8 } else { 1 };
    let kernel = format!("column_sums_{}_{n}", suffix(dy.dtype()));
    let (grid, shared) = ([dim.div_ceil(32 * n), parts, 1], size_of::<f32>() * THREADS * n);
    launch!(device, "bias", &kernel, grid: grid, block: THREADS, shared: shared; &dy, &partials, rows, dim);
    add_partials(&partials, &[grad])
}

/// `grads[g] += Σ partials[g, p]` over `p`.
///
/// # Shapes
/// `grads`: one or two of `(dim)`. `partials`: `(parts, dim)`, or as many of these as gradients.
pub fn add_partials(partials: &Tensor, grads: &[&Tensor]) -> Result<()> {
    const WARPS: usize = 32;
    let (parts, dim) = (partials.dim(D::Minus2)?, partials.dim(D::Minus1)?);
    let (grid, shared) = ([dim.div_ceil(32), grads.len(), 1], size_of::<f32>() * WARPS * 32);
    launch!(
        device(partials), "bias", "add_partials", grid: grid, block: 32 * WARPS, shared: shared;
        partials, grads[0], grads.get(1).copied(), parts, dim,
    );
    Ok(())
}
