//! Checkpoints: when to save, what to load, and how neither can lose anything.
//!
//! `{job.dump_folder}/{checkpoint.folder}/step-N/` holds
//!
//! | file | what |
//! | --- | --- |
//! | `model.safetensors` | parameters and expert biases by name, as they are trained |
//! | `optimizer.safetensors` | `exp_avg.{name}` and `exp_avg_sq.{name}` |
//! | `train_state.json` | [`Progress`]: step, tokens, seed, schedule, data position |
//! | `config.toml`, `tokenizer/` | what the run was started with, so that the folder needs nothing else |
//! | `base.json` | of a run that trains adapters, which then are all that the files above hold: [`Base`], whose weights these go with |
//! | `manifest.json` | [`manifest::Manifest`]: step, kind, size and sha256 of every file |
//!
//! A folder is written under a hidden name, made durable and renamed, so that a `step-N` that exists is complete; the
//! manifest is verified before anything is loaded.
//!
//! The last step is a full `step-N` like any other, from which a longer run can go on. What `last_save_model_only` asks
//! for stands beside it and is never removed: `step-N-hf` with `last_save_in_hf`, a folder that `transformers` loads;
//! else `step-N-bfloat16` (or whatever `export_dtype` says), a checkpoint without training state. Where `export_dtype`
//! is the type that was trained, `step-N/model.safetensors` already is that export.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;
use serde_json::Value;
use tracing::{info, warn};

use crate::config::{self, CheckpointState};
use crate::models::args::DecoderArgs;
use crate::{Error, Result};

mod base;
mod export;
mod fp8;
mod lock;
pub mod manifest;
mod merged;
mod mxfp4;
mod staged;
mod step_folder;
mod tensors;
mod weights;

pub use base::Base;
pub use export::{Export, HuggingFaceModel};
pub use lock::DumpFolderLock;
pub use manifest::Kind;
pub use merged::Merged;
pub use step_folder::{Progress, StepFolder, TrainState, Use, open_step, step_name, step_of, steps_in};
pub use tensors::SHARD_BYTES;
pub use weights::{Fitted, Parameter, Parameters, Weights, holds_hugging_face, read_config};

use base::BASE;
use manifest::{Damage, MANIFEST, Manifest};
use staged::Staged;

/// What makes a checkpoint self-contained.
#[derive(Clone, Debug)]
pub struct Assets {
    /// `model.hf_assets_path`: where `initial_load_in_hf` looks if there is no `initial_load_path`.
    pub hf_assets_path: PathBuf,
    /// `model.name`.
    pub model_name: String,
    pub args: DecoderArgs,
    /// The job config with every value filled in.
    pub config_toml: String,
    /// File names and contents.
    pub tokenizer_files: Vec<(String, Vec<u8>)>,
    pub bos_id: Option<u32>,
    pub eos_id: Option<u32>,
}

/// What a checkpoint is made of. Tensors may be views, on any device.
#[derive(Clone, Copy)]
pub struct State<'a> {
    pub model: &'a [(String, Tensor)],
    /// `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`.
    pub optimizer: &'a [(String, Tensor)],
    pub progress: &'a Progress,
}

/// Why a checkpoint is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    Interval,
    /// `enable_first_step_checkpoint`.
    First,
    Last,
    /// The user stops the run.
    Interrupt,
    /// `create_seed_checkpoint`: step 0.
    Seed,
}

/// What was found to start from. A part that is `None` starts afresh.
pub struct Resume {
    pub source: PathBuf,
    pub model: Option<Weights>,
    pub optimizer: Option<Weights>,
    pub train_state: Option<TrainState>,
    pub lr_scheduler: Option<Value>,
    pub dataloader: Option<Value>,
}

impl Resume {
    /// Steps that are done: training goes on at the next.
    pub fn step(&self) -> usize {
        self.train_state.as_ref().map_or(0, |state| state.step)
    }
}

