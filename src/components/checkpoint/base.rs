//! The weights that adapters were trained for, by name.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::manifest::MANIFEST;
use super::staged::hex;
use super::tensors::weight_files;
use super::{StepFolder, Use, Weights};
use crate::models::args::DecoderArgs;
use crate::{Error, Result};

/// In the folder of a checkpoint that holds adapters only.
pub const BASE: &str = "base.json";

/// Bytes at both ends of a file that tell whether it is still the same: they hold its header, and weights.
const SAMPLE_BYTES: u64 = 1 << 20;

/// What `base.json` says: where the weights are, and how to tell whether they are still the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub path: PathBuf,
    /// Whether they have Hugging Face's names.
    pub hugging_face: bool,
    /// Of the sizes and ends of all safetensors.
    pub sha256: String,
}

impl Base {
    pub fn new(path: &Path, hugging_face: bool) -> Result<Self> {
        let path = path.canonicalize().map_err(Error::io("find", path))?;
        let sha256 = fingerprint(&path)?;
        Ok(Self { path, hugging_face, sha256 })
    }

    /// The weights, after a look whether they are those.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if they are gone, or changed.
    pub fn open(&self, model_name: &str, args: &DecoderArgs) -> Result<Weights> {
        if !self.path.exists() {
            return Err(Error::Checkpoint(format!(
                "{} is gone: it holds the weights that this checkpoint's adapters were trained for\n   = move it back; or run \
                 the training again with checkpoint.initial_load_path where it is now, which exports the merged model",
                self.path.display()
            )));
        }
        self.check(&Self::new(&self.path, self.hugging_face)?)?;
        if self.hugging_face {
            // If they have 8 bits, the run that began with them asked for that.
            return Weights::open_hugging_face(&self.path, model_name, args, true);
        }
        if self.path.join(MANIFEST).is_file() {
            let folder = StepFolder::open(&self.path, Use::Model)
                .map_err(|damage| Error::Checkpoint(format!("{} cannot be used: {damage}", self.path.display())))?;
            return folder.model();
        }
        Weights::open(&self.path)
    }

    /// # Errors
    /// [`Error::Checkpoint`] if `other` is not the same weights, wherever they lie.
    pub fn check(&self, other: &Self) -> Result<()> {
        if self.sha256 == other.sha256 {
            return Ok(());
        }
        Err(Error::Checkpoint(format!(
            "{} does not hold the weights that the adapters were trained for, those of {}, or they have changed",
            other.path.display(),
            self.path.display()
        )))
    }
}

fn fingerprint(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    for path in weight_files(path)? {
        let mut file = File::open(&path).map_err(Error::io("open", &path))?;
        let size = file.metadata().map_err(Error::io("read", &path))?.len();
        hasher.update(size.to_le_bytes());
        for start in [0, size.saturating_sub(SAMPLE_BYTES)] {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(start)).map_err(Error::io("read", &path))?;
            file.by_ref().take(SAMPLE_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", &path))?;
            hasher.update(&bytes);
        }
    }
    Ok(hex(hasher))
}
