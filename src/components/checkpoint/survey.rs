//! What a folder holds of checkpoints, and in which state.

use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{Damage, MANIFEST, Manifest};
use super::step_folder::step_of;
use super::weights::holds_hugging_face;
use crate::{Error, Result};

/// The checkpoints of a folder, in the order of their steps.
pub struct Survey {
    /// Where they are.
    pub folder: PathBuf,
    pub found: Vec<Found>,
}

/// A folder that is a checkpoint, or should be one.
pub struct Found {
    pub path: PathBuf,
    /// Of all its files.
    pub bytes: u64,
    /// What it says that it holds; `None` for Hugging Face's, which say nothing.
    pub manifest: Result<Option<Manifest>, Damage>,
}

impl Survey {
    /// Looks into a checkpoint, a folder of them, or a dump folder with its folder `checkpoint`. Names and sizes are
    /// compared with each manifest, and where `hashed`, every bit.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there are none.
    pub fn of(path: &Path, hashed: bool) -> Result<Self> {
        if is_checkpoint(path) {
            return Ok(Self { folder: path.to_owned(), found: vec![Found::look(path, hashed)?] });
        }
        for folder in [path, &path.join("checkpoint")] {
            let found = checkpoints_in(folder)?;
            if !found.is_empty() {
                let found = found.iter().map(|path| Found::look(path, hashed)).collect::<Result<_>>()?;
                return Ok(Self { folder: folder.to_owned(), found });
            }
        }
        let holds = if path.is_dir() { "holds no checkpoints" } else { "is no folder" };
        Err(Error::Checkpoint(format!(
            "{} {holds}\n   = name a checkpoint, a folder of them, or the job.dump_folder of a run",
            path.display()
        )))
    }

    /// The steps whose training can go on, in order.
    pub fn whole_steps(&self) -> impl DoubleEndedIterator<Item = (usize, &Found)> {
        self.found.iter().filter(|found| found.manifest.is_ok()).filter_map(|found| Some((found.step()?, found)))
    }
}

impl Found {
    fn look(path: &Path, hashed: bool) -> Result<Self> {
        let bytes = bytes_below(path).map_err(Error::io("read", path))?;
        Ok(Self { path: path.to_owned(), bytes, manifest: Self::compare(path, hashed) })
    }

    fn compare(path: &Path, hashed: bool) -> Result<Option<Manifest>, Damage> {
        if holds_hugging_face(path) {
            return Ok(None);
        }
        let manifest = Manifest::read(path)?;
        manifest.is_of(path)?;
        manifest.verify(path, |_| hashed)?;
        Ok(Some(manifest))
    }

    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// The step that its name says; `None` for exports.
    pub fn step(&self) -> Option<usize> {
        step_of(&self.name())
    }
}

fn is_checkpoint(path: &Path) -> bool {
    let is_step = || path.file_name().and_then(|name| step_of(name.to_str()?)).is_some();
    path.is_dir() && (path.join(MANIFEST).is_file() || holds_hugging_face(path) || is_step())
}

/// Steps in order, then the others.
fn checkpoints_in(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let is_hidden = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| !is_hidden(path) && is_checkpoint(path))
        .collect();
    found.sort_by_cached_key(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (step_of(&name).unwrap_or(usize::MAX), name)
    });
    Ok(found)
}

fn bytes_below(folder: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        bytes += if path.is_dir() && !path.is_symlink() { bytes_below(&path)? } else { path.symlink_metadata()?.len() };
    }
    Ok(bytes)
}
