//! `manifest.json`: what a checkpoint folder must hold, to the bit.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::staged::hex;
use super::step_folder::{CONFIG, step_of};
use crate::tools::files::is_plain;

pub const MANIFEST: &str = "manifest.json";
const FORMAT_VERSION: u32 = 2;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format_version: u32,
    pub step: usize,
    pub kind: Kind,
    /// Fingerprint of the config of the run: equal in the steps that one config made.
    pub config_sha256: String,
    /// By path relative to the folder, with `/`.
    pub files: BTreeMap<String, FileFacts>,
    /// Of this manifest with this field empty.
    sha256: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Everything that training needs to go on.
    Full,
    /// Weights, config and tokenizer.
    ModelOnly,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileFacts {
    pub size: u64,
    pub sha256: String,
}

/// The part of a manifest that every version has.
#[derive(Deserialize)]
struct Versioned {
    format_version: u32,
}

/// What is wrong with a folder, in words for its owner.
pub type Damage = String;

impl Manifest {
    pub fn new(step: usize, kind: Kind, files: BTreeMap<String, FileFacts>) -> Self {
        let config_sha256 = files.get(CONFIG).map_or_else(String::new, |facts| facts.sha256.clone());
        let format_version = FORMAT_VERSION;
        let mut manifest = Self { format_version, step, kind, config_sha256, files, sha256: String::new() };
        let mut hasher = Sha256::new();
        hasher.update(manifest.to_json());
        manifest.sha256 = hex(hasher);
        manifest
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("strings and numbers only")
    }

    pub fn read(folder: &Path) -> Result<Self, Damage> {
        let json = fs::read(folder.join(MANIFEST)).map_err(|error| format!("{MANIFEST}: {error}"))?;
        Self::from_json(&json)
    }

    /// Accepts a manifest only if it is, byte for byte, what titan wrote.
    pub fn from_json(json: &[u8]) -> Result<Self, Damage> {
        let damaged = |error| format!("{MANIFEST} is damaged: {error}");
        let Versioned { format_version } = serde_json::from_slice(json).map_err(damaged)?;
        if format_version != FORMAT_VERSION {
            let needed = if format_version > FORMAT_VERSION { "a newer" } else { "an older" };
            return Err(format!("{MANIFEST}: format version {format_version} needs {needed} titan"));
        }
        let found: Self = serde_json::from_slice(json).map_err(damaged)?;
        let manifest = Self::new(found.step, found.kind, found.files);
        if manifest.to_json() != json {
            return Err(format!("{MANIFEST} is damaged: its hash does not match"));
        }
        if let Some(path) = manifest.files.keys().find(|path| !is_plain(path)) {
            return Err(format!("{MANIFEST} names a file outside its folder: {path}"));
        }
        Ok(manifest)
    }

    /// Whether it is that of this folder, going by the name.
    pub fn is_of(&self, folder: &Path) -> Result<(), Damage> {
        match folder.file_name().and_then(|name| step_of(name.to_str()?)) {
            Some(step) if step != self.step => {
                Err(format!("{MANIFEST} is that of step-{}, not of step-{step}", self.step))
            }
            _ => Ok(()),
        }
    }

    /// Compares the folder with the manifest: names and sizes of all files, hashes of those that `hashed` selects.
    ///
    /// Hidden files that the manifest does not name are left to the file manager that put them there.
    pub fn verify(&self, folder: &Path, hashed: impl Fn(&str) -> bool + Sync) -> Result<(), Damage> {
        let mut damages: Vec<Damage> = self
            .files
            .par_iter()
            .filter_map(|(name, facts)| verify_file(folder, name, facts, hashed(name)).err())
            .collect();
        let found = files_in(folder, "").map_err(|error| error.to_string())?;
        damages.extend(
            found
                .into_iter()
                .filter(|name| name != MANIFEST && !self.files.contains_key(name))
                .map(|name| format!("{name} is not in {MANIFEST}")),
        );
        if damages.is_empty() { Ok(()) } else { Err(damages.join("; ")) }
    }
}

