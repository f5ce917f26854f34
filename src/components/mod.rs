//! Parts of the trainer that can be swapped.

pub mod checkpoint;
pub mod loss_guard;
pub mod lr_scheduler;
pub mod metrics;
pub mod optimizer;
pub mod validate;
