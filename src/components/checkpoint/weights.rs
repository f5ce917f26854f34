//! Loading parameters into a model, whatever names and layouts their files have.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use tracing::warn;

use super::tensors::{TensorFiles, inside};
use crate::models::args::DecoderArgs;
use crate::models::hf::{self, Family, Mapping};
use crate::{Error, Result};

/// Name and shape.
pub type Parameter = (String, Vec<usize>);

/// Named tensors in files, ready to be loaded.
pub struct Weights {
    files: TensorFiles,
    /// `None`: the files use titan's names.
    mappings: Option<Vec<Mapping>>,
}

impl Weights {
    /// A `.safetensors` file or a folder of them, in titan's (that is TorchTitan's) parameter names.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { files: TensorFiles::open(path)?, mappings: None })
    }

    pub(super) fn open_files(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        Ok(Self { files: TensorFiles::open_files(path, files)?, mappings: None })
    }

    /// The same in Hugging Face's names. A `config.json` beside them must describe a model that titan computes.
    pub fn open_hugging_face(path: &Path, family: Family, args: &DecoderArgs) -> Result<Self> {
        if path.join("config.json").is_file() {
            check_config(&inside(path, "config.json")?, family, args)?;
        }
        let files = TensorFiles::open(path)?;
        let mut mappings = hf::mappings(family, args);
        // A model that was saved as text-only has no prefix.
        const PREFIX: &str = "language_model.";
        if !files.names().any(|name| name.starts_with(PREFIX)) {
            for mapping in &mut mappings {
                mapping.file = mapping.file.replacen(PREFIX, "", 1);
            }
        }
        Ok(Self { files, mappings: Some(mappings) })
    }

    /// Hands every parameter of `expected` (name and shape) to `take`, one at a time, in the type it was stored in.
    ///
    /// An `expert_bias` that the files do not have is zeros, buffers that titan computes itself are ignored.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming every parameter that is missing, unknown, of another shape, or no floating-point
    /// tensor, before anything is taken.
    pub fn load(&self, expected: &[Parameter], mut take: impl FnMut(&str, Tensor) -> Result<()>) -> Result<()> {
        let mappings = match &self.mappings {
            Some(mappings) => mappings.clone(),
            None => expected
                .iter()
                .filter(|(name, _)| !is_bias(name) || self.files.info(name).is_some())
                .map(|(name, _)| Mapping::same(name))
                .collect(),
        };
        let mapped: HashSet<&str> = mappings.iter().flat_map(|m| &m.parameters).map(String::as_str).collect();
        let unmapped: Vec<_> = expected.iter().filter(|(name, _)| !mapped.contains(name.as_str())).collect();
        self.check(&mappings, expected, &unmapped)?;

        if !unmapped.is_empty() && self.mappings.is_none() {
            warn!("{} has no expert_bias: the experts' load is balanced from zero", self.files.path.display());
        }
        for (name, shape) in unmapped {
            take(name, Tensor::zeros(shape.as_slice(), DType::F32, &Device::Cpu)?)?;
        }
        for mapping in &mappings {
            let parameters = mapping.to_parameters(&self.files.tensor(&mapping.file)?)?;
            for (name, tensor) in mapping.parameters.iter().zip(parameters) {
                take(name, tensor)?;
            }
        }
        Ok(())
    }

    /// `unmapped`: the parameters of `expected` that no file has.
    fn check(&self, mappings: &[Mapping], expected: &[Parameter], unmapped: &[&Parameter]) -> Result<()> {
        let shapes: HashMap<&str, &[usize]> =
            expected.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
        let unmapped = unmapped.iter().filter(|(name, _)| !is_bias(name));
        let mut faults: Vec<String> = unmapped.map(|(name, _)| format!("missing: {name}")).collect();
        for mapping in mappings {
            let name = &mapping.file;
            let parameter = &mapping.parameters[0];
            match (self.files.info(name), shapes.get(parameter.as_str())) {
                (None, _) => faults.push(format!("missing: {name}")),
                (Some(_), None) => faults.push(format!("{name}: the model has no `{parameter}`")),
                (Some(info), Some(shape)) => {
                    let wanted = mapping.file_shape(shape);
                    if info.shape != wanted {
                        faults.push(format!("{name}: shape {:?}, the model's is {wanted:?}", info.shape));
                    }
                    if !is_float(info.dtype) {
                        faults.push(format!("{name}: type {}, which are no weights", info.dtype));
                    }
                }
            }
        }
        let known: HashSet<&str> = mappings.iter().map(|mapping| mapping.file.as_str()).collect();
        let ignored = |name: &str| is_buffer(name) || self.mappings.is_some() && hf::is_ignored(name);
        let unknown: Vec<&str> = self.files.names().filter(|name| !known.contains(name) && !ignored(name)).collect();
        faults.extend(unknown.iter().map(|name| format!("not of this model: {name}")));
        if faults.is_empty() {
            return Ok(());
        }
        let hint = if self.mappings.is_none() && unknown.iter().any(|name| name.ends_with("embed_tokens.weight")) {
            "\n   = these are Hugging Face's names: set checkpoint.initial_load_in_hf = true"
        } else {
            "\n   = the weights must be those of this [model]: compare model.name, model.flavor and [model.args]"
        };
        Err(Error::Checkpoint(format!(
            "{} does not fit the model:\n  {}{hint}",
            self.files.path.display(),
            faults.join("\n  ")
        )))
    }
}

/// Refuses what would load and compute something else.
fn check_config(path: &Path, family: Family, args: &DecoderArgs) -> Result<()> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    let fault = |what: String| Error::Checkpoint(format!("{}: {what}", path.display()));
    let config = serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
    let (found, source) = hf::args_from_config(&config).map_err(|error| fault(error.to_string()))?;
    if found != family {
        return Err(fault(format!("this is a {found:?} model, model.name says {family:?}")));
    }
    let different = hf::different_structure(args, &source);
    if !different.is_empty() {
        let different = different.join("\n  ");
        return Err(fault(format!("not the model of this run:\n  {different}\n   = set these in [model.args]")));
    }
    for difference in hf::different_constants(args, &source) {
        warn!("{} differs from this run's model: {difference}; [model.args] can set it", path.display());
    }
    Ok(())
}

fn is_bias(name: &str) -> bool {
    name.ends_with(".moe.expert_bias")
}

/// What TorchTitan's models save besides parameters, and titan derives or counts anew.
fn is_buffer(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    ["freqs_cis", "rope_cache", "tokens_per_expert"].contains(&last)
}

fn is_float(dtype: safetensors::Dtype) -> bool {
    use safetensors::Dtype::{BF16, F16, F32, F64};
    [F64, F32, F16, BF16].contains(&dtype)
}
