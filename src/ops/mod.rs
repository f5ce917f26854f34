//! Differentiable functions on tensors: what a decoder is computed with.
//!
//! One folder each. `mod.rs` states the contract, records the backward, and holds the composed float64 reference
//! that the tests compare with; `cpu.rs` is the arithmetic on one device, from slices to slices. Every op computes in
//! f32 inside, whatever its inputs are stored in, and gives the same bits on any number of threads.

/// Calls the arithmetic of the device that a tensor is on: `on_device!(x, forward(x, w))` is `cpu::forward(x, w)`, or
/// `cuda::forward(x, w)` where `x` is on a GPU.
macro_rules! on_device {
    ($tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.device() {
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(_) => cuda::$function($($argument),*),
            _ => cpu::$function($($argument),*),
        }
    };
}

mod adamw;
mod add;
mod attention;
mod bias;
mod copy;
mod cross_entropy;
mod embedding;
mod float8;
mod glu;
#[cfg(feature = "cuda")]
mod gpu;
pub(crate) mod host;
mod layer_norm;
mod linear;
mod magnitude;
mod matmul;
mod moe;
mod narrow;
mod rms_norm;
mod rope;
mod scale;
mod sort;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(target_arch = "x86_64")]
mod tiles;

#[cfg(feature = "cuda")]
pub use adamw::Offload;
pub use adamw::{Adam, AdamSteps, StepOutcome, StepRules, zero};
pub(crate) use add::add_tensors;
pub use add::{Residual, add, add_onto};
pub use attention::{AttentionMask, Scores, attention, projected_attention};
pub use bias::add_bias;
pub use cross_entropy::{IGNORE_INDEX, LossAndGrad, cross_entropy_grad, cross_entropy_loss};
pub use embedding::{embedding, embedding_backward};
pub use glu::{Gate, feed_forward, glu};
#[cfg(feature = "cuda")]
pub use gpu::launches;
#[cfg(feature = "cuda")]
pub(crate) use gpu::{capability as gpu_capability, load_all as load_kernels};
pub(crate) use host::{check_tokens, upload};
pub use layer_norm::layer_norm;
pub use linear::{by_head, linear, linear_onto, logits};
pub use magnitude::magnitude;
#[cfg(feature = "cuda")]
pub use matmul::cuda::measured_peak_flops as measured_gpu_peak_flops;
pub use matmul::measured_peak_flops;
pub use moe::{ExpertGroups, Experts, Router, Routing, experts, rebalance, route};
pub use narrow::{join_shared, narrow};
pub use rms_norm::{rms_norm, unit_norm};
pub use rope::{RopeTable, rope};
pub(crate) use scale::scale_tensor;
pub use scale::{scale, scale_positions};
