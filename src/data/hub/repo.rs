//! Repositories: which commit, which files, where they lie.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

use hf_hub::repository::RepoTreeEntry;
use indicatif::ProgressBar;

use super::api::{Api, Fault, RepoApi};
use super::cache::{self, RepoCache};
use super::download::{Entry, download};
use super::{HubOptions, RepoKind, explain};
use crate::data::remote::RemoteFiles;
use crate::tools::files;
use crate::{Error, Result};

/// Tries before a hub that does not answer is given up: about half a minute.
const TRIES: u32 = 6;

/// The longest wait that a hub may ask for.
const MAX_WAIT: Duration = Duration::from_secs(300);

#[derive(Clone)]
pub struct Hub {
    api: Api,
    /// Without a slash at its end.
    pub(super) endpoint: String,
    pub(super) cache_dir: PathBuf,
    pub(super) has_token: bool,
    offline: bool,
    first_wait: Duration,
}

/// One repository at one revision. The revision is looked up once, so that all files are of the same commit.
#[derive(Clone)]
pub struct HubRepo {
    pub(super) hub: Hub,
    pub(super) api: RepoApi,
    pub(super) revision: String,
    cache: RepoCache,
    commit: OnceLock<Commit>,
}

#[derive(Clone)]
struct Commit {
    hash: String,
    /// Known from the cache only: the hub was not, or could not be asked.
    offline: bool,
}

impl Hub {
    /// The hub of the environment: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, and `HF_TOKEN` where `token` is `None`.
    pub fn from_env(token: Option<String>) -> Result<Self> {
        Self::new(HubOptions::from_env(token))
    }

    /// # Errors
    /// [`Error::Hub`] if the endpoint is no URL.
    pub fn new(options: HubOptions) -> Result<Self> {
        let api = Api::new(&options).map_err(Error::Hub)?;
        Ok(Self {
            endpoint: api.endpoint().to_owned(),
            cache_dir: api.cache_dir().to_owned(),
            has_token: api.has_token(),
            api,
            offline: options.offline,
            first_wait: options.first_wait,
        })
    }

    /// A repository such as `allenai/c4`. `revision` is a branch, a tag or a commit; `None` is `main`. Asks nothing yet.
    ///
    /// # Errors
    /// [`Error::Hub`] if `id` or `revision` cannot be names on a hub.
    pub fn repo(&self, kind: RepoKind, id: &str, revision: Option<&str>) -> Result<HubRepo> {
        let revision = revision.unwrap_or("main");
        if id.split('/').count() > 2 || !id.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c)) {
            return Err(Error::Hub(format!("`{id}` is no repository: expected OWNER/NAME")));
        }
        cache::check_path(id)?;
        cache::check_path(revision)?;
        Ok(HubRepo {
            hub: self.clone(),
            api: RepoApi { api: self.api.clone(), kind, id: id.into() },
            revision: revision.into(),
            cache: RepoCache::new(&self.cache_dir, kind, id),
            commit: OnceLock::new(),
        })
    }
}

