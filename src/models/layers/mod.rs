//! What a block is made of.

mod block;
mod cache;
mod feed_forward;
mod grouped_attention;
mod latent_attention;
mod linear;
mod moe;
mod norm;
mod positions;

pub use block::Block;
pub use cache::LayerCache;
pub use feed_forward::FeedForward;
pub use grouped_attention::GroupedAttention;
pub use latent_attention::LatentAttention;
pub use linear::Linear;
pub use moe::{ExpertLoad, Moe};
pub use norm::Norm;
pub use positions::Positions;

use crate::autograd::Init;

/// The normal distribution of most weights; its bound of 2 is absolute and all but never met.
pub fn normal(std: f64) -> Init {
    Init::Normal { std, limit: 2.0 }
}

/// Standard deviation of weights that read the residual stream.
pub const STD: f64 = 0.02;
