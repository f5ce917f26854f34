//! Model families as data for one decoder.

pub mod args;
pub mod hf;

/// Each family with its flavors.
pub const FAMILIES: &[(&str, &[&str])] = &[
    (
        "llama3",
        &["debugmodel", "debugmodel_flex_attn", "debugmodel_varlen_attn", "8B", "8B_flex", "8B_varlen", "70B", "405B"],
    ),
    ("llama4", &["debugmodel", "17bx16e", "17bx128e", "debugmodel_irope", "17bx16e_irope", "17bx128e_irope"]),
];
