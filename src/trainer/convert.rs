//! What `model.converters` makes of a model before it is trained.

use candle_core::Device;
use tracing::{info, warn};

use crate::Result;
use crate::autograd::{Float8, Parameter, Scaling};
use crate::config::{Float8Linear, Float8Recipe, JobConfig, Loaded};
use crate::models::Decoder;
use crate::tools::device::lack_of_float8;

/// What a filter says that leaves out layers too small to gain.
const AUTO_FILTER: &str = "auto_filter_small_kn";

/// Refuses what the device cannot compute.
pub fn check(loaded: &Loaded, device: &Device) -> Result<()> {
    let config = &loaded.config;
    if !config.model.converts_to_float8() || config.quantize.linear.float8.emulate {
        return Ok(());
    }
    let Some(found) = lack_of_float8(device)? else { return Ok(()) };
    let fault = format!("8-bit floats need a GPU of compute capability 8.9 or above, and {found}");
    let remedy = "leave \"quantize.linear.float8\" out of `model.converters`; or, to try it without gaining time, set \
                  `quantize.linear.float8.emulate = true`, which works on any device";
    Err(loaded.refuse(&[("model.converters", fault)], remedy))
}

/// Makes the linear layers that the config names compute in 8-bit floats.
pub fn convert(model: &Decoder, config: &JobConfig) {
    if !config.model.converts_to_float8() {
        return;
    }
    let keys = &config.quantize.linear.float8;
    let scaling = match keys.recipe_name {
        None | Some(Float8Recipe::Tensorwise) => Scaling::Tensorwise,
        Some(Float8Recipe::Rowwise) => Scaling::Rowwise,
        Some(Float8Recipe::RowwiseWithGwHp) => Scaling::RowwiseWithGwHp,
    };
    let how = Float8 { scaling, emulate: keys.emulate };
    // Embedding and output layer are outside of the blocks; the matrices of experts have three dimensions.
    let is_linear =
        |p: &Parameter| p.shape().len() == 2 && p.fqn().starts_with("layers.") && !p.fqn().contains(".experts.");
    let linear: Vec<_> = model.parameters().filter(|parameter| is_linear(parameter)).collect();
    let converted = linear.iter().filter(|parameter| is_converted(parameter, scaling, keys));
    let n = converted.map(|parameter| parameter.set_float8(how)).count();
    if n == 0 {
        warn!("No linear layer is converted to 8-bit floats: {} are left out by size or name", linear.len());
        return;
    }
    info!(
        "{n} of the {} linear layers in the blocks compute in 8-bit floats{}; routed experts and the output layer do not",
        linear.len(),
        if keys.emulate { ", emulated" } else { "" }
    );
}

/// As torchao decides it.
fn is_converted(weight: &Parameter, scaling: Scaling, keys: &Float8Linear) -> bool {
    let [outer, inner] = [weight.shape()[0], weight.shape()[1]];
    let layer = weight.fqn().trim_end_matches(".weight");
    let (flags, names): (Vec<_>, Vec<_>) = keys.filter_fqns.iter().partition(|name| *name == AUTO_FILTER);
    let is_too_small = match scaling {
        Scaling::Tensorwise => outer <= 4096 && inner <= 1024,
        Scaling::Rowwise | Scaling::RowwiseWithGwHp => inner <= 2048 || outer <= 1024 || inner <= 4096 && outer <= 2048,
    };
    outer.is_multiple_of(16)
        && inner.is_multiple_of(16)
        && !names.into_iter().any(|name| layer.contains(name.as_str()))
        && (flags.is_empty() || !is_too_small)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models;

    /// The layers of a model that compute in 8-bit floats, by name.
    fn converted(family: &str, flavor: &str, recipe_name: Option<Float8Recipe>, filter_fqns: &[&str]) -> Vec<String> {
        let mut config = JobConfig::default();
        config.model.converters = vec!["float8".into()];
        config.quantize.linear.float8 = Float8Linear {
            recipe_name,
            filter_fqns: filter_fqns.iter().map(|&name| name.to_owned()).collect(),
            emulate: true,
            ..Float8Linear::default()
        };
        let model = Decoder::new(&models::flavor(family, flavor).unwrap(), Some(0)).unwrap();
        convert(&model, &config);
        let converted = model.parameters().filter(|parameter| parameter.float8().is_some());
        converted.map(|parameter| parameter.fqn().trim_end_matches(".weight").to_owned()).collect()
    }

    #[test]
    fn linear_layers_of_the_blocks_are_converted_and_nothing_else() {
        let names = converted("llama3", "debugmodel", None, &["output"]);
        let in_block = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"];
        let in_block = in_block.into_iter().chain(["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]);
        let n_blocks = models::flavor("llama3", "debugmodel").unwrap().n_layers;
        let mut expected: Vec<String> =
            in_block.flat_map(|name| (0..n_blocks).map(move |block| format!("layers.{block}.{name}"))).collect();
        let mut names = names;
        names.sort();
        expected.sort();
        assert_eq!(names, expected);

        // Eight experts: the router's size is no multiple of 16.
        let names = converted("llama4", "debugmodel", None, &[]);
        assert!(names.iter().any(|name| name.contains("shared_experts")), "{names:?}");
        assert!(!names.iter().any(|name| name.contains("router") || name.contains(".experts.")), "{names:?}");
    }

    #[test]
    fn filters_take_parts_of_names_and_the_small_ones_at_once() {
        let names = converted("llama3", "debugmodel", None, &["attention", "layers.0.", ".w2"]);
        assert!(names.contains(&"layers.1.feed_forward.w1".to_owned()), "{names:?}");
        assert!(
            !names.iter().any(|name| name.contains("attention") || name.contains("w2") || name.contains("layers.0."))
        );

        assert!(converted("llama3", "debugmodel", None, &[AUTO_FILTER]).is_empty());
        let of_8b = |recipe| converted("llama3", "8B", recipe, &[AUTO_FILTER, "w3"]);
        let is_kept = |names: &[String], name: &str| names.contains(&format!("layers.0.{name}"));
        let rowwise = of_8b(Some(Float8Recipe::Rowwise));
        assert!(is_kept(&rowwise, "feed_forward.w1") && is_kept(&rowwise, "attention.wq"), "{rowwise:?}");
        assert!(!is_kept(&rowwise, "attention.wk") && !is_kept(&rowwise, "feed_forward.w3"), "{rowwise:?}");
        assert!(is_kept(&of_8b(None), "attention.wk"));
    }
}
