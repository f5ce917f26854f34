//! Logging, profiling, signals, random numbers, and facts about the device.

pub mod device;
pub mod logging;
pub mod memory;
pub mod profiler;
pub mod random;
pub mod signals;
