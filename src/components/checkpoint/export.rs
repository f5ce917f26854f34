//! Writing a model alone: what `last_save_model_only` asks for after the last step, and `titan convert`.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::manifest::Kind;
use super::staged::Staged;
use super::step_folder::{step_name, step_of};
use super::tensors::{self, Entry, SHARD_BYTES};
use super::weights::{CONFIG_JSON, Parameter, Parameters};
use super::writer::seal;
use super::{CheckpointManager, json_text};
use crate::models::args::DecoderArgs;
use crate::models::hf::{self, ExpertTensors, Family, Mapping};
use crate::{Error, Result};

/// A model to be written. Tensors are converted and written piece by piece, never all at once.
pub struct Export<'a> {
    /// Name and shape of every parameter.
    pub shapes: &'a [Parameter],
    pub parameters: &'a dyn Parameters,
    /// `None`: each parameter keeps its type.
    pub dtype: Option<DType>,
    /// File names and contents.
    pub tokenizer_files: &'a [(String, Vec<u8>)],
    /// Weights are split where a file would grow beyond this.
    pub max_shard_bytes: u64,
    /// Hears of the bytes of weights as they are written.
    pub progress: &'a dyn Fn(u64),
}

/// What Hugging Face's `config.json` is made of.
pub struct HuggingFaceModel<'a> {
    pub family: Family,
    pub args: &'a DecoderArgs,
    /// Of the weights.
    pub dtype: DType,
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
}

impl HuggingFaceModel<'_> {
    /// # Errors
    /// [`Error::Model`] if Hugging Face has no such model.
    pub fn config(&self) -> Result<Value> {
        hf::config_from_args(self.family, self.args, self.dtype, self.bos_id, self.eos_id)
    }
}

impl Export<'_> {
    /// Writes a checkpoint folder of titan's without training state, under a hidden name until it is whole. Its step is
    /// the one that `path` names, or else `step`.
    pub fn write(&self, path: &Path, step: usize, config_toml: &str) -> Result<()> {
        let mut folder = stage(path)?;
        let entries = self.shapes.iter().map(|(name, shape)| Entry {
            name: name.clone(),
            dtype: self.dtype_of(name),
            shape: shape.clone(),
            rows_together: self.parameters.rows_together(name),
            rows: Box::new(move |rows| self.parameters.rows(name, rows)),
        });
        tensors::write(&mut folder, "model", entries.collect(), self.max_shard_bytes, self.progress)?;
        let step = path.file_name().and_then(|name| step_of(name.to_str()?)).unwrap_or(step);
        seal(folder, step, Kind::ModelOnly, config_toml, self.tokenizer_files)
    }

    /// Writes a folder that `transformers` loads, under a hidden name until it is whole.
    pub fn write_hugging_face(&self, path: &Path, model: &HuggingFaceModel) -> Result<()> {
        let config = model.config()?;
        let mappings = hf::mappings(model.family, model.args, ExpertTensors::Apart);
        self.warn_of_losses(path, model, &mappings)?;
        let shapes: HashMap<&str, &[usize]> =
            self.shapes.iter().map(|(name, shape)| (name.as_str(), &shape[..])).collect();
        let entries = mappings.iter().map(|mapping| self.hugging_face_entries(mapping, &shapes));
        let entries = entries.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();

        let mut folder = stage(path)?;
        tensors::write(&mut folder, "model", entries, self.max_shard_bytes, self.progress)?;
        for (name, bytes) in self.tokenizer_files {
            folder.write_bytes(name, bytes)?;
        }
        let generation_config =
            json!({ "bos_token_id": model.bos_id, "eos_token_id": model.eos_id, "do_sample": true });
        folder.write_bytes(CONFIG_JSON, &json_text(&config))?;
        folder.write_bytes("generation_config.json", &json_text(&generation_config))?;
        folder.commit().map(drop)
    }

    fn hugging_face_entries<'a>(
        &'a self,
        mapping: &'a Mapping,
        shapes: &HashMap<&str, &[usize]>,
    ) -> Result<impl Iterator<Item = Entry<'a>>> {
        let parameter = &mapping.parameters[0];
        let shape = shapes.get(parameter.as_str()).ok_or_else(|| {
            Error::Checkpoint(format!("{} cannot be exported: the model has no `{parameter}`", mapping.files[0]))
        })?;
        let (shape, dtype) = (mapping.file_shape(shape), self.dtype_of(parameter));
        Ok(mapping.files.iter().enumerate().map(move |(which, name)| Entry {
            name: name.clone(),
            dtype,
            shape: shape.clone(),
            rows_together: mapping.rows_together(),
            rows: Box::new(move |rows| mapping.file_rows(which, rows, &|name, rows| self.parameters.rows(name, rows))),
        }))
    }

    /// Biases of experts are sums of small steps, which no narrower type holds.
    fn dtype_of(&self, name: &str) -> DType {
        match self.dtype {
            Some(dtype) if !name.ends_with(".expert_bias") => dtype,
            _ => self.parameters.dtype(name),
        }
    }

    fn warn_of_losses(&self, path: &Path, model: &HuggingFaceModel, mappings: &[Mapping]) -> Result<()> {
        let mapped: HashSet<&str> = mappings.iter().flat_map(|it| &it.parameters).map(String::as_str).collect();
        for (name, shape) in self.shapes.iter().filter(|(name, _)| !mapped.contains(name.as_str())) {
            let bias = self.parameters.rows(name, 0..shape[0])?.to_dtype(DType::F32)?;
            if bias.sqr()?.sum_all()?.to_scalar::<f32>()? > 0.0 {
                warn!(
                    "Hugging Face's format has no expert_bias: where it decides, {} sends tokens to other experts than titan does",
                    path.display()
                );
                break;
            }
        }
        let norm_eps = model.args.norm_eps;
        if let Some(eps) = model.args.final_norm_eps.filter(|eps| *eps != norm_eps) {
            warn!("Hugging Face's format has one epsilon for all norms: the last has {norm_eps:e} there, not {eps:e}");
        }
        Ok(())
    }
}

