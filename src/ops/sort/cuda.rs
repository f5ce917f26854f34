use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};

use super::Groups;
use crate::Result;
use crate::ops::gpu::{device, launch, uninit};

/// Threads of a block, in `kernel.cu`, and the warps that they are.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
/// Bits that a pass sorts by: as many counts for each warp are what shared memory has room for.
const MAX_BITS: u32 = 9;
/// Blocks of a pass: each reads the counts of all.
const MAX_BLOCKS: usize = 64;

/// How keys are cut for a pass.
#[derive(Debug, PartialEq)]
struct Cut {
    chunk: usize,
    blocks: usize,
}

impl Cut {
    fn of(n: usize) -> Self {
        let chunk = THREADS * n.div_ceil(THREADS * MAX_BLOCKS).max(4);
        Self { chunk, blocks: n.div_ceil(chunk).max(1) }
    }
}

/// The bits that each pass sorts by, from the lowest, for keys less than `bound`.
fn passes(bound: usize) -> Vec<u32> {
    let bits = usize::BITS - bound.saturating_sub(1).leading_zeros();
    let n = bits.div_ceil(MAX_BITS).max(1);
    (0..n).map(|pass| (bits * (pass + 1) / n - bits * pass / n).max(1)).collect()
}

pub fn stable_sort(keys: &Tensor, bound: usize) -> Result<(Tensor, Tensor)> {
    let sorted = sort(keys, bound, None, None)?;
    Ok((sorted.order, sorted.keys))
}

pub fn group(groups: &Tensor, n_groups: usize) -> Result<Groups> {
    let device = device(groups);
    let positions = uninit(groups.dims1()?, DType::U32, device)?;
    let offsets = uninit(n_groups + 1, DType::U32, device)?;
    let sorted = sort(groups, n_groups, Some(&positions), Some(&offsets))?;
    Ok(Groups { order: sorted.order, positions, offsets })
}

struct Sorted {
    order: Tensor,
    keys: Tensor,
}

fn sort(keys: &Tensor, bound: usize, positions: Option<&Tensor>, offsets: Option<&Tensor>) -> Result<Sorted> {
    let device = device(keys);
    let keys = keys.contiguous()?;
    let n = keys.dims1()?;
    let passes = passes(bound);
    let n_offsets = offsets.map_or(Ok(0), Tensor::dims1)?;
    let (mut sorted, mut shift) = (Sorted { order: keys.clone(), keys }, 0);
    for (i, bits) in passes.iter().enumerate() {
        let is_last = i + 1 == passes.len();
        let offsets = offsets.filter(|_| passes.len() == 1);
        let from = (i > 0).then_some(&sorted.order);
        sorted =
            pass(device, &sorted.keys, from, n, [shift, *bits], positions.filter(|_| is_last), offsets, n_offsets)?;
        shift += bits;
    }
    if let Some(offsets) = offsets.filter(|_| passes.len() > 1) {
        let blocks = n_offsets.div_ceil(THREADS);
        launch!(device, "sort", "sort_offsets", grid: [blocks, 1, 1], block: THREADS; &sorted.keys, n, offsets, n_offsets);
    }
    Ok(sorted)
}

/// Sorts by `bits` of the keys, from bit `shift` on.
#[expect(clippy::too_many_arguments, reason = "those of the kernel")]
fn pass(
    device: &CudaDevice,
    keys: &Tensor,
    from: Option<&Tensor>,
    n: usize,
    [shift, bits]: [u32; 2],
    positions: Option<&Tensor>,
    offsets: Option<&Tensor>,
    n_offsets: usize,
) -> Result<Sorted> {
    let Cut { chunk, blocks } = Cut::of(n);
    let counts_bytes = 4 << bits;
    let counts = uninit((blocks, 1 << bits), DType::U32, device)?;
    let sorted = Sorted { order: uninit(n, DType::U32, device)?, keys: uninit(n, DType::U32, device)? };
    let (shift, bits) = (shift as i32, bits as i32);
    launch!(
        device, "sort", "sort_count", grid: [blocks, 1, 1], block: THREADS, shared: counts_bytes;
        keys, n, shift, bits, chunk, &counts,
    );
    launch!(
        device, "sort", "sort_scatter", grid: [blocks, 1, 1], block: THREADS, shared: WARPS * counts_bytes;
        keys, from, &counts, n, shift, bits, chunk, &sorted.keys, &sorted.order, positions, offsets, n_offsets,
    );
    Ok(sorted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_cover_the_bits_of_the_largest_key() {
        assert_eq!(passes(1), [1]);
        assert_eq!(passes(8), [3]);
        assert_eq!(passes(512), [9]);
        assert_eq!(passes(513), [5, 5]);
        assert_eq!(passes(151_936), [9, 9]);
        assert_eq!(passes(u32::MAX as usize + 1), [8; 4]);
    }

    #[test]
    fn chunks_cover_the_keys_in_whole_warps() {
        for n in [0, 1, 1023, 1024, 1025, 16_384, 65_536, 65_537, 131_072, 10_000_000] {
            let Cut { chunk, blocks } = Cut::of(n);
            assert!(chunk * blocks >= n && chunk * blocks < n + chunk.max(n) + 1, "{n}");
            assert_eq!(chunk % THREADS, 0, "{n}");
            assert!((1..=MAX_BLOCKS).contains(&blocks), "{n}");
        }
    }
}
