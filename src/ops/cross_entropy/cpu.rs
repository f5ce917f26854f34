use candle_core::{D, Device, Tensor};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::tiles::Head;
use crate::Result;
use crate::ops::IGNORE_INDEX;
use crate::ops::host::{
    Element, GRAIN, check_tokens, elements, exp, max_of, softcap_slope, softcapped, sum_of, tensor, typed, update_if,
    vectorized, with_indices,
};
use crate::ops::matmul::{Dst, Mat, Operand, Product};
#[cfg(target_arch = "x86_64")]
use crate::ops::tiles::{Number, Source};

/// Logits that exist at a time: 128 MiB of f32.
const LOGITS: usize = 1 << 25;

/// The mean of the losses, `()` f32.
pub fn forward(x: &Tensor, weight: &Tensor, softcap: Option<f32>, targets: &Tensor) -> Result<Tensor> {
    let Some(Counted { x, targets, .. }) = Counted::of(x, targets)? else { return scalar(0.0) };
    let mean = 1.0 / targets.elem_count() as f64;
    scalar(sum_of_losses(&x, weight, softcap, &targets)? * mean)
}

/// `scale` times that mean, and the gradient of `x`; that of the weight is added to `grad`, if it is wanted.
pub fn forward_backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    softcap: Option<f32>,
    targets: &Tensor,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let Some(Counted { x: rows, targets, places }) = Counted::of(x, targets)? else {
        return Ok((scalar(0.0)?, x.zeros_like()?));
    };
    let mean = scale / targets.elem_count() as f64;
    let (sum, dx) = sum_and_gradients(&rows, weight, grad, softcap, &targets, mean as f32)?;
    let dx = match places {
        None => dx,
        Some(places) => {
            let all = Tensor::zeros((x.elem_count() / x.dim(D::Minus1)?, x.dim(D::Minus1)?), dx.dtype(), dx.device())?;
            all.index_add(&places, &dx, 0)?.reshape(x.shape())?
        }
    };
    Ok((scalar(sum * mean)?, dx))
}

fn scalar(loss: f64) -> Result<Tensor> {
    Ok(Tensor::new(loss as f32, &Device::Cpu)?)
}

/// The rows that have targets.
struct Counted {
    x: Tensor,
    targets: Tensor,
    /// Where among all rows they were; `None`: they are all.
    places: Option<Tensor>,
}

impl Counted {
    /// `None` if there are no such rows.
    fn of(x: &Tensor, targets: &Tensor) -> Result<Option<Self>> {
        let flat = targets.flatten_all()?;
        let kept: Vec<u32> =
            flat.to_vec1::<u32>()?.iter().zip(0..).filter(|(t, _)| **t != IGNORE_INDEX).map(|(_, i)| i).collect();
        if kept.len() == flat.elem_count() {
            return Ok(Some(Self { x: x.clone(), targets: targets.clone(), places: None }));
        }
        if kept.is_empty() {
            return Ok(None);
        }
        let places = Tensor::new(kept, x.device())?;
        let rows = x.reshape(((), x.dim(D::Minus1)?))?.contiguous()?;
        let (x, targets) = (rows.index_select(&places, 0)?, flat.index_select(&places, 0)?);
        Ok(Some(Self { x, targets, places: Some(places) }))
    }
}

/// The sum of the losses of all tokens.
fn sum_of_losses(x: &Tensor, weight: &Tensor, softcap: Option<f32>, targets: &Tensor) -> Result<f64> {
    #[cfg(target_arch = "x86_64")]
    if softcap.is_none()
        && let Some(loss) = typed!(T = weight.dtype(); in_tiles::<T>(x, weight, targets))?
    {
        return Ok(loss);
    }
    typed!(T = weight.dtype(); forward_in::<T>(x, weight, softcap, targets))
}

/// As [`sum_of_losses`], with the gradients of `mean` times that sum.
fn sum_and_gradients(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    softcap: Option<f32>,
    targets: &Tensor,
    mean: f32,
) -> Result<(f64, Tensor)> {
    #[cfg(target_arch = "x86_64")]
    if softcap.is_none()
        && let Some(result) = typed!(T = weight.dtype(); in_tiles_backward::<T>(x, weight, grad, targets, mean))?
    {
        return Ok(result);
    }
    typed!(T = weight.dtype(); forward_backward_in::<T>(x, weight, grad, softcap, targets, mean))
}

