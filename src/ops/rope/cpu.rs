use candle_core::{Device, Tensor};

use super::RopeTable;
use crate::Result;
use crate::models::args::RopeLayout;
use crate::ops::host::{Element, GRAIN, build, elements, floats, typed, vectorized};

/// Rotates by `direction` (1 or -1) times the angle.
pub fn rotate(x: &Tensor, table: &RopeTable, direction: f32) -> Result<Tensor> {
    typed!(X = x.dtype(); match table.layout {
        RopeLayout::Pairs => rotate_pairs::<X>(x, table, direction),
        RopeLayout::Halves => rotate_halves::<X>(x, table, direction),
    })
}

fn rotate_pairs<X: Element>(x: &Tensor, table: &RopeTable, direction: f32) -> Result<Tensor> {
    // Pairs that one step of the loop handles: angles are repeated for as many heads, where heads are smaller.
    const STEP: usize = 16;
    let (_, s, h, hd) = x.dims4()?;
    let (values, cos, sin) = (elements::<X>(x)?, floats(&table.cos)?, floats(&table.sin)?);
    let (half, row) = (table.cos.dim(1)?, h * hd / 2);
    let kept = hd / 2 - half;
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
                // What is kept of a head lies between what is rotated, so that heads go one by one.
                for _ in 0..if kept == 0 { STEP.div_ceil(half) } else { 1 } {
                    cosines.extend_from_slice(&cos[angles.clone()]);
                    sines.extend(sin[angles.clone()].iter().map(|sin| direction * sin));
                }
                for heads in row_of_pairs.chunks(kept + cosines.len()) {
                    let (kept, rotary) = heads.split_at(kept);
                    y.extend(kept.iter().map(|pair| [*pair]));
                    y.extend(rotary.iter().zip(cosines.iter().zip(&sines)).map(|([a, b], (cos, sin))| {
                        let (a, b) = (a.load(), b.load());
                        [[X::store(a * cos - b * sin), X::store(a * sin + b * cos)]]
                    }));
                }
            }
        });
    });
    Ok(Tensor::from_vec(y.into_flattened(), x.shape(), &Device::Cpu)?)
}

fn rotate_halves<X: Element>(x: &Tensor, table: &RopeTable, direction: f32) -> Result<Tensor> {
    let (_, s, h, hd) = x.dims4()?;
    let (values, cos, sin) = (elements::<X>(x)?, floats(&table.cos)?, floats(&table.sin)?);
    let (half, row) = (table.cos.dim(1)?, h * hd);
    let ([y], _) = build(values.len(), (GRAIN / row).max(1) * row, |range, y| {
        let (values, cos, sin) = (&values[range.clone()], &*cos, &*sin);
        vectorized!({
            for (i, heads) in values.chunks_exact(row).enumerate() {
                let position = (range.start / row + i) % s;
                let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
                for head in heads.chunks_exact(hd) {
                    let (kept, rotary) = head.split_at(hd - 2 * half);
                    let (first, second) = rotary.split_at(half);
                    let pairs = || first.iter().zip(second).zip(cos.iter().zip(sin));
                    y.extend(kept.iter().map(|x| [*x]));
                    y.extend(
                        pairs().map(|((a, b), (cos, sin))| [X::store(a.load() * cos - direction * sin * b.load())]),
                    );
                    y.extend(
                        pairs().map(|((a, b), (cos, sin))| [X::store(direction * sin * a.load() + b.load() * cos)]),
                    );
                }
            }
        },);
    });
    Ok(Tensor::from_vec(y, x.shape(), &Device::Cpu)?)
}
