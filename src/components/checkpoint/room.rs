//! Whether a disk has room for checkpoints.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use candle_core::Tensor;
use indicatif::HumanBytes;
use tracing::warn;

use super::Assets;
use crate::{Error, Result};

/// For a tensor's line in a header, and for a file's share of what a file system keeps of it.
const TENSOR_BYTES: u64 = 256;
/// For the training state, the manifest and folders.
const OTHER_BYTES: u64 = 128 << 10;

/// What a checkpoint of these tensors takes, rounded up.
pub fn checkpoint_bytes<'a>(tensors: impl Iterator<Item = &'a (String, Tensor)>, assets: &Assets) -> u64 {
    let tensor_bytes = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64 + TENSOR_BYTES;
    let tokenizer: usize = assets.tokenizer_files.iter().map(|(_, bytes)| bytes.len()).sum();
    let text = (tokenizer + assets.config_toml.len()) as u64;
    tensors.map(|(_, tensor)| tensor_bytes(tensor)).sum::<u64>() + text + OTHER_BYTES
}

/// Refuses a run whose next checkpoint does not fit, warns of one whose checkpoints `to_come` will not all fit: up to
/// `keep_latest_k` (0: all) of them, one more while it is written, `existing` of which are there already.
pub fn check(folder: &Path, each: u64, to_come: usize, keep_latest_k: usize, existing: usize) -> Result<()> {
    let Some(free) = free_bytes(folder).map_err(Error::io("ask for free space", folder))? else { return Ok(()) };
    if to_come > 0 && free < each {
        return Err(Error::Checkpoint(format!(
            "{}: the next checkpoint takes {}, and {} are free\n   = make room, or choose a job.dump_folder on another disk",
            folder.display(),
            HumanBytes(each),
            HumanBytes(free)
        )));
    }
    let more = at_once(to_come, keep_latest_k, existing) as u64;
    if free / each < more {
        warn!(
            "{}: {} are free, and the checkpoints to come take {} ({more} times {}; checkpoint.keep_latest_k = {keep_latest_k})",
            folder.display(),
            HumanBytes(free),
            HumanBytes(more * each),
            HumanBytes(each)
        );
    }
    Ok(())
}

/// Checkpoints beyond the existing ones that will lie on the disk at once.
fn at_once(to_come: usize, keep_latest_k: usize, existing: usize) -> usize {
    match keep_latest_k {
        0 => to_come,
        keep => to_come.min((keep + 1).saturating_sub(existing).max(1)),
    }
}

/// What this user may still write on the file system of `folder`; `None` where it does not say.
fn free_bytes(folder: &Path) -> io::Result<Option<u64>> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    let mut facts = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: a path that ends with a zero, and memory for the answer.
    if unsafe { libc::statvfs(path.as_ptr(), facts.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, and so wrote the answer.
    let facts = unsafe { facts.assume_init() };
    // Some network file systems have neither size nor free space.
    #[allow(clippy::unnecessary_cast)] // narrower on some systems
    let free = facts.f_bavail as u64 * facts.f_frsize as u64;
    Ok((facts.f_blocks > 0).then_some(free))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kept_checkpoints_and_one_being_written_lie_on_the_disk_at_once() {
        for (to_come, keep_latest_k, existing, expected) in [
            (20, 10, 0, 11),
            (20, 10, 10, 1),
            (20, 10, 3, 8),
            (3, 10, 0, 3),
            (20, 0, 5, 20),
            (4, 2, 9, 1),
            (0, 2, 2, 0),
        ] {
            let found = at_once(to_come, keep_latest_k, existing);
            assert_eq!(found, expected, "{to_come} to come, {keep_latest_k} kept, {existing} existing");
        }
    }

    #[test]
    fn a_checkpoint_that_does_not_fit_is_refused_with_what_it_takes_and_what_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let free = free_bytes(folder.path()).unwrap().unwrap();
        check(folder.path(), 1, 1, 2, 0).unwrap();
        let message = check(folder.path(), 2 * free, 1, 2, 0).unwrap_err().to_string();
        assert!(message.contains("the next checkpoint takes ") && message.contains(" are free"), "{message}");
        check(folder.path(), 2 * free, 0, 2, 0).unwrap();
    }
}
