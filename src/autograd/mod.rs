//! What gradients hang on: activations that remember how they were made, and parameters that own their gradients.
//!
//! A [`Value`] is an activation. Ops take values and [`record`](Value::record) how a gradient flows back through them;
//! [`Value::backward`] walks those records once, last first, and drops what each had saved as soon as it has run.
//! Parameters are not on the tape: an op that uses a [`Parameter`] adds its weight gradient straight into the
//! parameter's accumulator, so that no dense gradient is ever allocated, zeroed or summed.

mod adapter;
mod float8;
mod parameter;
mod value;

pub use adapter::{Adapter, Dropout};
pub use float8::{Float8, Scaling};
pub use parameter::{Init, Parameter, Precision, StageBuffers, StageBuilder};
pub use value::Value;
