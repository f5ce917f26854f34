use candle_core::{D, DType, Tensor};

use crate::Result;
use crate::ops::bias::cuda::add_partials;
use crate::ops::gpu::{THREADS, device, elements, launch, suffix, uninit};
use crate::ops::rms_norm::cuda::{Shape, beside};

/// The result, and the moments of each row, `(rows, 2)`.
pub fn forward(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
    let device = device(x);
    let (x, dim) = (beside(x, dtype)?, x.dim(D::Minus1)?);
    let rows = x.elem_count() / dim;
    let (y, moments) = (uninit(x.shape(), dtype, device)?, uninit((rows, 2), DType::F32, device)?);
    let shape = Shape::new(rows, dim, &[&x, &y, weight, bias])?;
    let kernel = format!("layer_norm_forward_{}_{}_{}", suffix(x.dtype()), suffix(dtype), shape.name);
    launch!(
        device, "layer_norm", &kernel,
        grid: [shape.blocks(), 1, 1], block: THREADS, shared: shape.scratch_bytes();
        &x, weight, bias, is_bf16(weight), eps, &y, &moments, rows, dim,
    );
    Ok((y, moments))
}

/// `grads`: of weight and bias.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grads: Option<&(Tensor, Tensor)>,
    moments: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let (device, dtype) = (device(x), x.dtype());
    let (x, dy, dim) = (beside(x, dy.dtype())?, elements(dy, dy.dtype())?, x.dim(D::Minus1)?);
    let rows = x.elem_count() / dim;
    let dx = uninit(x.shape(), x.dtype(), device)?;
    let shape = Shape::new(rows, dim, &[&x, &dy, &dx, weight])?;
    let partials = grads.map(|_| uninit((2, shape.parts(), dim), DType::F32, device)).transpose()?;
    let types = format!("{}_{}", suffix(x.dtype()), suffix(dy.dtype()));
    let kernel = format!("layer_norm_backward_{types}_{}", shape.name);
    launch!(
        device, "layer_norm", &kernel,
        grid: [shape.backward_blocks(), 1, 1], block: THREADS, shared: shape.backward_scratch_bytes();
        &x, weight, is_bf16(weight), moments, &dy, &dx, partials.as_ref(), rows, dim,
    );
    if let (Some((dweight, dbias)), Some(partials)) = (grads, &partials) {
        if !shape.keeps_rows() {
            let (kernel, (grid, shared)) = (format!("layer_norm_columns_{types}"), shape.columns());
            launch!(
                device, "layer_norm", &kernel, grid: grid, block: THREADS, shared: shared;
                &x, moments, &dy, partials, rows, dim,
            );
        }
        add_partials(partials, &[dweight, dbias])?;
    }
    elements(&dx, dtype)
}

fn is_bf16(weight: &Tensor) -> i32 {
    i32::from(weight.dtype() == DType::BF16)
}
