use std::iter::repeat_n;

use candle_core::{D, Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, elements, typed, vectorized};

/// Rows whose number `i` is number `start + i` of the rows of `x`, and zero where there is none.
pub fn resized(x: &Tensor, start: isize, width: usize) -> Result<Tensor> {
    typed!(T = x.dtype(); resized_in::<T>(x, start, width))
}

fn resized_in<T: Element>(x: &Tensor, start: isize, width: usize) -> Result<Tensor> {
    let old = x.dim(D::Minus1)?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = width;
    let zeros_before = (-start).clamp(0, width as isize) as usize;
    let first = start.max(0) as usize;
    let taken = old.saturating_sub(first).min(width - zeros_before);
    let values = elements::<T>(x)?;
    let ([y], _) = build(shape.iter().product(), GRAIN.div_ceil(width) * width, |range, y| {
        let rows = &values[range.start / width * old..range.end / width * old];
        for row in rows.chunks_exact(old) {
            y.extend(repeat_n([T::store(0.0)], zeros_before));
            y.extend(row[first..first + taken].iter().map(|x| [*x]));
            y.extend(repeat_n([T::store(0.0)], width - zeros_before - taken));
        }
    });
    Ok(Tensor::from_vec(y, shape, &Device::Cpu)?)
}

pub fn join_shared(x: &Tensor, shared: &Tensor) -> Result<Tensor> {
    typed!(T = x.dtype(); join_shared_in::<T>(x, shared))
}

fn join_shared_in<T: Element>(x: &Tensor, shared: &Tensor) -> Result<Tensor> {
    let (b, s, h, n) = x.dims4()?;
    let m = shared.dim(D::Minus1)?;
    let (values, shared) = (elements::<T>(x)?, elements::<T>(shared)?);
    let width = n + m;
    let ([y], _) = build(b * s * h * width, GRAIN.div_ceil(width) * width, |range, y| {
        for row in range.start / width..range.end / width {
            y.extend(values[row * n..][..n].iter().map(|x| [*x]));
            y.extend(shared[row / h * m..][..m].iter().map(|x| [*x]));
        }
    });
    Ok(Tensor::from_vec(y, (b, s, h, width), &Device::Cpu)?)
}

/// The sum over heads of the numbers `start..start + len`, `(b, s, 1, len)`, summed in f32.
pub fn sum_of_heads(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    typed!(T = x.dtype(); sum_of_heads_in::<T>(x, start, len))
}

fn sum_of_heads_in<T: Element>(x: &Tensor, start: usize, len: usize) -> Result<Tensor> {
    let (b, s, h, width) = x.dims4()?;
    let values = elements::<T>(x)?;
    let ([y], _) = build(b * s * len, GRAIN.div_ceil(h * width) * len, |range, y| {
        let tokens = &values[range.start / len * h * width..range.end / len * h * width];
        vectorized!({
            let mut sums = vec![0f32; len];
            for token in tokens.chunks_exact(h * width) {
                sums.fill(0.0);
                for head in token.chunks_exact(width) {
                    sums.iter_mut().zip(&head[start..]).for_each(|(sum, x)| *sum += x.load());
                }
                y.extend(sums.iter().map(|sum| [T::store(*sum)]));
            }
        },);
    });
    Ok(Tensor::from_vec(y, (b, s, 1, len), &Device::Cpu)?)
}