/// Saves and finds the checkpoints of one run. While it lives, no other process can train in the dump folder.
pub struct CheckpointManager {
    keys: config::Checkpoint,
    folder: PathBuf,
    assets: Assets,
    /// The step of `folder` that was loaded whole or saved last: its state need not be written again.
    on_disk: Option<usize>,
    /// Of a run that trains adapters.
    base: Option<Base>,
    _lock: DumpFolderLock,
}

impl CheckpointManager {
    /// Locks the dump folder, and tidies up after saves that died.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if another process trains there, [`Error::Model`] if the model has no Hugging Face format
    /// but the config asks for it: better now than after the last step.
    pub fn open(keys: config::Checkpoint, dump_folder: &Path, assets: Assets) -> Result<Self> {
        let lock = DumpFolderLock::acquire(dump_folder)?;
        let folder = dump_folder.join(&keys.folder);
        let manager = Self { keys, folder, assets, on_disk: None, base: None, _lock: lock };
        if manager.saves() {
            fs::create_dir_all(&manager.folder).map_err(Error::io("create", &manager.folder))?;
            staged::sync_folder(dump_folder)?;
            staged::recover(&manager.folder)?;
            if manager.keys.last_save_in_hf {
                manager.hugging_face_model()?.config()?;
            }
        }
        Ok(manager)
    }

    /// Opens the weights that the run's adapters are for: those that it would otherwise start from. From here on what is
    /// saved and found are adapters.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there are none.
    pub fn open_base(&mut self) -> Result<Weights> {
        let Some(Resume { source, model: Some(weights), .. }) = self.initial()? else {
            return Err(Error::Checkpoint(
                "adapters need weights: set checkpoint.initial_load_path or checkpoint.initial_load_in_hf".into(),
            ));
        };
        self.base = Some(Base::new(&source, self.keys.initial_load_in_hf)?);
        Ok(weights)
    }

    /// Whether this run writes checkpoints at all.
    pub fn saves(&self) -> bool {
        self.keys.enable && !self.keys.load_only
    }

    /// Whether the model alone is to be written after the last step.
    pub fn exports(&self) -> bool {
        self.saves() && self.keys.last_save_model_only
    }

    /// Whether, and why, a checkpoint is to be saved after `step` of `last_step`.
    pub fn due(&self, step: usize, last_step: usize) -> Option<Why> {
        match step {
            _ if !self.saves() => None,
            _ if step == last_step => Some(Why::Last),
            1 if self.keys.enable_first_step_checkpoint => Some(Why::First),
            _ if step.is_multiple_of(self.keys.interval) => Some(Why::Interval),
            _ => None,
        }
    }

    /// What this run starts from: its own newest checkpoint that is whole, or the one that `load_step` names, or else
    /// `initial_load_path`. `None`: nothing, start afresh.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there are checkpoints but none can be loaded: a run never starts over unasked.
    pub fn find(&mut self) -> Result<Option<Resume>> {
        if !self.keys.enable {
            return Ok(None);
        }
        let steps = steps_in(&self.folder)?;
        let folder = match self.keys.load_step {
            Some(step) => self.open_named(step, &steps)?,
            None if steps.is_empty() && self.base.is_some() => return Ok(None),
            None if steps.is_empty() => return self.initial(),
            None => step_folder::newest(&self.folder, &steps, open_full)?,
        };
        let of_adapters = folder.base()?;
        match (&self.base, &of_adapters) {
            (None, None) => {}
            (Some(base), Some(then)) => then.check(base)?,
            (base, _) => {
                let (holds, trains) = if base.is_some() { ("all weights", "") } else { ("adapters", "no ") };
                return Err(Error::Checkpoint(format!(
                    "{} holds {holds}, but this run trains {trains}adapters\n   = set model.lora.rank as it was, or \
                     another job.dump_folder",
                    folder.path().display()
                )));
            }
        }
        if let (Some(path), None) = (&self.keys.initial_load_path, of_adapters) {
            info!("checkpoint.initial_load_path {} is not used: this run has checkpoints of its own", path.display());
        }
        self.on_disk = self.keys.exclude_from_loading.is_empty().then_some(folder.step());
        // Step 0 is a seed checkpoint: initial weights, from which any run may start.
        self.resume(&folder, folder.step() == 0).map(Some)
    }

