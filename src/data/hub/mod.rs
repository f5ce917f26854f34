//! The Hugging Face hub: files of model and dataset repositories, kept in the cache that all its programs share.
//!
//! Every file is checked against the id that git knows it by. Downloads go in pieces into a `.part` file and go on
//! where they were cut off. `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean elsewhere.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::remote::RemoteFiles;
use crate::Result;

#[cfg(not(feature = "hub"))]
mod absent;
#[cfg(feature = "hub")]
mod api;
#[cfg(feature = "hub")]
mod cache;
#[cfg(feature = "hub")]
mod download;
#[cfg(feature = "hub")]
mod explain;
#[cfg(feature = "hub")]
mod repo;

#[cfg(not(feature = "hub"))]
pub use absent::{Hub, HubRepo};
#[cfg(feature = "hub")]
pub use repo::{Hub, HubRepo};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    Model,
    Dataset,
}

/// Where the hub is, and who asks. What is `None` comes from the environment.
#[derive(Clone, Debug)]
pub struct HubOptions {
    pub token: Option<String>,
    pub endpoint: Option<String>,
    pub cache_dir: Option<PathBuf>,
    /// Use what is in the cache, and nothing else.
    pub offline: bool,
    /// The wait before the second try; each further one is twice as long.
    pub first_wait: Duration,
}

impl HubOptions {
    /// What the environment says, with `token` before its own.
    pub fn from_env(token: Option<String>) -> Self {
        let offline = std::env::var("HF_HUB_OFFLINE").unwrap_or_default().to_uppercase();
        let implicit = std::env::var_os("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_none();
        let token = token.or_else(|| std::env::var("HF_TOKEN").ok().filter(|_| implicit));
        Self {
            // A secret that was pasted or read from a file often ends with a line break.
            token: token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()),
            endpoint: None,
            cache_dir: None,
            offline: ["1", "TRUE", "YES", "ON"].contains(&offline.as_str()),
            first_wait: Duration::from_secs(1),
        }
    }
}

/// The dataset repository of a name such as `allenai/c4`, as the environment says. Asks nothing yet.
///
/// # Errors
/// [`crate::Error::Hub`] if that cannot be a name, or this build has no hub.
pub fn open_dataset(name: &str) -> Result<Arc<dyn RemoteFiles>> {
    Ok(Arc::new(Hub::from_env(None)?.repo(RepoKind::Dataset, name, None)?))
}
