//! The hub in a titan that was built without it.

use std::path::{Path, PathBuf};

use super::{HubOptions, RepoKind};
use crate::data::remote::RemoteFiles;
use crate::{Error, Result};

/// Cannot be made in this build.
#[derive(Clone)]
pub enum Hub {}

/// Cannot be made in this build.
#[derive(Clone)]
pub enum HubRepo {}

impl Hub {
    pub fn from_env(token: Option<String>) -> Result<Self> {
        Self::new(HubOptions::from_env(token))
    }

    /// # Errors
    /// Always [`Error::Hub`].
    pub fn new(_: HubOptions) -> Result<Self> {
        Err(Error::Hub(
            "this titan was built without the Hugging Face hub\n  = build it with the feature `hub`, which is on by default: \
             cargo build --release"
                .into(),
        ))
    }

    pub fn repo(&self, _: RepoKind, _: &str, _: Option<&str>) -> Result<HubRepo> {
        match *self {}
    }
}

impl HubRepo {
    pub fn save(&self, _: &str, _: &Path) -> Result<PathBuf> {
        match *self {}
    }
}

impl RemoteFiles for HubRepo {
    fn list(&self, _: &str) -> Result<Vec<String>> {
        match *self {}
    }

    fn fetch(&self, _: &str) -> Result<PathBuf> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_feature_the_hub_says_how_to_get_it() {
        let Err(Error::Hub(message)) = Hub::from_env(None) else { panic!("a hub was made") };
        assert!(message.contains("cargo build --release"), "{message}");
    }
}
