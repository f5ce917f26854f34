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
//! manifest is verified before anything is loaded. With `async_mode` that happens on another thread, to a copy of the
//! state as it was after the step.
//!
//! The last step is a full `step-N` like any other, from which a longer run can go on. What `last_save_model_only` asks
//! for stands beside it and is never removed: `step-N-hf` with `last_save_in_hf`, a folder that `transformers` loads;
//! else `step-N-bfloat16` (or whatever `export_dtype` says), a checkpoint without training state. Where `export_dtype`
//! is the type that was trained, `step-N/model.safetensors` already is that export.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Tensor;
use serde_json::Value;
use tracing::{error, info};

use crate::config::{self, CheckpointState};
use crate::models::args::DecoderArgs;
use crate::{Error, Result};

mod background;
mod base;
mod export;
mod fp8;
mod inspect;
mod lock;
pub mod manifest;
mod merged;
mod mxfp4;
mod room;
mod staged;
mod step_folder;
mod survey;
mod tensors;
mod weights;
mod writer;

pub use base::Base;
pub use export::{Export, HuggingFaceModel};
pub use inspect::{Statistics, TensorFacts, inspect};
pub use lock::DumpFolderLock;
pub use manifest::Kind;
pub use merged::Merged;
pub use step_folder::{Progress, StepFolder, TrainState, Use, open_step, step_name, step_of, steps_in};
pub use survey::{Found, Survey};
pub use tensors::SHARD_BYTES;
pub use weights::{Fitted, Parameter, Parameters, Weights, holds_hugging_face, read_config};
pub use writer::remove_unless_read;

use background::Background;
use base::BASE;
use manifest::{Damage, MANIFEST};
use writer::Writer;

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
    /// The user asked for it.
    Asked,
    /// The user stops the run.
    Interrupt,
    /// The run cannot go on.
    Fault,
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
    /// Steps that the optimizer took.
    pub optimizer_steps: Option<u64>,
    pub loss_guard: Option<Value>,
    /// The step that the run goes on from; `None` where it only lends its weights.
    pub folder: Option<StepFolder>,
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
    writer: Writer,
    background: Background,
    /// The step that was loaded whole or saved last: its state need not be written again.
    on_disk: Option<usize>,
    /// Given up last, after the save that may be running in the background.
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
        let writer = Writer {
            dump_folder: dump_folder.to_owned(),
            folder: dump_folder.join(&keys.folder),
            assets: Arc::new(assets),
            keep_latest_k: keys.keep_latest_k,
            base: None,
        };
        let manager = Self { keys, writer, background: Background::default(), on_disk: None, _lock: lock };
        if manager.saves() {
            staged::create_folder(&manager.writer.folder)?;
            staged::recover(&manager.writer.folder)?;
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
        self.writer.base = Some(Base::new(&source, self.keys.initial_load_in_hf)?);
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
        let steps = steps_in(&self.writer.folder)?;
        let folder = match self.keys.load_step {
            Some(step) => self.open_named(step, &steps)?,
            None if steps.is_empty() && self.writer.base.is_some() => return Ok(None),
            None if steps.is_empty() => return self.initial(),
            None => step_folder::newest(&self.writer.folder, &steps, open_full)?,
        };
        let of_adapters = folder.base()?;
        match (&self.writer.base, &of_adapters) {
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
        let is_seed = folder.step() == 0;
        self.resume(folder, is_seed).map(Some)
    }

    fn open_named(&self, step: usize, steps: &[usize]) -> Result<StepFolder> {
        let path = self.writer.folder.join(step_name(step));
        if !path.is_dir() {
            return Err(Error::Checkpoint(format!(
                "checkpoint.load_step = {step}, but there is no {}\n   = {}",
                path.display(),
                step_folder::describe(&self.writer.folder, steps)
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
            None if keys.initial_load_in_hf => ("model.hf_assets_path", &self.writer.assets.hf_assets_path),
            None => return Ok(None),
        };
        if !path.exists() {
            return Err(Error::Checkpoint(format!("{key}: there is no {}", path.display())));
        }
        if keys.initial_load_in_hf {
            let Assets { model_name, args, .. } = &*self.writer.assets;
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
                return self.resume(folder, keys.initial_load_model_only).map(Some);
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

    fn resume(&self, folder: StepFolder, model_only: bool) -> Result<Resume> {
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
            optimizer_steps: wanted(CheckpointState::Optimizer).then_some(progress.optimizer_steps),
            loss_guard: wanted(CheckpointState::TrainState).then_some(progress.loss_guard),
            folder: Some(folder),
        })
    }

    /// Before the first step: whether a checkpoint can be written at all, and whether there is room for the next, and for
    /// those to come until `last_step`. `tensors`: all that a checkpoint holds.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written, [`Error::Checkpoint`] if the next checkpoint will not fit.
    pub fn rehearse<'a>(
        &self,
        step: usize,
        last_step: usize,
        tensors: impl Iterator<Item = &'a (String, Tensor)>,
    ) -> Result<()> {
        if !self.saves() {
            return Ok(());
        }
        let interval = self.keys.interval;
        let to_come = last_step / interval - step / interval + usize::from(!last_step.is_multiple_of(interval));
        self.writer.rehearse(room::checkpoint_bytes(tensors, &self.writer.assets), to_come)
    }

    /// Writes `step-N`; then removes the oldest steps beyond `keep_latest_k`. After the last step also what
    /// `last_save_model_only` asks for, unless the run trains adapters, which would have to be merged before
    /// [`CheckpointManager::export`].
    ///
    /// When this returns, all of it is durable; with `async_mode`, and where training goes on, it will be some time after
    /// [`CheckpointManager::check`] found no fault.
    ///
    /// `None`: this run does not save.
    pub fn save(&mut self, step: usize, why: Why, state: &State) -> Result<Option<PathBuf>> {
        if !self.saves() {
            return Ok(None);
        }
        let goes_on = matches!(why, Why::Interval | Why::First | Why::Asked);
        match self.background.wait() {
            Ok(saved) => self.on_disk = saved.or(self.on_disk),
            Err(error) if goes_on => return Err(error),
            // The state at the end is worth another try.
            Err(error) => error!("{error}"),
        }
        if self.on_disk == Some(step) {
            self.writer.purge(step);
        } else {
            info!("Saving the checkpoint of step {step} ({}).", why.in_words());
            if goes_on && self.keys.in_background() {
                self.background.begin(self.writer.clone(), step, state)?;
            } else {
                self.writer.save(step, state)?;
                self.on_disk = Some(step);
            }
        }
        if why == Why::Last && self.exports() && self.writer.base.is_none() {
            self.export(step, state.model)?;
        }
        Ok(Some(self.writer.folder.join(step_name(step))))
    }

    /// Fails if a save in the background has.
    pub fn check(&mut self) -> Result<()> {
        if self.background.is_finished() {
            self.on_disk = self.background.wait()?.or(self.on_disk);
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
            Self::Asked => "asked for by SIGUSR1",
            Self::Interrupt | Self::Fault => "before stopping",
            Self::Seed => "seed",
        }
    }
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
        optimizer_steps: None,
        loss_guard: None,
        folder: None,
    }
}

fn json_text(value: &impl serde::Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("maps with string keys only");
    text.push(b'\n');
    text
}
