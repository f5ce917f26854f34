use candle_core::{D, Shape, Tensor};

use super::Gate;
use crate::Result;
use crate::autograd::Parameter;
use crate::ops::gpu::{THREADS, blocks, device, elements, first, launch, suffix, uninit};
use crate::ops::linear;

/// Gate and up, where each row of `both` holds one behind the other.
fn halves(both: &Tensor) -> Result<[Tensor; 2]> {
    let width = both.dim(D::Minus1)? / 2;
    let rows = both.reshape(((), 2 * width))?;
    Ok([rows.narrow(1, 0, width)?, rows.narrow(1, width, width)?])
}

/// A gate and an up as kernels read them: contiguous, or [`halves`].
struct Branches {
    gate: Tensor,
    up: Tensor,
    /// Numbers of a row, and those from one row to the next; contiguous rows are one.
    width: usize,
    apart: usize,
}

impl Branches {
    fn new(gate: &Tensor, up: &Tensor) -> Result<Self> {
        if let (&[_, width], &[apart, 1], false) = (gate.dims(), gate.stride(), gate.is_contiguous()) {
            assert_eq!(gate.stride(), up.stride(), "gate and up lie alike");
            return Ok(Self { gate: gate.clone(), up: up.clone(), width, apart });
        }
        let (gate, up, n) = (elements(gate, gate.dtype())?, elements(up, gate.dtype())?, gate.elem_count());
        Ok(Self { gate, up, width: n, apart: n })
    }

    /// How many numbers a thread takes, with those of `others`, which are contiguous.
    fn group(&self, others: &[&Tensor]) -> Result<usize> {
        let mut by_eights = self.width.is_multiple_of(8) && self.apart.is_multiple_of(8);
        for tensor in [&self.gate, &self.up].iter().chain(others) {
            by_eights = by_eights && first(tensor)?.is_multiple_of(16);
        }
        Ok(if by_eights { 8 } else { 1 })
    }

    fn uninit(&self, shape: &Shape) -> Result<Tensor> {
        uninit(shape, self.gate.dtype(), device(&self.gate))
    }
}

pub fn forward(gate: &Tensor, up: &Tensor, kind: Gate) -> Result<Tensor> {
    let own = Branches::new(gate, up)?;
    let y = own.uninit(gate.shape())?;
    let n = own.group(&[&y])?;
    let (groups, (kind, limit)) = (y.elem_count() / n, kind.for_kernel());
    let kernel = format!("glu_forward_{}_{n}", suffix(y.dtype()));
    launch!(
        device(&y), "glu", &kernel, grid: blocks(groups), block: THREADS;
        first(&own.gate)?, first(&own.up)?, &y, kind, limit, groups, own.width, own.apart,
    );
    Ok(y)
}

/// [`forward`] of what [`halves`] takes apart, `(…, 2 hidden)`.
pub fn forward_at_once(both: &Tensor, kind: Gate) -> Result<Tensor> {
    let [gate, up] = halves(both)?;
    let shape = both.narrow(D::Minus1, 0, gate.dim(1)?)?.shape().clone();
    Ok(forward(&gate, &up, kind)?.reshape(shape)?)
}

/// As the host's. What gate and up were multiplied to is made anew along with their gradients, so that they are read once.
pub fn gradients_through(
    gate: &Tensor,
    up: &Tensor,
    weight: &Parameter,
    dy: &Tensor,
    kind: Gate,
) -> Result<(Tensor, Tensor)> {
    let (gate, up) = (elements(gate, gate.dtype())?, elements(up, gate.dtype())?);
    let new = || uninit(gate.shape(), gate.dtype(), device(&gate));
    let (dgate, dup) = (new()?, new()?);
    gradients_into([&dgate, &dup], [&gate, &up], weight, dy, kind)?;
    Ok((dgate, dup))
}

/// The gradient of what [`halves`] takes apart, laid out as it is.
pub fn gradients_at_once(both: &Tensor, weight: &Parameter, dy: &Tensor, kind: Gate) -> Result<Tensor> {
    let gradients = uninit(both.shape(), both.dtype(), device(both))?;
    let ([dgate, dup], [gate, up]) = (halves(&gradients)?, halves(both)?);
    gradients_into([&dgate, &dup], [&gate, &up], weight, dy, kind)?;
    Ok(gradients)
}

fn gradients_into(
    into: [&Tensor; 2],
    [gate, up]: [&Tensor; 2],
    weight: &Parameter,
    dy: &Tensor,
    kind: Gate,
) -> Result<()> {
    if !weight.is_plain() {
        let dhidden = linear::backward(&forward(gate, up, kind)?, weight, dy, None)?;
        return gradients(into, [gate, up], &dhidden, kind, None);
    }
    let values = weight.compute()?;
    let dy = elements(dy, values.dtype())?;
    let dhidden = linear::cuda::input_gradient(gate.shape(), gate.dtype(), &values, &dy, None)?;
    let Some(grad) = weight.accumulator()? else { return gradients(into, [gate, up], &dhidden, kind, None) };
    let hidden = uninit(gate.shape(), gate.dtype(), device(gate))?;
    gradients(into, [gate, up], &dhidden, kind, Some(&hidden))?;
    linear::cuda::weight_gradient(&hidden, &values, &grad, &dy)
}

/// The gradients of `gate` and `up`, which lie as these do; their product goes to `hidden`, if it is wanted.
fn gradients(
    [dgate, dup]: [&Tensor; 2],
    [gate, up]: [&Tensor; 2],
    dy: &Tensor,
    kind: Gate,
    hidden: Option<&Tensor>,
) -> Result<()> {
    let (own, dy) = (Branches::new(gate, up)?, elements(dy, gate.dtype())?);
    assert_eq!(
        [dgate.stride(), dup.stride()],
        [own.gate.stride(), own.up.stride()],
        "gradients lie as what they are of"
    );
    let n = own.group(&[dgate, dup, &dy, hidden.unwrap_or(&dy)])?;
    let (groups, (kind, limit)) = (dy.elem_count() / n, kind.for_kernel());
    let kernel = format!("glu_backward_{}_{n}", suffix(dy.dtype()));
    launch!(
        device(&dy), "glu", &kernel, grid: blocks(groups), block: THREADS;
        first(&own.gate)?, first(&own.up)?, &dy, first(dgate)?, first(dup)?, hidden, kind, limit, groups,
        own.width, own.apart,
    );
    Ok(())
}
