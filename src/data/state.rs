//! What a checkpoint keeps of the data: where it was, and enough to tell whether it is still the same.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::data::datasets::{FileEntry, Files, Position};
use crate::{Error, Result};

/// What files may take of a state, in bytes, so that it stays small whatever the dataset.
const FILES_BYTES: usize = 48 * 1024;

/// What a file takes of a state beside its name.
const FACTS_BYTES: usize = 128;

/// A file up to this size is hashed whole, of a larger one [`SAMPLES`] evenly spread blocks, from the first to the last.
const WHOLE_BYTES: u64 = 1 << 20;
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

/// What tells whether files are what they were. Not when they were written: a copy of the data is the same data.
#[derive(Debug, Clone, Default)]
pub struct Fingerprints {
    /// As many files as there is room for.
    files: Vec<FileFacts>,
    /// Of names and sizes of the others.
    others: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct FileFacts {
    name: String,
    /// Unknown of remote files, so is their hash.
    bytes: Option<u64>,
    sha256: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    pub dataset: String,
    pub seq_len: usize,
    pub shuffle_seed: Option<u64>,
    /// Name of `position.file`, which may have another index by now.
    pub file: Option<String>,
    pub position: Position,
    n_files: usize,
    files: Vec<FileFacts>,
    /// As in [`Fingerprints`].
    other_files: Option<String>,
}

impl Fingerprints {
    /// Reads of local files what they are to be known by.
    pub fn of(files: &Files) -> Result<Self> {
        let mut room = FILES_BYTES;
        let fits = |entry: &&FileEntry| {
            let rest = room.checked_sub(entry.name.len() + FACTS_BYTES);
            room = rest.unwrap_or(0);
            rest.is_some()
        };
        let n = files.entries.iter().take_while(fits).count();
        let (named, others) = files.entries.split_at(n);
        let facts = |entry: &FileEntry| {
            // What has no size may be a pipe, of which nobody else would read these bytes.
            let bytes = entry.bytes.filter(|bytes| *bytes > 0);
            let sha256 = bytes.map(|bytes| sampled_hash(entry, bytes)).transpose()?;
            Ok(FileFacts { name: entry.name.clone(), bytes: entry.bytes, sha256 })
        };
        let mut hasher = Sha256::new();
        others.iter().for_each(|entry| hasher.update(format!("{}\0{:?}\0", entry.name, entry.bytes)));
        let others = (!others.is_empty()).then(|| short_hex(hasher));
        Ok(Self { files: named.par_iter().map(facts).collect::<Result<_>>()?, others })
    }
}

fn sampled_hash(entry: &FileEntry, bytes: u64) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut read = || -> std::io::Result<()> {
        let mut file = File::open(entry.path())?;
        let (samples, sample_bytes) = if bytes <= WHOLE_BYTES { (1, bytes) } else { (SAMPLES, SAMPLE_BYTES) };
        for sample in 0..samples {
            let mut block = Vec::new();
            file.seek(SeekFrom::Start((bytes - sample_bytes) * sample / (samples - 1).max(1)))?;
            file.by_ref().take(sample_bytes).read_to_end(&mut block)?;
            hasher.update(&block);
        }
        Ok(())
    };
    read().map_err(Error::io("cannot read", entry.path()))?;
    Ok(short_hex(hasher))
}

