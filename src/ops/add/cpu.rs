use candle_core::{Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, elements, typed, vectorized};

pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    typed!(X = x.dtype(), Y = y.dtype(); sum::<X, Y>(x, y))
}

fn sum<X: Element, Y: Element>(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (a, b) = (elements::<X>(x)?, elements::<Y>(y)?);
    let ([sum], _) = build(a.len(), GRAIN, |range, sum| {
        let (a, b) = (&a[range.clone()], &b[range]);
        vectorized!(sum.extend(a.iter().zip(b).map(|(a, b)| [X::store(a.load() + b.load())])));
    });
    Ok(Tensor::from_vec(sum, x.shape(), &Device::Cpu)?)
}
