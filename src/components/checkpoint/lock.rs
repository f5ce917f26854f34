//! One process at a time in a dump folder.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use tracing::warn;

use super::staged::create_folder;
use crate::{Error, Result};

const LOCK: &str = ".lock";

/// An advisory lock on a dump folder, held until dropped or until the process ends, however it ends.
pub struct DumpFolderLock {
    _file: File,
}

impl DumpFolderLock {
    /// That of the run which writes, or wrote, into a folder of checkpoints; `None` if none ever did.
    pub fn of_checkpoints(folder: &Path) -> Result<Option<Self>> {
        let folder = folder.canonicalize().map_err(Error::io("find", folder))?;
        let dump_folder = folder.ancestors().skip(1).find(|above| above.join(LOCK).is_file());
        dump_folder.map(Self::acquire).transpose()
    }

    /// Creates the folder if need be.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the process that holds the folder.
    pub fn acquire(dump_folder: &Path) -> Result<Self> {
        create_folder(dump_folder)?;
        let path = dump_folder.join(LOCK);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {
                let write_pid = |file: &mut File| {
                    file.set_len(0)?;
                    file.rewind()?;
                    write!(file, "{}", std::process::id())
                };
                write_pid(&mut file).map_err(Error::io("write", &path))?;
            }
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // Whoever holds the lock may be about to write its number.
                let _ = file.read_to_string(&mut pid);
                let holder = if pid.is_empty() { "another process".to_owned() } else { format!("process {pid}") };
                return Err(Error::Checkpoint(format!(
                    "{} is in use by {holder}\n   = wait for it or stop it, or choose another job.dump_folder",
                    dump_folder.display()
                )));
            }
            // Some network file systems have no locks; training there is still better than not training.
            Err(TryLockError::Error(error)) => {
                warn!("{}: no lock ({error}); see to it that no other process trains here", path.display());
            }
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_comer_is_told_who_holds_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let dump_folder = folder.path().join("outputs");
        let lock = DumpFolderLock::acquire(&dump_folder).unwrap();
        let message = DumpFolderLock::acquire(&dump_folder).err().unwrap().to_string();
        assert!(message.contains(&format!("in use by process {}\n", std::process::id())), "{message}");
        drop(lock);
        DumpFolderLock::acquire(&dump_folder).unwrap();
    }
}
