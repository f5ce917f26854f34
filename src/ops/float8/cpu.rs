use candle_core::{D, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::Cast;
use crate::Result;
use crate::autograd::Float8;
use crate::ops::add::add_within;
use crate::ops::host::{Element, GRAIN, build, convert, elements, typed, update, vectorized};
use crate::ops::matmul::{Mat, Operand, add_product, wide_product};

pub fn forward(x: &Tensor, weight: &Tensor, how: Float8) -> Result<Tensor> {
    typed!(T = weight.dtype(); forward_in::<T>(x, weight, how.scaling.forward()))
}

pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    dy: &Tensor,
    sum: Option<&Tensor>,
    how: Float8,
) -> Result<Tensor> {
    let dx = typed!(T = weight.dtype(); backward_in::<T>(x, weight, grad, dy, how))?;
    sum.map_or(Ok(dx.clone()), |sum| add_within(sum, &dx))
}

fn forward_in<T: Element>(x: &Tensor, weight: &Tensor, [of_x, of_weight]: [Cast; 2]) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    *shape.last_mut().expect("activations have at least one dimension") = outer;
    let rows = x.elem_count() / x.dim(D::Minus1)?;

    let x = Quantized::by_rows(&elements::<T>(x)?, [rows, inner], of_x);
    let weight = Quantized::by_rows(&elements::<T>(weight)?, [outer, inner], of_weight);
    Ok(Tensor::from_vec(convert::<f32, T>(&x.product(&weight)), shape, &Device::Cpu)?)
}

fn backward_in<T: Operand>(
    x: &Tensor,
    weight: &Tensor,
    grad: Option<&Tensor>,
    dy: &Tensor,
    how: Float8,
) -> Result<Tensor> {
    let (outer, inner) = weight.dims2()?;
    let rows = x.elem_count() / inner;
    let dy = elements::<T>(dy)?;
    if let Some(grad) = grad {
        let x = elements::<T>(x)?;
        match how.scaling.weight_gradient() {
            Some([of_dy, of_x]) => {
                let dy = Quantized::by_columns(&dy, [rows, outer], of_dy);
                let dw = dy.product(&Quantized::by_columns(&x, [rows, inner], of_x));
                update(grad, |grad: &mut [f32]| {
                    let parts = grad.par_chunks_mut(GRAIN).zip(dw.par_chunks(GRAIN));
                    parts.for_each(|(grad, dw)| {
                        vectorized!(grad.iter_mut().zip(dw).for_each(|(grad, dw)| *grad += dw));
                    });
                })?;
            }
            None => update(grad, |grad: &mut [f32]| {
                add_product(grad, Mat::new(&dy, rows, outer).t(), Mat::new(&x, rows, inner));
            })?,
        }
    }
    let [of_dy, of_weight] = how.scaling.input_gradient();
    let dy = Quantized::by_rows(&dy, [rows, outer], of_dy);
    let weight = Quantized::by_columns(&elements::<T>(weight)?, [outer, inner], of_weight);
    let dx = convert::<f32, T>(&dy.product(&weight));
    Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?.to_dtype(x.dtype())?)
}

/// A matrix of 8-bit floats, of which another sums over the lines. bf16 holds any of them.
struct Quantized {
    values: Vec<bf16>,
    /// As they are stored.
    dims: [usize; 2],
    has_lines_in_columns: bool,
    /// What undoes the scales, of each line or of all.
    inverse: Vec<f32>,
}

impl Quantized {
    fn by_rows<T: Element>(values: &[T], dims: [usize; 2], cast: Cast) -> Self {
        Self::new(values, dims, cast, false)
    }

    fn by_columns<T: Element>(values: &[T], dims: [usize; 2], cast: Cast) -> Self {
        Self::new(values, dims, cast, true)
    }

    fn new<T: Element>(values: &[T], dims: [usize; 2], cast: Cast, has_lines_in_columns: bool) -> Self {
        let [_, cols] = dims;
        let by_column = has_lines_in_columns && cast.by_line;
        let largest = match (cast.by_line, has_lines_in_columns) {
            (false, _) => vec![largest_of_all(values)],
            (true, false) => largest_of_rows(values, cols),
            (true, true) => largest_of_columns(values, cols),
        };
        let scales: Vec<f32> = largest.into_iter().map(|bits| cast.scale(f32::from_bits(bits))).collect();

        let format = cast.format;
        let chunk = (GRAIN / cols).max(1) * cols;
        let ([rounded], _) = build(values.len(), chunk, |range, out| {
            for (row, values) in (range.start / cols..).zip(values[range].chunks_exact(cols)) {
                if by_column {
                    let scaled = values.iter().zip(&scales).map(|(x, scale)| x.load() * scale);
                    vectorized!(out.extend(scaled.map(|x| [bf16::store(format.round(x))])));
                } else {
                    let scale = scales[if cast.by_line { row } else { 0 }];
                    vectorized!(out.extend(values.iter().map(|x| [bf16::store(format.round(x.load() * scale))])));
                }
            }
        });
        let inverse = scales.into_iter().map(|scale| 1.0 / scale).collect();
        Self { values: rounded, dims, has_lines_in_columns, inverse }
    }

    /// A row for each line.
    fn lines(&self) -> Mat<'_, bf16> {
        let [rows, cols] = self.dims;
        let mat = Mat::new(&self.values, rows, cols);
        if self.has_lines_in_columns { mat.t() } else { mat }
    }

    /// What undoes the scale of a line.
    fn inverse(&self, line: usize) -> f32 {
        if self.inverse.len() == 1 { self.inverse[0] } else { self.inverse[line] }
    }

    /// The sums over each pair of lines, scaled back.
    fn product(&self, other: &Self) -> Vec<f32> {
        let mut sums = wide_product(self.lines(), other.lines().t());
        let n = other.lines().rows();
        let of_columns: Vec<f32> = (0..n).map(|column| other.inverse(column)).collect();
        sums.par_chunks_mut(n).enumerate().for_each(|(row, sums)| {
            let of_row = self.inverse(row);
            vectorized!(sums.iter_mut().zip(&of_columns).for_each(|(sum, inverse)| *sum *= of_row * inverse));
        });
        sums
    }
}

/// The bits of a magnitude, whose order is that of the numbers, NaN last.
#[inline(always)]
fn magnitude<T: Element>(x: &T) -> u32 {
    x.load().to_bits() & !(1 << 31)
}

fn largest_of_all<T: Element>(values: &[T]) -> u32 {
    let parts = values.par_chunks(GRAIN);
    parts.map(|values| vectorized!(values.iter().map(magnitude).fold(0, u32::max))).max().unwrap_or(0)
}

fn largest_of_rows<T: Element>(values: &[T], cols: usize) -> Vec<u32> {
    values.par_chunks_exact(cols).map(|row| vectorized!(row.iter().map(magnitude).fold(0, u32::max))).collect()
}

fn largest_of_columns<T: Element>(values: &[T], cols: usize) -> Vec<u32> {
    let larger = |mut largest: Vec<u32>, others: Vec<u32>| {
        largest.iter_mut().zip(others).for_each(|(largest, other)| *largest = (*largest).max(other));
        largest
    };
    let parts = values.par_chunks((GRAIN / cols).max(1) * cols).map(|rows| {
        let mut largest = vec![0; cols];
        for row in rows.chunks_exact(cols) {
            vectorized!(largest.iter_mut().zip(row).for_each(|(largest, x)| *largest = (*largest).max(magnitude(x))));
        }
        largest
    });
    parts.reduce(|| vec![0; cols], larger)
}