    fn open_named(&self, step: usize, steps: &[usize]) -> Result<StepFolder> {
        let path = self.folder.join(step_name(step));
        if !path.is_dir() {
            return Err(Error::Checkpoint(format!(
                "checkpoint.load_step = {step}, but there is no {}\n   = {}",
                path.display(),
                step_folder::describe(&self.folder, steps)
            )));
        }
        open_full(&path).map_err(|damage| {
            Error::Checkpoint(format!("checkpoint.load_step = {step}: {} cannot be used: {damage}", path.display()))
        })
    }

    fn initial(&self) -> Result<Option<Resume>> {
        let keys = &self.keys;
        let (key, path) = match &keys.initial_load_path {
            Some(path) => ("checkpoint.initial_load_path", path),
            None if keys.initial_load_in_hf => ("model.hf_assets_path", &self.assets.hf_assets_path),
            None => return Ok(None),
        };
        if !path.exists() {
            return Err(Error::Checkpoint(format!("{key}: there is no {}", path.display())));
        }
        if keys.initial_load_in_hf {
            let Assets { model_name, args, .. } = &self.assets;
            let weights = Weights::open_hugging_face(path, model_name, args, keys.initial_load_in_hf_quantized)?;
            return Ok(Some(weights_alone(path, weights)));
        }
        if path.join(BASE).is_file() {
            return Err(Error::Checkpoint(format!(
                "{key}: {} holds adapters only\n   = checkpoint.last_save_model_only writes the model with its adapters \
                 merged; name that",
                path.display()
            )));
        }
        if path.join(MANIFEST).is_file() {
            let usage = if keys.initial_load_model_only { Use::Model } else { Use::Everything };
            let folder = StepFolder::open(path, usage)
                .map_err(|damage| Error::Checkpoint(format!("{key}: {} cannot be used: {damage}", path.display())))?;
            if keys.initial_load_model_only || folder.kind() == Kind::Full {
                return self.resume(&folder, keys.initial_load_model_only).map(Some);
            }
        }
        if !keys.initial_load_model_only {
            return Err(Error::Checkpoint(format!(
                "{key}: {} holds weights only\n   = set checkpoint.initial_load_model_only = true, or name a full step-N folder",
                path.display()
            )));
        }
        let steps = steps_in(path)?;
        if !steps.is_empty() {
            return Err(Error::Checkpoint(format!("{key}: name one step; {}", step_folder::describe(path, &steps))));
        }
        Ok(Some(weights_alone(path, Weights::open(path)?)))
    }

    fn resume(&self, folder: &StepFolder, model_only: bool) -> Result<Resume> {
        info!("Loading the checkpoint from {}.", folder.path().display());
        if model_only {
            return Ok(weights_alone(folder.path(), folder.model()?));
        }
        if !self.keys.exclude_from_loading.is_empty() {
            info!("not loaded, as checkpoint.exclude_from_loading says: {:?}", self.keys.exclude_from_loading);
        }
        let wanted = |state| !self.keys.exclude_from_loading.contains(&state);
        let progress = folder.progress()?;
        Ok(Resume {
            source: folder.path().to_owned(),
            model: wanted(CheckpointState::Model).then(|| folder.model()).transpose()?,
            optimizer: wanted(CheckpointState::Optimizer).then(|| folder.optimizer()).transpose()?,
            train_state: wanted(CheckpointState::TrainState).then_some(progress.train_state),
            lr_scheduler: wanted(CheckpointState::LrScheduler).then_some(progress.lr_scheduler),
            dataloader: wanted(CheckpointState::Dataloader).then_some(progress.dataloader),
        })
    }

