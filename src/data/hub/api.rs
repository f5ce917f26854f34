//! The hub's HTTP interface. What there is to know of a repository or a file comes by hf-hub. Lists and contents of files are
//! read here: hf-hub follows a list to any host with the token, and reads answers whole, whatever their length.

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use hf_hub::repository::{RepoTreeEntry, RepoType, RepoTypeDataset, RepoTypeModel};
use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync};
use indicatif::ProgressBar;
use reqwest::blocking::{Client, RequestBuilder, Response};
use reqwest::redirect::{Action, Attempt, Policy};
use reqwest::{Url, header};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::explain::chain;
use super::{HubOptions, RepoKind};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// A hub that goes silent for so long, or has not answered hf-hub, is asked again.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A page of a listing has a thousand files, of some hundred bytes each.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// All pages of a listing; some repositories have a hundred thousand files.
const MAX_LISTING_BYTES: u64 = 256 << 20;
/// What a page counts at the least, so that empty ones come to an end as well.
const MIN_PAGE_BYTES: u64 = 100_000;

/// A hub, and who asks.
#[derive(Clone)]
pub struct Api {
    hub: HFClientSync,
    client: Client,
    endpoint: Url,
    cache_dir: PathBuf,
    token: Option<String>,
}

/// A repository of it.
#[derive(Clone)]
pub struct RepoApi {
    pub api: Api,
    pub kind: RepoKind,
    pub id: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("{}", chain(.0))]
    Network(reqwest::Error),
    #[error("the answer breaks off: {}", chain(.0))]
    BrokenOff(io::Error),
    #[error("status {} from {}{}{}", .0.status, .0.url, if .0.message.is_empty() { "" } else { ": " }, .0.message)]
    Refused(Box<Refusal>),
    /// An answer that no hub gives.
    #[error("{0}")]
    Nonsense(String),
}

#[derive(Debug)]
pub struct Refusal {
    pub status: u16,
    pub url: String,
    /// The hub's own name for the fault, such as `GatedRepo`.
    pub code: String,
    pub message: String,
    pub retry_after: Duration,
}

impl Api {
    /// # Errors
    /// What is wrong with the endpoint, or with the system.
    pub fn new(options: &HubOptions) -> Result<Self, String> {
        // Two clients of one kind, as hf-hub's is asynchronous.
        macro_rules! client {
            ($builder:expr) => {
                $builder
                    .user_agent(concat!("titan/", env!("CARGO_PKG_VERSION")))
                    .connect_timeout(CONNECT_TIMEOUT)
                    .timeout(TIMEOUT)
                    .redirect(Policy::custom(follow))
                    .build()
                    .map_err(|e| format!("cannot use the hub: {}", chain(&e)))?
            };
        }
        // Tries are counted in `HubRepo`, where the hub's own wishes are heeded and the user is told.
        let mut hub = HFClient::builder().client(client!(reqwest::Client::builder())).retry_max_attempts(0);
        if let Some(endpoint) = &options.endpoint {
            hub = hub.endpoint(endpoint.trim_end_matches('/'));
        }
        if let Some(dir) = &options.cache_dir {
            hub = hub.cache_dir(dir);
        }
        let token = options.token.clone().or_else(stored_token);
        if let Some(token) = &token {
            hub = hub.token(token);
        }
        let bad = |error: HFError| match error {
            HFError::Url(error) => format!("HF_ENDPOINT is no URL: {error}"),
            error => format!("cannot use the hub: {}", chain(&error)),
        };
        let hub = hub.build().map_err(bad)?;
        let (endpoint, cache_dir) = (hub.endpoint().parse::<Url>(), hub.cache_dir().to_owned());
        let endpoint = endpoint.map_err(|error| bad(error.into()))?;
        let hub = HFClientSync::from_inner(hub).map_err(bad)?;
        Ok(Self { hub, client: client!(Client::builder()), endpoint, cache_dir, token })
    }

    /// Without a slash at its end.
    pub fn endpoint(&self) -> &str {
        self.endpoint.as_str().trim_end_matches('/')
    }

    pub fn cache_dir(&self) -> &Path {
        &self.cache_dir
    }

    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The token goes to the hub alone: its listings may go on elsewhere.
    fn get(&self, url: Url) -> RequestBuilder {
        let request = self.client.get(url.clone());
        match &self.token {
            Some(token) if url.origin() == self.endpoint.origin() => request.bearer_auth(token),
            _ => request,
        }
    }
}

