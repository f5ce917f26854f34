//! Model families as data for one decoder.

pub mod args;
pub mod hf;
