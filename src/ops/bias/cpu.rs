use candle_core::{D, Device, Tensor};
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{Element, build, elements, floats, typed, update, vectorized};
use crate::ops::rms_norm::cpu::grain;

pub fn forward(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    typed!(T = x.dtype(); forward_in::<T>(x, bias))
}

fn forward_in<T: Element>(x: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let dim = x.dim(D::Minus1)?;
    let (values, bias) = (elements::<T>(x)?, floats(bias)?);
    let ([y], _) = build(values.len(), grain(dim), |range, y| {
        let (values, bias) = (&values[range], &*bias);
        vectorized!({
            for row in values.chunks_exact(dim) {
                y.extend(row.iter().zip(bias).map(|(x, b)| [T::store(x.load() + b)]));
            }
        },);
    });
    Ok(Tensor::from_vec(y, x.shape(), &Device::Cpu)?)
}

/// `grad += Σ dy` over rows.
pub fn accumulate(grad: &Tensor, dy: &Tensor) -> Result<()> {
    typed!(T = dy.dtype(); {
        let dy = elements::<T>(dy)?;
        update(grad, |grad: &mut [f32]| add_rows::<T>(grad, &dy))
    })
}

/// `sum += Σ` of rows as wide as `sum`.
pub fn add_rows<T: Element>(sum: &mut [f32], rows: &[T]) {
    let dim = sum.len();
    let sum_of = |rows: &[T]| {
        vectorized!({
            let mut sum = vec![0f32; dim];
            for row in rows.chunks_exact(dim) {
                sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.load());
            }
            sum
        },)
    };
    let partial_sums: Vec<_> = rows.par_chunks(grain(dim)).map(sum_of).collect();
    for partial in partial_sums {
        sum.iter_mut().zip(partial).for_each(|(sum, x)| *sum += x);
    }
}

/// Adds `bias` to every row.
pub fn add_to_rows<T: Element>(rows: &mut [T], bias: &[f32]) {
    rows.par_chunks_mut(grain(bias.len())).for_each(|rows| {
        vectorized!({
            for row in rows.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(x, b)| *x = T::store(x.load() + b));
            }
        },);
    });
}
