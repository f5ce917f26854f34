//! Repositories: which commit, which files, where they lie.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

use hf_hub::repository::{RepoTreeEntry, RepoTypeDataset, RepoTypeModel};
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync, HFResult};
use reqwest::redirect::{Action, Attempt, Policy};

use super::cache::{self, RepoCache};
use super::download::{Entry, download};
use super::{HubOptions, RepoKind, explain};
use crate::data::remote::RemoteFiles;
use crate::{Error, Result};

/// Tries before a hub that does not answer is given up: about half a minute.
const TRIES: u32 = 6;

/// The longest wait that a hub may ask for.
const MAX_WAIT: Duration = Duration::from_secs(300);

/// A hub that goes silent for so long is asked again.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Hub {
    client: HFClientSync,
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
    pub(super) kind: RepoKind,
    pub(super) id: String,
    pub(super) revision: String,
    handle: Handle,
    cache: RepoCache,
    commit: OnceLock<Commit>,
}

#[derive(Clone)]
enum Handle {
    Model(HFRepositorySync<RepoTypeModel>),
    Dataset(HFRepositorySync<RepoTypeDataset>),
}

/// The same call on either kind of repository.
macro_rules! on {
    ($handle:expr, $repo:ident => $call:expr) => {
        match $handle {
            Handle::Model($repo) => $call,
            Handle::Dataset($repo) => $call,
        }
    };
}

#[derive(Clone)]
struct Commit {
    hash: String,
    /// Known from the cache only: the hub was not, or could not be asked.
    offline: bool,
}

/// Follows the hub to its storage, and no further: reqwest takes the token off a request that goes to another host, but puts
/// it on again where that host redirects once more.
fn follow(attempt: Attempt) -> Action {
    let hops = attempt.previous();
    match hops.iter().all(|hop| hop.origin() == hops[0].origin()) {
        true if hops.len() <= 10 => attempt.follow(),
        true => attempt.error("it redirects too often"),
        false => attempt.error("its storage redirects once more"),
    }
}

impl Hub {
    /// The hub of the environment: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, and `HF_TOKEN` where `token` is `None`.
    pub fn from_env(token: Option<String>) -> Result<Self> {
        Self::new(HubOptions::from_env(token))
    }

    pub fn new(options: HubOptions) -> Result<Self> {
        let bad = |e: &dyn std::error::Error| Error::Hub(format!("cannot use the hub: {}", explain::chain(e)));
        let http = reqwest::Client::builder()
            .user_agent(concat!("titan/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(20))
            .read_timeout(READ_TIMEOUT)
            .redirect(Policy::custom(follow))
            .build()
            .map_err(|e| bad(&e))?;
        // Tries are counted here, where the hub's own wishes are heeded and the user is told.
        let mut builder = HFClient::builder().client(http).retry_max_attempts(0);
        if let Some(endpoint) = options.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(dir) = options.cache_dir {
            builder = builder.cache_dir(dir);
        }
        // Where no token is given, hf-hub reads the file that `hf auth login` writes.
        let has_token = options.token.is_some() || hf_hub::hf_home().join("token").is_file();
        if let Some(token) = options.token {
            builder = builder.token(token);
        }
        let client = builder.build().map_err(|e| match e {
            HFError::Url(e) => Error::Hub(format!("HF_ENDPOINT is no URL: {e}")),
            e => bad(&e),
        })?;
        Ok(Self {
            has_token,
            endpoint: client.endpoint().to_owned(),
            cache_dir: client.cache_dir().to_owned(),
            client: HFClientSync::from_inner(client).map_err(|e| bad(&e))?,
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
        let (owner, name) = hf_hub::split_id(id);
        let handle = match kind {
            RepoKind::Model => Handle::Model(self.client.model(owner, name)),
            RepoKind::Dataset => Handle::Dataset(self.client.dataset(owner, name)),
        };
        Ok(HubRepo {
            hub: self.clone(),
            kind,
            id: id.into(),
            revision: revision.into(),
            handle,
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
            std::fs::copy(self.fetch(file)?, &path).map_err(Error::io("cannot write", &path))?;
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

    /// Bytes `range` of `file`.
    pub(super) fn read(
        &self,
        commit: &str,
        file: &str,
        range: std::ops::Range<u64>,
        progress: hf_hub::progress::Progress,
    ) -> Result<impl AsRef<[u8]> + use<>> {
        self.retrying(|| {
            let (range, progress) = (range.clone(), progress.clone());
            on!(&self.handle, repo => repo.download_file_to_bytes().filename(file).revision(commit).range(range).progress(progress).send())
        })
        .map_err(|e| explain::explain(self, Some(file), &e))
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
        let answer = self.retrying(|| {
            let revision = self.revision.as_str();
            Ok(match &self.handle {
                Handle::Model(repo) => repo.info().revision(revision).expand(vec!["sha".into()]).send()?.sha,
                Handle::Dataset(repo) => repo.info().revision(revision).expand(vec!["sha".into()]).send()?.sha,
            })
        });
        match (answer, cached) {
            (Ok(Some(hash)), _) if cache::is_git_id(&hash) => Ok(Commit { hash, offline: false }),
            (Ok(_), _) => Err(Error::Hub(format!(
                "{} did not say which commit `{}` of {} is",
                self.hub.endpoint, self.revision, self.id
            ))),
            (Err(e), Some(hash)) if explain::wait(&e).is_some() => {
                tracing::warn!("{}: going on with what is in {}", explain::chain(&e), self.hub.cache_dir.display());
                Ok(Commit { hash, offline: true })
            }
            (Err(e), _) => Err(explain::explain(self, None, &e)),
        }
    }

    fn entry(&self, commit: &Commit, file: &str) -> Result<Entry> {
        let paths = || vec![file.to_owned()];
        let hash = commit.hash.as_str();
        let found = self
            .retrying(|| on!(&self.handle, repo => repo.get_paths_info().paths(paths()).revision(hash).send()))
            .map_err(|e| explain::explain(self, Some(file), &e))?;
        let entry = found.into_iter().find_map(Entry::of).filter(|entry| entry.path == file);
        entry.ok_or_else(|| explain::no_such_file(self, file))
    }

    /// Repeats a call that failed for a reason that may pass.
    fn retrying<T>(&self, mut call: impl FnMut() -> HFResult<T>) -> HFResult<T> {
        let mut tries = 1;
        loop {
            let error: HFError = match call() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let Some(asked_for) = explain::wait(&error).filter(|_| tries < TRIES) else { return Err(error) };
            let wait = asked_for.max(self.hub.first_wait * 2_u32.pow(tries - 1)).min(MAX_WAIT);
            tracing::warn!("{}; trying again in {wait:.1?}", explain::chain(&error));
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
            let hash = commit.hash.as_str();
            let tree = self.retrying(|| {
                on!(&self.handle, repo => repo.list_tree().revision(hash).maybe_path_in_repo(folder).recursive(true).send())
            });
            match tree {
                Ok(tree) => tree.into_iter().filter_map(Entry::of).map(|entry| entry.path).collect(),
                Err(e) if explain::status(&e) == Some(404) => Vec::new(),
                Err(e) => return Err(explain::explain(self, None, &e)),
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
