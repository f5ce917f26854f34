use candle_core::{D, DType, Device, Tensor};

use crate::Result;
use crate::ops::add::add_within;
use crate::ops::host::{Element, GRAIN, build, dot, elements, floats, sum_of, typed, update_if, vectorized};

/// Elements per task of a sum over rows: whole rows, and enough of them that their sum of weight gradients is small
/// beside them.
pub(in crate::ops) fn grain(dim: usize) -> usize {
    (GRAIN / dim).max(16) * dim
}

/// The result, and `rstd` of each row.
pub fn forward(x: &Tensor, weight: &Tensor, offset: f32, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
    typed!(X = x.dtype(), Y = dtype; normalize::<X, Y>(x, &shifted(weight, offset)?, eps))
}

/// The same without a weight, in `x`'s dtype.
pub fn forward_unit(x: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    typed!(X = x.dtype(); normalize::<X, X>(x, &vec![1.0; x.dim(D::Minus1)?], eps))
}

fn shifted(weight: &Tensor, offset: f32) -> Result<Vec<f32>> {
    Ok(floats(weight)?.iter().map(|w| offset + w).collect())
}

fn normalize<X: Element, Y: Element>(x: &Tensor, weight: &[f32], eps: f32) -> Result<(Tensor, Tensor)> {
    let dim = x.dim(D::Minus1)?;
    let values = elements::<X>(x)?;
    let ([y], rstd) = build(values.len(), grain(dim), |range, y| {
        let x = &values[range];
        vectorized!({
            let mut rstds = Vec::with_capacity(x.len() / dim);
            for x in x.chunks_exact(dim) {
                let rstd = 1.0 / (dot(x, x) / dim as f32 + eps).sqrt();
                y.extend(x.iter().zip(weight).map(|(x, w)| [Y::store(x.load() * rstd * w)]));
                rstds.push(rstd);
            }
            rstds
        },)
    });
    let rstd = rstd.concat();
    let rows = rstd.len();
    Ok((Tensor::from_vec(y, x.shape(), &Device::Cpu)?, Tensor::from_vec(rstd, rows, &Device::Cpu)?))
}

pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    offset: f32,
    grad: Option<&Tensor>,
    rstd: &Tensor,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let dx = typed!(X = x.dtype(), Y = dy.dtype(); {
        gradients::<X, Y>(x, &shifted(weight, offset)?, grad, rstd, dy)
    })?;
    sum.map_or(Ok(dx.clone()), |sum| add_within(sum, &dx))
}

pub fn backward_unit(x: &Tensor, rstd: &Tensor, dy: &Tensor) -> Result<Tensor> {
    typed!(X = x.dtype(); gradients::<X, X>(x, &vec![1.0; x.dim(D::Minus1)?], None, rstd, dy))
}

fn gradients<X: Element, Y: Element>(
    x: &Tensor,
    weight: &[f32],
    grad: Option<&Tensor>,
    rstd: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let (values, dy, rstd) = (elements::<X>(x)?, elements::<Y>(dy)?, floats(rstd)?);
    let ([dx], partial_dw) = build(values.len(), grain(dim), |range, dx| {
        let rstd = &rstd[range.start / dim..];
        let (x, dy) = (&values[range.clone()], &dy[range]);
        vectorized!({
            let (mut dw, mut products) = (vec![0f32; dim], vec![0f32; dim]);
            for ((x, dy), &rstd) in x.chunks_exact(dim).zip(dy.chunks_exact(dim)).zip(rstd) {
                let sums = dw.iter_mut().zip(&mut products);
                for ((dw, product), ((x, dy), w)) in sums.zip(x.iter().zip(dy).zip(weight)) {
                    let dy_xhat = dy.load() * (x.load() * rstd);
                    *dw += dy_xhat;
                    *product = w * dy_xhat;
                }
                let mean = sum_of(&products, |product| product) / dim as f32;
                let terms = x.iter().zip(dy).zip(weight);
                dx.extend(terms.map(|((x, dy), w)| [X::store(rstd * (w * dy.load() - x.load() * rstd * mean))]));
            }
            dw
        },)
    });
    update_if(grad, |grad| {
        let Some(grad) = grad else { return };
        for partial in &partial_dw {
            grad.iter_mut().zip(partial).for_each(|(grad, dw)| *grad += dw);
        }
    })?;
    Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)
}