/// What `hf auth login` wrote, unless no token is to be used that was not asked for: as hf-hub reads it.
fn stored_token() -> Option<String> {
    if env::var_os("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let path = env::var_os("HF_TOKEN_PATH").map_or_else(|| hf_hub::hf_home().join("token"), PathBuf::from);
    Some(fs::read_to_string(path).ok()?.trim().to_owned()).filter(|token| !token.is_empty())
}

impl RepoApi {
    /// The commit that `revision` is at, if the hub says so.
    pub fn commit(&self, revision: &str) -> Result<Option<String>, Fault> {
        let sha = || vec!["sha".to_owned()];
        Ok(match self.kind {
            RepoKind::Model => self.model().info().revision(revision).expand(sha()).send()?.sha,
            RepoKind::Dataset => self.dataset().info().revision(revision).expand(sha()).send()?.sha,
        })
    }

    /// What the hub lists under the name of a file, or a folder: nothing, if it has none.
    pub fn entry(&self, commit: &str, path: &str) -> Result<Vec<RepoTreeEntry>, Fault> {
        fn ask<T: RepoType>(
            repo: HFRepositorySync<T>,
            commit: &str,
            path: &str,
        ) -> Result<Vec<RepoTreeEntry>, HFError> {
            repo.get_paths_info().paths(vec![path.to_owned()]).revision(commit).send()
        }
        Ok(match self.kind {
            RepoKind::Model => ask(self.model(), commit, path)?,
            RepoKind::Dataset => ask(self.dataset(), commit, path)?,
        })
    }

    fn model(&self) -> HFRepositorySync<RepoTypeModel> {
        let (owner, name) = hf_hub::split_id(&self.id);
        self.api.hub.model(owner, name)
    }

    fn dataset(&self) -> HFRepositorySync<RepoTypeDataset> {
        let (owner, name) = hf_hub::split_id(&self.id);
        self.api.hub.dataset(owner, name)
    }

    /// All that is in a folder and below it; `None`: in the repository.
    pub fn tree(&self, commit: &str, folder: Option<&str>) -> Result<Vec<RepoTreeEntry>, Fault> {
        let mut url = self.url("tree", commit, folder);
        url.set_query(Some("recursive=true"));
        let (mut next, mut found, mut n_bytes) = (Some(url), Vec::new(), 0);
        while let Some(url) = next {
            let response = send(self.api.get(url))?;
            next = next_page(&response);
            let page = read(response, MAX_ANSWER_BYTES)?;
            n_bytes += MIN_PAGE_BYTES.max(page.len() as u64);
            if n_bytes > MAX_LISTING_BYTES {
                return Err(Fault::Nonsense("its list of files does not end".into()));
            }
            found.extend(parse::<Vec<RepoTreeEntry>>(&page)?);
        }
        Ok(found)
    }

    /// Bytes `range` of a file; `bar` moves while they come.
    pub fn read(&self, commit: &str, file: &str, range: Range<u64>, bar: &ProgressBar) -> Result<Vec<u8>, Fault> {
        let Range { start, end } = range;
        bar.set_position(start);
        let url = self.url("resolve", commit, Some(file));
        let response = send(self.api.get(url).header(header::RANGE, format!("bytes={start}-{}", end - 1)))?;
        read(bar.wrap_read(response), end - start)
    }

    fn url(&self, what: &str, revision: &str, path: Option<&str>) -> Url {
        let home = match (self.kind, what) {
            (RepoKind::Model, "resolve") => &[][..],
            (RepoKind::Model, _) => &["api", "models"],
            (RepoKind::Dataset, "resolve") => &["datasets"],
            (RepoKind::Dataset, _) => &["api", "datasets"],
        };
        let mut url = self.api.endpoint.clone();
        // A URL without a path, such as `mailto:`, stays as it is, and no request will go there.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(home).extend(self.id.split('/'));
            // A revision is one segment, whatever it is called.
            segments.extend([what, revision]).extend(path.into_iter().flat_map(|path| path.split('/')));
        }
        url
    }
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

impl From<HFError> for Fault {
    fn from(error: HFError) -> Self {
        let retry_after = match &error {
            HFError::RateLimited { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let context = match error {
            HFError::Request { source, .. } => return Self::Network(source),
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context }
            | HFError::RateLimited { context, .. }
            | HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => context,
            other => return Self::Nonsense(format!("its answer makes no sense: {}", chain(&other))),
        };
        Self::Refused(Box::new(Refusal {
            status: context.status.as_u16(),
            url: context.url,
            code: context.error_code.unwrap_or_default(),
            message: context.server_message.unwrap_or_default(),
            retry_after,
        }))
    }
}

fn send(request: RequestBuilder) -> Result<Response, Fault> {
    let response = request.send().map_err(Fault::Network)?;
    if response.status().is_success() {
        return Ok(response);
    }
    let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
    let (status, url) = (response.status().as_u16(), response.url().to_string());
    let (code, told) = (header("x-error-code").unwrap_or_default(), header("x-error-message"));
    // A date, which it may be too, is nothing that the hub sends.
    let retry_after = header("retry-after").and_then(|seconds| seconds.trim().parse().ok()).unwrap_or_default();
    let body: Value = read(response, MAX_ANSWER_BYTES).and_then(|body| parse(&body)).unwrap_or_default();
    let message = told.or_else(|| Some(body["error"].as_str()?.to_owned())).unwrap_or_default();
    let retry_after = Duration::from_secs(retry_after);
    Err(Fault::Refused(Box::new(Refusal { status, url, code, message, retry_after })))
}

/// Where a listing goes on, as a `Link` header says: `<https://...>; rel="next"`.
fn next_page(response: &Response) -> Option<Url> {
    let links = response.headers().get(header::LINK)?.to_str().ok()?;
    let next = links.split(',').find(|link| link.contains("rel=\"next\""))?;
    let (_, url) = next.split_once('<')?;
    response.url().join(url.split('>').next()?).ok()
}

fn read(body: impl Read, max_bytes: u64) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    body.take(max_bytes + 1).read_to_end(&mut bytes).map_err(Fault::BrokenOff)?;
    match bytes.len() as u64 > max_bytes {
        true => Err(Fault::Nonsense(format!("its answer goes on after {max_bytes} bytes, where it should end"))),
        false => Ok(bytes),
    }
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(json).map_err(|error| Fault::Nonsense(format!("its answer makes no sense: {error}")))
}
