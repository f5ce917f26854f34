//! Writing step folders and removing old ones, on whichever thread.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tracing::{info, warn};

use super::base::{BASE, Base};
use super::manifest::{Kind, MANIFEST, Manifest};
use super::staged::{self, Staged};
use super::step_folder::{self, step_name, steps_in};
use super::{Assets, State, json_text, room, tensors};
use crate::Result;
use crate::components::metrics;

#[derive(Clone)]
pub struct Writer {
    /// Of the run, with its metrics.
    pub dump_folder: PathBuf,
    /// Where the `step-N` are.
    pub folder: PathBuf,
    pub assets: Arc<Assets>,
    /// 0: all.
    pub keep_latest_k: usize,
    /// Of a run that trains adapters.
    pub base: Option<Base>,
}

impl Writer {
    /// Writes `step-N` and says so once it is durable; then purges.
    pub fn save(&self, step: usize, state: &State) -> Result<()> {
        let start = Instant::now();
        // A run that goes on from here does not write those of the steps before again.
        metrics::sync(&self.dump_folder);
        self.write(step, state)?;
        let path = self.folder.join(step_name(step));
        info!("Finished saving the checkpoint in {:.2} seconds: {}", start.elapsed().as_secs_f64(), path.display());
        self.purge(step);
        Ok(())
    }

    fn write(&self, step: usize, state: &State) -> Result<()> {
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

    /// Removes all but the `keep_latest_k` newest steps, counting the one just saved, which stays in any case.
    pub fn purge(&self, saved: usize) {
        if self.keep_latest_k == 0 {
            return;
        }
        if let Err(error) = self.remove_old(saved) {
            // What had to be saved is saved.
            warn!("old checkpoints stay: {error}");
        }
    }

    fn remove_old(&self, saved: usize) -> Result<()> {
        let others = self.whole_steps()?.into_iter().rev().filter(|step| *step != saved);
        for step in others.skip(self.keep_latest_k - 1) {
            if remove_unless_read(&self.folder, step)? {
                info!("Removed {}: checkpoint.keep_latest_k = {}", step_name(step), self.keep_latest_k);
            }
        }
        Ok(())
    }

    /// Steps whose files are all there, with the sizes that they should have. The others do not count as kept, and nobody
    /// but their owner removes them.
    fn whole_steps(&self) -> Result<Vec<usize>> {
        let mut steps = steps_in(&self.folder)?;
        steps.retain(|step| {
            let path = self.folder.join(step_name(*step));
            Manifest::read(&path)
                .is_ok_and(|manifest| manifest.is_of(&path).is_ok() && manifest.verify(&path, |_| false).is_ok())
        });
        Ok(steps)
    }

    /// See [`super::CheckpointManager::rehearse`].
    pub fn rehearse(&self, checkpoint_bytes: u64, to_come: usize) -> Result<()> {
        staged::try_out(&self.folder)?;
        room::check(&self.folder, checkpoint_bytes, to_come, self.keep_latest_k, self.whole_steps()?.len())
    }
}

/// Whether the step was removed: one that is being read stays.
pub fn remove_unless_read(folder: &Path, step: usize) -> Result<bool> {
    let name = step_name(step);
    let manifest = File::open(folder.join(&name).join(MANIFEST));
    // Held until the folder is gone, so that nobody begins to read it.
    let lock = manifest.as_ref().map(File::try_lock);
    if let Ok(Err(TryLockError::WouldBlock)) = lock {
        warn!("{} is being read and stays for now", folder.join(&name).display());
        return Ok(false);
    }
    staged::discard(folder, &name)?;
    Ok(true)
}

/// Adds what every checkpoint carries, the manifest last, and gives the folder its name.
pub fn seal(
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
