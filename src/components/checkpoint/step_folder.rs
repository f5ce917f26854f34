//! `step-N` folders: finding, opening and reading them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::warn;

use super::base::{BASE, Base};
use super::manifest::{Damage, Kind, MANIFEST, Manifest};
use super::weights::Weights;
use crate::{Error, Result};

pub(super) const CONFIG: &str = "config.toml";
pub(super) const TOKENIZER: &str = "tokenizer/";
pub(super) const TRAIN_STATE: &str = "train_state.json";

/// What `train_state.json` holds: all of the training state that is not tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub train_state: TrainState,
    pub lr_scheduler: Value,
    pub dataloader: Value,
    /// Steps that the optimizer took: fewer than the run's where some were skipped.
    pub optimizer_steps: u64,
    pub loss_guard: Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done, those that were skipped included.
    pub step: usize,
    pub n_tokens_seen: u64,
    /// Every random number of the run follows from it.
    pub seed: u64,
}

/// How much of a step folder is read, and therefore checked bit by bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Everything,
    /// All but the optimizer's state, most of the bytes.
    Model,
}

/// A checkpoint folder that agrees with its manifest. While it is open, no titan removes it.
#[derive(Debug)]
pub struct StepFolder {
    path: PathBuf,
    manifest: Manifest,
    _reading: File,
}

impl StepFolder {
    pub fn open(path: &Path, usage: Use) -> Result<Self, Damage> {
        let reading = File::open(path.join(MANIFEST)).map_err(|error| format!("{MANIFEST}: {error}"))?;
        // Without locks on this file system, an open file still outlives its name.
        let _ = reading.lock_shared();
        let manifest = Manifest::read(path)?;
        manifest.is_of(path)?;
        manifest.verify(path, |name| usage == Use::Everything || !name.starts_with("optimizer"))?;
        Ok(Self { path: path.to_owned(), manifest, _reading: reading })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn step(&self) -> usize {
        self.manifest.step
    }

    pub fn kind(&self) -> Kind {
        self.manifest.kind
    }

    pub fn model(&self) -> Result<Weights> {
        self.weights("model")
    }

    /// Tensors `exp_avg.{parameter}` and `exp_avg_sq.{parameter}`.
    pub fn optimizer(&self) -> Result<Weights> {
        self.weights("optimizer")
    }

    fn weights(&self, stem: &str) -> Result<Weights> {
        let files = self.manifest.files.keys().filter(|name| name.starts_with(stem) && name.ends_with(".safetensors"));
        Weights::open_files(&self.path, files.map(|name| self.path.join(name)).collect())
    }

    pub fn progress(&self) -> Result<Progress> {
        let path = self.path.join(TRAIN_STATE);
        serde_json::from_slice(&self.read(TRAIN_STATE)?)
            .map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))
    }

    /// The weights that the model's adapters are for; `None` where it holds all weights.
    pub fn base(&self) -> Result<Option<Base>> {
        if !self.manifest.files.contains_key(BASE) {
            return Ok(None);
        }
        let path = self.path.join(BASE);
        serde_json::from_slice(&self.read(BASE)?)
            .map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))
    }

    /// The job config that the run was started with, all values filled in.
    pub fn config_toml(&self) -> Result<String> {
        let path = self.path.join(CONFIG);
        String::from_utf8(self.read(CONFIG)?).map_err(|error| Error::Checkpoint(format!("{}: {error}", path.display())))
    }

    /// The tokenizer's files, by name.
    pub fn tokenizer_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let names = self.manifest.files.keys().filter_map(|path| Some((path, path.strip_prefix(TOKENIZER)?)));
        names.map(|(path, name)| Ok((name.to_owned(), self.read(path)?))).collect()
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.path.join(name);
        fs::read(&path).map_err(Error::io("read", &path))
    }
}

/// The step of a folder named exactly as titan names it; `step-09` and `step-9.bak` are no steps.
pub fn step_of(name: &str) -> Option<usize> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

