use candle_core::{DType, Tensor};

use crate::Result;
use crate::ops::gpu::{THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};
use crate::ops::sort::stable_sort;

/// Sorted tokens whose gradients a block adds up.
const CHUNK: usize = 16;

/// A token that is not in the table has a row of NaN.
pub fn forward(tokens: &Tensor, table: &Tensor) -> Result<Tensor> {
    let device = device(table);
    let ((vocab_size, dim), (b, s)) = (table.dims2()?, tokens.dims2()?);
    let tokens = elements(tokens, DType::U32)?;
    let y = uninit((b, s, dim), DType::F32, device)?;
    let n = if by_eights(dim, &[table, &y])? { 8 } else { 1 };
    let groups = y.elem_count() / n;
    let kernel = format!("embedding_{}_{n}", suffix(table.dtype()));
    launch!(
        device, "embedding", &kernel, grid: blocks(groups), block: THREADS;
        &tokens, table, &y, groups, vocab_size, dim,
    );
    Ok(y)
}

/// The gradients of a token are summed in the order of its places.
pub fn backward(tokens: &Tensor, grad: &Tensor, dy: &Tensor) -> Result<()> {
    const CHUNK_THREADS: usize = 128;
    let device = device(grad);
    let (vocab_size, dim) = grad.dims2()?;
    let (tokens, dy) = (elements(tokens, DType::U32)?.flatten_all()?, elements(dy, dy.dtype())?);
    let (order, keys) = stable_sort(&tokens, vocab_size)?;
    let count = tokens.elem_count();
    let chunks = count.div_ceil(CHUNK);
    let partials = uninit((chunks, 2, dim), DType::F32, device)?;
    let n = if by_eights(dim, &[&dy, grad, &partials])? { 8 } else { 1 };
    let kernel = format!("embedding_chunk_{}_{n}", suffix(dy.dtype()));
    launch!(
        device, "embedding", &kernel, grid: [chunks, dim.div_ceil(CHUNK_THREADS * n), 1], block: CHUNK_THREADS;
        &keys, &order, &dy, grad, &partials, count, CHUNK, vocab_size, dim,
    );
    launch!(
        device, "embedding", "embedding_join", grid: [chunks, dim.div_ceil(THREADS), 1], block: THREADS;
        &keys, &partials, grad, count, CHUNK, vocab_size, dim,
    );
    Ok(())
}
