//! Text -> tokens -> packed batches, with a position that can be saved and resumed.
//!
//! A [`Dataset`](datasets::Dataset) deals documents from files; [`Tokenized`](pipeline::Tokenized) encodes them on
//! other threads, in their order; [`Loader`] packs their tokens into batches and knows the position of
//! each. Conversations go through the tokenizer's [`ChatTemplate`](tokenizer::ChatTemplate), and stay whole.
//! [`ShardWriter`](shards::ShardWriter) writes the same tokens to files instead.

pub mod chat;
pub mod datasets;
pub mod hub;
pub mod loader;
pub mod packing;
pub mod permutation;
pub mod pipeline;
pub mod remote;
pub mod shards;
mod state;
pub mod stories;
pub mod tokenizer;

pub use datasets::DatasetSpec;
pub use loader::{Loader, LoaderOptions};
pub use packing::Batch;
pub use pipeline::Encode;
