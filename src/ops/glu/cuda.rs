use candle_core::Tensor;

use super::Gate;
use crate::Result;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};

pub fn forward(gate: &Tensor, up: &Tensor, kind: Gate) -> Result<Tensor> {
    let (device, dtype) = (device(gate), gate.dtype());
    let (gate, up) = (elements(gate, dtype)?, elements(up, dtype)?);
    let y = uninit(gate.shape(), dtype, device)?;
    let n = if by_eights(gate.elem_count(), &[&gate, &up, &y])? { 8 } else { 1 };
    let (groups, (kind, limit)) = (gate.elem_count() / n, kind.for_kernel());
    let kernel = format!("glu_forward_{}_{n}", suffix(dtype));
    launch!(device, "glu", &kernel, grid: blocks(groups), block: THREADS; &gate, &up, &y, kind, limit, groups);
    Ok(y)
}

/// The gradients of `gate` and `up`.
pub fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor, kind: Gate) -> Result<(Tensor, Tensor)> {
    let (device, dtype) = (device(gate), gate.dtype());
    let (gate, up, dy) = (elements(gate, dtype)?, elements(up, dtype)?, elements(dy, dtype)?);
    let (dgate, dup) = (uninit(gate.shape(), dtype, device)?, uninit(up.shape(), dtype, device)?);
    let n = if by_eights(gate.elem_count(), &[&gate, &up, &dy, &dgate, &dup])? { 8 } else { 1 };
    let (groups, (kind, limit)) = (gate.elem_count() / n, kind.for_kernel());
    let kernel = format!("glu_backward_{}_{n}", suffix(dtype));
    launch!(
        device, "glu", &kernel, grid: blocks(groups), block: THREADS;
        &gate, &up, &dy, &dgate, &dup, kind, limit, groups,
    );
    Ok((dgate, dup))
}
