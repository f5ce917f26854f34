//! A trained model from its folder alone, whoever wrote it.

use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::components::checkpoint::{StepFolder, Weights, holds_hugging_face, open_step, read_config};
use crate::config;
use crate::data::tokenizer::{Tokenizer, TokenizerFile};
use crate::models::args::DecoderArgs;
use crate::models::lora::Lora;
use crate::models::{self, hf};
use crate::{Error, Result};

/// What a folder says of its model, and the weights ready to be read.
pub struct Pretrained {
    pub path: PathBuf,
    /// Its `model.name`.
    pub name: String,
    pub args: DecoderArgs,
    /// Its own, or those of its adapters.
    pub weights: Weights,
    /// How it was adapted, and the weights that its adapters are for.
    pub adapters: Option<(Lora, Weights)>,
    /// The precision that it was made to compute in.
    pub compute: DType,
    /// The files of its tokenizer; none if it was trained on token shards.
    pub tokenizer_files: Vec<TokenizerFile>,
    /// The step of a checkpoint of titan's; while it is here, no titan removes its folder.
    pub step_folder: Option<StepFolder>,
}

impl Pretrained {
    /// Opens what a user names: a folder of Hugging Face's, a checkpoint folder of titan's, or `step-N` or `latest` in
    /// `{dump_folder}/{folder}`.
    pub fn open(checkpoint: &str, dump_folder: &Path, folder: &str) -> Result<Self> {
        let path = Path::new(checkpoint);
        match holds_hugging_face(path) {
            true => Self::open_hugging_face(path),
            false => Self::open_step(open_step(checkpoint, dump_folder, folder)?),
        }
    }

    /// A folder with `config.json`, safetensors and, if it is to generate, a tokenizer.
    pub fn open_hugging_face(path: &Path) -> Result<Self> {
        let config = read_config(path)?;
        let (family, args) =
            hf::args_from_config(&config).map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))?;
        let stored = [&config["dtype"], &config["torch_dtype"], &config["text_config"]["dtype"]];
        let is_f32 = stored.into_iter().find(|dtype| dtype.is_string()).is_some_and(|dtype| dtype == "float32");
        Ok(Self {
            name: family.name().to_owned(),
            weights: Weights::open_hugging_face(path, family.name(), &args, false)?,
            adapters: None,
            args,
            compute: if is_f32 { DType::F32 } else { DType::BF16 },
            tokenizer_files: Tokenizer::files_in(path)?,
            path: path.to_owned(),
            step_folder: None,
        })
    }

    fn open_step(folder: StepFolder) -> Result<Self> {
        let path = folder.path().to_owned();
        let job = config::parse(&format!("{}/config.toml", path.display()), &folder.config_toml()?)?.config;
        let base = models::flavor(&job.model.name, &job.model.flavor)
            .ok_or_else(|| Error::Model(format!("there is no model {} {}", job.model.name, job.model.flavor)))?;
        let args = job.model.args.apply(&base)?;
        let adapted = folder.base()?.map(|base| base.open(&job.model.name, &args)).transpose()?;
        let files = folder.tokenizer_files()?.into_iter();
        Ok(Self {
            args,
            adapters: adapted.map(|weights| (job.model.lora, weights)),
            name: job.model.name,
            weights: folder.model()?,
            compute: job.training.mixed_precision_param.into(),
            tokenizer_files: files.map(|(name, bytes)| TokenizerFile { name, bytes }).collect(),
            path,
            step_folder: Some(folder),
        })
    }

    /// # Errors
    /// [`Error::Tokenizer`] if the folder has none.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let origin = self.path.display().to_string();
        if self.tokenizer_files.is_empty() {
            let remedy = match self.step_folder {
                Some(_) => {
                    "the run was trained on token shards and named none\n   = train with model.hf_assets_path set to \
                     the tokenizer that made the shards"
                }
                None => "looked for tokenizer.json, vocab.json and vocab.txt\n   = put the model's tokenizer there",
            };
            return Err(Error::Tokenizer(format!("{origin} holds no tokenizer: {remedy}")));
        }
        Tokenizer::from_files(self.tokenizer_files.clone(), &origin)
    }
}
