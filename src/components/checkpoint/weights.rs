//! Loading parameters into a model, whatever names and layouts their files have.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde_json::Value;
use tracing::warn;

use super::manifest::MANIFEST;
use super::tensors::TensorFiles;
use super::{fp8, mxfp4};
use crate::models::args::DecoderArgs;
use crate::models::hf::{self, ExpertTensors, Family, Layout, Mapping};
use crate::tools::files;
use crate::{Error, Result};

pub(super) const CONFIG_JSON: &str = "config.json";
/// Some hold the names of all classes of ImageNet.
const MAX_CONFIG_BYTES: u64 = 10_000_000;

/// Name and shape.
pub type Parameter = (String, Vec<usize>);

/// The parameters of a model, wherever they are, to be read some rows (indices of the first dimension) at a time.
pub trait Parameters {
    /// The type to keep a parameter in: its own; bfloat16 where that has 8 bits or 4.
    fn dtype(&self, name: &str) -> DType;

    /// Ranges of rows must begin and end at multiples of this.
    fn rows_together(&self, name: &str) -> usize;

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor>;
}

/// Named tensors in files, ready to be loaded.
pub struct Weights {
    files: TensorFiles,
    /// `None`: the files use titan's names.
    hugging_face: Option<HuggingFace>,
}

/// What tells a Hugging Face checkpoint of one model from one of titan's.
struct HuggingFace {
    mappings: Vec<Mapping>,
    /// Rows and columns that share a scale, if 8-bit weights are to be read.
    quantized_block: Option<fp8::Block>,
    args: DecoderArgs,
}

