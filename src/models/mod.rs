//! Model families: data for one decoder.
//!
//! A family is a file that fills [`args::DecoderArgs`] for each of its flavors; [`decoder::Decoder`] builds any of them.

pub mod args;
mod clashes;
mod custom;
pub mod decoder;
mod deepseek_v3;
pub mod hf;
mod init;
pub mod layer;
mod layers;
mod llama3;
mod llama4;
pub mod lora;
mod qwen3;

pub use clashes::Clash;
pub use decoder::Decoder;
pub use init::initialize;

use args::DecoderArgs;

/// Each family with its flavors.
pub const FAMILIES: &[(&str, &[&str])] = &[
    ("llama3", llama3::FLAVORS),
    ("llama4", llama4::FLAVORS),
    ("qwen3", qwen3::FLAVORS),
    ("deepseek_v3", deepseek_v3::FLAVORS),
    ("decoder", custom::FLAVORS),
];

/// The family that a name stands for: `llama3_ft` is TorchTitan's second name of `llama3`.
pub fn family_name(name: &str) -> &str {
    if name == "llama3_ft" { "llama3" } else { name }
}

/// What the flavors of a family have in common, before their sizes; `None` if there is no such family.
pub fn family(name: &str) -> Option<DecoderArgs> {
    match family_name(name) {
        "llama3" => Some(llama3::family()),
        "llama4" => Some(llama4::family()),
        "qwen3" => Some(qwen3::family()),
        "deepseek_v3" => Some(deepseek_v3::family()),
        "decoder" => Some(custom::family()),
        _ => None,
    }
}

/// The flavor of any family whose sizes stand in the `config.json` of Hugging Face's format.
pub const FLAVOR_OF_CONFIG_JSON: &str = "hf";

/// The arguments of a flavor, `None` if there is no such family or flavor. Of [`FLAVOR_OF_CONFIG_JSON`], what its family
/// has in common.
pub fn flavor(family: &str, flavor: &str) -> Option<DecoderArgs> {
    if flavor == FLAVOR_OF_CONFIG_JSON {
        return self::family(family);
    }
    match family_name(family) {
        "llama3" => llama3::flavor(flavor),
        "llama4" => llama4::flavor(flavor),
        "qwen3" => qwen3::flavor(flavor),
        "deepseek_v3" => deepseek_v3::flavor(flavor),
        "decoder" => custom::flavor(flavor),
        _ => None,
    }
}
