//! Drills: the world misbehaves, and nothing is lost.
//!
//! Each tries what it can of its promise in seconds; with `TITAN_DRILL=full`, as `scripts/drill.sh` sets it, all of it. A
//! drill that held prints a row of that script's table.

#[path = "../common/binary.rs"]
mod binary;
mod bounded;
mod commands;
mod common;
mod damage;
mod hostile;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "hub")]
#[path = "../common/hub_server.rs"]
mod hub_server;
mod inputs;
mod jobs;
mod kills;
mod mutation;
mod numbers;
#[cfg(target_os = "linux")]
mod operations;
#[cfg(target_os = "linux")]
mod power;
#[cfg(target_os = "linux")]
mod preloaded;
mod resume;
#[cfg(target_os = "linux")]
mod room;
mod signals;
#[cfg(target_os = "linux")]
mod written;
