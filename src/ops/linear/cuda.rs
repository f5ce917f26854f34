use std::ops::Range;

use candle_core::{DType, Shape, Tensor};

use crate::Result;
use crate::ops::gpu::{self, launch};
use crate::ops::matmul::cuda::{Mat, Store, multiply, multiply_and_add, multiply_batch, product_with_transpose};

pub fn forward(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    product_with_transpose(x, weight, weight.dtype())
}

/// As [`forward`], added to `residual` before it is rounded.
pub fn forward_onto(residual: &Tensor, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let (residual, x) = (gpu::elements(residual, residual.dtype())?, gpu::elements(x, weight.dtype())?);
    let rows = x.elem_count() / inner;
    let sum = gpu::uninit(residual.shape(), residual.dtype(), gpu::device(&x))?;
    let (weight, residual, dst) = (Mat::new(weight, outer)?.t(), Mat::new(&residual, rows)?, Mat::new(&sum, rows)?);
    multiply_and_add(gpu::device(&x), Mat::new(&x, rows)?, weight, residual, dst)?;
    Ok(sum)
}

/// As the host's, but rounded once, to `x`'s dtype.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let dy = gpu::elements(dy, weight.dtype())?;
    if let Some(grad) = grad {
        weight_gradient(x, weight, grad, &dy)?;
    }
    input_gradient(x.shape(), x.dtype(), weight, &dy, sum)
}

/// `grad += dyᵀ x`; `dy` is row-major, in the dtype of `weight`.
pub fn weight_gradient(x: &Tensor, weight: &Tensor, grad: &Tensor, dy: &Tensor) -> Result<()> {
    let (outer, inner) = weight.dims2()?;
    let x = gpu::elements(x, weight.dtype())?;
    let rows = x.elem_count() / inner;
    multiply(gpu::device(dy), Mat::new(dy, rows)?.t(), Mat::new(&x, rows)?, Mat::new(grad, outer)?, Store::Add(1.0))
}

/// `dy weight`, and `sum` if there is one, in a shape and dtype; `dy` is as for [`weight_gradient`].
pub fn input_gradient(
    shape: &Shape,
    dtype: DType,
    weight: &Tensor,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let rows = shape.elem_count() / inner;
    let dx = gpu::uninit(shape, dtype, gpu::device(dy))?;
    let (dy, weight, dst) = (Mat::new(dy, rows)?, Mat::new(weight, outer)?, Mat::new(&dx, rows)?);
    match sum.map(|sum| gpu::elements(sum, dtype)).transpose()? {
        None => multiply(gpu::device(&dx), dy, weight, dst, Store::Overwrite(1.0))?,
        Some(sum) => multiply_and_add(gpu::device(&dx), dy, weight, Mat::new(&sum, rows)?, dst)?,
    }
    Ok(dx)
}

pub fn logits(x: &Tensor, weight: &Tensor, softcap: Option<f32>) -> Result<Tensor> {
    let logits = product_with_transpose(x, weight, DType::F32)?;
    if let Some(cap) = softcap {
        let n = logits.elem_count();
        // The kernel stays below `n`, the tensor's length.
        launch!(gpu::device(x), "linear", "softcap", grid: [n.div_ceil(256), 1, 1], block: 256; &logits, n, cap);
    }
    Ok(logits)
}

pub fn by_head(x: &Tensor, weight: &Tensor, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    let (b, s, h, inner) = x.dims4()?;
    let (all_rows, cols) = weight.dims2()?;
    let outer = if transposed { cols } else { rows.len() };
    let device = gpu::device(x);
    let x = gpu::elements(x, weight.dtype())?;
    let y = gpu::uninit((b, s, h, outer), weight.dtype(), device)?;
    // The matrices of head 0; those of the others follow within the tensors.
    let own = Mat::strided(weight, rows.start * cols, rows.len(), cols, cols)?.batched(all_rows / h * cols);
    let x = Mat::strided(&x, 0, b * s, inner, h * inner)?.batched(inner);
    let dst = Mat::strided(&y, 0, b * s, outer, h * outer)?.batched(outer);
    multiply_batch(device, x, if transposed { own } else { own.t() }, dst, Store::Overwrite(1.0), h)?;
    Ok(y)
}
