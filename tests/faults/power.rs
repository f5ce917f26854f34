//! Power cuts: after any operation, and with any part of what was not synced gone, what was announced is there.
//!
//! What a disk may hold after a power cut is derived from the operations of a run. Bytes of a file are safe once the file is
//! synced, names once their folder is. Of the others any part may be there, whatever the order they were made in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rayon::prelude::*;
use titan::components::checkpoint::{Assets, CheckpointManager};
use titan::config;

use crate::common::{Job, Outcome, amount, held};
use crate::preloaded::{Operation, operations};

const DUMP_FOLDER: &str = "outputs";

/// Files and folders by number; 0 is the job's folder.
struct Disk(Vec<Node>);

enum Node {
    File { content: Vec<u8>, synced: Vec<u8> },
    Folder { names: Names, synced: Names, changes: Vec<Change> },
}

type Names = BTreeMap<String, usize>;

/// To the names of a folder, since it was synced.
#[derive(Clone)]
enum Change {
    Add(String, usize),
    Remove(String),
    Rename(String, String, usize),
}

/// How much of what was not synced a power cut leaves.
#[derive(Clone, Copy, Debug)]
enum Left {
    Nothing,
    /// Files exist, and are as empty as when they were synced last.
    Names,
    /// Synced names only, with all of their content.
    Content,
    /// Each change of a name, and a part of each file, as chance has it.
    Some(u64),
}

impl Disk {
    fn new() -> Self {
        Self(vec![Node::folder()])
    }

    fn find(&self, path: &Path) -> usize {
        path.iter().fold(0, |at, name| self.names(at)[name.to_str().unwrap()])
    }

    fn names(&self, folder: usize) -> &Names {
        match &self.0[folder] {
            Node::Folder { names, .. } => names,
            Node::File { .. } => panic!("a file holds no names"),
        }
    }

    fn change(&mut self, folder: &Path, change: Change) {
        let at = self.find(folder);
        let Node::Folder { names, changes, .. } = &mut self.0[at] else { panic!("{} is a file", folder.display()) };
        change.apply(names);
        changes.push(change);
    }

    fn make(&mut self, path: &Path, node: Node) {
        self.0.push(node);
        self.change(path.parent().unwrap(), Change::Add(name(path), self.0.len() - 1));
    }

    fn apply(&mut self, operation: &Operation) {
        let Operation { name: what, path, to, data } = operation;
        match what.as_str() {
            "folder" => self.make(path, Node::folder()),
            "create" if !self.names(self.find(path.parent().unwrap())).contains_key(&name(path)) => {
                self.make(path, Node::File { content: Vec::new(), synced: Vec::new() });
            }
            "write" => {
                let at = self.find(path);
                let Node::File { content, .. } = &mut self.0[at] else { panic!("{} is a folder", path.display()) };
                content.extend(data);
            }
            "sync" => {
                let at = self.find(path);
                match &mut self.0[at] {
                    Node::File { content, synced } => synced.clone_from(content),
                    Node::Folder { names, synced, changes } => {
                        synced.clone_from(names);
                        changes.clear();
                    }
                }
            }
            "rename" => {
                assert_eq!(path.parent(), to.parent(), "titan renames in one folder");
                self.change(path.parent().unwrap(), Change::Rename(name(path), name(to), self.find(path)));
            }
            "remove" => self.change(path.parent().unwrap(), Change::Remove(name(path))),
            "create" | "open" | "log" => {}
            other => panic!("{other}?"),
        }
    }

    /// Writes what a power cut leaves of a folder.
    fn restore(&self, at: usize, path: &Path, left: Left, chance: &mut StdRng) {
        match &self.0[at] {
            Node::File { content, synced } => {
                let unsynced = content.len() - synced.len().min(content.len());
                let kept = match left {
                    Left::Nothing | Left::Names => 0,
                    Left::Content => unsynced,
                    Left::Some(_) => chance.random_range(0..=unsynced),
                };
                fs::write(path, &content[..synced.len() + kept]).unwrap();
            }
            Node::Folder { names, synced, changes } => {
                fs::create_dir_all(path).unwrap();
                let mut found = synced.clone();
                match left {
                    Left::Nothing | Left::Content => {}
                    Left::Names => found.clone_from(names),
                    Left::Some(_) => {
                        changes.iter().filter(|_| chance.random()).for_each(|change| change.apply(&mut found));
                    }
                }
                found.iter().for_each(|(name, at)| self.restore(*at, &path.join(name), left, chance));
            }
        }
    }
}

