//! What `last_save_model_only` asks for after the last step.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::manifest::Kind;
use super::staged::Staged;
use super::step_folder::step_name;
use super::tensors::{self, Entry};
use super::{CheckpointManager, json_text};
use crate::models::hf::{self, Family, Mapping};
use crate::{Error, Result};

impl CheckpointManager {
    /// Writes what `last_save_model_only` asks for: the whole `model` after `step`.
    pub fn export(&self, step: usize, model: &[(String, Tensor)]) -> Result<()> {
        let keys = &self.keys;
        let dtype: DType = keys.export_dtype.into();
        let suffix = if keys.last_save_in_hf { "hf" } else { hf::dtype_name(dtype) };
        let name = format!("{}-{suffix}", step_name(step));
        if keys.last_save_in_hf {
            self.export_to_hugging_face(&name, model)?;
        } else if self.base.is_none() && model.iter().all(|(_, tensor)| tensor.dtype() == dtype) {
            info!("The model alone, in {}, is {}/model.safetensors", hf::dtype_name(dtype), step_name(step));
            return Ok(());
        } else {
            let mut folder = Staged::new(&self.folder, &name)?;
            tensors::write(&mut folder, "model", tensors::entries(model, Some(dtype)))?;
            self.seal(folder, step, Kind::ModelOnly)?;
        }
        info!("Exported the model in {} to {}", hf::dtype_name(dtype), self.folder.join(name).display());
        Ok(())
    }

    fn export_to_hugging_face(&self, name: &str, model: &[(String, Tensor)]) -> Result<()> {
        let config = self.hf_config()?;
        let tensors: HashMap<&str, &Tensor> = model.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        if has_expert_bias(model)? {
            warn!(
                "Hugging Face's format has no expert_bias: where it decides, {name} sends tokens to other experts than titan does"
            );
        }
        let mappings = hf::mappings(Family::of(&self.assets.model_name)?, &self.assets.args);
        let entries = mappings.iter().map(|mapping| self.hf_entry(mapping, &tensors)).collect::<Result<_>>()?;

        let mut folder = Staged::new(&self.folder, name)?;
        tensors::write(&mut folder, "model", entries)?;
        for (name, bytes) in &self.assets.tokenizer_files {
            folder.write_bytes(name, bytes)?;
        }
        let generation_config = json!({
            "bos_token_id": self.assets.bos_id,
            "eos_token_id": self.assets.eos_id,
            "do_sample": true,
        });
        folder.write_bytes("config.json", &json_text(&config))?;
        folder.write_bytes("generation_config.json", &json_text(&generation_config))?;
        folder.commit().map(drop)
    }

    fn hf_entry<'a>(&self, mapping: &'a Mapping, tensors: &HashMap<&str, &'a Tensor>) -> Result<Entry<'a>> {
        let find = |name: &String| tensors.get(name.as_str()).copied();
        let parameters: Vec<&Tensor> = mapping.parameters.iter().map(find).collect::<Option<_>>().ok_or_else(|| {
            Error::Checkpoint(format!("{} cannot be exported: the model has no {:?}", mapping.file, mapping.parameters))
        })?;
        let dtype: DType = self.keys.export_dtype.into();
        Ok(Entry {
            name: mapping.file.clone(),
            dtype,
            shape: mapping.file_shape(parameters[0].dims()),
            make: Box::new(move || {
                let parameters: Vec<Tensor> = parameters.iter().map(|&tensor| tensor.clone()).collect();
                Ok(mapping.to_file(&parameters)?.to_dtype(dtype)?)
            }),
        })
    }

    /// The `config.json` of this run's model.
    pub(super) fn hf_config(&self) -> Result<Value> {
        let assets = &self.assets;
        let family = Family::of(&assets.model_name)?;
        hf::config_from_args(family, &assets.args, self.keys.export_dtype.into(), assets.bos_id, assets.eos_id)
    }
}

/// Whether any expert's bias has moved from zero.
fn has_expert_bias(model: &[(String, Tensor)]) -> Result<bool> {
    for (_, bias) in model.iter().filter(|(name, _)| name.ends_with(".expert_bias")) {
        if bias.to_dtype(DType::F32)?.sqr()?.sum_all()?.to_scalar::<f32>()? > 0.0 {
            return Ok(true);
        }
    }
    Ok(false)
}
