//! Logging, profiling, signals, panics, random numbers, and facts about the device.

pub mod bugs;
pub mod device;
pub mod logging;
pub mod memory;
pub mod profiler;
pub mod random;
pub mod signals;
