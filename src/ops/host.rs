//! Tensors of the host as slices.

use std::array::from_fn;
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::{Deref, Range};

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
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
pub(crate) struct Once;
pub(crate) use vectorized;

/// Evaluates an expression with names for the types that dtypes stand for: `typed!(X = x.dtype(); f::<X>(x))`.
macro_rules! typed {
    (; $body:expr) => { $body };
    ($name:ident = $dtype:expr $(, $rest:ident = $dtypes:expr)*; $body:expr) => {
        match $dtype {
            candle_core::DType::BF16 => {
                type $name = half::bf16;
                $crate::ops::host::typed!($($rest = $dtypes),*; $body)
            }
            candle_core::DType::F32 => {
                type $name = f32;
                $crate::ops::host::typed!($($rest = $dtypes),*; $body)
            }
            other => unreachable!("activations and weights are f32 or bf16, not {other:?}"),
        }
    };
}
pub(in crate::ops) use typed;

/// What can be changed where it is stored.
pub trait Stored: WithDType {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($($type:ty = $name:ident),*) => {$(
        impl Stored for $type {
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                if let CpuStorage::$name(values) = storage { Some(values) } else { None }
            }
        }
    )*};
}
stored!(f32 = F32, bf16 = BF16, u32 = U32);

/// What tensors hold. Arithmetic is f32: elements are widened when loaded and rounded to nearest even when stored.
pub trait Element: Stored {
    fn load(self) -> f32;
    fn store(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }
}

/// Without the branches of [`bf16::from_f32`] and [`bf16::to_f32`], which keep loops from vectorising.
impl Element for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        // The addition could carry a NaN's payload away, and the cut could leave none of it.
        let bits = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
        Self::from_bits((bits >> 16) as u16)
    }
}

/// The elements of a tensor, row-major: borrowed where they are stored so, converted where not. Dereference it before a
/// loop: the choice inside a loop keeps that from vectorising.
pub enum Elements<'a, T> {
    Borrowed { storage: StorageRef<'a>, range: Range<usize> },
    Owned(Vec<T>),
}

pub type Floats<'a> = Elements<'a, f32>;
pub type Indices<'a> = Elements<'a, u32>;

impl<T: WithDType> Deref for Elements<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(values) => values,
            Self::Borrowed { storage, range } => match &**storage {
                Storage::Cpu(storage) => {
                    &T::cpu_storage_as_slice(storage).expect("checked when borrowed")[range.clone()]
                }
                _ => unreachable!("only the host's memory is borrowed"),
            },
        }
    }
}

/// The elements of `tensor`, in row-major order, as `T`.
pub fn elements<T: Element>(tensor: &Tensor) -> Result<Elements<'_, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    if let (Some((start, end)), Storage::Cpu(data)) = (layout.contiguous_offsets(), &*storage) {
        match data {
            _ if tensor.dtype() == T::DTYPE => return Ok(Elements::Borrowed { storage, range: start..end }),
            CpuStorage::F32(values) => return Ok(Elements::Owned(convert(&values[start..end]))),
            CpuStorage::BF16(values) => return Ok(Elements::Owned(convert(&values[start..end]))),
            _ => {}
        }
    }
    drop(storage);
    Ok(Elements::Owned(tensor.flatten_all()?.to_dtype(T::DTYPE)?.to_vec1()?))
}

/// The elements of `tensor`, in row-major order, as f32.
pub fn floats(tensor: &Tensor) -> Result<Floats<'_>> {
    elements(tensor)
}

/// The elements of a u32 tensor, in row-major order.
pub fn indices(tensor: &Tensor) -> Result<Indices<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(Elements::Borrowed { storage, range: start..end }),
        None => Ok(Elements::Owned(tensor.flatten_all()?.to_vec1()?)),
    }
}

/// The elements of a contiguous u32 tensor.
pub fn with_indices<R>(tensor: &Tensor, body: impl FnOnce(&[u32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous above");
    let Storage::Cpu(storage) = &*storage else { unreachable!("this module is for tensors of the host") };
    Ok(body(&storage.as_slice::<u32>()?[start..end]))
}

/// `tensor` in `dtype`, rounded where need be.
pub fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype {
        return Ok(tensor.clone());
    }
    typed!(X = tensor.dtype(), Y = dtype; {
        let values = convert::<X, Y>(&elements(tensor)?);
        Ok(Tensor::from_vec(values, tensor.shape(), &Device::Cpu)?)
    })
}

/// Refuses ids that are not in the vocabulary.
pub fn check_tokens<'a>(tokens: impl IntoIterator<Item = &'a u32>, vocab_size: usize) -> Result<()> {
    match tokens.into_iter().find(|t| **t as usize >= vocab_size) {
        None => Ok(()),
        Some(token) => Err(Error::Model(format!("token {token} does not exist in a model of vocab_size {vocab_size}"))),
    }
}

