use candle_core::{CudaDevice, DType, Tensor};

use super::{Cast, Format};
use crate::Result;
use crate::autograd::{Float8, Scaling};
use crate::ops::gpu::{self, THREADS, blocks, by_eights, device, elements, launch, suffix, uninit};
use crate::ops::linear::cuda::weight_gradient;
use crate::ops::matmul::cuda::{Codes, Float8Product, Mat, Scales, Store, multiply, multiply_float8};

/// What sums over 8-bit floats go over in memory is a multiple of.
const PADDING: usize = 16;

/// Rows and columns that a block casts.
const TILE: usize = 64;

/// Rows that a block looks through for their largest magnitudes.
const AMAX_ROWS: usize = 256;

pub fn forward(x: &Tensor, weight: &Tensor, how: Float8) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let (device, dtype) = (device(x), weight.dtype());
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = outer;
    let x = elements(x, dtype)?;
    let rows = x.elem_count() / inner;
    let [of_x, of_weight] = how.scaling.forward();
    let x = Quantized::by_rows(&x, [rows, inner], of_x, how)?;
    let weight = Quantized::by_rows(weight, [outer, inner], of_weight, how)?;
    let y = uninit(shape, dtype, device)?;
    // As torchao has it: sums of the forward product are the fastest that there are, those of gradients with "rowwise" alone.
    product(&x, &weight, None, &y, true)?;
    Ok(y)
}

/// As the host's, but rounded once, to `x`'s dtype.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    dy: &Tensor,
    sum: Option<&Tensor>,
    how: Float8,
) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let dy = elements(dy, weight.dtype())?;
    let rows = dy.elem_count() / outer;
    let [of_dy, of_weight] = how.scaling.input_gradient();
    let for_weight = grad.zip(how.scaling.weight_gradient());
    let fast = how.scaling == Scaling::Rowwise;

    let of_columns = for_weight.map(|(_, [of_dy, _])| of_dy);
    let [dy_rows, dy_columns] = cast(&dy, [rows, outer], [Some(of_dy), of_columns], how)?;
    match (for_weight, dy_columns) {
        (Some((grad, [_, of_x])), Some(dy_columns)) => {
            let x = elements(x, weight.dtype())?;
            let x = Quantized::by_columns(&x, [rows, inner], of_x, how)?;
            product(&dy_columns, &x, Some(grad), grad, fast)?;
        }
        _ => grad.map_or(Ok(()), |grad| weight_gradient(x, weight, grad, &dy))?,
    }
    let weight = Quantized::by_columns(weight, [outer, inner], of_weight, how)?;
    let dx = uninit(x.shape(), x.dtype(), device(x))?;
    let sum = sum.map(|sum| elements(sum, x.dtype())).transpose()?;
    product(&dy_rows.expect("asked for"), &weight, sum.as_ref(), &dx, fast)?;
    Ok(dx)
}

/// A matrix of 8-bit floats, of which another sums over the rows.
struct Quantized {
    /// `(lines, len)`: u8, or bf16 where they are emulated.
    codes: Tensor,
    /// What undoes the scales, `(lines,)`, of each line; of all where they have one.
    inverse: Tensor,
    cast: Cast,
}

impl Quantized {
    fn by_rows(x: &Tensor, dims: [usize; 2], by: Cast, how: Float8) -> Result<Self> {
        let [rows, _] = cast(x, dims, [Some(by), None], how)?;
        Ok(rows.expect("asked for"))
    }

    /// The transpose of what `x` holds.
    fn by_columns(x: &Tensor, dims: [usize; 2], by: Cast, how: Float8) -> Result<Self> {
        let [_, columns] = cast(x, dims, [None, Some(by)], how)?;
        Ok(columns.expect("asked for"))
    }

    fn lines(&self) -> usize {
        self.inverse.elem_count()
    }

    fn mat(&self) -> Result<Mat> {
        if self.codes.dtype() == DType::BF16 {
            return Mat::new(&self.codes, self.lines());
        }
        let codes = match self.cast.format {
            Format::E4m3 => Codes::E4m3,
            Format::E5m2 => Codes::E5m2,
        };
        Mat::of_codes(&self.codes, self.lines(), codes)
    }
}

