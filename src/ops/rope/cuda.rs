use candle_core::Tensor;

use super::RopeTable;
use crate::Result;
use crate::models::args::RopeLayout;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

/// Rotates by `direction` (1 or -1) times the angle.
pub fn rotate(x: &Tensor, table: &RopeTable, direction: f32) -> Result<Tensor> {
    let device = device(x);
    let (_, s, h, hd) = x.dims4()?;
    let x = elements(x, x.dtype())?;
    let y = uninit(x.shape(), x.dtype(), device)?;
    let (RopeTable { cos, sin, layout }, half) = (table, table.cos.dim(1)?);
    let aligned = |widths| by_eights(widths, &[&x, &y, cos, sin]);
    let (layout, n, groups) = match layout {
        RopeLayout::Pairs => {
            let n = if aligned(hd | (2 * half))? { 8 } else { 2 };
            ("pairs", n, x.elem_count() / n)
        }
        RopeLayout::Halves => {
            let n = if aligned(hd | half)? { 8 } else { 1 };
            ("halves", n, x.elem_count() / hd * (hd - half) / n)
        }
    };
    let kernel = format!("rope_{layout}_{}_{n}", suffix(x.dtype()));
    launch!(
        device, "rope", &kernel, grid: blocks(groups), block: THREADS;
        &x, &y, cos, sin, direction, groups, s, h, hd, half,
    );
    Ok(y)
}