/// Ids on `device`, which nobody waits to have copied.
pub fn upload(ids: Vec<u32>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => super::gpu::upload(&ids, shape, device),
        _ => Ok(Tensor::from_vec(ids, shape.into(), device)?),
    }
}

/// A tensor of `dtype` that holds `values`, rounded where need be.
pub fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    Ok(match dtype {
        DType::BF16 => Tensor::from_vec(convert::<_, bf16>(&values), shape, &Device::Cpu)?,
        DType::F32 => Tensor::from_vec(values, shape, &Device::Cpu)?,
        other => Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(other)?,
    })
}

/// `values` as another type, rounded where need be.
pub fn convert<X: Element, Y: Element>(values: &[X]) -> Vec<Y> {
    let ([out], _) = build(values.len(), GRAIN, |range, out| {
        let values = &values[range];
        vectorized!(out.extend(values.iter().map(|x| [Y::store(x.load())])));
    });
    out
}

/// `N` new vectors of `n` elements, written by parallel tasks of `chunk` elements each, and what the tasks return, in
/// their order. A task gets the range of its elements and writes all of them, in order, so that memory need not be
/// filled beforehand.
pub fn build<T: Copy + Send, R: Send, const N: usize>(
    n: usize,
    chunk: usize,
    task: impl Fn(Range<usize>, &mut Slots<T, N>) -> R + Sync,
) -> ([Vec<T>; N], Vec<R>) {
    let mut vectors = from_fn(|_| Box::<[T]>::new_uninit_slice(n));
    let mut chunks = vectors.each_mut().map(|vector| vector.chunks_mut(chunk));
    let parts: Vec<(usize, [&mut [MaybeUninit<T>]; N])> = (0..n)
        .step_by(chunk)
        .map(|start| (start, chunks.each_mut().map(|chunks| chunks.next().expect("vectors have equal lengths"))))
        .collect();
    let run = |(start, slots): (usize, [&mut [MaybeUninit<T>]; N])| {
        let len = chunk.min(n - start);
        let mut slots = Slots { slots, written: 0 };
        let result = task(start..start + len, &mut slots);
        assert_eq!(slots.written, len, "a task writes all of its elements");
        result
    };
    let results =
        if parts.len() == 1 { parts.into_iter().map(run).collect() } else { parts.into_par_iter().map(run).collect() };
    // SAFETY: the parts cover the vectors, and every slot of a part was written, as its task's assertion has checked.
    (vectors.map(|vector| unsafe { vector.assume_init() }.into_vec()), results)
}

/// A task's part of vectors that are being built: as many slots in each of the `N`.
pub struct Slots<'a, T, const N: usize> {
    slots: [&'a mut [MaybeUninit<T>]; N],
    written: usize,
}

impl<T, const N: usize> Slots<'_, T, N> {
    /// Writes the next elements, one of each vector per item.
    #[inline(always)]
    pub fn extend(&mut self, items: impl Iterator<Item = [T; N]>) {
        let room = self.slots.iter().map(|slots| slots.len()).min().unwrap_or(0) - self.written;
        let mut slots = self.slots.each_mut().map(|slots| &mut slots[self.written..][..room]);
        let mut count = 0;
        for (i, item) in (0..room).zip(items) {
            for (slots, value) in slots.iter_mut().zip(item) {
                // SAFETY: `i < room`, the length that the slots were cut to. A check would keep the loop from vectorising.
                unsafe { slots.get_unchecked_mut(i) }.write(value);
            }
            count += 1;
        }
        self.written += count;
    }
}

/// Changes the elements of a contiguous tensor where they live.
pub fn update<T: Stored, R>(tensor: &Tensor, body: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    let body = Cell::new(Some(body));
    let result = Cell::new(None);
    let run: &dyn Fn(&mut [T]) = &|values| result.set(body.take().map(|body| body(values)));
    tensor.inplace_op1(&Update(run))?;
    Ok(result.into_inner().expect("the op has run"))
}

/// As [`update`], of an accumulator that is not there where its weight is frozen.
pub fn update_if<R>(grad: Option<&Tensor>, body: impl FnOnce(Option<&mut [f32]>) -> R) -> Result<R> {
    match grad {
        Some(grad) => update(grad, |grad: &mut [f32]| body(Some(grad))),
        None => Ok(body(None)),
    }
}

