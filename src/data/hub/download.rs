//! One file, piece by piece, and the proof that it is the right one.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::repo::HubRepo;
use crate::tools::logging;
use crate::{Error, Result};

/// What a cut connection can cost, and what is held in memory.
const PIECE: u64 = 16 << 20;

/// A file as the hub lists it.
pub(super) struct Entry {
    pub path: String,
    pub size: u64,
    /// The id of git's blob: of the file, or of the pointer that stands in for a large one.
    pub git_id: String,
    pub is_lfs: bool,
}

/// Downloads `entry` to `part`, going on where an earlier attempt ended, and moves it to `path` once it is verified.
///
/// # Errors
/// [`Error::Hub`]; what arrived stays in `part`, unless it is wrong.
pub(super) fn download(repo: &HubRepo, commit: &str, entry: &Entry, part: &Path, path: &Path) -> Result<()> {
    let io = |action| Error::io(action, part);
    let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(part);
    let mut file = file.map_err(io("cannot write"))?;
    // Another process may be at the same file; the lock is free when that one is done, and has moved `part` away.
    file.lock().map_err(io("cannot lock"))?;
    if entry.is_at(path)? {
        return match fs::remove_file(part) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("cannot remove")(e)),
            _ => Ok(()),
        };
    }

    let mut done = file.metadata().map_err(io("cannot read"))?.len();
    if done > entry.size {
        file.set_len(0).map_err(io("cannot write"))?;
        done = 0;
    }
    file.seek(SeekFrom::Start(done)).map_err(io("cannot write"))?;
    let bar = bar(entry);
    while done < entry.size {
        let end = entry.size.min(done + PIECE);
        let piece = repo.read(commit, &entry.path, done..end, &bar)?;
        if piece.len() as u64 != end - done {
            return Err(Error::Hub(format!(
                "{} sent {} bytes of {} of {} where {} were asked for",
                repo.hub.endpoint,
                piece.len(),
                entry.path,
                repo.api.id,
                end - done
            )));
        }
        file.write_all(&piece).map_err(io("cannot write"))?;
        done = end;
    }
    bar.finish_and_clear();
    file.sync_all().map_err(io("cannot write"))?;

    if !entry.is_at(part)? {
        fs::remove_file(part).map_err(io("cannot remove"))?;
        return Err(Error::Hub(format!(
            "{} of {} arrived damaged: its hash is not the one that the hub lists\n  = run the command again; nothing of it was kept",
            entry.path, repo.api.id
        )));
    }
    fs::rename(part, path).map_err(Error::io("cannot write", path))
}

impl Entry {
    /// Whether the file at `path` has the content that the hub lists.
    pub fn is_at(&self, path: &Path) -> Result<bool> {
        let size = match fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(_) => return Ok(false),
        };
        if size != self.size {
            return Ok(false);
        }
        let git_id = if self.is_lfs {
            let mut sha256 = Sha256::new();
            feed(path, |bytes| sha256.update(bytes))?;
            let sha256 = hex(&sha256.finalize());
            // Git stores this text for a large file, so that its id proves the SHA-256.
            let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
            let mut sha1 = Sha1::new();
            sha1.update(format!("blob {}\0{pointer}", pointer.len()));
            hex(&sha1.finalize())
        } else {
            let mut sha1 = Sha1::new();
            sha1.update(format!("blob {size}\0"));
            feed(path, |bytes| sha1.update(bytes))?;
            hex(&sha1.finalize())
        };
        Ok(git_id == self.git_id)
    }
}

fn feed(path: &Path, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io("cannot read", path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::io("cannot read", path))? {
            0 => return Ok(()),
            n => take(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bar(entry: &Entry) -> ProgressBar {
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = ProgressStyle::with_template(style).expect("the template is well-formed");
    logging::bars().add(ProgressBar::new(entry.size).with_style(style).with_message(entry.path.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_files_git_id_proves_its_sha256() {
        // `git hash-object` of the file, and of its pointer.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, b"hello").unwrap();
        let entry = |git_id: &str, is_lfs| Entry { path: "f".into(), size: 5, git_id: git_id.into(), is_lfs };
        assert!(entry("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", false).is_at(&path).unwrap());
        assert!(entry("d1ca116d6733584c13cb8bb50b21d5b5b81ee28f", true).is_at(&path).unwrap());
        fs::write(&path, b"hellO").unwrap();
        assert!(!entry("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", false).is_at(&path).unwrap());
        assert!(!entry("d1ca116d6733584c13cb8bb50b21d5b5b81ee28f", true).is_at(&path).unwrap());
    }
}
