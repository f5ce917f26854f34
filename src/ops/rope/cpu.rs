use candle_core::{Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, elements, floats, typed, vectorized};

/// Rotates by `direction` (1 or -1) times the angle.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f32) -> Result<Tensor> {
    typed!(X = x.dtype(); rotate_as::<X>(x, cos, sin, direction))
}

fn rotate_as<X: Element>(x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f32) -> Result<Tensor> {
    // Pairs that one step of the loop handles: angles are repeated for as many heads, where heads are smaller.
    const STEP: usize = 16;
    let (_, s, h, hd) = x.dims4()?;
    let (values, cos, sin) = (elements::<X>(x)?, floats(cos)?, floats(sin)?);
    let (half, row) = (hd / 2, h * hd / 2);
    let ([y], _) = build(values.len() / 2, (GRAIN / 2 / row).max(1) * row, |range, y| {
        let (cos, sin) = (&*cos, &*sin);
        let (pairs, _) = values[2 * range.start..2 * range.end].as_chunks::<2>();
        vectorized!({
            let (mut cosines, mut sines) = (Vec::new(), Vec::new());
            for (i, row_of_pairs) in pairs.chunks_exact(row).enumerate() {
                let position = (range.start / row + i) % s;
                let angles = position * half..(position + 1) * half;
                cosines.clear();
                sines.clear();
                for _ in 0..STEP.div_ceil(half) {
                    cosines.extend_from_slice(&cos[angles.clone()]);
                    sines.extend(sin[angles.clone()].iter().map(|sin| direction * sin));
                }
                for heads in row_of_pairs.chunks(cosines.len()) {
                    y.extend(heads.iter().zip(cosines.iter().zip(&sines)).map(|([a, b], (cos, sin))| {
                        let (a, b) = (a.load(), b.load());
                        [[X::store(a * cos - b * sin), X::store(a * sin + b * cos)]]
                    }));
                }
            }
        });
    });
    Ok(Tensor::from_vec(y.into_flattened(), x.shape(), &Device::Cpu)?)
}