struct Update<'a, T>(&'a dyn Fn(&mut [T]));

impl<T: Stored> InplaceOp1 for Update<'_, T> {
    fn name(&self) -> &'static str {
        "update"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (Some((start, end)), Some(values)) = (layout.contiguous_offsets(), T::slice_mut(storage)) else {
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

/// `Σ a · b`.
#[inline(always)]
pub fn dot<X: Element, Y: Element>(a: &[X], b: &[Y]) -> f32 {
    fold(a, b, 0.0, |sum, a, b| sum + a * b, |a, b| a + b)
}

/// `Σ f(x)`.
#[inline(always)]
pub fn sum_of<X: Element>(values: &[X], f: impl Fn(f32) -> f32) -> f32 {
    fold(values, values, 0.0, |sum, x, _| sum + f(x), |a, b| a + b)
}

/// The largest of `values` and `least`.
#[inline(always)]
pub fn max_of<X: Element>(values: &[X], least: f32) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    fold(values, values, least, |max, x, _| larger(max, x), larger)
}

/// Folds pairs of elements into 64 partial results, which are then joined: four of the widest vectors, so that it
/// vectorises and no step waits for the one before.
#[inline(always)]
fn fold<X: Element, Y: Element>(
    a: &[X],
    b: &[Y],
    start: f32,
    step: impl Fn(f32, f32, f32) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    const LANES: usize = 16;
    const VECTORS: usize = 4;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let ((a, a_last), (b, b_last)) = (a.as_chunks::<VECTORS>(), b.as_chunks::<VECTORS>());
    let add = |lanes: &mut [f32; LANES], a: &[X; LANES], b: &[Y; LANES]| {
        for i in 0..LANES {
            lanes[i] = step(lanes[i], a[i].load(), b[i].load());
        }
    };
    let mut lanes = [[start; LANES]; VECTORS];
    for (a, b) in a.iter().zip(b) {
        for v in 0..VECTORS {
            add(&mut lanes[v], &a[v], &b[v]);
        }
    }
    let mut total = from_fn(|i| join(join(lanes[0][i], lanes[1][i]), join(lanes[2][i], lanes[3][i])));
    for (a, b) in a_last.iter().zip(b_last) {
        add(&mut total, a, b);
    }
    let rest = a_rest.iter().zip(b_rest).fold(start, |rest, (a, b)| step(rest, a.load(), b.load()));
    let total: [f32; 8] = from_fn(|i| join(total[i], total[i + 8]));
    let total: [f32; 4] = from_fn(|i| join(total[i], total[i + 4]));
    join(join(join(total[0], total[1]), join(total[2], total[3])), rest)
}

/// `eˣ` within 1 ulp; 0 below 2⁻¹²⁵·⁵, infinity beyond the range of f32. Without branches, so that loops over it
/// vectorise. To be called in `vectorized!`: elsewhere each fused multiplication is a call of libm's.
///
/// `2ⁿ eʳ` with `x = n ln 2 + r`, `|r| <= ln 2 / 2`. `2eʳ` is the polynomial of degree 6 that begins `2 + 2r + r²` and
/// has the least relative error, 4e-9; the factor 2 is what brings `2ⁿ⁻¹` into range where eˣ is near the largest f32.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    use std::f32::consts::{LN_2, LOG2_E};
    // What rounding has cut from ln 2.
    const LN_2_REST: f32 = -1.904_654_3e-9;
    // Adding it rounds to an integer, which the lowest bits then hold; 126 is the bias of an exponent, less one.
    const TO_INTEGER: f32 = (3 << 22) as f32 + 126.0;
    let x = x.clamp(-87.5, 89.0);
    let shifted = x.mul_add(LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = n.mul_add(-LN_2_REST, n.mul_add(-LN_2, x));
    let mut p = 2.807_097e-3_f32;
    for c in [1.674_451_1e-2, 8.333_111e-2, 3.333_297_7e-1, 1.0, 2.0, 2.0] {
        p = p.mul_add(r, c);
    }
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// The hyperbolic tangent within 3e-7 of its value. Without branches, for `vectorized!`, as [`exp`] is.
///
/// Near zero, where `1 - 2 / (e²ˣ + 1)` would cancel, the polynomial of the Cephes library.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_988_7e-3_f32;
    for c in [2.063_909e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = p.mul_add(z, c);
    }
    let near_zero = (p * z).mul_add(x, x);
    let beyond = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    if x.abs() < 0.625 { near_zero } else { beyond }
}