impl Node {
    fn folder() -> Self {
        Self::Folder { names: Names::new(), synced: Names::new(), changes: Vec::new() }
    }
}

impl Change {
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Add(name, node) => drop(names.insert(name.clone(), *node)),
            Self::Remove(name) => drop(names.remove(name)),
            Self::Rename(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
        }
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

/// A power cut after some operations of a run.
struct Cut<'a> {
    operations: &'a [Operation],
    /// The newest step that was announced before.
    announced: usize,
    left: Left,
}

impl<'a> Cut<'a> {
    /// After every operation, in every way.
    fn all(operations: &'a [Operation]) -> Vec<Self> {
        let (mut announced, mut cuts) = (0, Vec::new());
        for (nth, operation) in operations.iter().enumerate() {
            let log = String::from_utf8_lossy(&operation.data);
            if operation.name == "log" && log.contains("Finished saving") {
                announced = log.trim_end().rsplit("step-").next().unwrap().parse().unwrap();
            }
            for left in [Left::Nothing, Left::Names, Left::Content, Left::Some(nth as u64), Left::Some(!nth as u64)] {
                cuts.push(Self { operations: &operations[..=nth], announced, left });
            }
        }
        cuts
    }

    fn restore(&self, folder: &Path) {
        let mut disk = Disk::new();
        self.operations.iter().for_each(|operation| disk.apply(operation));
        let seed = if let Left::Some(seed) = self.left { seed } else { 0 };
        disk.restore(0, folder, self.left, &mut StdRng::seed_from_u64(seed));
    }

    /// What a run that starts then would go on from.
    fn found(&self) -> usize {
        let folder = tempfile::tempdir().unwrap();
        self.restore(folder.path());
        let assets = Assets {
            hf_assets_path: PathBuf::new(),
            model_name: "llama3".into(),
            args: Default::default(),
            config_toml: String::new(),
            tokenizer_files: Vec::new(),
            bos_id: None,
            eos_id: None,
        };
        let keys = config::Checkpoint { enable: true, ..Default::default() };
        let mut manager = CheckpointManager::open(keys, &folder.path().join(DUMP_FOLDER), assets).unwrap();
        manager.find().unwrap().map_or(0, |resume| resume.step())
    }

    fn goes_on(&self, mode: &str, outcome: &Outcome) {
        let job = Job::new(&[mode]);
        self.restore(job.folder());
        let ended = job.run();
        ended.assert_succeeded();
        let first = ended.first_step().unwrap_or(usize::MAX);
        assert!(first > self.announced, "step {} was announced\n{}", self.announced, ended.log);
        job.assert_came_to(outcome);
    }
}

#[test]
fn what_was_announced_survives_a_power_cut_after_any_operation() {
    let modes = ["--checkpoint.async_mode=disabled", "--checkpoint.async_mode=async"];
    let (mut n, mut n_runs) = (0, 0);
    for mode in modes {
        let outcome = Job::new(&[mode]).outcome();
        let operations = operations(&Job::new(&[mode]), Path::new(""));
        let cuts = Cut::all(&operations);
        cuts.par_iter().step_by(amount(9, 1)).for_each(|cut| {
            let found = cut.found();
            assert!(found >= cut.announced, "step {} was announced, {found} found: {:?}", cut.announced, cut.left);
        });
        cuts.par_iter().step_by(amount(150, 3)).for_each(|cut| cut.goes_on(mode, &outcome));
        n += cuts.len().div_ceil(amount(9, 1));
        n_runs += cuts.len().div_ceil(amount(150, 3));
    }
    held("a power cut after an operation: what was announced is found", format_args!("{n} of {n}"));
    held(
        "a power cut after an operation: the same command comes to the same end",
        format_args!("{n_runs} of {n_runs}"),
    );
}
