//! Datasets through the loader: formats, packing, resuming, shuffling, the hub, faults.

mod common;
mod faults;
mod formats;
mod hub;
mod resume;
mod shards;
