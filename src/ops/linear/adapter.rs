//! What an adapter adds to a product: `scale · drop(x) Aᵀ Bᵀ`. The narrow product in the middle is made anew in backward.

use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use rand_chacha::rand_core::RngCore;

use super::cpu;
use crate::Result;
use crate::autograd::Adapter;
use crate::ops::host::{Element, GRAIN, build, convert, elements, floats, typed, update};
use crate::ops::matmul::{Mat, Operand, add_product, product, wide_product};

/// `(…, in) -> (…, out)`, in the compute dtype of the adapter.
pub fn forward(x: &Tensor, adapter: &Adapter, name: &str) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda_adapter::forward(x, adapter, name);
    }
    typed!(T = compute_dtype(adapter)?; forward_in::<T>(x, adapter, name))
}

/// The adapter's share of the gradient of `x`, in `x`'s dtype; those of `A` and `B` are added to their accumulators.
pub fn backward(x: &Tensor, adapter: &Adapter, name: &str, dy: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda_adapter::backward(x, adapter, name, dy);
    }
    typed!(T = compute_dtype(adapter)?; backward_in::<T>(x, adapter, name, dy))
}

/// What it adds to [`by_head`](super::by_head): `B` has the rows of the weight, `A` its columns. Nothing is left out.
pub fn by_head(x: &Tensor, adapter: &Adapter, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda_adapter::by_head(x, adapter, rows, transposed);
    }
    typed!(T = compute_dtype(adapter)?; by_head_in::<T>(x, adapter, rows, transposed))
}

fn by_head_in<T: Operand>(x: &Tensor, adapter: &Adapter, rows: Range<usize>, transposed: bool) -> Result<Tensor> {
    let (b, s, h, _) = x.dims4()?;
    let [rank, inner] = [adapter.a.shape()[0], adapter.a.shape()[1]];
    if !transposed {
        let narrow = Tensor::from_vec(narrow::<T>(&elements::<T>(x)?, adapter)?, (b, s, h, rank), &Device::Cpu)?;
        return cpu::by_head(&narrow, &adapter.b.compute()?, rows, false);
    }
    let narrow = cpu::by_head(x, &adapter.b.compute()?, rows, true)?; // (b, s, h, rank)
    let narrow = scaled::<T>(floats(&narrow)?.to_vec(), adapter.scale);
    let a = adapter.a.compute()?;
    let y = product(Mat::new(&narrow, b * s * h, rank), Mat::new(&elements::<T>(&a)?, rank, inner));
    Ok(Tensor::from_vec(y, (b, s, h, inner), &Device::Cpu)?)
}

fn compute_dtype(adapter: &Adapter) -> Result<DType> {
    Ok(adapter.a.compute()?.dtype())
}

fn forward_in<T: Operand>(x: &Tensor, adapter: &Adapter, name: &str) -> Result<Tensor> {
    let (b, rank) = (adapter.b.compute()?, adapter.a.shape()[0]);
    let outer = adapter.b.shape()[0];
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = outer;

    let narrow = narrow::<T>(&dropped::<T>(x, adapter, name)?, adapter)?;
    let y = product(Mat::new(&narrow, narrow.len() / rank, rank), Mat::new(&elements::<T>(&b)?, outer, rank).t());
    Ok(Tensor::from_vec(y, shape, &Device::Cpu)?)
}

fn backward_in<T: Operand>(x: &Tensor, adapter: &Adapter, name: &str, dy: &Tensor) -> Result<Tensor> {
    let (a, b) = (adapter.a.compute()?, adapter.b.compute()?);
    let ([rank, inner], outer) = ([adapter.a.shape()[0], adapter.a.shape()[1]], adapter.b.shape()[0]);
    let rows = x.elem_count() / x.dim(D::Minus1)?;
    let (a, b, dy) = (elements::<T>(&a)?, elements::<T>(&b)?, elements::<T>(dy)?);
    let (a, b, dy) = (Mat::new(&a, rank, inner), Mat::new(&b, outer, rank), Mat::new(&dy, rows, outer));

    let dropped = dropped::<T>(x, adapter, name)?;
    let narrow = narrow::<T>(&dropped, adapter)?;
    update(&adapter.b.grad()?, |grad: &mut [f32]| add_product(grad, dy.t(), Mat::new(&narrow, rows, rank)))?;
    let dnarrow = scaled::<T>(wide_product(dy, b), adapter.scale);
    let dnarrow = Mat::new(&dnarrow, rows, rank);
    update(&adapter.a.grad()?, |grad: &mut [f32]| add_product(grad, dnarrow.t(), Mat::new(&dropped, rows, inner)))?;
    let dx = Tensor::from_vec(product(dnarrow, a), x.shape(), &Device::Cpu)?;
    // What did not go in has no gradient.
    let dx = Tensor::from_vec(self::dropped::<T>(&dx, adapter, name)?, x.shape(), &Device::Cpu)?;
    Ok(dx.to_dtype(x.dtype())?)
}