/// Enough of a hash to tell files apart that nobody made to be alike.
fn short_hex(hasher: Sha256) -> String {
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

impl State {
    pub fn new(
        dataset: &str,
        seq_len: usize,
        shuffle_seed: Option<u64>,
        position: Position,
        files: &Files,
        fingerprints: &Fingerprints,
    ) -> Self {
        Self {
            dataset: dataset.to_owned(),
            seq_len,
            shuffle_seed,
            file: position.file.map(|file| files.entries[file].name.clone()),
            position,
            n_files: files.entries.len(),
            files: fingerprints.files.clone(),
            other_files: fingerprints.others.clone(),
        }
    }

    /// What is not as it was, each as a sentence without its full stop.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        if self.dataset != now.dataset {
            changes.push(format!("the dataset was {}, now it is {}", self.dataset, now.dataset));
        }
        if self.shuffle_seed.is_some() != now.shuffle_seed.is_some() {
            let turned = if now.shuffle_seed.is_some() { "on" } else { "off" };
            changes.push(format!("data.shuffle was turned {turned}"));
        }
        if self.shuffle_seed.is_some() && self.dataset == "tokens" && self.seq_len != now.seq_len {
            changes.push(format!("seq_len was {}, now it is {}", self.seq_len, now.seq_len));
        }
        let facts_now: HashMap<_, _> = now.files.iter().map(|file| (&file.name, file)).collect();
        for then in &self.files {
            let name = &then.name;
            match facts_now.get(name) {
                // It may be among those that there was no room for.
                None if now.other_files.is_some() => {}
                None => changes.push(format!("data file {name} is gone")),
                Some(now) => match (then.bytes, now.bytes) {
                    (Some(then), Some(now)) if then != now => {
                        changes.push(format!("data file {name} had {then} bytes, now it has {now}"));
                    }
                    _ if then.sha256.is_some() && then.sha256 != now.sha256 => {
                        changes.push(format!("data file {name} has other contents"));
                    }
                    _ => {}
                },
            }
        }
        if self.n_files != now.n_files {
            changes.push(format!("the dataset had {} files, now it has {}", self.n_files, now.n_files));
        } else if self.other_files != now.other_files {
            let n = self.n_files - self.files.len();
            changes.push(format!("names or sizes of the last {n} data files have changed"));
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dataset: &str, seq_len: usize, shuffle: Option<u64>, files: &[(&str, &[u8])]) -> State {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let files = Files::local(dir.path().to_str().unwrap(), &[".txt"]).unwrap();
        let fingerprints = Fingerprints::of(&files).unwrap();
        State::new(dataset, seq_len, shuffle, Position::default(), &files, &fingerprints)
    }

    #[test]
    fn what_changed_since_a_checkpoint_is_named() {
        let then = state("text", 8, None, &[("a.txt", b"x"), ("b.txt", b"xx"), ("c.txt", b"xxx"), ("d.txt", b"same")]);
        assert_eq!(then.changes(&then), [""; 0]);

        let now = state("tokens", 8, Some(1), &[("a.txt", b"y"), ("c.txt", &[b'x'; 30]), ("d.txt", b"same")]);
        assert_eq!(
            then.changes(&now),
            [
                "the dataset was text, now it is tokens",
                "data.shuffle was turned on",
                "data file a.txt has other contents",
                "data file b.txt is gone",
                "data file c.txt had 3 bytes, now it has 30",
                "the dataset had 4 files, now it has 3",
            ]
        );
    }

    #[test]
    fn another_seq_len_matters_only_where_windows_are_shuffled() {
        let changes = |dataset, shuffle| {
            let then = state(dataset, 8, shuffle, &[("a.txt", b"x")]);
            then.changes(&state(dataset, 16, shuffle, &[("a.txt", b"x")]))
        };
        assert_eq!(changes("tokens", Some(1)), ["seq_len was 8, now it is 16"]);
        assert_eq!(changes("tokens", None), [""; 0]);
        assert_eq!(changes("text", Some(1)), [""; 0]);
    }

    #[test]
    fn a_byte_that_changes_shows_anywhere_in_a_small_file_and_at_the_ends_of_a_large_one() {
        let mut bytes = vec![b'x'; WHOLE_BYTES as usize];
        let of = |bytes: &[u8]| state("text", 8, None, &[("a.txt", bytes)]);
        let (whole, then) = (bytes.len(), of(&bytes));
        for at in [0, 12_345, whole - 1] {
            bytes[at] = b'y';
            assert_eq!(then.changes(&of(&bytes)), ["data file a.txt has other contents"], "at {at}");
            bytes[at] = b'x';
        }
        bytes.resize(5 * whole + 7, b'x');
        let then = of(&bytes);
        for at in [0, bytes.len() - 1] {
            bytes[at] = b'y';
            assert_eq!(then.changes(&of(&bytes)), ["data file a.txt has other contents"], "at {at}");
            bytes[at] = b'x';
        }
    }

    #[test]
    fn files_that_no_room_is_left_for_are_told_apart_by_size() {
        let names: Vec<String> = (0..600).map(|i| format!("{i:05}.txt")).collect();
        let of = |last: &[u8]| {
            let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"x"[..])).collect();
            state("text", 8, None, &[&files[..599], &[(names[599].as_str(), last)]].concat())
        };
        let then = of(b"x");
        assert!(then.files.len() < 600 && serde_json::to_string(&then).unwrap().len() < 64 * 1024);
        assert_eq!(then.changes(&of(b"x")), [""; 0]);
        let n = 600 - then.files.len();
        assert_eq!(then.changes(&of(b"xx")), [format!("names or sizes of the last {n} data files have changed")]);
    }
}