impl Parameters for HashMap<&str, &Tensor> {
    fn dtype(&self, name: &str) -> DType {
        self[name].dtype()
    }

    fn rows_together(&self, _: &str) -> usize {
        1
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        Ok(self[name].narrow(0, rows.start, rows.len())?)
    }
}

/// A folder to be written, whose parents may be new too.
fn stage(path: &Path) -> Result<Staged> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| Error::Usage(format!("{} is no name for a folder", path.display())))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    Staged::new(parent, name)
}

impl CheckpointManager {
    /// Writes what `last_save_model_only` asks for: the whole `model` after `step`.
    pub fn export(&self, step: usize, model: &[(String, Tensor)]) -> Result<()> {
        let keys = &self.keys;
        let dtype: DType = keys.export_dtype.into();
        let suffix = if keys.last_save_in_hf { "hf" } else { hf::dtype_name(dtype) };
        let path = self.writer.folder.join(format!("{}-{suffix}", step_name(step)));
        let shapes: Vec<_> = model.iter().map(|(name, tensor)| (name.clone(), tensor.dims().to_vec())).collect();
        let tensors: HashMap<&str, &Tensor> = model.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let export = Export {
            shapes: &shapes,
            parameters: &tensors,
            dtype: Some(dtype),
            tokenizer_files: &self.writer.assets.tokenizer_files,
            max_shard_bytes: SHARD_BYTES,
            progress: &|_| (),
        };
        let as_trained = || model.iter().all(|(name, tensor)| tensor.dtype() == export.dtype_of(name));
        if keys.last_save_in_hf {
            export.write_hugging_face(&path, &self.hugging_face_model()?)?;
        } else if self.writer.base.is_none() && as_trained() {
            info!("The model alone, in {}, is {}/model.safetensors", hf::dtype_name(dtype), step_name(step));
            return Ok(());
        } else {
            export.write(&path, step, &self.writer.assets.config_toml)?;
        }
        info!("Exported the model in {} to {}", hf::dtype_name(dtype), path.display());
        Ok(())
    }

    pub(super) fn hugging_face_model(&self) -> Result<HuggingFaceModel<'_>> {
        let assets = &self.writer.assets;
        Ok(HuggingFaceModel {
            family: Family::of(&assets.model_name, &assets.args)?,
            args: &assets.args,
            dtype: self.keys.export_dtype.into(),
            bos_id: assets.bos_id,
            eos_id: assets.eos_id,
        })
    }
}
