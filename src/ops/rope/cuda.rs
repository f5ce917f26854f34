use candle_core::Tensor;

use super::RopeTable;
use crate::Result;
use crate::models::args::RopeLayout;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

/// Rotates by `direction` (1 or -1) times the angle.
pub fn rotate(x: &Tensor, table: &RopeTable, direction: f32) -> Result<Tensor> {
    let x = elements(x, x.dtype())?;
    let y = uninit(x.shape(), x.dtype(), device(&x))?;
    rotate_heads(&x, &y, x.dim(2)?, table, direction)?;
    Ok(y)
}

/// Rotates the first `h` heads of each position of `x`, where they are. Nobody else may hold `x`.
pub fn rotate_in_place(x: &Tensor, h: usize, table: &RopeTable, direction: f32) -> Result<()> {
    rotate_heads(x, x, h, table, direction)
}

fn rotate_heads(x: &Tensor, y: &Tensor, h: usize, table: &RopeTable, direction: f32) -> Result<()> {
    let (b, s, all, hd) = x.dims4()?;
    let (RopeTable { cos, sin, layout }, half) = (table, table.cos.dim(1)?);
    let aligned = |widths| by_eights(widths, &[x, y, cos, sin]);
    let (layout, n, per_head) = match layout {
        RopeLayout::Pairs => ("pairs", if aligned(hd | (2 * half))? { 8 } else { 2 }, hd),
        RopeLayout::Halves => ("halves", if aligned(hd | half)? { 8 } else { 1 }, hd - half),
    };
    let groups = b * s * h * per_head / n;
    let kernel = format!("rope_{layout}_{}_{n}", suffix(x.dtype()));
    launch!(
        device(x), "rope", &kernel, grid: blocks(groups), block: THREADS;
        x, y, cos, sin, direction, groups, s, h, all, hd, half,
    );
    Ok(())
}