    /// Writes `step-N`, and after the last step what `last_save_model_only` asks for, unless the run trains adapters, which
    /// would have to be merged before [`CheckpointManager::export`]; then removes the oldest steps
    /// beyond `keep_latest_k`. When this returns, all of it is durable.
    ///
    /// `None`: this run does not save.
    pub fn save(&mut self, step: usize, why: Why, state: &State) -> Result<Option<PathBuf>> {
        if !self.saves() {
            return Ok(None);
        }
        let path = self.folder.join(step_name(step));
        if self.on_disk != Some(step) {
            let start = Instant::now();
            info!("Saving the checkpoint of step {step} ({}).", why.in_words());
            self.write_step(step, state)?;
            self.on_disk = Some(step);
            info!("Finished saving the checkpoint in {:.2} seconds: {}", start.elapsed().as_secs_f64(), path.display());
        }
        if why == Why::Last && self.exports() && self.base.is_none() {
            self.export(step, state.model)?;
        }
        if let Err(error) = self.purge(step) {
            // What had to be saved is saved.
            warn!("old checkpoints stay: {error}");
        }
        Ok(Some(path))
    }

    fn write_step(&self, step: usize, state: &State) -> Result<()> {
        let mut folder = Staged::new(&self.folder, &step_name(step))?;
        for (stem, tensors) in [("model", state.model), ("optimizer", state.optimizer)] {
            tensors::write(&mut folder, stem, tensors::entries(tensors), tensors::SHARD_BYTES, &|_| ())?;
        }
        if let Some(base) = &self.base {
            folder.write_bytes(BASE, &json_text(base))?;
        }
        folder.write_bytes(step_folder::TRAIN_STATE, &json_text(state.progress))?;
        seal(folder, step, Kind::Full, &self.assets.config_toml, &self.assets.tokenizer_files)
    }

    /// Removes all but the `keep_latest_k` newest steps. The one just saved stays in any case, so does one that is
    /// being read; a folder without a valid manifest is neither counted nor touched.
    fn purge(&self, saved: usize) -> Result<()> {
        let keep = self.keys.keep_latest_k;
        if keep == 0 {
            return Ok(());
        }
        let others = steps_in(&self.folder)?.into_iter().rev().filter(|step| *step != saved);
        let complete = others.map(step_name).filter(|name| Manifest::read(&self.folder.join(name)).is_ok());
        for name in complete.skip(keep - 1) {
            let manifest = self.folder.join(&name).join(MANIFEST);
            let is_read =
                File::open(&manifest).is_ok_and(|file| matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock)));
            if is_read {
                warn!("{} is being read and stays for now", self.folder.join(&name).display());
                continue;
            }
            staged::discard(&self.folder, &name)?;
            info!("Removed {name}: checkpoint.keep_latest_k = {keep}");
        }
        Ok(())
    }
}

impl Why {
    fn in_words(self) -> &'static str {
        match self {
            Self::Interval => "checkpoint.interval",
            Self::First => "the first step",
            Self::Last => "the last step",
            Self::Interrupt => "before stopping",
            Self::Seed => "seed",
        }
    }
}

/// Adds what every checkpoint carries, the manifest last, and gives the folder its name.
fn seal(
    mut folder: Staged,
    step: usize,
    kind: Kind,
    config_toml: &str,
    tokenizer_files: &[(String, Vec<u8>)],
) -> Result<()> {
    folder.write_bytes(step_folder::CONFIG, config_toml.as_bytes())?;
    for (name, bytes) in tokenizer_files {
        folder.write_bytes(&format!("{}{name}", step_folder::TOKENIZER), bytes)?;
    }
    let manifest = Manifest::new(step, kind, folder.files().clone());
    folder.write_bytes(MANIFEST, &manifest.to_json())?;
    folder.commit().map(drop)
}

/// A folder from which training can go on.
fn open_full(path: &Path) -> Result<StepFolder, Damage> {
    let folder = StepFolder::open(path, Use::Everything)?;
    match folder.kind() {
        Kind::Full => Ok(folder),
        Kind::ModelOnly => Err("it holds the model only; checkpoint.initial_load_path can load it".to_owned()),
    }
}

fn weights_alone(source: &Path, model: Weights) -> Resume {
    Resume {
        source: source.to_owned(),
        model: Some(model),
        optimizer: None,
        train_state: None,
        lr_scheduler: None,
        dataloader: None,
    }
}

fn json_text(value: &impl serde::Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("maps with string keys only");
    text.push(b'\n');
    text
}
