//! Model families: data for one decoder.
//!
//! A family is a file that fills [`args::DecoderArgs`] for each of its flavors; [`decoder::Decoder`] builds any of them.

pub mod args;
pub mod decoder;
pub mod hf;
mod init;
mod layers;
mod llama3;
mod llama4;
pub mod lora;

pub use decoder::Decoder;
pub use init::initialize;

use args::DecoderArgs;

/// Each family with its flavors.
pub const FAMILIES: &[(&str, &[&str])] = &[("llama3", llama3::FLAVORS), ("llama4", llama4::FLAVORS)];

/// The family that a name stands for: `llama3_ft` is TorchTitan's second name of `llama3`.
pub fn family_name(name: &str) -> &str {
    if name == "llama3_ft" { "llama3" } else { name }
}

/// The arguments of a flavor, `None` if there is no such family or flavor.
pub fn flavor(family: &str, flavor: &str) -> Option<DecoderArgs> {
    match family_name(family) {
        "llama3" => llama3::flavor(flavor),
        "llama4" => llama4::flavor(flavor),
        _ => None,
    }
}
