//! titan trains language models from one TOML file.
//!
//! How a batch flows: [`data`] turns text into packed batches of tokens, [`trainer`] hands each to [`engine`], which
//! runs the stages of a [`models`] decoder forward and backward through [`ops`], on the tape and into the gradient
//! accumulators of [`autograd`]; [`components`] update the weights and write checkpoints and metrics, and [`generate`]
//! samples from what was learned. [`config`] states it all, and [`cli`] is what a user types.

pub mod autograd;
pub mod cli;
pub mod components;
pub mod config;
pub mod data;
pub mod engine;
pub mod error;
pub mod generate;
pub mod models;
pub mod ops;
pub mod tools;
pub mod trainer;

pub use error::{Error, Result};
