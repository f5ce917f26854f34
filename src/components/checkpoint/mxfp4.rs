//! Weights of experts that a checkpoint stores in 4 bits, as GPT-OSS's: 32 of them share a power of two.

use candle_core::{Device, Tensor};

use crate::Result;

/// The names of a weight's numbers, two in a byte, and of its exponents.
pub fn stored_names(weight: &str) -> [String; 2] {
    ["_blocks", "_scales"].map(|suffix| format!("{weight}{suffix}"))
}

/// Bytes that share an exponent.
const BLOCK_BYTES: usize = 16;

/// The numbers of 4 bits: sign, 2 bits of exponent, 1 of mantissa.
const NUMBERS: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The shapes of the blocks and of the exponents of weights `(experts, in, out)`; `None` where no blocks make such weights.
pub fn stored_shapes(weights: &[usize]) -> Option<[Vec<usize>; 2]> {
    let &[experts, inner, outer] = weights else { return None };
    let scales = vec![experts, outer, inner / (2 * BLOCK_BYTES)];
    let blocks = [&scales[..], &[BLOCK_BYTES]].concat();
    inner.is_multiple_of(2 * BLOCK_BYTES).then_some([blocks, scales])
}

/// Weights of some experts, `(experts, in, out)` in f32, a view whose transpose lies contiguous: the lower half of each byte,
/// then the upper, times two to the power of its block's exponent less 127.
///
/// # Shapes
/// `blocks`, `scales`: as [`stored_shapes`] says, u8.
///
/// # Source
/// Open Compute Project, Microscaling Formats (MX) 1.0, MXFP4.
pub fn dequantize(blocks: &Tensor, scales: &Tensor) -> Result<Tensor> {
    let (experts, outer, groups) = scales.dims3()?;
    let powers: Vec<f32> = (0..=u8::MAX).map(|exponent| 2f32.powi(i32::from(exponent) - 127)).collect();
    let mut weights = Vec::with_capacity(2 * blocks.elem_count());
    let blocks = blocks.flatten_all()?.to_vec1::<u8>()?;
    for (block, &exponent) in blocks.chunks_exact(BLOCK_BYTES).zip(&scales.flatten_all()?.to_vec1::<u8>()?) {
        let power = powers[exponent as usize];
        weights.extend(block.iter().flat_map(|byte| [byte & 15, byte >> 4]).map(|bits| NUMBERS[bits as usize] * power));
    }
    let weights = Tensor::from_vec(weights, (experts, outer, groups * 2 * BLOCK_BYTES), &Device::Cpu)?;
    Ok(weights.transpose(1, 2)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ninth to the sixteenth input of each output of `convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)` in
    /// transformers 5.23.
    #[test]
    fn weights_are_those_of_transformers() {
        const EXPECTED: [[f32; 8]; 6] = [
            [-2.0, 1.0, -2.0, 1.5, -4.0, 2.0, 1.0, 4.0],
            [-0.015625, 0.00390625, -0.015625, 0.015625, -0.03125, 0.046875, 0.0078125, -0.01171875],
            [-1.1754944e-38, 0.0, -1.1754944e-38, 1.7632415e-38, -2.3509887e-38, -5.877472e-39, 5.877472e-39, 0.0],
            [
                -2.1267648e+37,
                -6.3802944e+37,
                -2.1267648e+37,
                4.2535296e+37,
                -4.2535296e+37,
                -3.1901472e+37,
                1.0633824e+37,
                3.1901472e+37,
            ],
            [-16384.0, -32768.0, -16384.0, 49152.0, -32768.0, 0.0, 8192.0, -8192.0],
            [
                -2.3509887e-38,
                -3.526483e-38,
                -2.3509887e-38,
                -0.0,
                -4.7019774e-38,
                1.7632415e-38,
                1.1754944e-38,
                -7.052966e-38,
            ],
        ];
        let shape = [2, 32, 3];
        let [blocks, scales] = stored_shapes(&shape).unwrap();
        assert_eq!((&blocks[..], &scales[..]), (&[2, 3, 1, 16][..], &[2, 3, 1][..]));
        let bytes = (0..96u32).map(|i| ((7 * i + i * i) % 256) as u8).collect();
        let blocks = Tensor::from_vec(bytes, blocks, &Device::Cpu).unwrap();
        let scales = Tensor::from_vec(vec![127u8, 120, 0, 250, 140, 1], scales, &Device::Cpu).unwrap();
        let weights = dequantize(&blocks, &scales).unwrap();
        assert_eq!(weights.dims(), shape);
        let rows = weights.transpose(1, 2).unwrap().flatten(0, 1).unwrap().to_vec2::<f32>().unwrap();
        for (row, expected) in rows.iter().zip(EXPECTED) {
            assert_eq!(row[8..16], expected);
        }
        // 32 inputs share an exponent.
        assert_eq!(stored_shapes(&[2, 48, 3]), None);
    }
}
