//! Files that were damaged at random, the same in every run.

use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::common::{amount, held};

/// Tries a property of `what`, damaged by a seed: it must hold, and not panic, for `quick` seeds, or in full for `full`.
pub fn for_seeds(what: &str, quick: usize, full: usize, property: impl Fn(u64) -> Result<(), String>) {
    let cases = amount(quick, full) as u32;
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(cases) });
    let run = runner.run(&proptest::num::u64::ANY, |seed| {
        let verdict = catch_unwind(AssertUnwindSafe(|| property(seed)));
        verdict.map_err(|_| TestCaseError::fail("it panicked"))?.map_err(TestCaseError::fail)
    });
    run.unwrap();
    held(
        &format!("mutated {what}, read in process: an error with its place, or none, and no panic"),
        format!("{cases} of {cases}"),
    );
}

pub struct Random(ChaCha8Rng);

pub fn random(seed: u64) -> Random {
    Random(ChaCha8Rng::seed_from_u64(seed))
}

impl Random {
    /// From 0 to below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.random_range(0..n)
    }

    pub fn pick<'a, T: ?Sized>(&mut self, choices: &[&'a T]) -> &'a T {
        choices[self.below(choices.len())]
    }
}

/// What is put where something else was: numbers at the ends of their types, brackets, bytes that no text has.
const INSERTED: [&[u8]; 24] = [
    b"0",
    b"-1",
    b"1e308",
    b"nan",
    b"18446744073709551615",
    b"9223372036854775807",
    b"4294967296",
    b"999999999999999999999999",
    b"null",
    b"true",
    b"\"\"",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"\"",
    b"\\",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"../",
    b"\xf0\x9f\x98\x80",
];

/// `bytes` with one to four faults: bits flipped, pieces taken out, doubled, moved, replaced, or the end cut off.
pub fn mutated(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut random = random(seed);
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + {
            let most = 1 + random.below(40);
            random.below(most)
        })
        .min(bytes.len());
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            3 => {
                let piece: Vec<u8> = bytes.drain(at..end).collect();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, piece);
            }
            4 => drop(bytes.splice(at..end, random.pick(&INSERTED).iter().copied())),
            5 => drop(bytes.splice(number_at(&bytes, at), random.pick(&INSERTED[..10]).iter().copied())),
            6 if random.below(4) == 0 => bytes.truncate(at),
            _ => {}
        }
    }
    bytes
}

/// The next number, if there is one.
fn number_at(bytes: &[u8], at: usize) -> std::ops::Range<usize> {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let start = bytes[at..].iter().position(is_digit).map_or(bytes.len(), |offset| at + offset);
    let len = bytes[start..].iter().position(|byte| !is_digit(byte)).unwrap_or(bytes.len() - start);
    start..start + len
}