impl HubRepo {
    /// Downloads `file` to `dir/file`, past the cache, and gives its path. Nothing is done where it is there already.
    pub fn save(&self, file: &str, dir: &Path) -> Result<PathBuf> {
        cache::check_path(file)?;
        let path = dir.join(file);
        let parent = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(parent).map_err(Error::io("cannot make the folder", parent))?;
        let commit = self.commit()?;
        if commit.offline {
            let cached = self.fetch(file)?;
            let mut content = std::fs::File::open(&cached).map_err(Error::io("cannot read", &cached))?;
            files::write(&path, &mut content).map_err(Error::io("cannot write", &path))?;
            return Ok(path);
        }
        let entry = self.entry(commit, file)?;
        if entry.is_at(&path)? {
            return Ok(path);
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let part = parent.join(format!(".{name}.{}.part", entry.git_id));
        download(self, &commit.hash, &entry, &part, &path)?;
        Ok(path)
    }

    /// Bytes `range` of `file`; `bar` moves while they come.
    pub(super) fn read(&self, commit: &str, file: &str, range: Range<u64>, bar: &ProgressBar) -> Result<Vec<u8>> {
        self.retrying(|| self.api.read(commit, file, range.clone(), bar))
            .map_err(|fault| explain::explain(self, Some(file), &fault))
    }

    fn commit(&self) -> Result<&Commit> {
        match self.commit.get() {
            Some(commit) => Ok(commit),
            None => {
                let commit = self.look_up_commit()?;
                Ok(self.commit.get_or_init(|| commit))
            }
        }
    }

    fn look_up_commit(&self) -> Result<Commit> {
        if cache::is_git_id(&self.revision) {
            return Ok(Commit { hash: self.revision.clone(), offline: self.hub.offline });
        }
        let cached = self.cache.commit(&self.revision);
        if self.hub.offline {
            let hash = cached.ok_or_else(|| explain::not_cached(self, None))?;
            return Ok(Commit { hash, offline: true });
        }
        let answer = self.retrying(|| self.api.commit(&self.revision));
        match (answer, cached) {
            (Ok(Some(hash)), _) if cache::is_git_id(&hash) => Ok(Commit { hash, offline: false }),
            (Ok(_), _) => Err(Error::Hub(format!(
                "{} did not say which commit `{}` of {} is",
                self.hub.endpoint, self.revision, self.api.id
            ))),
            (Err(fault), Some(hash)) if explain::wait(&fault).is_some() => {
                tracing::warn!("{fault}: going on with what is in {}", self.hub.cache_dir.display());
                Ok(Commit { hash, offline: true })
            }
            (Err(fault), _) => Err(explain::explain(self, None, &fault)),
        }
    }

    fn entry(&self, commit: &Commit, file: &str) -> Result<Entry> {
        let found = self.retrying(|| self.api.entry(&commit.hash, file));
        let found = found.map_err(|fault| explain::explain(self, Some(file), &fault))?;
        let entry = found.into_iter().find_map(Entry::of).filter(|entry| entry.path == file);
        entry.ok_or_else(|| explain::no_such_file(self, file))
    }

    /// Repeats a call that failed for a reason that may pass.
    fn retrying<T>(&self, mut call: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
        let mut tries = 1;
        loop {
            let fault = match call() {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            let Some(asked_for) = explain::wait(&fault).filter(|_| tries < TRIES) else { return Err(fault) };
            let wait = asked_for.max(self.hub.first_wait * 2_u32.pow(tries - 1)).min(MAX_WAIT);
            tracing::warn!("{fault}; trying again in {wait:.1?}");
            sleep(wait);
            tries += 1;
        }
    }
}

impl RemoteFiles for HubRepo {
    fn list(&self, pattern: &str) -> Result<Vec<String>> {
        let glob = glob::Pattern::new(pattern).map_err(|e| Error::Hub(format!("`{pattern}` is no glob: {e}")))?;
        let commit = self.commit()?;
        let mut files = if commit.offline {
            self.cache.files(&commit.hash)
        } else {
            // Only the folder that the pattern names: some repositories have a hundred thousand files.
            let literal = &pattern[..pattern.find(['*', '?', '[']).unwrap_or(pattern.len())];
            let folder = literal.rsplit_once('/').map(|(folder, _)| folder);
            match self.retrying(|| self.api.tree(&commit.hash, folder)) {
                Ok(tree) => tree.into_iter().filter_map(Entry::of).map(|entry| entry.path).collect(),
                Err(fault) if explain::status(&fault) == Some(404) => Vec::new(),
                Err(fault) => return Err(explain::explain(self, None, &fault)),
            }
        };
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        files.retain(|file| glob.matches_with(file, options));
        files.sort();
        Ok(files)
    }

    fn fetch(&self, file: &str) -> Result<PathBuf> {
        cache::check_path(file)?;
        let commit = self.commit()?;
        let path = self.cache.snapshot(&commit.hash, file);
        if path.exists() {
            return Ok(path);
        }
        if commit.offline {
            return Err(explain::not_cached(self, Some(file)));
        }
        let entry = self.entry(commit, file)?;
        self.cache.store(&self.revision, &commit.hash, &entry, |part, blob| {
            download(self, &commit.hash, &entry, part, blob)
        })?;
        Ok(path)
    }
}

impl Entry {
    /// `None` for a folder. The id becomes a file name, so it must be one that git could have given.
    fn of(entry: RepoTreeEntry) -> Option<Self> {
        match entry {
            RepoTreeEntry::File { oid, size, path, lfs, .. } if cache::is_git_id(&oid) => Some(Self {
                path,
                size: lfs.as_ref().and_then(|lfs| lfs.size).unwrap_or(size),
                git_id: oid,
                is_lfs: lfs.is_some(),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_that_git_never_gave_is_not_made_a_file_name() {
        let listed = |oid: &str| {
            let entry = serde_json::json!({ "type": "file", "oid": oid, "size": 1, "path": "a" });
            Entry::of(serde_json::from_value(entry).unwrap()).is_some()
        };
        assert!(listed("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"));
        assert!(!listed("../../../../../../../../../../etc/passwd"));
        assert!(!listed(""));
    }

    #[test]
    fn an_endpoint_that_is_no_url_is_named() {
        let options = HubOptions { endpoint: Some("huggingface".into()), ..HubOptions::from_env(None) };
        let Err(Error::Hub(message)) = Hub::new(options) else { panic!("a hub was made") };
        assert!(message.contains("HF_ENDPOINT is no URL"), "{message}");
    }
}
