//! Tensors of the host as slices.

use std::cell::Cell;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::{Error, Result};

/// Elements that one task of a parallel elementwise loop handles. Fixed, so that results of reductions do not depend
/// on the number of threads.
pub const GRAIN: usize = 1 << 14;

/// Runs an expression compiled for the widest vectors that this processor has.
macro_rules! vectorized {
    ($body:expr $(,)?) => {{
        let once = $crate::ops::host::Once;
        pulp::Arch::new().dispatch(
            #[inline(always)]
            || {
                let _moved = once;
                $body
            },
        )
    }};
}
/// What a closure consumes, so that it can be called but once. Such a closure is inlined into the vectorised function
/// itself; any other kind is called through a shim, which is compiled for the narrowest vectors.
pub(in crate::ops) struct Once;
pub(in crate::ops) use vectorized;

/// The elements of a tensor, row-major, as f32: borrowed where they are stored so, converted where not.
pub enum Floats<'a> {
    Borrowed { storage: StorageRef<'a>, range: Range<usize> },
    Owned(Vec<f32>),
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Owned(values) => values,
            Self::Borrowed { storage, range } => match &**storage {
                Storage::Cpu(CpuStorage::F32(values)) => &values[range.clone()],
                _ => unreachable!("only f32 on the host is borrowed"),
            },
        }
    }
}

/// The elements of `tensor`, in row-major order.
pub fn floats(tensor: &Tensor) -> Result<Floats<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    if let Some((start, end)) = layout.contiguous_offsets() {
        match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => return Ok(Floats::Borrowed { storage, range: start..end }),
            Storage::Cpu(CpuStorage::BF16(values)) => return Ok(Floats::Owned(widen(&values[start..end]))),
            _ => {}
        }
    }
    drop(storage);
    Ok(Floats::Owned(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?))
}

/// As [`floats`], rounded to what `dtype` can hold.
pub fn floats_in(tensor: &Tensor, dtype: DType) -> Result<Floats<'_>> {
    let values = floats(tensor)?;
    if dtype == DType::F32 || tensor.dtype() == dtype {
        return Ok(values);
    }
    let mut values = values.to_vec();
    round(&mut values, dtype);
    Ok(Floats::Owned(values))
}

/// The elements of a contiguous u32 tensor.
pub fn with_indices<R>(tensor: &Tensor, body: impl FnOnce(&[u32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous above");
    let Storage::Cpu(storage) = &*storage else { unreachable!("this module is for tensors of the host") };
    Ok(body(&storage.as_slice::<u32>()?[start..end]))
}

/// Refuses ids that are not in the vocabulary.
pub fn check_tokens(tokens: &[u32], vocab_size: usize) -> Result<()> {
    match tokens.iter().find(|t| **t as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(Error::Model(format!("token {token} does not exist in a model of vocab_size {vocab_size}"))),
    }
}

/// A tensor of `dtype` that holds `values`, rounded where need be.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    Ok(match dtype {
        DType::BF16 => Tensor::from_vec(narrow(&values), shape, &Device::Cpu)?,
        DType::F32 => Tensor::from_vec(values, shape, &Device::Cpu)?,
        other => Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(other)?,
    })
}

/// Rounds to what `dtype` can hold, to nearest even.
pub fn round(values: &mut [f32], dtype: DType) {
    if dtype == DType::BF16 {
        values.par_chunks_mut(GRAIN).for_each(|chunk| vectorized!(chunk.iter_mut().for_each(|x| *x = round_bf16(*x))));
    }
}

/// Round to nearest even in bf16; branch-free for finite numbers, so that loops over it vectorise.
#[inline(always)]
pub fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    // The addition could carry a NaN's payload away; a NaN is kept as it is.
    f32::from_bits(if x.is_nan() { bits } else { rounded })
}

pub fn widen(values: &[bf16]) -> Vec<f32> {
    let mut out = vec![0f32; values.len()];
    out.par_chunks_mut(GRAIN).zip(values.par_chunks(GRAIN)).for_each(|(out, values)| {
        vectorized!(out.iter_mut().zip(values).for_each(|(o, v)| *o = f32::from_bits(u32::from(v.to_bits()) << 16)));
    });
    out
}

pub fn narrow(values: &[f32]) -> Vec<bf16> {
    let mut out = vec![bf16::ZERO; values.len()];
    out.par_chunks_mut(GRAIN).zip(values.par_chunks(GRAIN)).for_each(|(out, values)| {
        vectorized!({
            out.iter_mut().zip(values).for_each(|(o, v)| *o = bf16::from_bits((round_bf16(*v).to_bits() >> 16) as u16));
        },);
    });
    out
}

