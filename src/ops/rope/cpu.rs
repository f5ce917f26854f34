use candle_core::Tensor;
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{floats, tensor, vectorized};

/// Rotates by `direction` (1 or -1) times the angle.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f32) -> Result<Tensor> {
    let (_, s, h, hd) = x.dims4()?;
    let (values, cos, sin) = (floats(x)?, floats(cos)?, floats(sin)?);
    let mut y = vec![0f32; values.len()];
    y.par_chunks_mut(h * hd).zip(values.par_chunks(h * hd)).enumerate().for_each(|(row, (y, x))| {
        let angles = (row % s) * hd / 2..((row % s) + 1) * hd / 2;
        let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
        vectorized!({
            for (y, x) in y.chunks_exact_mut(hd).zip(x.chunks_exact(hd)) {
                let pairs = y.chunks_exact_mut(2).zip(x.chunks_exact(2));
                for ((y, x), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                    let sin = direction * sin;
                    y[0] = x[0] * cos - x[1] * sin;
                    y[1] = x[0] * sin + x[1] * cos;
                }
            }
        },);
    });
    tensor(y, x.shape(), x.dtype())
}
