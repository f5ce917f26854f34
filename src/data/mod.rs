//! Text -> tokens -> packed batches, with a position that can be saved and resumed.

pub mod hub;
pub mod remote;
pub mod stories;
pub mod tokenizer;
