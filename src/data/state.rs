//! What a checkpoint keeps of the data: where it was, and enough to tell whether it is still the same.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::data::datasets::{Files, Position};

/// File names that a state may take, in bytes, so that it stays small whatever the dataset.
const NAMES_BYTES: usize = 48 * 1024;

#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    pub dataset: String,
    pub seq_len: usize,
    pub shuffle_seed: Option<u64>,
    /// Name of `position.file`, which may have another index by now.
    pub file: Option<String>,
    pub position: Position,
    n_files: usize,
    /// Name and bytes of as many files as there is room for.
    files: Vec<(String, Option<u64>)>,
}

impl State {
    pub fn new(dataset: &str, seq_len: usize, shuffle_seed: Option<u64>, position: Position, files: &Files) -> Self {
        let mut room = NAMES_BYTES;
        let named = files.entries.iter().map_while(|entry| {
            room = room.checked_sub(entry.name.len() + 32)?;
            Some((entry.name.clone(), entry.bytes))
        });
        Self {
            dataset: dataset.to_owned(),
            seq_len,
            shuffle_seed,
            file: position.file.map(|file| files.entries[file].name.clone()),
            position,
            n_files: files.entries.len(),
            files: named.collect(),
        }
    }

    /// What is not as it was, each as a sentence without its full stop.
    pub fn changes(&self, now: &Self, files: &Files) -> Vec<String> {
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
        let bytes_now: HashMap<_, _> = files.entries.iter().map(|entry| (&entry.name, entry.bytes)).collect();
        for (name, bytes) in &self.files {
            match (bytes_now.get(name), bytes) {
                (None, _) => changes.push(format!("data file {name} is gone")),
                (Some(Some(now)), Some(bytes)) if now != bytes => {
                    changes.push(format!("data file {name} had {bytes} bytes, now it has {now}"));
                }
                _ => {}
            }
        }
        if self.n_files != now.n_files {
            changes.push(format!("the dataset had {} files, now it has {}", self.n_files, now.n_files));
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dataset: &str, seq_len: usize, shuffle: Option<u64>, sizes: &[(&str, usize)]) -> (State, Files) {
        let dir = tempfile::tempdir().unwrap();
        for &(name, bytes) in sizes {
            std::fs::write(dir.path().join(name), vec![b'x'; bytes]).unwrap();
        }
        let files = Files::local(dir.path().to_str().unwrap(), &[".txt"]).unwrap();
        (State::new(dataset, seq_len, shuffle, Position::default(), &files), files)
    }

    #[test]
    fn what_changed_since_a_checkpoint_is_named() {
        let (then, files) = state("text", 8, None, &[("a.txt", 1), ("b.txt", 2), ("c.txt", 3)]);
        assert_eq!(then.changes(&then, &files), [""; 0]);

        let (now, files) = state("tokens", 8, Some(1), &[("a.txt", 1), ("c.txt", 30)]);
        assert_eq!(
            then.changes(&now, &files),
            [
                "the dataset was text, now it is tokens",
                "data.shuffle was turned on",
                "data file b.txt is gone",
                "data file c.txt had 3 bytes, now it has 30",
                "the dataset had 3 files, now it has 2",
            ]
        );
    }

    #[test]
    fn another_seq_len_matters_only_where_windows_are_shuffled() {
        let changes = |dataset, shuffle| {
            let (then, files) = state(dataset, 8, shuffle, &[("a.txt", 1)]);
            then.changes(&State { seq_len: 16, ..state(dataset, 8, shuffle, &[("a.txt", 1)]).0 }, &files)
        };
        assert_eq!(changes("tokens", Some(1)), ["seq_len was 8, now it is 16"]);
        assert_eq!(changes("tokens", None), [""; 0]);
        assert_eq!(changes("text", Some(1)), [""; 0]);
    }
}