/// [`sum_of_losses`] on matrix instructions, where the processor has them.
#[cfg(target_arch = "x86_64")]
fn in_tiles<S: Source + Number>(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Option<f64>> {
    let Some(isa) = Head::<S>::isa() else { return Ok(None) };
    let (vocab_size, dim) = weight.dims2()?;
    let (x, weight) = (elements::<S>(x)?, elements::<S>(weight)?);
    with_indices(targets, |targets| {
        check_tokens(targets, vocab_size)?;
        Ok(Some(Head::new(isa, &x, &weight, dim, targets).loss()))
    })?
}

/// As [`in_tiles`], of [`sum_and_gradients`].
#[cfg(target_arch = "x86_64")]
fn in_tiles_backward<S: Source + Number>(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    targets: &Tensor,
    mean: f32,
) -> Result<Option<(f64, Tensor)>> {
    let Some(isa) = Head::<S>::isa() else { return Ok(None) };
    let (vocab_size, dim) = weight.dims2()?;
    let (values, weight) = (elements::<S>(x)?, elements::<S>(weight)?);
    let mut dx = vec![0f32; values.len()];
    let sum = with_indices(targets, |targets| {
        check_tokens(targets, vocab_size)?;
        update_if(grad, |grad| Head::new(isa, &values, &weight, dim, targets).loss_grad(mean, &mut dx, grad))
    })??;
    Ok(Some((sum, tensor(dx, x.shape(), x.dtype())?)))
}

fn forward_in<T: Operand>(x: &Tensor, weight: &Tensor, softcap: Option<f32>, targets: &Tensor) -> Result<f64> {
    let (vocab_size, dim) = weight.dims2()?;
    let (x, w) = (elements::<T>(x)?, elements::<T>(weight)?);
    with_indices(targets, |targets| {
        let mut sum = 0.0;
        for_chunks(&x, Mat::new(&w, vocab_size, dim), softcap, targets, |_, logits, targets| {
            sum += losses(logits, targets, |_, _, _| {});
        })?;
        Ok(sum)
    })?
}

fn forward_backward_in<T: Operand>(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    softcap: Option<f32>,
    targets: &Tensor,
    mean: f32,
) -> Result<(f64, Tensor)> {
    let (vocab_size, dim) = weight.dims2()?;
    let (values, w) = (elements::<T>(x)?, elements::<T>(weight)?);
    let w = Mat::new(&w, vocab_size, dim);
    let mut dx = Vec::with_capacity(values.len());
    let sum = with_indices(targets, |targets| {
        update_if(grad, |mut grad| -> Result<f64> {
            let mut sum = 0.0;
            for_chunks(&values, w, softcap, targets, |first, logits, targets| {
                // logits become their own gradient: mean · (softmax - one-hot), times the slope of the softcap
                sum += losses(
                    logits,
                    targets,
                    #[inline(always)]
                    |logits, target, logsumexp| {
                        let slope = softcap.map_or(1.0, |cap| softcap_slope(logits[target].load(), cap));
                        let at_target = mean * (exp(logits[target].load() - logsumexp) - 1.0) * slope;
                        match softcap {
                            None => logits.iter_mut().for_each(|l| *l = T::store(mean * exp(l.load() - logsumexp))),
                            Some(cap) => logits.iter_mut().for_each(|l| {
                                let slope = softcap_slope(l.load(), cap);
                                *l = T::store(mean * exp(l.load() - logsumexp) * slope);
                            }),
                        }
                        logits[target] = T::store(at_target);
                    },
                );
                let rows = targets.len();
                let dlogits = Mat::new(logits, rows, vocab_size);
                let chunk = first * dim..(first + rows) * dim;
                let dx = &mut dx.spare_capacity_mut()[chunk.clone()];
                let mut products = vec![Product::new(dlogits, w, Dst::Rounded(dx))];
                if let Some(grad) = grad.as_deref_mut() {
                    let values = Mat::new(&values[chunk], rows, dim);
                    products.push(Product::new(dlogits.t(), values, Dst::Add(grad)));
                }
                T::multiply(products);
            })?;
            Ok(sum)
        })?
    })??;
    // SAFETY: the chunks cover all rows, and a product writes all of its destination.
    unsafe { dx.set_len(values.len()) };
    Ok((sum, Tensor::from_vec(dx, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?))
}

/// Computes the logits, capped if there is a `softcap`, of some rows at a time and hands them on:
/// `(first row, logits, targets)`.
fn for_chunks<T: Operand>(
    x: &[T],
    w: Mat<T>,
    softcap: Option<f32>,
    targets: &[u32],
    mut body: impl FnMut(usize, &mut [T], &[u32]),
) -> Result<()> {
    let (vocab_size, dim) = (w.rows(), w.cols());
    check_tokens(targets, vocab_size)?;
    let rows = (LOGITS / vocab_size).clamp(1, targets.len());
    let mut buffer = Vec::with_capacity(rows * vocab_size);
    for (chunk, targets) in targets.chunks(rows).enumerate() {
        let first = chunk * rows;
        let len = targets.len() * vocab_size;
        let x = Mat::new(&x[first * dim..], targets.len(), dim);
        buffer.clear();
        T::multiply(vec![Product::new(x, w.t(), Dst::Rounded(&mut buffer.spare_capacity_mut()[..len]))]);
        // SAFETY: a product writes all of its destination.
        unsafe { buffer.set_len(len) };
        if let Some(cap) = softcap {
            buffer.par_chunks_mut(GRAIN).for_each(|logits| {
                vectorized!(logits.iter_mut().for_each(|l| *l = T::store(softcapped(l.load(), cap))));
            });
        }
        body(first, &mut buffer, targets);
    }
    Ok(())
}

/// The sum over rows of `logsumexp - logits[target]`, in f64. `then` gets each row's logits, target and logsumexp.
fn losses<T: Element>(logits: &mut [T], targets: &[u32], then: impl Fn(&mut [T], usize, f32) + Sync) -> f64 {
    let rows: Vec<f64> = logits
        .par_chunks_mut(logits.len() / targets.len())
        .zip(targets)
        .map(|(logits, target)| {
            vectorized!({
                let max = max_of(logits, f32::NEG_INFINITY);
                let mut sum = 0f64;
                for chunk in logits.chunks(256) {
                    sum += f64::from(sum_of(
                        chunk,
                        #[inline(always)]
                        |l| exp(l - max),
                    ));
                }
                let logsumexp = max + (sum as f32).ln();
                let loss = f64::from(logsumexp) - f64::from(logits[*target as usize].load());
                then(logits, *target as usize, logsumexp);
                loss
            },)
        })
        .collect();
    rows.iter().sum()
}
