/// How the products with a weight are computed in 8-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Float8 {
    pub scaling: Scaling,
    /// By products of numbers that are as few as 8-bit floats, and wider: on any device.
    pub emulate: bool,
}

/// Which numbers share the scale that brings them into the range of 8-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// All of a tensor.
    Tensorwise,
    /// Those that are summed over together: a row of the left matrix of a product, a column of the right one. Scales are
    /// powers of two.
    Rowwise,
    /// As [`Scaling::Rowwise`], but the gradients of weights are products of numbers as they are; and the weight has one scale
    /// where its product is the gradient of what came in.
    RowwiseWithGwHp,
}
