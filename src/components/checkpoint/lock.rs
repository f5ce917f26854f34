//! One process at a time in a dump folder.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use chrono::Local;
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
                let sign = |file: &mut File| {
                    file.set_len(0)?;
                    file.rewind()?;
                    let now = Local::now().format("%Y-%m-%d %H:%M:%S %:z");
                    write!(file, "process {} on {} since {now}", std::process::id(), host_name())
                };
                sign(&mut file).map_err(Error::io("write", &path))?;
            }
            Err(TryLockError::WouldBlock) => {
                // Whoever has only just taken the lock is about to sign; what is there now may be of an earlier run.
                thread::sleep(Duration::from_millis(300));
                let mut holder = String::new();
                let holder = match file.read_to_string(&mut holder) {
                    Ok(1..) => holder,
                    _ => "another process".to_owned(),
                };
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

fn host_name() -> String {
    let mut name = [0u8; 256];
    // SAFETY: there is room for as many bytes as it is told; a name that is cut off keeps the zero behind it.
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } != 0;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    if failed { "an unnamed host".to_owned() } else { String::from_utf8_lossy(&name[..end]).into_owned() }
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
        assert!(
            message.contains(&format!("in use by process {} on {} since 20", std::process::id(), host_name())),
            "{message}"
        );
        drop(lock);
        DumpFolderLock::acquire(&dump_folder).unwrap();
    }
}
