use candle_core::{DType, Tensor};
use rayon::prelude::*;

use crate::Result;
use crate::ops::host::{Disjoint, check_tokens, floats, tensor, update, with_indices};

pub fn forward(tokens: &Tensor, table: &Tensor) -> Result<Tensor> {
    let (vocab_size, dim) = table.dims2()?;
    let (b, s) = tokens.dims2()?;
    let rows = floats(table)?;
    let y = with_indices(tokens, |tokens| {
        check_tokens(tokens, vocab_size)?;
        let mut y = vec![0f32; tokens.len() * dim];
        y.par_chunks_mut(dim).zip(tokens).for_each(|(y, token)| {
            y.copy_from_slice(&rows[*token as usize * dim..][..dim]);
        });
        Ok::<_, crate::Error>(y)
    })??;
    tensor(y, (b, s, dim), DType::F32)
}

/// In parallel over columns, so that each sum runs over the tokens in their order.
pub fn backward(tokens: &Tensor, grad: &Tensor, dy: &Tensor) -> Result<()> {
    const COLUMNS: usize = 64;
    let (_, dim) = grad.dims2()?;
    let dy = floats(dy)?;
    with_indices(tokens, |tokens| {
        update(grad, |grad: &mut [f32]| {
            let grad = Disjoint::new(grad);
            (0..dim.div_ceil(COLUMNS)).into_par_iter().for_each(|block| {
                let columns = block * COLUMNS..dim.min((block + 1) * COLUMNS);
                for (row, token) in dy.chunks_exact(dim).zip(tokens) {
                    let at = *token as usize * dim;
                    // SAFETY: a task has its own columns of every row.
                    let sums = unsafe { grad.slice_mut(at + columns.start..at + columns.end) };
                    sums.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, dy)| *sum += dy);
                }
            });
        })
    })?
}
