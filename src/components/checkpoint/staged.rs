//! Folders that appear under their name whole, or not at all.
//!
//! [`Staged`] collects files under `.tmp-NAME`; [`Staged::commit`] makes them durable and renames the folder, in the
//! order that survives a crash between any two operations. [`recover`] tidies up after one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tracing::warn;

use super::manifest::FileFacts;
use crate::{Error, Result};

const STAGING: &str = ".tmp-";
/// What [`Staged::commit`] calls the folder that it replaces, for the moment between two renames.
const REPLACED: &str = ".old-";
/// What [`try_out`] calls its folder.
const TRIAL: &str = "trial";

pub struct Staged {
    parent: PathBuf,
    name: String,
    path: PathBuf,
    files: BTreeMap<String, FileFacts>,
}

impl Staged {
    pub fn new(parent: &Path, name: &str) -> Result<Self> {
        let path = parent.join(format!("{STAGING}{name}"));
        remove(&path)?;
        fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(Self { parent: parent.to_owned(), name: name.to_owned(), path, files: BTreeMap::new() })
    }

    /// Writes a file, hashing it on the way, and waits until it is on the disk.
    pub fn write(&mut self, name: &str, fill: impl FnOnce(&mut Sink) -> Result<()>) -> Result<()> {
        let path = self.path.join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut sink = Sink { path, file, size: 0, hasher: Sha256::new() };
        fill(&mut sink)?;
        self.files.insert(name.to_owned(), sink.finish()?);
        Ok(())
    }

    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write(name, |sink| sink.write(bytes))
    }

    /// Size and hash of every file written so far.
    pub fn files(&self) -> &BTreeMap<String, FileFacts> {
        &self.files
    }

    /// Gives the folder its name, replacing one that has it. When this returns, the folder is durable.
    pub fn commit(self) -> Result<PathBuf> {
        let folders: BTreeSet<&Path> = self.files.keys().flat_map(|name| Path::new(name).ancestors().skip(1)).collect();
        for folder in folders {
            sync_folder(&self.path.join(folder))?;
        }
        let path = self.parent.join(&self.name);
        let replaced = self.parent.join(format!("{REPLACED}{}", self.name));
        if path.exists() {
            remove(&replaced)?;
            fs::rename(&path, &replaced).map_err(Error::io("rename", &path))?;
        }
        fs::rename(&self.path, &path).map_err(Error::io("rename", &self.path))?;
        sync_folder(&self.parent)?;
        // The new folder stands whatever becomes of the old one; `recover` tries again.
        let _ = remove(&replaced);
        Ok(path)
    }
}

impl Drop for Staged {
    /// An unfinished folder is of no use; what cannot be removed now, [`recover`] removes later.
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A file being written.
pub struct Sink {
    path: PathBuf,
    file: File,
    size: u64,
    hasher: Sha256,
}

impl Sink {
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))?;
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    fn finish(self) -> Result<FileFacts> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        Ok(FileFacts { size: self.size, sha256: hex(self.hasher) })
    }
}

pub fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the names in a folder durable.
pub fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io("sync", path))
}

/// Creates a folder, and those above it that are missing, so that they outlast a power cut.
pub fn create_folder(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    create_folder(parent)?;
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists || !path.is_dir() => {
            Err(Error::io("create", path)(error))
        }
        _ => sync_folder(parent),
    }
}

/// Writes a little in a folder as a save would, and removes it again.
pub fn try_out(parent: &Path) -> Result<()> {
    Staged::new(parent, TRIAL)?.write_bytes(TRIAL, b"Can this folder be written?")
}

/// Removes a folder so that a crash on the way leaves nothing that looks like it.
pub fn discard(parent: &Path, name: &str) -> Result<()> {
    let doomed = parent.join(format!("{STAGING}{name}"));
    remove(&doomed)?;
    fs::rename(parent.join(name), &doomed).map_err(Error::io("remove", parent.join(name)))?;
    // Or a power cut could take the files, and leave the name.
    sync_folder(parent)?;
    remove(&doomed)
}

/// Removes what saves left behind when they died, and completes a replacement that stopped half-way. Call it only while
/// no other process can be saving.
pub fn recover(parent: &Path) -> Result<()> {
    for entry in fs::read_dir(parent).map_err(Error::io("read", parent))? {
        let path = entry.map_err(Error::io("read", parent))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if name.strip_prefix(STAGING).is_some_and(|name| name.starts_with("step-") || name == TRIAL) {
            warn!("removing {}: a save that did not finish left it", path.display());
            remove(&path)?;
        } else if let Some(original) = name.strip_prefix(REPLACED).filter(|name| name.starts_with("step-")) {
            let original = parent.join(original);
            if original.exists() {
                remove(&path)?;
            } else {
                warn!("restoring {}: the save that was to replace it did not finish", original.display());
                fs::rename(&path, &original).map_err(Error::io("rename", &path))?;
            }
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let removed = fs::remove_dir_all(path);
    match removed
        .or_else(|error| if error.kind() == ErrorKind::NotADirectory { fs::remove_file(path) } else { Err(error) })
    {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged(parent: &Path, content: &[u8]) -> Staged {
        let mut staged = Staged::new(parent, "step-1").unwrap();
        staged.write_bytes("sub/file", content).unwrap();
        staged
    }

    #[test]
    fn a_folder_has_no_name_before_its_commit() {
        let parent = tempfile::tempdir().unwrap();
        let unfinished = staged(parent.path(), b"new");
        assert!(!parent.path().join("step-1").exists());
        drop(unfinished);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_commit_replaces_the_folder_of_that_name() {
        let parent = tempfile::tempdir().unwrap();
        staged(parent.path(), b"old").commit().unwrap();
        let path = staged(parent.path(), b"new").commit().unwrap();
        assert_eq!(fs::read(path.join("sub/file")).unwrap(), b"new");
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn recovery_restores_a_folder_whose_replacement_never_came() {
        let parent = tempfile::tempdir().unwrap();
        let path = staged(parent.path(), b"old").commit().unwrap();
        fs::rename(&path, parent.path().join(".old-step-1")).unwrap();
        fs::create_dir(parent.path().join(".tmp-step-1")).unwrap();
        fs::create_dir(parent.path().join(".tmp-notes")).unwrap();
        recover(parent.path()).unwrap();
        assert_eq!(fs::read(path.join("sub/file")).unwrap(), b"old");
        assert!(!parent.path().join(".tmp-step-1").exists());
        assert!(parent.path().join(".tmp-notes").exists(), "not ours");
    }
}