/// What the elements of a tensor that is changed in place may be.
pub trait Element: Sized {
    fn of(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Element for f32 {
    fn of(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::F32(values) = storage { Some(values) } else { None }
    }
}

impl Element for bf16 {
    fn of(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        if let CpuStorage::BF16(values) = storage { Some(values) } else { None }
    }
}

/// Changes the elements of a contiguous tensor where they live.
pub fn update<T: Element, R>(tensor: &Tensor, body: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    let body = Cell::new(Some(body));
    let result = Cell::new(None);
    let run: &dyn Fn(&mut [T]) = &|values| result.set(body.take().map(|body| body(values)));
    tensor.inplace_op1(&Update(run))?;
    Ok(result.into_inner().expect("the op has run"))
}

struct Update<'a, T>(&'a dyn Fn(&mut [T]));

impl<T: Element> InplaceOp1 for Update<'_, T> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (Some((start, end)), Some(values)) = (layout.contiguous_offsets(), T::of(storage)) else {
            candle_core::bail!("an update in place needs contiguous elements of the expected type")
        };
        (self.0)(&mut values[start..end]);
        Ok(())
    }
}

/// A pointer to disjoint parts of a buffer that several threads write, each its own.
#[derive(Clone, Copy)]
pub struct Disjoint(*mut f32, usize);

// SAFETY: every use goes through `slice_mut`, whose callers promise disjoint ranges.
unsafe impl Send for Disjoint {}
// SAFETY: as above.
unsafe impl Sync for Disjoint {}

impl Disjoint {
    pub fn new(buffer: &mut [f32]) -> Self {
        Self(buffer.as_mut_ptr(), buffer.len())
    }

    /// # Safety
    /// Ranges that are in use at the same time do not overlap, and the buffer outlives them.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that ranges are disjoint")]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.1);
        // SAFETY: inside the buffer by the assertion; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// `Σ a · b`, in sixteen interleaved sums, so that it vectorises.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0f32; LANES];
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// `Σ f(x)`, likewise.
#[inline(always)]
pub fn sum_of(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let chunks = values.chunks_exact(LANES);
    let tail: f32 = chunks.remainder().iter().map(|x| f(*x)).sum();
    let mut sums = [0f32; LANES];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += f(*x));
    }
    sums.iter().sum::<f32>() + tail
}

/// The largest of `values` and `least`, likewise.
#[inline(always)]
pub fn max_of(values: &[f32], least: f32) -> f32 {
    let chunks = values.chunks_exact(LANES);
    let mut maxima = [least; LANES];
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let tail = chunks.remainder().iter().fold(least, |m, x| larger(m, *x));
    for chunk in chunks {
        maxima.iter_mut().zip(chunk).for_each(|(m, x)| *m = larger(*m, *x));
    }
    maxima.into_iter().fold(tail, larger)
}

/// Independent partial results of the reductions above.
const LANES: usize = 16;

/// `eˣ` to about 1e-7 relative, without branches, so that loops over it vectorise; libm's does not. 0 and infinity
/// beyond the range of f32; subnormal results are 0.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, `2ⁿ` built from bits, and a polynomial for `eʳ` (its coefficients are
/// Cephes' `expf`).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.8);
    let n = (clamped * std::f32::consts::LOG2_E).round_ties_even();
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = p * r + c;
    }
    let mantissa = p * r * r + r + 1.0;
    // In two factors, because 2¹²⁸ is out of range although mantissa · 2¹²⁸ may not be.
    let n = n as i32;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let value = mantissa * power(n >> 1) * power(n - (n >> 1));
    if x < -87.3 {
        0.0
    } else if x > 88.8 {
        f32::INFINITY
    } else if x.is_nan() {
        x
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    #[test]
    fn exp_is_within_two_ulps_of_libms() {
        for i in -87_000..88_700 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours - exact).abs() <= 2.4e-7 * exact, "exp({x}) = {ours}, expected {exact}");
        }
        assert_eq!((exp(-1e9), exp(1e9), exp(0.0)), (0.0, f32::INFINITY, 1.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        let mut values = random("values", 10_000);
        values.extend([0.0, -0.0, f32::INFINITY, f32::MAX, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        let expected: Vec<f32> = values.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        assert_eq!(narrow(&values), values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
        round(&mut values, DType::BF16);
        assert_eq!(values, expected);
        assert!(round_bf16(f32::NAN).is_nan());
    }
}