fn verify_file(folder: &Path, name: &str, facts: &FileFacts, hashed: bool) -> Result<(), Damage> {
    let path = folder.join(name);
    let fault = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => format!("{name} is missing"),
        _ => format!("{name}: {error}"),
    };
    if !path.canonicalize().map_err(fault)?.starts_with(folder.canonicalize().map_err(fault)?) {
        return Err(format!("{name} is a link out of the folder"));
    }
    let size = path.metadata().map_err(fault)?.len();
    if size != facts.size {
        return Err(format!("{name} has {size} bytes instead of {}", facts.size));
    }
    if hashed && sha256_of(&path).map_err(fault)? != facts.sha256 {
        return Err(format!("{name} has changed: its sha256 does not match"));
    }
    Ok(())
}

fn sha256_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(hasher)),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Visible files below `folder`, as the manifest names them.
fn files_in(folder: &Path, prefix: &str) -> io::Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        if entry.file_type()?.is_dir() {
            files.extend(files_in(&entry.path(), &format!("{prefix}{name}/"))?);
        } else {
            files.push(format!("{prefix}{name}"));
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(name: &str, content: &[u8]) -> (tempfile::TempDir, Manifest) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), content).unwrap();
        let mut hasher = Sha256::new();
        hasher.update(content);
        let facts = FileFacts { size: content.len() as u64, sha256: hex(hasher) };
        let manifest = Manifest::new(7, Kind::Full, BTreeMap::from([(name.to_owned(), facts)]));
        fs::write(folder.path().join(MANIFEST), manifest.to_json()).unwrap();
        (folder, manifest)
    }

    #[test]
    fn any_flipped_bit_of_the_manifest_is_noticed() {
        let (folder, manifest) = folder_with("file", b"weights");
        assert_eq!(Manifest::read(folder.path()).unwrap(), manifest);
        let json = manifest.to_json();
        for bit in 0..json.len() * 8 {
            let mut flipped = json.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::from_json(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let (_folder, manifest) = folder_with("file", b"weights");
        let json = String::from_utf8(manifest.to_json()).unwrap();
        for (version, needed) in [(FORMAT_VERSION - 1, "an older"), (FORMAT_VERSION + 1, "a newer")] {
            let other = json.replacen(&format!(": {FORMAT_VERSION},"), &format!(": {version},"), 1);
            let damage = Manifest::from_json(other.as_bytes()).unwrap_err();
            assert_eq!(damage, format!("manifest.json: format version {version} needs {needed} titan"));
        }
    }

    #[test]
    fn a_manifest_names_the_config_that_made_it() {
        let (_folder, manifest) = folder_with(CONFIG, b"[model]");
        let hash = Sha256::digest(b"[model]");
        assert_eq!(manifest.config_sha256, hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    }

    #[test]
    fn each_way_of_not_matching_is_named() {
        let check = |change: &dyn Fn(&Path)| {
            let (folder, manifest) = folder_with("file", b"weights");
            assert_eq!(manifest.verify(folder.path(), |_| true), Ok(()));
            change(folder.path());
            manifest.verify(folder.path(), |_| true).unwrap_err()
        };
        assert_eq!(
            check(&|folder| fs::write(folder.join("file"), b"Weights").unwrap()),
            "file has changed: its sha256 does not match"
        );
        assert_eq!(check(&|folder| fs::write(folder.join("file"), b"").unwrap()), "file has 0 bytes instead of 7");
        assert_eq!(check(&|folder| fs::remove_file(folder.join("file")).unwrap()), "file is missing");
        assert_eq!(check(&|folder| fs::write(folder.join("more"), b"").unwrap()), "more is not in manifest.json");
        assert_eq!(
            check(&|folder| {
                fs::remove_file(folder.join("file")).unwrap();
                std::os::unix::fs::symlink(std::env::current_exe().unwrap(), folder.join("file")).unwrap();
            }),
            "file is a link out of the folder"
        );
    }

    #[test]
    fn paths_that_leave_the_folder_are_refused() {
        for name in ["../file", "/etc/passwd", "a/../../file", "", "a\\..\\b"] {
            let (folder, _) = folder_with(name, b"weights");
            assert!(Manifest::read(folder.path()).unwrap_err().contains("outside its folder"), "{name}");
        }
        assert!(is_plain("tokenizer/tokenizer.json"));
    }
}
