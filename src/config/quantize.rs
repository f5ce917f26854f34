use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::QUANTIZE;

/// Low-precision matrix products. They act only through `model.converters`, which titan does not have yet.
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

/// Linear layers in 8-bit floats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Float8Linear {
    /// Gather weights over devices as 8-bit floats.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub enable_fsdp_float8_all_gather: bool,
    /// Compute the scales of all weights at once, after each optimizer step.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub precompute_float8_dynamic_scale_for_fsdp: bool,
    /// What shares a scale: a tensor, a row, or rows except for weight gradients. "none": as the other keys say.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub recipe_name: Option<Float8Recipe>,
    /// Modules that stay in full precision, by name.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub filter_fqns: Vec<String>,
    /// Compute in float32 what 8-bit hardware would give.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub emulate: bool,
}

/// Linear layers in block-scaled (MX) formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MxLinear {
    /// The kernel that casts along the first dimension.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub mxfp8_dim1_cast_kernel_choice: CastKernel,
    /// Format and library.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub recipe_name: String,
    /// Modules that stay in full precision, by name.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub filter_fqns: Vec<String>,
}

/// Experts in 8-bit floats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Float8GroupedMm {
    /// Modules to quantize, by name: a list, or one string with commas.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub fqns: Fqns,
}

/// Experts in block-scaled (MX) formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MxGroupedMm {
    /// Format.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
    pub recipe_name: MxRecipe,
    /// Modules to quantize, by name: a list, or one string with commas.
    #[schemars(extend("x-no-effect" = QUANTIZE))]
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
