use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{Element, GRAIN, elements, typed, vectorized};

pub fn magnitude(x: &Tensor) -> Result<f32> {
    typed!(T = x.dtype(); magnitude_in::<T>(x))
}

/// The order of the bits is that of the numbers, NaN last.
fn magnitude_in<T: Element>(x: &Tensor) -> Result<f32> {
    let values = elements::<T>(x)?;
    let bits = |x: &T| x.load().to_bits() & !(1 << 31);
    let parts = values.par_chunks(GRAIN).map(|chunk| vectorized!(chunk.iter().map(bits).fold(0, u32::max)));
    Ok(f32::from_bits(parts.max().unwrap_or(0)))
}
