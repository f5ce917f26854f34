use candle_core::{D, DType, Tensor};

use crate::Result;
use crate::ops::bias::cuda::add_partials;
use crate::ops::gpu::{THREADS, by_eights, device, elements, launch, suffix, uninit};

/// Blocks of a backward pass, at most: each leaves a sum of weight gradients.
const PARTS: usize = 264;
/// Rows that a warp of a sum over columns reads at least.
const ROWS: usize = 8;

/// How the threads of a norm hold rows of `dim` numbers: the end of its kernels' names, and the rows of a block.
pub struct Shape {
    pub name: &'static str,
    rows: usize,
    dim: usize,
    per_block: usize,
}

impl Shape {
    /// `tensors` are what is moved by eights, where it can be.
    pub fn new(rows: usize, dim: usize, tensors: &[&Tensor]) -> Result<Self> {
        let (name, per_block) = match dim {
            _ if !by_eights(dim, tensors)? => ("any", 1),
            0..=256 => ("32_1", THREADS / 32),
            257..=1024 => ("32_4", THREADS / 32),
            1025..=4096 => ("256_2", 1),
            4097..=8192 => ("256_4", 1),
            _ => ("any", 1),
        };
        Ok(Self { name, rows, dim, per_block })
    }

    /// Whether threads keep their rows, and a backward pass sums over rows on the way.
    pub fn keeps_rows(&self) -> bool {
        self.name != "any"
    }

    /// A block for each of its rows.
    pub fn blocks(&self) -> usize {
        self.rows.div_ceil(self.per_block)
    }

    /// Sums over rows that backward makes: of each block, or of a part of the columns where blocks make none.
    pub fn parts(&self) -> usize {
        match self.keeps_rows() {
            true => self.blocks().min(PARTS),
            false => self.rows.div_ceil(THREADS / 32 * ROWS).min(PARTS),
        }
    }

    /// Blocks of a backward pass.
    pub fn backward_blocks(&self) -> usize {
        if self.keeps_rows() { self.parts() } else { self.blocks() }
    }

    /// Shared memory of a forward pass.
    pub fn scratch_bytes(&self) -> usize {
        32 * size_of::<f32>()
    }

    /// Shared memory of a backward pass: a row of each warp, where rows are a warp's, and what a block's sum takes.
    pub fn backward_scratch_bytes(&self) -> usize {
        let row = if self.per_block > 1 { self.per_block * self.dim } else { 0 };
        row.max(32) * size_of::<f32>()
    }

    /// Grid and shared memory of a sum over columns.
    pub fn columns(&self) -> ([usize; 3], usize) {
        ([self.dim.div_ceil(32), self.parts(), 1], 2 * THREADS * size_of::<f32>())
    }
}

/// `x`, row-major, in a dtype that kernels know beside `y`: where they differ, it is `x` that is f32.
pub fn beside(x: &Tensor, y: DType) -> Result<Tensor> {
    elements(x, if y == DType::F32 { y } else { x.dtype() })
}

/// The result, and `rstd` of each row.
pub fn forward(x: &Tensor, weight: &Tensor, offset: f32, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
    normalize(x, Some(weight), offset, eps, dtype)
}

/// The same without a weight, in `x`'s dtype.
pub fn forward_unit(x: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    normalize(x, None, 0.0, eps, x.dtype())
}

fn normalize(x: &Tensor, weight: Option<&Tensor>, offset: f32, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
    let device = device(x);
    let (x, dim) = (beside(x, dtype)?, x.dim(D::Minus1)?);
    let rows = x.elem_count() / dim;
    let (y, rstd) = (uninit(x.shape(), dtype, device)?, uninit(rows, DType::F32, device)?);
    let shape = Shape::new(rows, dim, &[&x, &y, weight.unwrap_or(&x)])?;
    let kernel = format!("rms_norm_forward_{}_{}_{}", suffix(x.dtype()), suffix(dtype), shape.name);
    launch!(
        device, "rms_norm", &kernel,
        grid: [shape.blocks(), 1, 1], block: THREADS, shared: shape.scratch_bytes();
        &x, weight, is_bf16(weight), offset, eps, &y, &rstd, rows, dim,
    );
    Ok((y, rstd))
}

pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    offset: f32,
    grad: Option<&Tensor>,
    rstd: &Tensor,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    gradients(x, Some(weight), offset, grad, rstd, dy, sum)
}

pub fn backward_unit(x: &Tensor, rstd: &Tensor, dy: &Tensor) -> Result<Tensor> {
    gradients(x, None, 0.0, None, rstd, dy, None)
}

fn gradients(
    x: &Tensor,
    weight: Option<&Tensor>,
    offset: f32,
    grad: Option<&Tensor>,
    rstd: &Tensor,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let (device, dtype) = (device(x), x.dtype());
    let (x, dy, dim) = (beside(x, dy.dtype())?, elements(dy, dy.dtype())?, x.dim(D::Minus1)?);
    let sum = sum.map(|sum| elements(sum, x.dtype())).transpose()?;
    let rows = x.elem_count() / dim;
    let dx = uninit(x.shape(), x.dtype(), device)?;
    let shape = Shape::new(rows, dim, &[&x, &dy, &dx, weight.unwrap_or(&x), sum.as_ref().unwrap_or(&x)])?;
    let partials = grad.map(|_| uninit((shape.parts(), dim), DType::F32, device)).transpose()?;
    let types = format!("{}_{}", suffix(x.dtype()), suffix(dy.dtype()));
    let kernel = format!("rms_norm_backward_{types}_{}", shape.name);
    launch!(
        device, "rms_norm", &kernel,
        grid: [shape.backward_blocks(), 1, 1], block: THREADS, shared: shape.backward_scratch_bytes();
        &x, weight, is_bf16(weight), offset, rstd, &dy, sum.as_ref(), &dx, partials.as_ref(), rows, dim,
    );
    if let (Some(grad), Some(partials)) = (grad, &partials) {
        if !shape.keeps_rows() {
            let (kernel, (grid, shared)) = (format!("rms_norm_columns_{types}"), shape.columns());
            launch!(
                device, "rms_norm", &kernel, grid: grid, block: THREADS, shared: shared;
                &x, rstd, &dy, partials, rows, dim,
            );
        }
        add_partials(partials, &[grad])?;
    }
    elements(&dx, dtype)
}

fn is_bf16(weight: Option<&Tensor>) -> i32 {
    i32::from(weight.is_some_and(|weight| weight.dtype() == DType::BF16))
}
