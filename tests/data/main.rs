//! Datasets through the loader: formats, packing, resuming, shuffling, the hub, faults.

mod common;
mod examples;
mod faults;
mod formats;
mod hub;
#[cfg(feature = "hub")]
#[path = "../common/hub_server.rs"]
mod hub_server;
mod resume;
mod shards;
