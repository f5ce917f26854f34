use candle_core::{Device, Tensor};

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, elements, floats, typed, vectorized};

/// Rotates by `direction` (1 or -1) times the angle.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f32) -> Result<Tensor> {
    typed!(X = x.dtype(); rotate_as::<X>(x, cos, sin, direction))
}

fn rotate_as<X: Element>(x: &Tensor, cos: &Tensor, sin: &Tensor, direction: f32) -> Result<Tensor> {
    let (_, s, h, hd) = x.dims4()?;
    let (values, cos, sin) = (elements::<X>(x)?, floats(cos)?, floats(sin)?);
    let row = h * hd;
    let ([y], _) = build(values.len() / 2, (GRAIN / row).max(1) * row / 2, |range, y| {
        let (pairs, _) = values[2 * range.start..2 * range.end].as_chunks::<2>();
        for (i, pairs) in pairs.chunks_exact(row / 2).enumerate() {
            let position = (2 * range.start / row + i) % s;
            let angles = position * hd / 2..(position + 1) * hd / 2;
            let (cos, sin) = (&cos[angles.clone()], &sin[angles]);
            vectorized!({
                for head in pairs.chunks_exact(hd / 2) {
                    y.extend(head.iter().zip(cos.iter().zip(sin)).map(|([a, b], (cos, sin))| {
                        let (a, b, sin) = (a.load(), b.load(), direction * sin);
                        [[X::store(a * cos - b * sin), X::store(a * sin + b * cos)]]
                    }));
                }
            });
        }
    });
    Ok(Tensor::from_vec(y.into_flattened(), x.shape(), &Device::Cpu)?)
}
