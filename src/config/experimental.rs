use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema::PYTHON_CODE;

/// Python code of one's own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Experimental {
    /// A Python module to import at start.
    #[schemars(extend("x-not-yet" = PYTHON_CODE))]
    pub custom_import: String,
    /// A Python module with config classes of one's own.
    #[schemars(extend("x-not-yet" = PYTHON_CODE))]
    pub custom_args_module: String,
}
