use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{Element, GRAIN, build, check_tokens, elements, typed, update, vectorized, with_indices};

pub fn forward(tokens: &Tensor, table: &Tensor) -> Result<Tensor> {
    typed!(T = table.dtype(); gather::<T>(tokens, table))
}

fn gather<T: Element>(tokens: &Tensor, table: &Tensor) -> Result<Tensor> {
    let (vocab_size, dim) = table.dims2()?;
    let (b, s) = tokens.dims2()?;
    let table = elements::<T>(table)?;
    let y = with_indices(tokens, |tokens| {
        check_tokens(tokens, vocab_size)?;
        let ([y], _) = build(tokens.len() * dim, (GRAIN / dim).max(1) * dim, |range, y| {
            let table: &[T] = &table;
            for token in &tokens[range.start / dim..range.end / dim] {
                let row = &table[*token as usize * dim..][..dim];
                vectorized!(y.extend(row.iter().map(|x| [x.load()])));
            }
        });
        Ok::<_, crate::Error>(y)
    })??;
    Ok(Tensor::from_vec(y, (b, s, dim), &Device::Cpu)?)
}

/// In parallel over the tokens that occur; each one's sum runs over its positions in their order.
pub fn backward(tokens: &Tensor, grad: &Tensor, dy: &Tensor) -> Result<()> {
    typed!(Y = dy.dtype(); scatter::<Y>(tokens, grad, dy))
}

fn scatter<Y: Element>(tokens: &Tensor, grad: &Tensor, dy: &Tensor) -> Result<()> {
    let (_, dim) = grad.dims2()?;
    let dy = elements::<Y>(dy)?;
    let mut occurrences: Vec<(u32, u32)> =
        with_indices(tokens, |tokens| tokens.iter().zip(0..).map(|(token, position)| (*token, position)).collect())?;
    occurrences.par_sort_unstable();
    update(grad, |mut grad: &mut [f32]| {
        // Cuts the rows that occur out of the accumulator.
        let mut next = 0;
        let rows = occurrences.chunk_by(|a, b| a.0 == b.0).map(|occurrences| {
            let token = occurrences[0].0 as usize;
            let (row, rest) = std::mem::take(&mut grad)[(token - next) * dim..].split_at_mut(dim);
            (grad, next) = (rest, token + 1);
            (row, occurrences)
        });
        rows.collect::<Vec<_>>().into_par_iter().for_each(|(row, occurrences)| {
            vectorized!({
                for (_, position) in occurrences {
                    let dy = &dy[*position as usize * dim..][..dim];
                    row.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy.load());
                }
            });
        });
    })
}
