use std::ops::Range;

use candle_core::{D, Device, Tensor};
use rayon::prelude::*;

use crate::Result;
use crate::ops::add::add_within;
use crate::ops::host::{Element, GRAIN, elements, softcapped, typed, update, vectorized};
use crate::ops::matmul::{Dst, Mat, Operand, Product, add_product, product, wide_product};

pub fn forward(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    typed!(T = weight.dtype(); apply::<T, T>(x, weight, product))
}

/// The gradient of `x`, added to `sum` if there is one; that of the weight is added to `grad`, if it is wanted.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let dx = typed!(T = weight.dtype(); backward_in::<T>(x, weight, grad, dy))?;
    sum.map_or(Ok(dx.clone()), |sum| add_within(sum, &dx))
}

pub fn logits(x: &Tensor, weight: &Tensor, softcap: Option<f32>) -> Result<Tensor> {
    let logits = typed!(T = weight.dtype(); apply::<T, f32>(x, weight, wide_product))?;
    if let Some(cap) = softcap {
        update(&logits, |logits: &mut [f32]| {
            logits.par_chunks_mut(GRAIN).for_each(|logits| {
                vectorized!(logits.iter_mut().for_each(|l| *l = softcapped(*l, cap)));
            });
        })?;
    }
    Ok(logits)
}

fn apply<T: Operand, Y: Element>(x: &Tensor, weight: &Tensor, product: fn(Mat<T>, Mat<T>) -> Vec<Y>) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = outer;
    let rows = x.elem_count() / x.dim(D::Minus1)?;

    let (x, weight) = (elements::<T>(x)?, elements::<T>(weight)?);
    let y = product(Mat::new(&x, rows, inner), Mat::new(&weight, outer, inner).t());
    Ok(Tensor::from_vec(y, shape, &Device::Cpu)?)
}

fn backward_in<T: Operand>(x: &Tensor, weight: &Tensor, grad: Option<&Tensor>, dy: &Tensor) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner;
    let (dy, weight) = (elements::<T>(dy)?, elements::<T>(weight)?);
    let dy = Mat::new(&dy, rows, outer);

    if let Some(grad) = grad {
        let values = elements::<T>(x)?;
        update(grad, |grad: &mut [f32]| add_product(grad, dy.t(), Mat::new(&values, rows, inner)))?;
    }
    let dx = product(dy, Mat::new(&weight, outer, inner));
    Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?)
}

pub fn by_head(x: &Tensor, weight: &Tensor, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    typed!(T = weight.dtype(); by_head_in::<T>(x, weight, rows, transposed))
}

fn by_head_in<T: Operand>(x: &Tensor, weight: &Tensor, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    let (b, s, h, inner) = x.dims4()?;
    let (all_rows, cols) = weight.dims2()?;
    let outer = if transposed { cols } else { rows.len() };
    let (x, weight) = (elements::<T>(x)?, elements::<T>(weight)?);
    let mut y = Vec::with_capacity(b * s * h * outer); // (h, b, s, outer)
    let heads = y.spare_capacity_mut()[..b * s * h * outer].chunks_exact_mut(b * s * outer).enumerate();
    let products = heads.map(|(head, y)| {
        let own = Mat::new(&weight[(head * all_rows / h + rows.start) * cols..], rows.len(), cols);
        let x = Mat::strided(&x[head * inner..], b * s, inner, h * inner);
        Product::new(x, if transposed { own } else { own.t() }, Dst::Rounded(y))
    });
    T::multiply(products.collect());
    // SAFETY: a product writes all of its destination.
    unsafe { y.set_len(b * s * h * outer) };
    let y = Tensor::from_vec(y, (h, b, s, outer), &Device::Cpu)?;
    Ok(y.permute((1, 2, 0, 3))?.contiguous()?)
}
