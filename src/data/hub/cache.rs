//! The folders in which all programs of the hub keep what they downloaded:
//! `{kind}s--{owner}--{name}/{blobs/{hash}, snapshots/{commit}/{file} -> blob, refs/{revision}}`.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::RepoKind;
use super::download::Entry;
use crate::tools::files;
use crate::{Error, Result};

/// Refuses a name that would lead out of its folder.
pub(super) fn check_path(name: &str) -> Result<()> {
    let stays = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    if name.is_empty()
        || !stays
        || name.contains(['\\', '\0', ':'])
        || name.split('/').any(|part| part.is_empty() || part == ".")
    {
        return Err(Error::Hub(format!("`{name}` is refused: it is not a plain path within a repository")));
    }
    Ok(())
}

/// Whether `id` is the name of a commit or a file in git.
pub(super) fn is_git_id(id: &str) -> bool {
    id.len() == 40 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

#[derive(Clone)]
pub(super) struct RepoCache {
    dir: PathBuf,
}

impl RepoCache {
    pub fn new(cache_dir: &Path, kind: RepoKind, id: &str) -> Self {
        let kind = match kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        Self { dir: cache_dir.join(format!("{kind}--{}", id.replace('/', "--"))) }
    }

    /// The commit that the branch or tag `revision` was when something of it was last stored.
    pub fn commit(&self, revision: &str) -> Option<String> {
        let hash = fs::read_to_string(self.dir.join("refs").join(revision)).ok()?;
        Some(hash.trim().to_owned()).filter(|hash| is_git_id(hash))
    }

    pub fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit).join(file)
    }

    /// The files of `commit` that are stored, as paths within the repository.
    pub fn files(&self, commit: &str) -> Vec<String> {
        let root = self.dir.join("snapshots").join(commit);
        let mut files = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(file) = path.strip_prefix(&root).ok().and_then(Path::to_str) {
                    files.push(file.replace('\\', "/"));
                }
            }
        }
        files
    }

    /// Stores `entry` under its commit. `download` makes the blob, its second argument, by way of a file that is
    /// kept when it fails, its first.
    pub fn store(
        &self,
        revision: &str,
        commit: &str,
        entry: &Entry,
        download: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<()> {
        let blobs = self.dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(Error::io("cannot make the folder", &blobs))?;
        // Named by git's id rather than the one for large files, which is known only after the download.
        let blob = blobs.join(&entry.git_id);
        if !blob.exists() {
            download(&blobs.join(format!("{}.part", entry.git_id)), &blob)?;
        }
        let link = self.snapshot(commit, &entry.path);
        point(&link, &blob, entry.path.split('/').count() + 1).map_err(Error::io("cannot link", &link))?;
        if revision != commit {
            let reference = self.dir.join("refs").join(revision);
            let folder = reference.parent().unwrap_or(&self.dir);
            fs::create_dir_all(folder).map_err(Error::io("cannot make the folder", folder))?;
            files::write(&reference, &mut commit.as_bytes()).map_err(Error::io("cannot write", &reference))?;
        }
        Ok(())
    }
}

/// Makes `link`, which lies `depth` folders below the repository's, stand for `blob`.
fn point(link: &Path, blob: &Path, depth: usize) -> io::Result<()> {
    if let Some(folder) = link.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(link) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    #[cfg(unix)]
    {
        let mut target: PathBuf = std::iter::repeat_n("..", depth).collect();
        target.extend(["blobs".as_ref(), blob.file_name().unwrap_or_default()]);
        std::os::unix::fs::symlink(target, link)
    }
    #[cfg(not(unix))]
    {
        let _ = depth;
        fs::copy(blob, link).map(drop)
    }
}
