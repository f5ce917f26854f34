//! Any decoder: a job file states what it is made of, and these are only the sizes that it starts from.

use super::args::DecoderArgs;

pub const FLAVORS: &[&str] = &["debugmodel"];

pub fn family() -> DecoderArgs {
    DecoderArgs { dim: 256, n_layers: 6, n_heads: 8, vocab_size: 2048, ..Default::default() }
}

pub fn flavor(name: &str) -> Option<DecoderArgs> {
    (name == "debugmodel").then(family)
}
