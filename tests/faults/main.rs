//! Drills: the world misbehaves, and nothing is lost.
//!
//! Each tries what it can of its promise in seconds; with `TITAN_DRILL=full`, as `scripts/drill.sh` sets it, all of it. A
//! drill that held prints a row of that script's table.

#[path = "../common/binary.rs"]
mod binary;
mod commands;
mod common;
mod damage;
mod kills;
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
