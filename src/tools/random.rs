//! Random numbers by key: what is drawn depends on what it is for, never on what was drawn before it.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

/// The generator that belongs to `(seed, purpose, name)`, the same on every machine and thread.
///
/// The key of ChaCha8 is the SHA-256 of the three, so that neither a new parameter nor another order of drawing
/// changes any other stream. For the `i`-th draw of a stream alone, set its word position.
pub fn keyed(seed: u64, purpose: &str, name: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    // The length keeps ("ab", "c") and ("a", "bc") apart.
    hash.update((purpose.len() as u64).to_le_bytes());
    hash.update(purpose);
    hash.update(name);
    ChaCha8Rng::from_seed(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use rand_chacha::rand_core::RngCore;

    use super::*;

    #[test]
    fn each_part_of_the_key_changes_the_stream() {
        let first = |seed, purpose, name| keyed(seed, purpose, name).next_u64();
        let base = first(1, "init", "output.weight");
        assert_eq!(base, first(1, "init", "output.weight"));
        assert_ne!(base, first(2, "init", "output.weight"));
        assert_ne!(base, first(1, "data", "output.weight"));
        assert_ne!(base, first(1, "init", "norm.weight"));
        assert_ne!(first(1, "ab", "c"), first(1, "a", "bc"));
    }

    /// Computed apart, from hashlib's SHA-256 and ChaCha8 by its definition. A change here changes every seeded run.
    #[test]
    fn the_stream_of_a_key_is_chacha8_keyed_by_sha256() {
        assert_eq!(keyed(42, "init", "tok_embeddings.weight").next_u64(), 12582961259983236127);
    }
}
