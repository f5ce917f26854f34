use candle_core::Tensor;

use crate::Result;
use crate::autograd::Value;
use crate::ops::{self, AttentionMask, RopeTable};

/// What the attention of one layer knows of where the tokens of its input stand.
pub struct Positions<'a> {
    /// Their angles; `None` in a layer without rotary positions.
    pub rope: Option<&'a RopeTable>,
    /// What they see.
    pub mask: &'a AttentionMask,
    /// Factors on their queries; `None`: all are 1.
    pub query_scales: Option<&'a Tensor>,
}

impl Positions<'_> {
    /// `q`, `(b, s, h, hd)`, times the factors of its positions.
    pub fn scale_queries(&self, q: Value) -> Result<Value> {
        match self.query_scales {
            Some(factors) => ops::scale_positions(&q, factors),
            None => Ok(q),
        }
    }
}