/// `cap · tanh(x / cap)`: nearly `x` where that is small, and never beyond `cap`.
#[inline(always)]
pub fn softcapped(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

/// The derivative of [`softcapped`], from its value.
#[inline(always)]
pub fn softcap_slope(capped: f32, cap: f32) -> f32 {
    1.0 - (capped / cap) * (capped / cap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::random;

    #[test]
    fn exp_is_within_one_ulp() {
        for i in -86_980..88_722 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            assert!((ours - exact).abs() <= ulp, "exp({x}) = {ours}, expected {exact}");
        }
        assert_eq!(
            [f32::NEG_INFINITY, -87.5, 0.0, 88.723, f32::INFINITY].map(exp),
            [0., 0., 1., f32::INFINITY, f32::INFINITY]
        );
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_within_three_ten_millionths() {
        for i in -20_000..20_000 {
            let x = i as f32 / 1000.0;
            let (ours, exact) = (f64::from(tanh(x)), f64::from(x).tanh());
            assert!((ours - exact).abs() <= 3e-7 * exact.abs(), "tanh({x}) = {ours}, expected {exact}");
        }
        assert_eq!([f32::NEG_INFINITY, -0.0, 1e30].map(tanh), [-1.0, 0.0, 1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn rounding_to_bf16_is_that_of_half() {
        let mut values = random("values", 10_000);
        values.extend([0.0, -0.0, f32::INFINITY, f32::MAX, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        assert_eq!(convert::<_, bf16>(&values), values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
        assert!([f32::NAN, f32::from_bits(0x7f80_0001)].iter().all(|x| bf16::store(*x).is_nan()));
    }

    #[test]
    fn elements_are_read_in_row_major_order_whatever_the_tensor_holds() -> Result<()> {
        let values = random("x", 77);
        let tensor = Tensor::from_slice(&values, (7, 11), &Device::Cpu)?;
        let transposed: Vec<f32> = (0..77).map(|i| values[i % 7 * 11 + i / 7]).collect();
        for (tensor, values) in [(tensor.narrow(0, 2, 3)?, &values[22..55]), (tensor.t()?, &transposed[..])] {
            let rounded: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
            assert_eq!(&*elements::<f32>(&tensor)?, values);
            assert_eq!(&*elements::<bf16>(&tensor)?, rounded);
            let low = tensor.to_dtype(DType::BF16)?;
            assert_eq!(&*elements::<bf16>(&low)?, rounded);
            assert_eq!(&*elements::<f32>(&low)?, rounded.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
            assert_eq!(&*elements::<bf16>(&cast(&tensor, DType::BF16)?)?, rounded);
        }
        Ok(())
    }

    #[test]
    fn vectors_are_built_from_what_the_tasks_write() {
        for n in [0, 1, 10, 25] {
            let ([double, square], starts) = build(n, 10, |range, out| {
                let (first, rest) = (range.start..range.end.min(range.start + 3), range.start + 3..range.end);
                out.extend(first.map(|i| [2 * i, i * i]));
                out.extend(rest.map(|i| [2 * i, i * i]));
                range.start
            });
            assert_eq!(double, (0..n).map(|i| 2 * i).collect::<Vec<_>>());
            assert_eq!(square, (0..n).map(|i| i * i).collect::<Vec<_>>());
            assert_eq!(starts, (0..n).step_by(10).collect::<Vec<_>>());
        }
    }

    #[test]
    #[should_panic(expected = "a task writes all of its elements")]
    fn an_element_that_no_task_writes_is_refused() {
        build(25, 10, |range, out| out.extend(range.skip(1).map(|i| [i])));
    }

    #[test]
    fn reductions_of_any_length_match_plain_ones() {
        for n in [0, 1, 15, 16, 17, 64, 100, 1000] {
            let (a, b) = (random("a", n), random("b", n));
            let wide = |x: f32| f64::from(x);
            let (product, sum): (f64, f64) = a
                .iter()
                .zip(&b)
                .fold((0.0, 0.0), |(product, sum), (a, b)| (product + wide(*a) * wide(*b), sum + wide(*a) + 1.0));
            assert!((wide(dot(&a, &b)) - product).abs() < 1e-5, "{n}");
            assert!((wide(sum_of(&a, |x| x + 1.0)) - sum).abs() <= 1e-6 * n as f64, "{n}");
            assert_eq!(max_of(&a, -0.5), a.iter().copied().fold(-0.5, f32::max), "{n}");
        }
    }
}