impl Weights {
    /// A `.safetensors` file or a folder of them, in titan's (that is TorchTitan's) parameter names.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { files: TensorFiles::open(path)?, hugging_face: None })
    }

    pub(super) fn open_files(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        Ok(Self { files: TensorFiles::open_files(path, files)?, hugging_face: None })
    }

    /// The same in Hugging Face's names. A `config.json` beside them must describe a model that titan computes, and that
    /// is the one of `args`.
    ///
    /// 8-bit weights are dequantised if that config says that there are some, or if `quantized` does.
    pub fn open_hugging_face(path: &Path, model_name: &str, args: &DecoderArgs, quantized: bool) -> Result<Self> {
        let mut quantized_block = quantized.then_some(fp8::DEFAULT_BLOCK);
        let family = if path.join(CONFIG_JSON).is_file() {
            let config = read_config(path)?;
            quantized_block = hf::quantized_block(&config).ok().flatten().or(quantized_block);
            checked_family(&path.join(CONFIG_JSON), &config, model_name, args)?
        } else {
            Family::of(model_name, args)?
        };
        let files = TensorFiles::open(path)?;
        let experts = ExpertTensors::of(files.names());
        // Before all names are made up: a config may claim more tensors than memory has room for their names.
        let (claimed, found) = (hf::least_tensors(family, args, experts), files.names().count());
        if claimed > found {
            return Err(Error::Checkpoint(format!(
                "{}: config.json describes a model of at least {claimed} tensors, the safetensors hold {found}",
                path.display()
            )));
        }
        let mut mappings = hf::mappings(family, args, experts);
        // A model that was saved as text-only has no prefix.
        const PREFIX: &str = "language_model.";
        if !files.names().any(|name| name.starts_with(PREFIX)) {
            for file in mappings.iter_mut().flat_map(|mapping| &mut mapping.files) {
                *file = file.replacen(PREFIX, "", 1);
            }
        }
        Ok(Self { files, hugging_face: Some(HuggingFace { mappings, quantized_block, args: args.clone() }) })
    }

    /// Hands every parameter of `expected` (name and shape) to `take`, one at a time, in the type it was stored in; f32
    /// where that is 8 bits or less. A tensor that holds several is read once.
    ///
    /// An `expert_bias` that the files do not have is zeros, buffers that titan computes itself are ignored.
    ///
    /// # Errors
    /// As [`Weights::fit`], before anything is taken.
    pub fn load(&self, expected: &[Parameter], mut take: impl FnMut(&str, Tensor) -> Result<()>) -> Result<()> {
        let source = self.fit(expected)?;
        for (name, shape) in expected {
            let Some(&(mapping, which)) = source.sources.get(name) else {
                take(name, source.rows(name, 0..shape[0])?)?;
                continue;
            };
            // The others of a tensor come with its first.
            if which == 0 {
                let mapping = &source.mappings[mapping];
                let stored = mapping.stored_rows(0..shape[0], &|name, rows| self.read(name, rows))?;
                for (which, name) in mapping.parameters.iter().enumerate() {
                    take(name, mapping.parameter_of(which, &stored)?)?;
                }
            }
        }
        Ok(())
    }

    /// Checks that the files hold every parameter of `expected` (name and shape), and nothing else, so that any of them
    /// can be read.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming every parameter that is missing, unknown, of another shape, or no floating-point
    /// tensor.
    pub fn fit(&self, expected: &[Parameter]) -> Result<Fitted<'_>> {
        let mappings = match &self.hugging_face {
            Some(hugging_face) => hugging_face.mappings.clone(),
            None => expected
                .iter()
                .filter(|(name, _)| !is_bias(name) || self.files.info(name).is_some())
                .map(|(name, _)| Mapping::same(name))
                .collect(),
        };
        let mut sources = HashMap::new();
        for (i, mapping) in mappings.iter().enumerate() {
            sources.extend(mapping.parameters.iter().enumerate().map(|(which, name)| (name.clone(), (i, which))));
        }
        let unmapped: Vec<&Parameter> = expected.iter().filter(|(name, _)| !sources.contains_key(name)).collect();
        self.check(&mappings, expected, &unmapped)?;
        if !unmapped.is_empty() && self.hugging_face.is_none() {
            warn!("{} has no expert_bias: the experts' load is balanced from zero", self.files.path.display());
        }
        Ok(Fitted {
            weights: self,
            mappings,
            sources,
            zeros: unmapped.into_iter().map(|(name, shape)| (name.clone(), shape.clone())).collect(),
        })
    }

    /// Rows of a tensor of the files, all for `None`.
    fn read(&self, name: &str, rows: Option<Range<usize>>) -> Result<Tensor> {
        if let Some([blocks, scales]) = self.in_four_bits(name) {
            return mxfp4::dequantize(&self.files.read(&blocks, rows.clone())?, &self.files.read(&scales, rows)?);
        }
        let first_row = rows.as_ref().map_or(0, |rows| rows.start);
        let stored = self.files.read(name, rows)?;
        match self.quantized(name) {
            Some(block) => {
                let scales = self.files.read(&scales_of(name), None)?.to_dtype(DType::F32)?;
                fp8::dequantize(&stored, first_row, &scales, block)
            }
            None => Ok(stored),
        }
    }

    /// The names of what a tensor of 4-bit weights is stored as.
    fn in_four_bits(&self, name: &str) -> Option<[String; 2]> {
        let stored = mxfp4::stored_names(name);
        let is_stored = self.hugging_face.is_some() && self.files.info(name).is_none();
        (is_stored && self.files.info(&stored[0]).is_some()).then_some(stored)
    }

    /// The block of a tensor that is to be dequantised.
    fn quantized(&self, name: &str) -> Option<fp8::Block> {
        let is_quantized = self.files.info(name).is_some_and(|info| info.dtype == Dtype::F8_E4M3);
        self.hugging_face.as_ref()?.quantized_block.filter(|_| is_quantized)
    }

    /// `unmapped`: the parameters of `expected` that no file has.
    fn check(&self, mappings: &[Mapping], expected: &[Parameter], unmapped: &[&Parameter]) -> Result<()> {
        let shapes: HashMap<&str, &[usize]> =
            expected.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
        let unmapped = unmapped.iter().filter(|(name, _)| !is_bias(name));
        let mut faults: Vec<String> = unmapped.map(|(name, _)| format!("missing: {name}")).collect();
        let mut known = HashSet::new();
        for mapping in mappings {
            known.extend(mapping.files.iter().cloned());
            known
                .extend(mapping.files.iter().filter(|name| self.quantized(name).is_some()).map(|name| scales_of(name)));
            known.extend(mapping.files.iter().filter_map(|name| self.in_four_bits(name)).flatten());
            let parameter = &mapping.parameters[0];
            let Some(shape) = shapes.get(parameter.as_str()) else {
                faults.extend(mapping.files.iter().map(|name| format!("{name}: the model has no `{parameter}`")));
                continue;
            };
            if mapping.layout == Layout::Experts && mapping.files.len() != shape[0] {
                faults.push(format!("{parameter}: {} experts, the model has {}", mapping.files.len(), shape[0]));
            }
            let wanted = mapping.file_shape(shape);
            faults.extend(mapping.files.iter().flat_map(|name| self.faults_of(name, &wanted)));
        }
        let args = self.hugging_face.as_ref().map(|hugging_face| &hugging_face.args);
        let ignored = |name: &str| is_buffer(name) || args.is_some_and(|args| hf::is_ignored(name, args));
        let unknown: Vec<&str> = self.files.names().filter(|name| !known.contains(*name) && !ignored(name)).collect();
        faults.extend(unknown.iter().map(|name| format!("not of this model: {name}")));
        if faults.is_empty() {
            return Ok(());
        }
        let hint = if self.hugging_face.is_none() && unknown.iter().any(|name| name.ends_with("embed_tokens.weight")) {
            "\n   = these are Hugging Face's names: set checkpoint.initial_load_in_hf = true"
        } else {
            "\n   = the weights must be those of this [model]: compare model.name, model.flavor and [model.args]"
        };
        Err(Error::Checkpoint(format!(
            "{} does not fit the model:\n  {}{hint}",
            self.files.path.display(),
            shortened(faults).join("\n  ")
        )))
    }

    /// What keeps a tensor from being read as weights of such a shape.
    fn faults_of(&self, name: &str, wanted: &[usize]) -> Vec<String> {
        if let Some(stored) = self.in_four_bits(name) {
            return self.faults_of_four_bits(name, &stored, wanted);
        }
        let Some(info) = self.files.info(name) else { return vec![format!("missing: {name}")] };
        let mut faults = Vec::new();
        if info.shape != wanted {
            faults.push(format!("{name}: shape {:?}, the model's is {wanted:?}", info.shape));
        }
        match (info.dtype, self.quantized(name)) {
            (Dtype::F8_E4M3, None) => {
                faults.push(format!("{name}: 8-bit weights; set checkpoint.initial_load_in_hf_quantized = true"));
            }
            (Dtype::F8_E4M3, Some(_)) if wanted.len() != 2 => {
                faults.push(format!("{name}: 8-bit weights of {} dimensions, only matrices can be read", wanted.len()));
            }
            (Dtype::F8_E4M3, Some(block)) => {
                let scales = scales_of(name);
                let shape = fp8::scales_shape(wanted, block);
                match self.files.info(&scales) {
                    None => faults.push(format!("missing: {scales}")),
                    Some(info) if info.shape != shape || !is_float(info.dtype) => {
                        faults.push(format!(
                            "{scales}: {} {:?}, blocks of {block:?} need {shape:?}",
                            info.dtype, info.shape
                        ));
                    }
                    Some(_) => {}
                }
            }
            (other, _) if !is_float(other) => faults.push(format!("{name}: type {other}, which are no weights")),
            _ => {}
        }
        faults
    }

    fn faults_of_four_bits(&self, name: &str, stored: &[String; 2], wanted: &[usize]) -> Vec<String> {
        let Some(shapes) = mxfp4::stored_shapes(wanted) else {
            return vec![format!("{name}: 4-bit weights in blocks of 32 inputs do not make {wanted:?}")];
        };
        let fault = |(name, shape): (&String, Vec<usize>)| match self.files.info(name) {
            None => Some(format!("missing: {name}")),
            Some(info) if info.shape == shape && info.dtype == Dtype::U8 => None,
            Some(info) => {
                Some(format!("{name}: {} {:?}, the model's are {} {shape:?}", info.dtype, info.shape, Dtype::U8))
            }
        };
        stored.iter().zip(shapes).filter_map(fault).collect()
    }
}

