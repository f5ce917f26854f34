//! Indices in the order of their keys.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::Tensor;

use crate::Result;

/// The indices of `keys` in the order of their keys, of equals the first first; and the keys in that order.
///
/// # Shapes
/// `keys`: `(n,)`, u32, each less than `bound`. Returns two of `(n,)`, u32.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "the host's embedding has its own order"))]
pub fn stable_sort(keys: &Tensor, bound: usize) -> Result<(Tensor, Tensor)> {
    on_device!(keys, stable_sort(keys, bound))
}

/// Indices by group, u32.
#[derive(Debug)]
pub struct Groups {
    /// `(n,)`: the indices, sorted by group and within a group by index.
    pub order: Tensor,
    /// `(n,)`: where each index stands in `order`.
    pub positions: Tensor,
    /// `(n_groups + 1,)`: where each group begins in `order`, and at last `n`.
    pub offsets: Tensor,
}

/// Sorts indices by their groups.
///
/// # Shapes
/// `groups`: the group of each index, `(n,)`, u32, each less than `n_groups`.
pub fn group(groups: &Tensor, n_groups: usize) -> Result<Groups> {
    on_device!(groups, group(groups, n_groups))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::testing::{devices, random};

    fn keys(n: usize, bound: usize) -> Vec<u32> {
        random("keys", n).iter().map(|x| ((x + 1.0) / 2.0 * bound as f32) as u32 % bound as u32).collect()
    }

    /// `(n, bound)`: one pass and several, chunks that end anywhere, and keys that are all the same.
    const CASES: [(usize, usize); 9] =
        [(1, 1), (7, 1), (300, 3), (1000, 8), (1024, 512), (2500, 100), (5000, 513), (20_000, 151_936), (70_000, 60)];

    #[test]
    fn equal_keys_keep_their_order() -> Result<()> {
        for device in devices() {
            for (n, bound) in CASES {
                let keys = keys(n, bound);
                let mut expected: Vec<u32> = (0..n as u32).collect();
                expected.sort_by_key(|i| keys[*i as usize]);
                let (order, sorted) = stable_sort(&Tensor::from_slice(&keys, n, device)?, bound)?;
                assert!(order.to_vec1::<u32>()? == expected, "{n} keys below {bound} on {device:?}");
                let expected: Vec<u32> = expected.iter().map(|i| keys[*i as usize]).collect();
                assert!(sorted.to_vec1::<u32>()? == expected, "{n} keys below {bound} on {device:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn groups_follow_one_another() -> Result<()> {
        for device in devices() {
            for (n, n_groups) in CASES {
                // The last group is empty wherever there are several.
                let keys = keys(n, n_groups.max(2) - 1);
                let Groups { order, positions, offsets } = group(&Tensor::from_slice(&keys, n, device)?, n_groups)?;
                let (order, positions) = (order.to_vec1::<u32>()?, positions.to_vec1::<u32>()?);
                assert!(order.is_sorted_by_key(|i| (keys[*i as usize], *i)), "{n} in {n_groups} on {device:?}");
                assert!(positions.iter().enumerate().all(|(i, at)| order[*at as usize] == i as u32));
                let expected = |group: usize| keys.iter().filter(|key| (**key as usize) < group).count() as u32;
                let offsets = offsets.to_vec1::<u32>()?;
                assert_eq!(offsets.len(), n_groups + 1);
                let checked = (0..=n_groups).step_by(1 + n_groups / 700).chain([n_groups]);
                checked
                    .for_each(|group| assert_eq!(offsets[group], expected(group), "{n} in {n_groups} on {device:?}"));
            }
        }
        Ok(())
    }

    #[test]
    fn no_keys_are_in_order() -> Result<()> {
        let none = Tensor::from_slice::<_, u32>(&[], 0, &Device::Cpu)?;
        assert_eq!(stable_sort(&none, 5)?.0.dims(), [0]);
        assert_eq!(group(&none, 2)?.offsets.to_vec1::<u32>()?, [0, 0, 0]);
        Ok(())
    }
}