/// The rows of a contiguous matrix, and its columns, as they are wanted: both in one go over it.
fn cast(
    x: &Tensor,
    [rows, cols]: [usize; 2],
    wanted @ [by_row, by_column]: [Option<Cast>; 2],
    how: Float8,
) -> Result<[Option<Quantized>; 2]> {
    assert!(cols.is_multiple_of(PADDING), "rows of {cols} numbers are not cast");
    let any = by_row.or(by_column).expect("something is wanted");
    let (device, dtype) = (device(x), x.dtype());
    let is_aligned = i32::from(by_eights(cols, &[x])?);
    let across = cols.div_ceil(TILE);
    let padded = rows.next_multiple_of(PADDING);

    // The largest magnitude of all, of each row, of each column, as they are needed, one behind the other.
    let has = |cast: Option<Cast>| cast.is_some_and(|cast| cast.by_line);
    let sizes = [
        usize::from(wanted.iter().flatten().any(|cast| !cast.by_line)),
        if has(by_row) { rows } else { 0 },
        if has(by_column) { cols } else { 0 },
    ];
    let largest = uninit(sizes.iter().sum::<usize>(), DType::F32, device)?;
    gpu::zero(&largest)?;
    let part = |i: usize| -> Result<Option<Tensor>> {
        let start = sizes[..i].iter().sum();
        Ok((sizes[i] > 0).then(|| largest.narrow(0, start, sizes[i])).transpose()?)
    };
    let [of_all, of_rows, of_columns] = [part(0)?, part(1)?, part(2)?];
    // `x` is `(rows, cols)`, and the others are as long as they should be.
    launch!(
        device, "float8", &format!("float8_amax_{}", suffix(dtype)),
        grid: [rows.div_ceil(AMAX_ROWS) * across, 1, 1], block: THREADS, shared: 8 * TILE * size_of::<u32>();
        x, rows, cols, of_all.as_ref(), of_rows.as_ref(), of_columns.as_ref(), is_aligned,
    );

    let codes = if how.emulate { DType::BF16 } else { DType::U8 };
    let quantized = |cast: Option<Cast>, lines: usize, len: usize| -> Result<Option<Quantized>> {
        let Some(cast) = cast else { return Ok(None) };
        let (codes, inverse) = (uninit((lines, len), codes, device)?, uninit(lines, DType::F32, device)?);
        Ok(Some(Quantized { codes, inverse, cast }))
    };
    let (in_rows, in_columns) = (quantized(by_row, rows, cols)?, quantized(by_column, cols, padded)?);
    let of = |own: Option<Tensor>, cast: Option<Cast>| own.or_else(|| cast.and(of_all.clone()));
    let (of_rows, of_columns) = (of(of_rows, by_row), of(of_columns, by_column));
    let step = |cast| usize::from(has(cast));
    let parts = |of: &Option<Quantized>| of.as_ref().map(|of| (of.codes.clone(), of.inverse.clone())).unzip();
    let ((row_codes, row_inverse), (column_codes, column_inverse)) = (parts(&in_rows), parts(&in_columns));
    let format = match any.format {
        Format::E4m3 => "e4m3",
        Format::E5m2 => "e5m2",
    };
    let kernel = format!("float8_cast_{}_{format}_{}", suffix(dtype), if how.emulate { "bf16" } else { "codes" });
    let shared = TILE * (TILE + 4) * codes.size_in_bytes();
    // As above; both results have the sizes of their codes.
    launch!(
        device, "float8", &kernel, grid: [rows.div_ceil(TILE) * across, 1, 1], block: THREADS, shared: shared;
        x, rows, cols, i32::from(any.power_of_two),
        of_rows.as_ref(), step(by_row), row_codes.as_ref(), row_inverse.as_ref(),
        of_columns.as_ref(), step(by_column), column_codes.as_ref(), column_inverse.as_ref(), padded, is_aligned,
    );
    Ok([in_rows, in_columns])
}

/// `y = a bᵀ`, and `c` if there is one, which may be `y` itself. `fast`: sums may lose some of their last bits.
fn product(a: &Quantized, b: &Quantized, c: Option<&Tensor>, y: &Tensor, fast: bool) -> Result<()> {
    let device = device(y);
    let (rows, cols) = (a.lines(), b.lines());
    let (of_a, of_b) = (a.mat()?, b.mat()?.t());
    let emulated = a.codes.dtype() == DType::BF16;
    if !emulated {
        let by_line = a.cast.by_line || b.cast.by_line;
        let scales = Scales { a: &a.inverse, b: &b.inverse, by_line };
        let dst = Mat::new(y, rows)?;
        let c = c.map(|c| Mat::new(c, rows)).transpose()?;
        if multiply_float8(device, Float8Product { a: of_a, b: of_b, c, dst, scales: Some(scales), fast })? {
            return Ok(());
        }
    }
    let sums = uninit((rows, cols), DType::F32, device)?;
    let dst = Mat::new(&sums, rows)?;
    if emulated {
        multiply(device, of_a, of_b, dst, Store::Overwrite(1.0))?;
    } else if !multiply_float8(device, Float8Product { a: of_a, b: of_b, c: None, dst, scales: None, fast })? {
        let found = format!("cuBLASLt does not multiply 8-bit floats of {rows} x {cols} on this GPU");
        return Err(candle_core::Error::Msg(found).bt().into());
    }
    finish(device, &sums, a, b, c, y)
}

/// `y = c + sums`, scaled back.
fn finish(
    device: &CudaDevice,
    sums: &Tensor,
    a: &Quantized,
    b: &Quantized,
    c: Option<&Tensor>,
    y: &Tensor,
) -> Result<()> {
    let cols = b.lines();
    let n = if by_eights(cols, &[sums, c.unwrap_or(y), y])? { 8 } else { 1 };
    let groups = sums.elem_count() / n;
    let kernel = format!("float8_finish_{}_{n}", suffix(y.dtype()));
    // `sums`, `c` and `y` have as many numbers, in rows of `cols`.
    launch!(
        device, "float8", &kernel, grid: blocks(groups), block: THREADS;
        sums, &a.inverse, &b.inverse, c, y, cols, groups,
    );
    Ok(())
}