/// [`Weights`] that are known to hold the parameters of a model.
pub struct Fitted<'a> {
    weights: &'a Weights,
    mappings: Vec<Mapping>,
    /// Of each parameter: its mapping, and which of that mapping's parameters it is.
    sources: HashMap<String, (usize, usize)>,
    /// Parameters that no file has.
    zeros: HashMap<String, Vec<usize>>,
}

impl Parameters for Fitted<'_> {
    fn dtype(&self, name: &str) -> DType {
        let stored = self.sources.get(name).map(|(mapping, _)| &self.mappings[*mapping].files[0]);
        if stored.is_some_and(|name| self.weights.in_four_bits(name).is_some()) {
            return DType::BF16;
        }
        match stored.and_then(|name| self.weights.files.info(name)).map(|info| info.dtype) {
            Some(Dtype::F64) => DType::F64,
            Some(Dtype::F16) => DType::F16,
            Some(Dtype::BF16 | Dtype::F8_E4M3) => DType::BF16,
            _ => DType::F32,
        }
    }

    fn rows_together(&self, name: &str) -> usize {
        self.sources.get(name).map_or(1, |(mapping, _)| self.mappings[*mapping].rows_together())
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        if let Some(shape) = self.zeros.get(name) {
            let shape = [&[rows.len()], &shape[1..]].concat();
            return Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
        }
        let (mapping, which) = self.sources[name];
        let mapping = &self.mappings[mapping];
        mapping.parameter_of(which, &mapping.stored_rows(rows, &|name, rows| self.weights.read(name, rows))?)
    }
}

