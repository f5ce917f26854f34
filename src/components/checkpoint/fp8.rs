//! Weights that a checkpoint stores in 8 bits, with a scale for each block of a matrix.

use candle_core::{Device, Tensor};

use crate::Result;

/// What is appended to a weight's name to name its scales.
pub const SCALES: &str = "_scale_inv";

/// Rows and columns that share a scale.
pub type Block = [usize; 2];

/// DeepSeek's, where a config names no other.
pub const DEFAULT_BLOCK: Block = [128, 128];

/// The shape of the scales of a matrix.
pub fn scales_shape(matrix: &[usize], block: Block) -> Vec<usize> {
    matrix.iter().zip(block).map(|(size, block)| size.div_ceil(block)).collect()
}

/// Rows `first_row..` of a matrix, in f32: each number times the scale of its block.
///
/// # Shapes
/// `bytes`: `(rows, cols)`, u8. `scales`: [`scales_shape`] of the whole matrix, f32.
pub fn dequantize(bytes: &Tensor, first_row: usize, scales: &Tensor, block: Block) -> Result<Tensor> {
    let (rows, cols) = bytes.dims2()?;
    let scales = scales.to_vec2::<f32>()?;
    let numbers: Vec<f32> = (0..=u8::MAX).map(e4m3).collect();
    let mut weights = Vec::with_capacity(rows * cols);
    for (row, bytes) in (first_row..).zip(bytes.flatten_all()?.to_vec1::<u8>()?.chunks(cols)) {
        let scales = &scales[row / block[0]];
        for (bytes, scale) in bytes.chunks(block[1]).zip(scales) {
            weights.extend(bytes.iter().map(|&byte| numbers[byte as usize] * scale));
        }
    }
    Ok(Tensor::from_vec(weights, (rows, cols), &Device::Cpu)?)
}

/// The number of an `e4m3fn` byte: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, one NaN of each sign.
///
/// # Source
/// Micikevicius et al., arXiv:2209.05433, table 1.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if byte >> 7 == 1 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_numbers_of_the_formats_table() {
        let table = [(0x00, 0.0), (0x01, 0.001953125), (0x08, 0.015625), (0x38, 1.0), (0x7e, 448.0), (0xc1, -2.25)];
        for (byte, number) in table {
            assert_eq!(e4m3(byte), number, "{byte:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }

    #[test]
    fn each_number_is_scaled_by_its_block_wherever_reading_begins() {
        // 5 rows and 3 columns in blocks of 2: the last of each are not full.
        let scales = Tensor::arange(1f32, 7.0, &Device::Cpu).unwrap().reshape((3, 2)).unwrap();
        assert_eq!(scales.dims(), scales_shape(&[5, 3], [2, 2]));
        let ones = Tensor::full(0x38u8, (5, 3), &Device::Cpu).unwrap();
        let whole = dequantize(&ones, 0, &scales, [2, 2]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(whole, [[1., 1., 2.], [1., 1., 2.], [3., 3., 4.], [3., 3., 4.], [5., 5., 6.]]);
        let rest = dequantize(&ones.narrow(0, 3, 2).unwrap(), 3, &scales, [2, 2]).unwrap();
        assert_eq!(rest.to_vec2::<f32>().unwrap(), whole[3..]);
    }
}
