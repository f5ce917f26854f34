use candle_core::{D, Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, elements, typed, update};
use crate::ops::matmul::{Mat, Operand, add_product, product, wide_product};

pub fn forward(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    typed!(T = weight.dtype(); apply::<T, T>(x, weight, product))
}

/// The gradient of `x`; that of the weight is added to `grad`, if it is wanted.
pub fn backward(x: &Tensor, weight: &Tensor, grad: Option<&Tensor>, dy: &Tensor) -> Result<Tensor> {
    typed!(T = weight.dtype(); backward_in::<T>(x, weight, grad, dy))
}

pub fn logits(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    typed!(T = weight.dtype(); apply::<T, f32>(x, weight, wide_product))
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