/// Whether a folder is a checkpoint of Hugging Face's, and none of titan's.
pub fn holds_hugging_face(path: &Path) -> bool {
    path.join(CONFIG_JSON).is_file() && !path.join(MANIFEST).is_file()
}

/// The `config.json` of a folder of Hugging Face's.
pub fn read_config(folder: &Path) -> Result<Value> {
    let path = folder.join(CONFIG_JSON);
    if !path.exists() {
        let folder = folder.display();
        return Err(Error::Checkpoint(format!(
            "{folder} holds no {CONFIG_JSON}, as every model of Hugging Face's does"
        )));
    }
    let text = files::inside(folder, CONFIG_JSON).and_then(|path| files::read_json(&path, MAX_CONFIG_BYTES));
    let text = text.map_err(Error::io("read", &path))?;
    serde_json::from_slice(&text).map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))
}

/// The family of a config, unless what it describes would load and compute something else.
fn checked_family(path: &Path, config: &Value, model_name: &str, args: &DecoderArgs) -> Result<Family> {
    let fault = |what: String| Error::Checkpoint(format!("{}: {what}", path.display()));
    let (family, source) = hf::args_from_config(config).map_err(|error| fault(error.to_string()))?;
    if !family.is_named(model_name) {
        return Err(fault(format!("this is a {} model, and model.name is {model_name:?}", family.name())));
    }
    let different = hf::different_structure(args, &source);
    if !different.is_empty() {
        let different = different.join("\n  ");
        return Err(fault(format!("not the model of this run:\n  {different}\n   = set these in [model.args]")));
    }
    for difference in hf::different_constants(args, &source) {
        warn!("{} differs from this run's model: {difference}; [model.args] can set it", path.display());
    }
    Ok(family)
}

/// The most telling of a list that may have a line for each expert of each layer.
fn shortened(mut faults: Vec<String>) -> Vec<String> {
    const SHOWN: usize = 20;
    faults.sort_by_key(|fault| fault.starts_with("missing: "));
    if faults.len() > SHOWN {
        let more = faults.len() - SHOWN;
        faults.truncate(SHOWN);
        faults.push(format!("and {more} more"));
    }
    faults
}

fn scales_of(name: &str) -> String {
    format!("{name}{}", fp8::SCALES)
}

fn is_bias(name: &str) -> bool {
    name.ends_with(".moe.expert_bias")
}

/// What TorchTitan's models save besides parameters, and titan derives or counts anew.
fn is_buffer(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    ["freqs_cis", "rope_cache", "tokens_per_expert"].contains(&last)
}

fn is_float(dtype: Dtype) -> bool {
    [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16].contains(&dtype)
}
