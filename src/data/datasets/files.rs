//! Which files a dataset is made of, and how they get here.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use super::Position;
use crate::data::remote::RemoteFiles;
use crate::{Error, Result};

/// Asks threads that wait to give up.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Requests the stop when it is dropped.
pub struct StopOnDrop(pub Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.request();
    }
}

/// The files of a dataset in their order, never none.
pub struct Files {
    /// Where they come from, for messages.
    pub origin: String,
    pub entries: Vec<FileEntry>,
    remote: Option<Arc<dyn RemoteFiles>>,
}

pub struct FileEntry {
    /// Path below the folder that all files share: the same wherever the dataset is moved.
    pub name: String,
    /// Unknown for remote files.
    pub bytes: Option<u64>,
    /// Of a local file its path, of a remote one its path within the repository.
    path: PathBuf,
}

impl FileEntry {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Files {
    /// `pattern` is a file, a folder (its files with one of the `endings`, at any depth) or a glob.
    pub fn local(pattern: &str, endings: &[&str]) -> Result<Self> {
        let path = Path::new(pattern);
        let is_glob = pattern.contains(['*', '?', '[']);
        let mut paths = Vec::new();
        if path.is_dir() {
            walk(path, &mut HashSet::new(), &mut paths)?;
            let all = paths.len();
            paths.retain(|path| has_ending(&path.to_string_lossy(), endings));
            if paths.is_empty() {
                return Err(Error::Data(format!(
                    "folder {pattern}: none of its {all} files ends in {}; a glob takes files whatever their ending",
                    endings.join(", ")
                )));
            }
        } else if path.exists() {
            paths.push(path.to_owned());
        } else if !is_glob {
            return Err(Error::Data(format!("{pattern}: no such file or folder")));
        } else {
            let matches = glob::glob(pattern).map_err(|e| Error::Data(format!("dataset_path {pattern:?}: {e}")))?;
            for found in matches {
                let found = found.map_err(|e| Error::io("cannot read", e.path().to_owned())(e.into()))?;
                paths.extend(found.is_file().then_some(found));
            }
            if paths.is_empty() {
                return Err(Error::Data(format!("no file matches {pattern:?}")));
            }
        }
        paths.sort_unstable();
        Self::of_paths(pattern, paths)
    }

    fn of_paths(origin: &str, paths: Vec<PathBuf>) -> Result<Self> {
        let shared = shared_folder(&paths);
        let mut entries = Vec::with_capacity(paths.len());
        for path in paths {
            let metadata = std::fs::metadata(&path).map_err(Error::io("cannot read", &path))?;
            if !metadata.is_file() {
                // A pipe cannot be gone back in, and a device may have no end.
                return Err(Error::Data(format!("{}: is neither a file nor a folder", path.display())));
            }
            let name = path.strip_prefix(&shared).unwrap_or(&path).to_string_lossy().into_owned();
            entries.push(FileEntry { name, bytes: Some(metadata.len()), path });
        }
        Ok(Self { origin: origin.to_owned(), entries, remote: None })
    }

    /// Files of a repository, by their paths in it.
    pub fn remote(origin: String, remote: Arc<dyn RemoteFiles>, mut names: Vec<String>) -> Self {
        names.sort_unstable();
        let entry = |name: String| FileEntry { path: PathBuf::from(&name), name, bytes: None };
        Self { origin, entries: names.into_iter().map(entry).collect(), remote: Some(remote) }
    }

    /// One file that is part of titan.
    pub fn shipped(name: &str) -> Self {
        let entry = FileEntry { name: name.to_owned(), bytes: None, path: PathBuf::from(name) };
        Self { origin: name.to_owned(), entries: vec![entry], remote: None }
    }

    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Bytes in all, where they are known.
    pub fn bytes(&self) -> Option<u64> {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// About how many of them were read when a pass in the order of the files has come to `position`.
    pub fn bytes_before(&self, position: &Position) -> u64 {
        let (before, rest) = self.entries.split_at(position.file.unwrap_or(0));
        let within = rest.first().and_then(|entry| entry.bytes).unwrap_or(0).min(position.offset);
        before.iter().filter_map(|entry| entry.bytes).sum::<u64>() + within
    }

    /// What messages call a file.
    pub fn label(&self, index: usize) -> String {
        let entry = &self.entries[index];
        match self.remote {
            Some(_) => format!("{}/{}", self.origin, entry.name),
            None => entry.path.display().to_string(),
        }
    }
}

/// Every file below `folder` that is not hidden. `seen`: folders that were walked through, to which links may lead back.
fn walk(folder: &Path, seen: &mut HashSet<PathBuf>, files: &mut Vec<PathBuf>) -> Result<()> {
    if !seen.insert(folder.canonicalize().map_err(Error::io("cannot list", folder))?) {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let entry = entry.map_err(Error::io("cannot list", folder))?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if path.is_dir() {
            walk(&path, seen, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// Whether a path ends in one of `endings`, by itself or compressed.
pub fn has_ending(path: &str, endings: &[&str]) -> bool {
    let path = path.strip_suffix(".gz").or(path.strip_suffix(".zst")).unwrap_or(path);
    endings.iter().any(|ending| path.ends_with(ending))
}

fn shared_folder(paths: &[PathBuf]) -> PathBuf {
    let mut shared = paths[0].parent().unwrap_or(Path::new("")).to_owned();
    while !paths.iter().all(|path| path.starts_with(&shared)) {
        shared.pop();
    }
    shared
}

/// Brings files here one after another, the next one while the current one is read.
pub struct Fetcher {
    files: Arc<Files>,
    stop: Stop,
    /// A download under way. Its thread is never joined: a fetch cannot be interrupted, and nobody has to wait.
    pending: Option<(usize, Receiver<Result<PathBuf>>)>,
}

impl Fetcher {
    pub fn new(files: Arc<Files>, stop: Stop) -> Self {
        Self { files, stop, pending: None }
    }

    /// The local path of a file. `upcoming` is the one that will be asked for next.
    pub fn path(&mut self, index: usize, upcoming: Option<usize>) -> Result<PathBuf> {
        let Some(remote) = self.files.remote.clone() else {
            return Ok(self.files.entries[index].path.clone());
        };
        let path = match self.pending.take() {
            Some((pending, receiver)) if pending == index => self.wait(&receiver, index)?,
            _ => self.wait(&self.start(&remote, index), index)?,
        };
        self.pending = upcoming.map(|upcoming| (upcoming, self.start(&remote, upcoming)));
        Ok(path)
    }

    fn start(&self, remote: &Arc<dyn RemoteFiles>, index: usize) -> Receiver<Result<PathBuf>> {
        let (sender, receiver) = sync_channel(1);
        let (remote, name) = (remote.clone(), self.files.entries[index].name.clone());
        std::thread::spawn(move || {
            // Nobody receives it if the reader has stopped meanwhile.
            let _ = sender.send(remote.fetch(&name));
        });
        receiver
    }

    fn wait(&self, receiver: &Receiver<Result<PathBuf>>, index: usize) -> Result<PathBuf> {
        loop {
            match receiver.recv_timeout(Duration::from_millis(20)) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if !self.stop.requested() => {}
                Err(_) => return Err(Error::Data(format!("{}: the download broke off", self.files.label(index)))),
            }
        }
    }
}