/// `scale · x Aᵀ`, `(rows, rank)`.
fn narrow<T: Operand>(x: &[T], adapter: &Adapter) -> Result<Vec<T>> {
    let [rank, inner] = [adapter.a.shape()[0], adapter.a.shape()[1]];
    let a = adapter.a.compute()?;
    let wide = wide_product(Mat::new(x, x.len() / inner, inner), Mat::new(&elements::<T>(&a)?, rank, inner).t());
    Ok(scaled(wide, adapter.scale))
}

fn scaled<T: Element>(mut values: Vec<f32>, scale: f32) -> Vec<T> {
    values.iter_mut().for_each(|value| *value *= scale);
    convert(&values)
}

/// The elements of `x` without those that the adapter's dropout takes, and the rest larger to make up for them.
fn dropped<T: Element>(x: &Tensor, adapter: &Adapter, name: &str) -> Result<Vec<T>> {
    let x = elements::<T>(x)?;
    let x: &[T] = &x;
    let Some((words, threshold, factor)) = adapter.dropout.words(name) else { return Ok(x.to_vec()) };
    let ([kept], _) = build(x.len(), GRAIN, |range, kept| {
        let mut words = words.clone();
        words.set_word_pos(range.start as u128);
        kept.extend(x[range].iter().map(|x| {
            let stays = words.next_u32() >= threshold;
            [if stays { T::store(x.load() * factor) } else { T::store(0.0) }]
        }));
    });
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::autograd::{Dropout, Parameter, Value};
    use crate::ops::linear;
    use crate::ops::testing::{Case, assert_close, devices, on_threads, parameters, parameters_on, random_tensor};

    const SCALE: f32 = 1.75;

    fn adapt(weight: &Parameter, a: &Arc<Parameter>, b: &Arc<Parameter>, probability: f64) -> Arc<Dropout> {
        let dropout = Arc::new(Dropout::new(probability, 3));
        let (a, b) = (a.clone(), b.clone());
        weight.set_adapter(Some(Arc::new(Adapter { a, b, scale: SCALE, dropout: dropout.clone() })));
        dropout
    }

    #[test]
    fn an_adapted_linear_matches_its_reference() -> Result<()> {
        for dtype in [DType::F32, DType::BF16] {
            for (rows, inner, outer, rank) in [(7, 33, 19, 4), (130, 16, 48, 1)] {
                Case::new("adapted linear")
                    .compute(dtype)
                    .input(random_tensor("x", &[1, rows, inner])?)
                    .parameter("w", &[outer, inner])
                    .parameter("a", &[rank, inner])
                    .parameter("b", &[outer, rank])
                    .check_with_parameters(
                        |v, p| {
                            adapt(&p[0], &p[1], &p[2], 0.3); // evaluation: nothing is dropped
                            linear(&v[0], &p[0])
                        },
                        |t, p| {
                            let weight = (&p[0] + (p[2].matmul(&p[1])? * f64::from(SCALE))?)?;
                            Ok(t[0].broadcast_matmul(&weight.t()?)?)
                        },
                    )?;
            }
        }
        Ok(())
    }

    #[test]
    fn each_head_is_multiplied_by_its_own_rows_of_the_adapted_weight() -> Result<()> {
        let (b, s, h, n, m, rank) = (2, 3, 4, 7, 10, 5);
        let values = [("w", [h * n, m]), ("a", [rank, m]), ("b", [h * n, rank])];
        let values = values.map(|(name, shape)| random_tensor(name, &shape).unwrap());
        let merged = (&values[0] + (values[2].matmul(&values[1])? * f64::from(SCALE))?)?;
        for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 2e-2)] {
            let whole = &parameters(std::slice::from_ref(&merged), dtype)?[0];
            for (rows, transposed) in [(0..5, true), (5..7, false)] {
                let x = random_tensor("x", &[b, s, h, if transposed { rows.len() } else { m }])?.to_dtype(dtype)?;
                let expected = super::super::by_head(&x, whole, rows.clone(), transposed)?;
                for device in devices() {
                    let p = parameters_on(device, &values, dtype)?;
                    adapt(&p[0], &p[1], &p[2], 0.3);
                    let ours = super::super::by_head(&x.to_device(device)?, &p[0], rows.clone(), transposed)?;
                    assert_close("by_head", &ours, &expected, tolerance)?;
                }
            }
        }
        Ok(())
    }

    /// The mask is read off a product with ones; forward and backward then are those of the masked input.
    #[test]
    fn dropout_leaves_out_the_same_in_forward_and_backward_on_any_number_of_threads() -> Result<()> {
        let (rows, inner) = (300, 64);
        let x = random_tensor("x", &[rows, inner])?;
        let run = |pass| -> Result<[Vec<f32>; 3]> {
            let zero = Tensor::zeros((inner, inner), DType::F32, &Device::Cpu)?;
            let eye = Tensor::eye(inner, DType::F32, &Device::Cpu)?;
            let p = parameters(&[zero, eye.clone(), eye], DType::F32)?;
            adapt(&p[0], &p[1], &p[2], 0.25).set_pass(Some(pass));
            // With A and B the identity, the result is the input without what is left out.
            let y = linear(&Value::input(x.clone()), &p[0])?;
            let kept = y.tensor().flatten_all()?.to_vec1()?;
            let dx = y.backward(x.ones_like()?)?.flatten_all()?.to_vec1()?;
            Ok([kept, dx, p[1].grad()?.flatten_all()?.to_vec1()?])
        };
        let [kept, dx, da] = on_threads(1, || run(1))?;
        assert_eq!([&kept, &dx, &da], [&on_threads(3, || run(1))?[0], &run(1)?[1], &run(1)?[2]]);
        assert_ne!(kept, run(2)?[0], "another pass leaves out others");

        let factor = SCALE / 0.75;
        for ((x, kept), dx) in x.flatten_all()?.to_vec1::<f32>()?.iter().zip(&kept).zip(&dx) {
            assert!((kept - x * dx).abs() < 1e-5 && (*dx == 0.0 || (dx - factor).abs() < 1e-5), "{x}: {kept}, {dx}");
        }
        let left_out = dx.iter().filter(|dx| **dx == 0.0).count() as f64 / dx.len() as f64;
        assert!((left_out - 0.25).abs() < 5.0 * (0.25 * 0.75 / dx.len() as f64).sqrt(), "{left_out}");

        // dA = (scale · dy B)ᵀ drop(x): with dy and B as above, each row is the sum of what was kept, times scale.
        let sums = Tensor::from_vec(kept, (rows, inner), &Device::Cpu)?.sum(0)?;
        let da = Tensor::from_vec(da, (inner, inner), &Device::Cpu)?;
        assert_close("dA", &da, &sums.broadcast_as((inner, inner))?, 1e-5)
    }

    #[test]
    fn every_device_leaves_out_the_same() -> Result<()> {
        let (rows, inner) = (37, 24);
        let x = random_tensor("x", &[rows, inner])?;
        let eye = Tensor::eye(inner, DType::F32, &Device::Cpu)?;
        let zero = eye.zeros_like()?;
        let kept = |device: &Device| -> Result<Vec<f32>> {
            let p = parameters_on(device, &[zero.clone(), eye.clone(), eye.clone()], DType::F32)?;
            adapt(&p[0], &p[1], &p[2], 0.4).set_pass(Some(5));
            let y = linear(&Value::input(x.to_device(device)?), &p[0])?;
            Ok(y.tensor().flatten_all()?.to_vec1()?)
        };
        let expected = kept(&Device::Cpu)?;
        assert!(expected.contains(&0.0));
        for device in devices() {
            let zeros = |values: &[f32]| values.iter().map(|x| *x == 0.0).collect::<Vec<_>>();
            assert_eq!(zeros(&kept(device)?), zeros(&expected), "{:?}", device.location());
        }
        Ok(())
    }
}
