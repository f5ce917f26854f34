use candle_core::{DType, Tensor};

use crate::Result;
use crate::ops::gpu::{THREADS, address, blocks, device, first, launch, suffix, uninit};

pub fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype { Ok(tensor.clone()) } else { elements(tensor, dtype) }
}

/// The elements of `tensor` in row-major order, as `dtype`, rounded where need be: `tensor` itself where it is so.
pub fn elements(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype && tensor.is_contiguous() { Ok(tensor.clone()) } else { copied(tensor, dtype) }
}

fn copied(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let device = device(x);
    let y = uninit(x.shape(), dtype, device)?;
    let (sizes, strides) = merged(x)?;
    let whole = |strides: &[usize]| strides.iter().all(|stride| stride.is_multiple_of(8));
    let aligned = first(x)?.is_multiple_of(16) && address(&y)?.is_multiple_of(16);
    let by_eights = aligned && sizes[4].is_multiple_of(8) && strides[4] == 1 && whole(&strides[..4]);
    let n = if by_eights { 8 } else { 1 };
    let groups = x.elem_count() / n;
    let kernel = format!("copy_{}_{}_{n}", kind(x.dtype()), kind(dtype));
    launch!(
        device, "copy", &kernel, grid: blocks(groups), block: THREADS;
        first(x)?, &y, groups, sizes[1], sizes[2], sizes[3], sizes[4],
        strides[0], strides[1], strides[2], strides[3], strides[4],
    );
    Ok(y)
}

/// What kernels call a dtype: 4 bytes are copied as f32 whatever they mean.
fn kind(dtype: DType) -> &'static str {
    if dtype == DType::U32 { "f32" } else { suffix(dtype) }
}

/// Five sizes and strides, dimensions that lie behind one another taken as one.
fn merged(x: &Tensor) -> Result<([usize; 5], [usize; 5])> {
    let mut dims: Vec<(usize, usize)> = Vec::new();
    for (size, stride) in x.dims().iter().zip(x.stride()).filter(|(size, _)| **size != 1) {
        match dims.last_mut() {
            Some(last) if last.1 == size * stride => *last = (last.0 * size, *stride),
            _ => dims.push((*size, *stride)),
        }
    }
    let Some(lacking) = 5usize.checked_sub(dims.len()) else {
        let found = format!("a tensor of {:?} by {:?} has more dimensions than can be copied", x.dims(), x.stride());
        return Err(candle_core::Error::Msg(found).bt().into());
    };
    let (mut sizes, mut strides) = ([1; 5], [0; 5]);
    for (i, (size, stride)) in dims.into_iter().enumerate() {
        (sizes[lacking + i], strides[lacking + i]) = (size, stride);
    }
    Ok((sizes, strides))
}
