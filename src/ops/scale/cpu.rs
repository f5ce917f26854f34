use candle_core::{Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, elements, floats, typed, vectorized};

pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    typed!(T = x.dtype(); scale_in::<T>(x, factor))
}

fn scale_in<T: Element>(x: &Tensor, factor: f32) -> Result<Tensor> {
    let values = elements::<T>(x)?;
    let ([y], _) = build(values.len(), GRAIN, |range, y| {
        let values = &values[range];
        vectorized!(y.extend(values.iter().map(|x| [T::store(factor * x.load())])));
    });
    Ok(Tensor::from_vec(y, x.shape(), &Device::Cpu)?)
}

pub fn scale_positions(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    typed!(T = x.dtype(); scale_positions_in::<T>(x, &floats(factors)?))
}

fn scale_positions_in<T: Element>(x: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let (_, s, h, hd) = x.dims4()?;
    let values = elements::<T>(x)?;
    let row = h * hd;
    let ([y], _) = build(values.len(), (GRAIN / row).max(1) * row, |range, y| {
        let first = range.start / row;
        for (i, values) in values[range].chunks_exact(row).enumerate() {
            let factor = factors[(first + i) % s];
            y.extend(values.iter().map(|x| [T::store(factor * x.load())]));
        }
    });
    Ok(Tensor::from_vec(y, x.shape(), &Device::Cpu)?)
}