pub fn step_name(step: usize) -> String {
    format!("step-{step}")
}

/// The steps that a folder holds, in order; none if there is no such folder.
pub fn steps_in(folder: &Path) -> Result<Vec<usize>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut steps: Vec<usize> = entries
        .filter_map(|entry| step_of(entry.ok()?.file_name().to_str()?))
        .filter(|step| folder.join(step_name(*step)).is_dir())
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Opens the newest of `steps` that is whole and that `accept` takes, warning of each that is not.
///
/// # Errors
/// [`Error::Checkpoint`] with what is wrong with each.
pub(super) fn newest<T>(folder: &Path, steps: &[usize], accept: impl Fn(&Path) -> Result<T, Damage>) -> Result<T> {
    let mut damages = Vec::new();
    for step in steps.iter().rev() {
        let path = folder.join(step_name(*step));
        match accept(&path) {
            Ok(found) => {
                if !damages.is_empty() {
                    warn!("using {} instead", path.display());
                }
                return Ok(found);
            }
            Err(damage) => {
                warn!("{} cannot be used: {damage}", path.display());
                damages.push(format!("{}: {damage}", step_name(*step)));
            }
        }
    }
    Err(Error::Checkpoint(format!(
        "none of the checkpoints in {} can be used; nothing was deleted\n  {}\n   = to start over, choose another job.dump_folder or move these away",
        folder.display(),
        damages.join("\n  ")
    )))
}

/// Opens the checkpoint that a user names: a folder, or `step-N` or `latest` in `{dump_folder}/{folder}`.
///
/// The model, config and tokenizer are verified; the optimizer's state is not.
pub fn open_step(checkpoint: &str, dump_folder: &Path, folder: &str) -> Result<StepFolder> {
    let folder = dump_folder.join(folder);
    let steps = steps_in(&folder)?;
    let open = |path: &Path| StepFolder::open(path, Use::Model);
    if checkpoint == "latest" && !steps.is_empty() {
        return newest(&folder, &steps, open);
    }
    let named = folder.join(checkpoint);
    let path = match step_of(checkpoint) {
        Some(_) if named.is_dir() => named,
        _ => PathBuf::from(checkpoint),
    };
    if path.join(MANIFEST).is_file() {
        return open(&path).map_err(|damage| Error::Checkpoint(format!("{} cannot be used: {damage}", path.display())));
    }
    let problem = match path.is_dir() {
        true => format!("{} is no checkpoint: it has no {MANIFEST}", path.display()),
        false => format!("there is no checkpoint `{checkpoint}`"),
    };
    let (place, steps) = match steps_in(&path)? {
        inner if !inner.is_empty() => (path, inner),
        _ => (folder, steps),
    };
    Err(Error::Checkpoint(format!("{problem}\n   = {}", describe(&place, &steps))))
}

/// What there is instead, for an error message.
pub(super) fn describe(folder: &Path, steps: &[usize]) -> String {
    let names: Vec<String> = steps.iter().map(|step| step_name(*step)).collect();
    match &names[..] {
        [] => format!("{} holds no checkpoints", folder.display()),
        names => format!("{} holds {}", folder.display(), names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_as_titan_writes_them_are_steps() {
        assert_eq!(["step-0", "step-9", "step-10000"].map(step_of), [Some(0), Some(9), Some(10_000)]);
        for name in [
            "step-09",
            "step-+9",
            "step-9.bak",
            "old-step-9-backup",
            "step-9-hf",
            "step-",
            "step--1",
            "Step-9",
            " step-9",
        ] {
            assert_eq!(step_of(name), None, "{name}");
        }
    }

    #[test]
    fn a_file_named_like_a_step_is_none() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("step-9"), b"").unwrap();
        fs::create_dir(folder.path().join("step-3")).unwrap();
        assert_eq!(steps_in(folder.path()).unwrap(), [3]);
    }
}
