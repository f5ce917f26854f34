use candle_core::{DType, Tensor};

use crate::Result;
use crate::ops::gpu::{THREADS, by_eights, device, elements, launch, suffix, uninit};

/// Parts that are looked through on the device, at most; the host looks through their results.
const PARTS: usize = 1024;

pub fn magnitude(x: &Tensor) -> Result<f32> {
    let device = device(x);
    let x = elements(x, x.dtype())?;
    let n = if by_eights(x.elem_count(), &[&x])? { 8 } else { 1 };
    let groups = x.elem_count() / n;
    let parts = groups.div_ceil(THREADS).clamp(1, PARTS);
    let largest = uninit(parts, DType::F32, device)?;
    let kernel = format!("magnitude_{}_{n}", suffix(x.dtype()));
    let shared = 32 * size_of::<f32>();
    launch!(device, "magnitude", &kernel, grid: [parts, 1, 1], block: THREADS, shared: shared; &x, &largest, groups);
    // The order of the bits is that of the numbers, NaN last.
    let bits = largest.to_vec1::<f32>()?.into_iter().map(|x| x.to_bits() & !(1 << 31));
    Ok(f32::from_bits(bits.max().unwrap_or(0)))
}
