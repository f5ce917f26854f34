//! Logging, profiling, signals, panics, random numbers, files of others, and facts about the device.

pub mod bugs;
pub mod device;
pub mod files;
#[cfg(feature = "cuda")]
pub mod gpu;
pub mod logging;
pub mod memory;
pub mod panics;
pub mod profiler;
pub mod random;
pub mod signals;
