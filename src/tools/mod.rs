//! Logging, profiling, signals, random numbers, files and panics of others, and facts about the device.

pub mod device;
pub mod files;
pub mod logging;
pub mod memory;
pub mod panics;
pub mod profiler;
pub mod random;
pub mod signals;
