use candle_core::Tensor;

use super::Gate;
use crate::Result;
use crate::autograd::Parameter;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};
use crate::ops::linear;

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

/// As the host's. What gate and up were multiplied to is made anew along with their gradients, so that they are read once.
pub fn gradients_through(
    gate: &Tensor,
    up: &Tensor,
    weight: &Parameter,
    dy: &Tensor,
    kind: Gate,
) -> Result<(Tensor, Tensor)> {
    if weight.adapter().is_some() || weight.float8().is_some() {
        let dhidden = linear::backward(&forward(gate, up, kind)?, weight, dy, None)?;
        return gradients(gate, up, &dhidden, kind, None);
    }
    let values = weight.compute()?;
    let dy = elements(dy, values.dtype())?;
    let dhidden = linear::cuda::input_gradient(gate.shape(), gate.dtype(), &values, &dy, None)?;
    let Some(grad) = weight.accumulator()? else { return gradients(gate, up, &dhidden, kind, None) };
    let hidden = uninit(gate.shape(), gate.dtype(), device(gate))?;
    let both = gradients(gate, up, &dhidden, kind, Some(&hidden))?;
    linear::cuda::weight_gradient(&hidden, &values, &grad, &dy)?;
    Ok(both)
}

/// The gradients of `gate` and `up`; their product goes to `hidden`, if it is wanted.
fn gradients(gate: &Tensor, up: &Tensor, dy: &Tensor, kind: Gate, hidden: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let (device, dtype) = (device(gate), gate.dtype());
    let (gate, up, dy) = (elements(gate, dtype)?, elements(up, dtype)?, elements(dy, dtype)?);
    let (dgate, dup) = (uninit(gate.shape(), dtype, device)?, uninit(up.shape(), dtype, device)?);
    let all = [&gate, &up, &dy, &dgate, &dup, hidden.unwrap_or(&gate)];
    let n = if by_eights(gate.elem_count(), &all)? { 8 } else { 1 };
    let (groups, (kind, limit)) = (gate.elem_count() / n, kind.for_kernel());
    let kernel = format!("glu_backward_{}_{n}", suffix(dtype));
    launch!(
        device, "glu", &kernel, grid: blocks(groups), block: THREADS;
        &gate, &up, &dy, &dgate, &dup, hidden, kind, limit, groups,
    );
    Ok((dgate, dup))
}
