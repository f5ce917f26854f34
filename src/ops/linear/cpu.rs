use candle_core::{D, Tensor};

use crate::Result;
use crate::ops::host::{floats, floats_in, tensor, update};
use crate::ops::matmul::{Mat, Store, matmul_all};

pub fn forward(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = outer;
    let rows = x.elem_count() / x.dim(D::Minus1)?;

    let (values, weights) = (floats_in(x, weight.dtype())?, floats(weight)?);
    let mut y = vec![0f32; rows * outer];
    matmul_all(&mut y, Store::Overwrite, Mat::new(&values, rows, inner), Mat::new(&weights, outer, inner).t());
    tensor(y, shape, weight.dtype())
}

pub fn backward(x: &Tensor, weight: &Tensor, grad: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner;
    let dy = floats_in(dy, weight.dtype())?;
    let dy = Mat::new(&dy, rows, outer);

    {
        let values = floats_in(x, weight.dtype())?;
        update(grad, |grad: &mut [f32]| matmul_all(grad, Store::Add, dy.t(), Mat::new(&values, rows, inner)))?;
    }
    let mut dx = vec![0f32; rows * inner];
    matmul_all(&mut dx, Store::Overwrite, dy, Mat::new(&floats(weight)?, outer, inner));
    tensor(dx, x.shape(), x.dtype())
}
