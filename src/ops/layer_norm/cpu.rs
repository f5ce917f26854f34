use candle_core::{D, DType, Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, build, dot, elements, floats, sum_of, typed, update, vectorized};
use crate::ops::rms_norm::cpu::grain;

/// The result, and the mean of each row and its `rstd`, `(rows, 2)`.
pub fn forward(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
    typed!(X = x.dtype(), Y = dtype; normalize::<X, Y>(x, weight, bias, eps))
}

fn normalize<X: Element, Y: Element>(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let dim = x.dim(D::Minus1)?;
    let (values, weight, bias) = (elements::<X>(x)?, floats(weight)?, floats(bias)?);
    let ([y], moments) = build(values.len(), grain(dim), |range, y| {
        let (x, weight, bias) = (&values[range], &*weight, &*bias);
        vectorized!({
            let mut moments = Vec::with_capacity(x.len() / dim);
            for x in x.chunks_exact(dim) {
                let mean = sum_of(x, |x| x) / dim as f32;
                let variance = sum_of(
                    x,
                    #[inline(always)]
                    |x| (x - mean) * (x - mean),
                ) / dim as f32;
                let rstd = 1.0 / (variance + eps).sqrt();
                let terms = x.iter().zip(weight.iter().zip(bias));
                y.extend(terms.map(|(x, (w, b))| [Y::store((x.load() - mean) * rstd * w + b)]));
                moments.push([mean, rstd]);
            }
            moments
        },)
    });
    let moments = moments.concat();
    let shape = (moments.len(), 2);
    let moments = Tensor::from_vec(moments.into_flattened(), shape, &Device::Cpu)?;
    Ok((Tensor::from_vec(y, x.shape(), &Device::Cpu)?, moments))
}

/// `grads`: of weight and bias.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grads: Option<&(Tensor, Tensor)>,
    moments: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    typed!(X = x.dtype(), Y = dy.dtype(); gradients::<X, Y>(x, weight, grads, moments, dy))
}

fn gradients<X: Element, Y: Element>(
    x: &Tensor,
    weight: &Tensor,
    grads: Option<&(Tensor, Tensor)>,
    moments: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let (values, weight, dy) = (elements::<X>(x)?, floats(weight)?, elements::<Y>(dy)?);
    let moments = floats(moments)?;
    let (moments, _) = moments.as_chunks::<2>();
    let ([dx], partials) = build(values.len(), grain(dim), |range, dx| {
        let (moments, weight) = (&moments[range.start / dim..], &*weight);
        let (x, dy) = (&values[range.clone()], &dy[range]);
        vectorized!({
            let (mut dw, mut db) = (vec![0f32; dim], vec![0f32; dim]);
            let (mut normed, mut scaled) = (vec![0f32; dim], vec![0f32; dim]);
            for ((x, dy), &[mean, rstd]) in x.chunks_exact(dim).zip(dy.chunks_exact(dim)).zip(moments) {
                for i in 0..dim {
                    let dy = dy[i].load();
                    normed[i] = (x[i].load() - mean) * rstd;
                    scaled[i] = weight[i] * dy;
                    dw[i] += dy * normed[i];
                    db[i] += dy;
                }
                let mean_scaled = sum_of(&scaled, |x| x) / dim as f32;
                let mean_product = dot(&scaled, &normed) / dim as f32;
                let terms = scaled.iter().zip(&normed);
                dx.extend(terms.map(|(s, n)| [X::store(rstd * (s - mean_scaled - n * mean_product))]));
            }
            (dw, db)
        },)
    });
    if let Some((dweight, dbias)) = grads {
        let add = |grad: &mut [f32], partial: &[f32]| grad.iter_mut().zip(partial).for_each(|(grad, d)| *grad += d);
        update(dweight, |grad: &mut [f32]| partials.iter().for_each(|(dw, _)| add(grad, dw)))?;
        update(dbias, |grad: &mut [f32]| partials.iter().for_each(|(_, db)| add(grad, db)))?;
    }
    Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)
}
