//! Shuffled order without a list of it.

use rand_chacha::rand_core::RngCore;

const ROUNDS: usize = 6;

/// A pseudorandom permutation of `0..len`, computed one place at a time in constant memory.
///
/// A Feistel network over the smallest even number of bits that holds `len`; what falls outside `0..len` goes
/// through it again ("cycle walking", Black & Rogaway 2002), which keeps it a permutation.
#[derive(Debug, Clone)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    pub fn new(len: u64, mut random: impl RngCore) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        // Below 4 bits a half has too few round functions for all orders to be about equally likely.
        let half_bits = bits.div_ceil(2).max(4);
        Self { len, half_bits, keys: std::array::from_fn(|_| random.next_u64()) }
    }

    /// What stands at `place` of the shuffled order; `place` must be below `len`.
    pub fn at(&self, place: u64) -> u64 {
        assert!(place < self.len, "place {place} of a permutation of {}", self.len);
        let mut value = self.mix(place);
        while value >= self.len {
            value = self.mix(value);
        }
        value
    }

    /// `items`, of which there must be `len`, in the shuffled order.
    pub fn shuffle<T>(&self, items: Vec<T>) -> Vec<T> {
        let mut items: Vec<Option<T>> = items.into_iter().map(Some).collect();
        let mut take = |place| items[self.at(place) as usize].take().expect("a permutation meets each element once");
        (0..self.len).map(&mut take).collect()
    }

    fn mix(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (splitmix64(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// The finalizer of SplitMix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit.
fn splitmix64(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58476d1ce4e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d049bb133111eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::random::keyed;

    fn order(len: u64, seed: u64) -> Vec<u64> {
        let permutation = Permutation::new(len, keyed(seed, "test", ""));
        (0..len).map(|place| permutation.at(place)).collect()
    }

    #[test]
    fn every_element_appears_once_at_any_length() {
        for len in [1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 5000] {
            let mut sorted = order(len, 7);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..len).collect::<Vec<_>>(), "length {len}");
        }
    }

    #[test]
    fn another_seed_gives_another_order() {
        assert_ne!(order(100, 1), order(100, 2));
        assert_ne!(order(100, 1), (0..100).collect::<Vec<_>>());
    }

    /// 6 orders, 6000 seeds: 1000 each, and 5 standard deviations (29 each) around it.
    #[test]
    fn all_orders_of_three_are_about_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            *counts.entry(order(3, seed)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|n| (855..=1145).contains(n)), "{counts:?}");
    }
}
