use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{GRAIN, floats, tensor, vectorized};

pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (a, b) = (floats(x)?, floats(y)?);
    let mut sum = vec![0f32; a.len()];
    sum.par_chunks_mut(GRAIN).zip(a.par_chunks(GRAIN).zip(b.par_chunks(GRAIN))).for_each(|(sum, (a, b))| {
        vectorized!(sum.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (a, b))| *s = a + b));
    });
    tensor(sum, x.shape(), x.dtype())
}
