use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::{GROUPED, MX, ONE_DEVICE};

/// Low-precision matrix products. Each kind acts only where `model.converters` names it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Quantize {
    pub linear: QuantizeLinear,
    pub grouped_mm: QuantizeGroupedMm,
}

/// Linear layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizeLinear {
    pub float8: Float8Linear,
    pub mx: MxLinear,
}

/// The products of all experts at once.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizeGroupedMm {
    pub float8: Float8GroupedMm,
    pub mx: MxGroupedMm,
}

/// Linear layers in 8-bit floats, with `model.converters = ["quantize.linear.float8"]`: the three products of each layer take
/// half the time of bfloat16's on GPUs of compute capability 8.9 and up (RTX 40, L4, H100), and casting takes some of it back, so
/// that large layers gain. Weights, gradients and checkpoints stay what they are.
///
/// Converted are the linear layers of the blocks whose sizes are multiples of 16: those of attention and dense feed-forwards,
/// shared experts, and routers if `filter_fqns` does not name them. Never the output layer, which is one with the loss, nor routed
/// experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Float8Linear {
    /// Gather weights over devices as 8-bit floats.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub enable_fsdp_float8_all_gather: bool,
    /// Compute the scales of all weights at once, after each optimizer step.
    #[schemars(extend("x-no-effect" = ONE_DEVICE))]
    pub precompute_float8_dynamic_scale_for_fsdp: bool,
    /// Which numbers share a scale, made of the largest of them each time. "tensorwise" and "none": a whole tensor; gradients
    /// are rounded to e5m2, all else to e4m3. "rowwise": those that are summed over together, which copes better with
    /// outliers, and is slower; all are e4m3, scales powers of two. "rowwise_with_gw_hp": the same, but the gradients of weights
    /// are computed in the precision of training.
    pub recipe_name: Option<Float8Recipe>,
    /// Parts of the names of layers that are not converted, such as "output", "attention.wk" or "router.gate".
    /// "auto_filter_small_kn": those too small to gain by it, by torchao's measurements on H100.
    pub filter_fqns: Vec<String>,
    /// Compute in wider numbers what 8-bit hardware would give: on any device, to try whether a model takes it. Slower than not to
    /// convert.
    pub emulate: bool,
}

/// Linear layers in block-scaled (MX) formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MxLinear {
    /// The kernel that casts along the first dimension.
    #[schemars(extend("x-no-effect" = MX))]
    pub mxfp8_dim1_cast_kernel_choice: CastKernel,
    /// Format and library.
    #[schemars(extend("x-no-effect" = MX))]
    pub recipe_name: String,
    /// Modules that stay in full precision, by name.
    #[schemars(extend("x-no-effect" = MX))]
    pub filter_fqns: Vec<String>,
}

/// Experts in 8-bit floats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Float8GroupedMm {
    /// Modules to quantize, by name: a list, or one string with commas.
    #[schemars(extend("x-no-effect" = GROUPED))]
    pub fqns: Fqns,
}

/// Experts in block-scaled (MX) formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MxGroupedMm {
    /// Format.
    #[schemars(extend("x-no-effect" = GROUPED))]
    pub recipe_name: MxRecipe,
    /// Modules to quantize, by name: a list, or one string with commas.
    #[schemars(extend("x-no-effect" = GROUPED))]
    pub fqns: Fqns,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Float8Recipe {
    Tensorwise,
    Rowwise,
    RowwiseWithGwHp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CastKernel {
    Triton,
    Cuda,
    Torch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MxRecipe {
    Mxfp8,
}

/// Names of modules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Fqns {
    List(Vec<String>),
    Commas(String),
}

impl Default for Fqns {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl Default for MxLinear {
    fn default() -> Self {
        Self {
            mxfp8_dim1_cast_kernel_choice: CastKernel::Triton,
            recipe_name: "mxfp8_cublas".into(),
            filter_fqns: vec!["output".into()],
        }
    }
}

impl Default for MxGroupedMm {
    fn default() -> Self {
        Self { recipe_name: MxRecipe::Mxfp8, fqns: Fqns::default() }
    }
}
