//! Files that live elsewhere, as datasets see them.

use std::path::PathBuf;
use std::sync::Arc;

use crate::Result;

/// The files of one repository, fetched as they are needed and kept on disk.
pub trait RemoteFiles: Send + Sync {
    /// Paths within the repository that match a glob (`*` stays within a folder, `**` crosses folders).
    fn list(&self, pattern: &str) -> Result<Vec<String>>;

    /// The local copy of a listed file, downloaded now unless it was before. May take minutes.
    fn fetch(&self, file: &str) -> Result<PathBuf>;
}

/// Opens the dataset repository of a name such as `allenai/c4`.
pub type OpenRemote<'a> = &'a dyn Fn(&str) -> Result<Arc<dyn RemoteFiles>>;
